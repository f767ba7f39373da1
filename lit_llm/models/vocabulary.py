"""Resize the vocabulary of a causal language model to its tokenizer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rows(model: "PreTrainedModel") -> int:
    """Number of embedding rows; often larger than the vocabulary, because sizes are rounded up."""
    layer: Any = model.get_input_embeddings()
    return int(layer.num_embeddings)


def grow(model: "PreTrainedModel", count: int) -> int:
    """Extend embedding and output head to `count` tokens; a model that is large enough is unchanged.

    A new row is the mean of the existing ones, so that a new token is neither too likely nor too unlikely at first; the
    same holds for the head's bias. Tied matrices stay tied, and the config is updated.

    Args:
        model: The model, not yet sharded; its dtype and device are kept.
        count: Number of tokens of the tokenizer.

    Returns:
        Number of new rows, also set as `model.new_rows`; `model.all_rows` is the new size.
    """
    before = rows(model)
    if count <= before:
        return 0
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    means = [_mean(embedding.weight)] + ([] if head is None or tied else [_mean(head.weight)])
    bias = getattr(head, "bias", None)
    bias_mean = None if bias is None else _mean(bias)
    flags = embedding.weight.requires_grad
    model.resize_token_embeddings(count, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        for layer, mean in zip([embedding, head], means, strict=False):
            layer.weight[before:] = mean
        if bias_mean is not None:
            _whole_bias(head, count, bias_mean, before)
    for weight in (*embedding.parameters(), *(head.parameters() if head is not None else ())):
        weight.requires_grad_(flags)
    holder: Any = model
    holder.new_rows, holder.all_rows = count - before, count       # adapters need a base of the same size
    return count - before


def _mean(weight: Tensor) -> Tensor:
    """Mean of the rows, summed in float32."""
    total = torch.zeros(weight.shape[1:], dtype=torch.float32, device=weight.device)
    for part in weight.detach().split(16384):
        total += part.float().sum(0)
    return (total / len(weight)).to(weight.dtype)


def _whole_bias(head: Any, count: int, mean: Tensor, before: int) -> None:
    """Resize a head's bias where transformers did not resize it with the matrix."""
    if len(head.bias) < count:
        head.bias = nn.Parameter(torch.cat([head.bias.detach(), mean.expand(count - len(head.bias))]))
    head.bias[before:] = mean
