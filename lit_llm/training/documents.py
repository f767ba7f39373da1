"""A packed batch in, what a model makes of its documents one by one out: where they cannot share a row.

Architectures that mix tokens by more than plain attention (caps, sinks, convolutions, states) would mix documents too.
And packed attention knows no tokens that are not in the row, such as those that prompt and prefix tuning put in front.
Documents without a supervised token are left out. Knows nothing of steps or ranks.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llm import model as anatomy
from lit_llm.tokenizer import IGNORE_INDEX
from lit_llm.training.loss import Nll, nll_sum

if TYPE_CHECKING:
    from lit_llm.data.loader import Batch


def hidden_by_document(model: Any, given: dict[str, Tensor], batch: "Batch") -> tuple[Tensor, Tensor]:
    """(T, D) hidden states and (T,) labels of documents with supervised tokens, or of the first if none has any.

    Args:
        model: Any causal LM.
        given: `input_ids` or `inputs_embeds` of the whole micro-batch, (1, T) or (1, T, D).
        batch: The micro-batch.
    """
    labels = batch["labels"].view(-1)
    places = [slice(*ends) for ends in pairwise(batch["cu_seqlens"].tolist())]
    places = [place for place in places if (labels[place] != IGNORE_INDEX).any()] or places[:1]
    hidden = [anatomy.backbone(model)(**{name: states[:, place] for name, states in given.items()}, use_cache=False)
              .last_hidden_state[0] for place in places]
    return torch.cat(hidden), torch.cat([labels[place] for place in places])


def nll_by_document(model: Any, batch: "Batch") -> Nll:
    """Sums over one micro-batch.

    Args:
        model: A PEFT model of prompt, prefix or p-tuning.
        batch: The micro-batch.
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
