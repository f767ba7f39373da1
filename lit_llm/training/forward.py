"""A packed batch in, the sum of negative log-likelihoods of its supervised tokens out: one pass of a model over it.

Documents share a row where attention keeps them apart. Architectures that mix tokens by more than that (caps, sinks,
convolutions, states) would mix documents too, so their documents go through the model one by one, and so do those of
prompt and prefix tuning, which put tokens in front that are not in the row. Knows nothing of steps or ranks.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llm import adapter
from lit_llm import model as anatomy
from lit_llm.tokenizer import IGNORE_INDEX
from lit_llm.training.loss import CrossEntropy, Nll, nll_sum

if TYPE_CHECKING:
    from lit_llm.data.loader import Batch


@dataclass(frozen=True, slots=True)
class Choices:
    """How a run sends a batch through its model.

    Args:
        alone: Each document has a forward pass of its own.
        noise: NEFTune's alpha; null where there is none, and in evaluation.
        cross_entropy: Whose kernels train (see `loss.nll_sum`).
    """

    alone: bool = False
    noise: float | None = None
    cross_entropy: CrossEntropy = "fused"


def nll(model: Any, batch: "Batch", choices: Choices) -> Nll:
    """Sums over the supervised tokens of one micro-batch: with a gradient where gradients are enabled.

    Args:
        model: A causal LM of transformers, adapters or not; all its weights can be reached from this process.
        batch: (B, T) `input_ids`, `labels` and `position_ids` of B rows, which are read as one row of B * T tokens, and
            `cu_seqlens`, the borders of its documents.
        choices: Of the run.
    """
    if adapter.learns_prompt(model):
        return _nll_by_document(model, batch)
    if choices.alone:
        hidden, labels = _hidden_by_document(model, _given(model, batch, choices.noise), batch)
    else:
        labels = batch["labels"].view(-1)
        hidden = anatomy.backbone(model)(
            **_given(model, batch, choices.noise), position_ids=batch["position_ids"].view(1, -1), attention_mask=None,
            use_cache=False, cu_seqlens=batch["cu_seqlens"], max_seqlen=batch["max_seqlen"]).last_hidden_state[0]
    factor, cap = anatomy.logit_adjustment(model)
    return nll_sum(hidden, labels, anatomy.head(model), factor=factor, cap=cap, count=batch["num_supervised"],
                   by=choices.cross_entropy)


# ---- what the model is given -----------------------------------------------------------------------------------------

def _given(model: Any, batch: "Batch", noise: float | None) -> dict[str, Tensor]:
    """(1, T) token ids; with NEFTune their (1, T, D) embeddings with noise on them."""
    ids = batch["input_ids"].view(1, -1)
    if not noise:
        return {"input_ids": ids}
    embedded = anatomy.causal_lm(model).get_input_embeddings()(ids)
    return {"inputs_embeds": noisy(embedded, batch["cu_seqlens"], noise)}


def noisy(embedded: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Embeddings with uniform noise of alpha / sqrt(L * D) at most (NEFTune), L tokens being a token's own document.

    The rows of the paper (arXiv:2310.05914) hold one document each. In a packed row a document must not have less noise
    because of its neighbours, so each has its own length. Drawn from torch's generator of the device, whose state a
    checkpoint keeps.

    Args:
        embedded: (1, T, D).
        cu_seqlens: (documents + 1,) int, from 0 to T.
        alpha: The noise of a whole document has a norm of about alpha / sqrt(3), whatever its length.
    """
    lengths = cu_seqlens.diff()
    of_token = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])   # sized, or CUDA would wait
    bound = alpha / (of_token * embedded.shape[-1]).sqrt()
    noise = torch.rand(embedded.shape, device=embedded.device) * 2 - 1
    return embedded + (noise * bound[None, :, None]).to(embedded.dtype)


# ---- document by document --------------------------------------------------------------------------------------------

def _hidden_by_document(model: Any, given: dict[str, Tensor], batch: "Batch") -> tuple[Tensor, Tensor]:
    """(T, D) hidden states and (T,) labels of documents with supervised tokens, or of the first if none has any."""
    labels = batch["labels"].view(-1)
    places = [slice(*ends) for ends in pairwise(batch["cu_seqlens"].tolist())]
    places = [place for place in places if (labels[place] != IGNORE_INDEX).any()] or places[:1]
    hidden = [anatomy.backbone(model)(**{name: states[:, place] for name, states in given.items()}, use_cache=False)
              .last_hidden_state[0] for place in places]
    return torch.cat(hidden), torch.cat([labels[place] for place in places])


def _nll_by_document(model: Any, batch: "Batch") -> Nll:
    """Sums by the logits of a PEFT model of prompt, prefix or p-tuning."""
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
