"""Convert padded batches, as collators of transformers return them, to packed batches.

A user's own DataLoader yields dictionaries of (B, T) tensors: `input_ids`, and optionally `labels` (-100 is not
supervised, unshifted), `attention_mask` (1 for tokens, 0 for padding on either side) and `position_ids`. Padding is
removed and the documents are packed, which gives the same loss without computing padding:

    input_ids       a b c _ _        input_ids     a b c p q
                    _ _ _ p q        position_ids  0 1 2 0 1
    attention_mask  1 1 1 0 0        cu_seqlens    0     3   5
                    0 0 0 1 1
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from lit_llm.data.rows.loader import Batch
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import IGNORE_INDEX

COLLATOR = ("give the DataLoader a collate_fn that pads, such as transformers.DataCollatorForSeq2Seq(tokenizer), "
            "or use lit_llm.TextDataModule")


def packed(batch: object) -> Batch:
    """A packed batch: this project's batches are returned unchanged, padded ones are converted."""
    return cast(Batch, batch) if isinstance(batch, Mapping) and "cu_seqlens" in batch else as_batch(batch)


def as_batch(batch: object) -> Batch:
    """One packed sequence of the documents of a padded batch, on the same device.

    Padding is left out, whatever its labels. The first token of each document is not supervised, whatever its label,
    because no token precedes it from which it could be predicted.

    Args:
        batch: A mapping with (B, T) `input_ids`. Without `labels` all tokens are supervised; without `attention_mask`
            there is no padding. If there are `position_ids`, they also separate the documents of a row: each begins
            at 0, as in transformers' `DataCollatorWithFlattening`. Other keys are ignored.

    Returns:
        The batch. `step_is_unknown` is set, because `num_supervised_in_step`, `num_tokens_in_step` and `last_in_step`
        describe this batch only; `num_bytes` is 0, because there is no tokenizer.

    Raises:
        InputError: The batch has another form; the error describes the right one.
    """
    ids = _tensor(batch, "input_ids")
    real = _tensor(batch, "attention_mask", like=ids, default=torch.ones_like(ids)) != 0
    labels = _tensor(batch, "labels", like=ids, default=ids)
    counted = real.cumsum(1)
    positions = _tensor(batch, "position_ids", like=ids, default=counted - 1)
    starts = real & ((counted == 1) | (positions == 0))
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        raise InputError("there is padding between tokens of a row", where="batch.attention_mask",
                         fix="pad on the left or on the right; " + COLLATOR)
    if not bool(real.any()):                        # each rank needs a forward pass: two tokens without loss
        return as_batch({"input_ids": ids.new_zeros((1, 2)), "labels": ids.new_full((1, 2), IGNORE_INDEX)})
    flat_ids, flat_starts = ids[real].long(), starts[real]
    flat_labels = labels[real].long().masked_fill(flat_starts, IGNORE_INDEX)
    borders = torch.cat([flat_starts.nonzero()[:, 0], flat_starts.new_tensor([len(flat_ids)], dtype=torch.int64)])
    supervised, tokens = int((flat_labels != IGNORE_INDEX).sum()), len(flat_ids)
    return Batch(
        input_ids=flat_ids[None], labels=flat_labels[None], position_ids=positions[real].long()[None],
        cu_seqlens=borders.int(), max_seqlen=int(borders.diff().max()), num_supervised=supervised,
        num_supervised_in_step=supervised, last_in_step=True, num_bytes=0, num_tokens=tokens, num_tokens_in_step=tokens,
        step_is_unknown=True)


def documents(batch: Batch) -> Iterator[Batch]:
    """Each document of a packed batch as a separate batch."""
    for start, stop in pairwise(batch["cu_seqlens"].tolist()):
        yield as_batch({name: batch[name].view(1, -1)[:, start:stop]
                        for name in ("input_ids", "labels", "position_ids")})


def _tensor(batch: object, name: str, *, like: Tensor | None = None, default: Tensor | None = None) -> Tensor:
    """A tensor of a padded batch, which must have the shape of `input_ids`."""
    if not isinstance(batch, Mapping) or (name not in batch and default is None):
        came = f"has the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else (
            f"is a {type(batch).__name__}")
        raise InputError(f"a batch must be a mapping with {name}; this one {came}"[:300], where="batch",
                         fix=COLLATOR)
    value = batch.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, Tensor) or value.ndim != 2 or (like is not None and value.shape != like.shape):
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = "(batch, tokens)" if like is None else f"{tuple(like.shape)}, that of input_ids"
        raise InputError(f"{came} instead of a tensor of shape {wanted}", where=f"batch.{name}", fix=COLLATOR)
    return value
