"""A packed batch in, its loss out, for PEFT methods that put virtual tokens before each conversation.

Packed attention knows no tokens that are not in the row, so each document has a forward of its own, as PEFT does it.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_llm.tokenizer import IGNORE_INDEX
from lit_llm.training.loss import Nll, nll_sum

if TYPE_CHECKING:
    from lit_llm.data.loader import Batch


def nll_by_document(model: Any, batch: "Batch") -> Nll:
    """Sums over one micro-batch.

    Args:
        model: A PEFT model of prompt, prefix or p-tuning.
        batch: Documents without a supervised token are left out.
    """
    ids, labels = batch["input_ids"].view(-1), batch["labels"].view(-1)
    identity = nn.Identity()
    total, correct = torch.zeros((), dtype=torch.float64, device=ids.device), torch.zeros_like(ids[0])
    for start, stop in pairwise(batch["cu_seqlens"].tolist()):
        if (labels[start:stop] == IGNORE_INDEX).all():
            continue
        logits = model(input_ids=ids[None, start:stop], use_cache=False).logits[0, start - stop:]
        part = nll_sum(logits, labels[start:stop], identity)
        total, correct = total + part.total, correct + part.correct
    if torch.is_grad_enabled() and not total.requires_grad:     # a graph for every rank to walk
        total = total + sum(weight.sum() * 0.0 for weight in model.parameters() if weight.requires_grad)
    return Nll(total.float() if torch.is_grad_enabled() else total, correct)
