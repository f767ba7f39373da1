"""Give a causal LM as many embedding rows as its tokenizer has tokens."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rows(model: "PreTrainedModel") -> int:
    """Rows of the embedding; often more than there are tokens, since sizes are rounded up."""
    layer: Any = model.get_input_embeddings()
    return int(layer.num_embeddings)


def grow(model: "PreTrainedModel", count: int) -> int:
    """Give embedding and output head a row for each of `count` tokens; a model that has them stays as it is.

    A new row is the mean of the old ones, so that a new token is none too likely and none too strange to begin with;
    that holds for the head's bias, too. Tied matrices stay tied, and the config says the new size.

    Args:
        model: Whole, not yet cut over processes; its dtype and device stay.
        count: Tokens of the tokenizer.

    Returns:
        How many rows are new; `model.new_rows` says it, too, and `model.all_rows` the new size.
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
    holder.new_rows, holder.all_rows = count - before, count       # adapters are of no use on a base without them
    return count - before


def _mean(weight: Tensor) -> Tensor:
    """Of the rows, summed in float32."""
    total = torch.zeros(weight.shape[1:], dtype=torch.float32, device=weight.device)
    for part in weight.detach().split(16384):
        total += part.float().sum(0)
    return (total / len(weight)).to(weight.dtype)


def _whole_bias(head: Any, count: int, mean: Tensor, before: int) -> None:
    """Transformers resizes a head's bias with its matrix; where it did not, it is done here."""
    if len(head.bias) < count:
        head.bias = nn.Parameter(torch.cat([head.bias.detach(), mean.expand(count - len(head.bias))]))
    head.bias[before:] = mean
