"""Compute the summed negative log-likelihood of a packed batch's supervised tokens in one forward pass.

Documents share a packed sequence if attention isolates them. Architectures that mix tokens in other ways (caps, sinks,
convolutions, states) cannot isolate them, so their documents are processed one by one, and so are those of prompt and
prefix tuning, which insert virtual tokens.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llm.errors import InputError
from lit_llm.models import anatomy
from lit_llm.models.adapters import adapter
from lit_llm.text.tokenizer import IGNORE_INDEX
from lit_llm.training.balance import balance_sum, merged
from lit_llm.training.loss import CrossEntropy, Nll, head_logits, nll_sum, of_logits, supervised

if TYPE_CHECKING:
    from lit_llm.data.rows.loader import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """How a model's loss is computed, by this project or by transformers; determined by `proof.py`.

    Args:
        packed: Documents share a packed sequence, isolated by this project's attention; otherwise each has its own
            forward pass.
        own_logits: The model's whole forward pass computes the logits; otherwise its backbone computes hidden states,
            and this project's loss multiplies them by the head, without all logits of a batch in memory.
        factor: Factor that the model applies to its logits.
        cap: Soft cap of the logits.
        keep: The model can compute the logits of selected positions only.
        fast_norms: RMS norms on a CPU may use `rmsnorm.py`.
        why_unpacked: Why documents do not share a packed sequence; empty if they do.
        why_own_logits: Why the loss is not computed from hidden states; empty if it is.
    """

    packed: bool = True
    own_logits: bool = False
    factor: float = 1.0
    cap: float | None = None
    keep: bool = False
    fast_norms: bool = True
    why_unpacked: str = ""
    why_own_logits: str = ""


def announce(way: Way) -> None:
    """Log the parts that are slower than they could be, and why."""
    if way.why_unpacked:
        log.warning("packed documents are processed one by one, which is slower: %s", way.why_unpacked)
    if way.why_own_logits:
        log.warning("the loss is computed from the model's own logits, which takes more memory: %s", way.why_own_logits)


@dataclass(frozen=True, slots=True)
class Choices:
    """Settings of a run for its forward pass.

    Args:
        way: How the loss is computed.
        noise: NEFTune's alpha; null without noise, and in evaluation.
        cross_entropy: Kernels of the training loss (see `loss.nll_sum`).
        balance: Whether to compute the routers' load balance as well.
    """

    way: Way = field(default_factory=Way)
    noise: float | None = None
    cross_entropy: CrossEntropy = "fused"
    balance: bool = False


class Tokens(NamedTuple):
    """The supervised tokens of a micro-batch, in its order.

    Args:
        nll: (N,) float64 nats.
        correct: (N,) bool: whether the most likely prediction was right.
    """

    nll: Tensor
    correct: Tensor


class Sums(NamedTuple):
    """Sums over one micro-batch.

    Args:
        total: As `Nll.total`: nats of all supervised tokens.
        correct: As `Nll.correct`.
        balance: () if the routers' load balance was requested: sum over documents of their tokens times their balance
            (`balance.py`). Not part of `total`.
        tokens: The terms of `total` and `correct` in evaluation; null in training.
    """

    total: Tensor
    correct: Tensor
    balance: Tensor | None = None
    tokens: Tokens | None = None

    @classmethod
    def of_tokens(cls, tokens: Nll, balance: Tensor | None = None) -> "Sums":
        """The sums of (N,) losses and (N,) hits, which have no gradient."""
        return cls(tokens.total.sum(), tokens.correct.sum(), balance, Tokens(*tokens))


def nll(model: nn.Module, batch: "Batch", choices: Choices) -> Sums:
    """Sums over the supervised tokens of one micro-batch, with a gradient if gradients are enabled.

    Args:
        model: A causal LM of transformers, with or without adapters, whose weights are available to this process.
        batch: (B, T) `input_ids`, `labels` and `position_ids` of B packed sequences, which are processed as one of
            B * T tokens, and `cu_seqlens`, the boundaries of its documents.
        choices: Settings of the run.
    """
    if adapter.has_virtual_tokens(model):
        return _nll_behind_prompts(model, batch)
    way, parts = choices.way, _parts(batch, choices.way)
    if way.own_logits:
        return _sum([_nll_of_logits(model, part, choices) for part in parts])
    outputs = [_called(anatomy.backbone(model), model, part, choices) for part in parts]
    hidden = torch.cat([output.last_hidden_state[0] for output in outputs])
    measured = not torch.is_grad_enabled()
    sums = nll_sum(hidden, torch.cat([part.labels for part in parts]), anatomy.head(model), factor=way.factor,
                   cap=way.cap, per_token=measured, count=batch["num_supervised"], by=choices.cross_entropy)
    balance = _balance(model, parts, outputs, choices)
    return Sums.of_tokens(sums, balance) if measured else Sums(*sums, balance)


def logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, way: Way) -> Tensor:
    """(B, T, V) logits of sequences of one document each; zeros at padding.

    Args:
        model: As in `nll`.
        input_ids: (B, T).
        attention_mask: (B, T) 1 for tokens, 0 for padding on one side; null without padding.
        way: If packed, all sequences are computed in one pass; otherwise one by one.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    lengths = real.sum(1)
    if way.packed and not adapter.has_virtual_tokens(model):
        positions = (real.cumsum(1) - 1)[real][None]
        bounds = F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
        made = model(input_ids=input_ids[real][None], position_ids=positions, attention_mask=None, use_cache=False,
                     cu_seqlens=bounds, max_seqlen=int(lengths.max())).logits[0]
    else:
        made = torch.cat([model(input_ids=ids[None, which]).logits[0, -int(which.sum()):]
                          for ids, which in zip(input_ids, real, strict=True) if which.any()])
    out = made.new_zeros((*input_ids.shape, made.shape[-1]))
    out[real] = made
    return out


def supervised_logits(model: nn.Module, batch: "Batch", choices: Choices) -> tuple[Tensor, Tensor]:
    """(N, V) logits of the supervised positions of a micro-batch, and (N,) their next tokens.

    For losses that `nll` cannot compute, such as a z-loss or distillation. All logits are in memory together, N * V
    numbers in the precision of the model; `nll` computes those of a slice of tokens at a time.

    Args:
        model: As in `nll`.
        batch: As in `nll`.
        choices: Settings of the run; the routers' load balance is not computed here.
    """
    way, choices = choices.way, replace(choices, balance=False)
    if adapter.has_virtual_tokens(model):
        raise InputError("logits are not available with prompt tuning", where="model.peft",
                         fix="set --model.lora or train every weight")
    made = []
    for part in _parts(batch, way):
        index, targets = supervised(part.labels, part.count)
        if way.own_logits:
            logits = _called(anatomy.causal_lm(model), model, part, choices).logits[0].index_select(0, index)
        else:
            hidden = _called(anatomy.backbone(model), model, part, choices).last_hidden_state[0]
            logits = head_logits(hidden.index_select(0, index), anatomy.head(model), factor=way.factor, cap=way.cap)
        made.append((logits, targets))
    return torch.cat([logits for logits, _ in made]), torch.cat([targets for _, targets in made])


def _parts(batch: "Batch", way: Way) -> "list[_Part]":
    """The calls of the model: one for a packed batch, or one per supervised document."""
    ids, labels = batch["input_ids"].view(1, -1), batch["labels"].view(-1)
    if way.packed:
        borders: dict[str, Any] = {"position_ids": batch["position_ids"].view(1, -1), "attention_mask": None,
                                   "cu_seqlens": batch["cu_seqlens"], "max_seqlen": batch["max_seqlen"]}
        return [_Part(ids, labels, batch["cu_seqlens"], borders, batch["num_supervised"])]
    places = [slice(*ends) for ends in pairwise(batch["cu_seqlens"].tolist())]
    places = [place for place in places if (labels[place] != IGNORE_INDEX).any()] or places[:1]
    return [_Part(ids[:, place], labels[place]) for place in places]


# ---- one call of the model -------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class _Part:
    """The input of one call of the model: a packed batch, or one document.

    Args:
        ids: (1, T).
        labels: (T,) unshifted.
        cu_seqlens: Document boundaries; null for one document.
        more: Keyword arguments of the call.
        count: Number of supervised tokens, if known on the host.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)
    count: int | None = None


def _called(callee: Any, model: nn.Module, part: _Part, choices: Choices, **more: Any) -> Any:
    """Call a model or its backbone on a part."""
    if accepts(callee, "use_cache"):
        more["use_cache"] = False
    if choices.balance:
        more["output_router_logits"] = True
    with _shaken(model, part, choices.noise):
        return callee(input_ids=part.ids, **part.more, **more)


def _nll_of_logits(model: nn.Module, part: _Part, choices: Choices) -> Sums:
    """Sums from the model's own logits, of supervised positions only if the model supports that."""
    index, targets = supervised(part.labels, part.count)
    positions = index if len(index) else torch.zeros_like(part.labels[:1])  # a graph on every rank
    more = {"logits_to_keep": positions} if choices.way.keep else {}
    output = _called(anatomy.causal_lm(model), model, part, choices, **more)
    logits = output.logits[0]
    balance = _balance(model, [part], [output], choices)
    if not choices.way.keep:
        logits = logits.index_select(0, positions)
    if not torch.is_grad_enabled():
        return Sums.of_tokens(of_logits(logits[:len(index)], targets, per_token=True), balance)
    if not len(index):
        return Sums(logits.float().sum() * 0.0, torch.zeros_like(index.sum()), balance)
    return Sums(*of_logits(logits, targets), balance)


def _balance(model: nn.Module, parts: list["_Part"], outputs: list[Any], choices: Choices) -> Tensor | None:
    return merged([balance_sum(model, output.router_logits, part.labels, part.cu_seqlens)
                   for part, output in zip(parts, outputs, strict=True)] if choices.balance else [])


def _sum(parts: list[Sums]) -> Sums:
    return Sums(torch.stack([part.total for part in parts]).sum(), torch.stack([part.correct for part in parts]).sum(),
                merged([part.balance for part in parts if part.balance is not None]),
                _joined([part.tokens for part in parts if part.tokens is not None]))


def _joined(parts: list[Tokens]) -> Tokens | None:
    return Tokens(*(torch.cat(columns) for columns in zip(*parts, strict=True))) if parts else None


def accepts(callee: nn.Module, name: str) -> bool:
    """Whether a forward pass accepts an argument, or passes unknown ones on."""
    arguments = signature(callee.forward).parameters
    return name in arguments or any(parameter.kind is Parameter.VAR_KEYWORD for parameter in arguments.values())


# ---- noise -----------------------------------------------------------------------------------------------------------

@contextmanager
def _shaken(model: nn.Module, part: _Part, alpha: float | None) -> Iterator[None]:
    """Add noise to the token embeddings (NEFTune); the model still gets ids, which some models read twice."""
    if not alpha:
        yield
        return
    borders = part.cu_seqlens
    if borders is None:
        borders = torch.tensor([0, part.ids.shape[1]], device=part.ids.device)
    table = anatomy.causal_lm(model).get_input_embeddings()
    hook = table.register_forward_hook(lambda _, __, embedded: noisy(embedded, borders, alpha))
    try:
        yield
    finally:
        hook.remove()


def noisy(embedded: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Embeddings with uniform noise of alpha / sqrt(L * D) at most (NEFTune), L tokens being a token's own document.

    In the paper (arXiv:2310.05914) each row has one document. In a packed sequence a document must not get less noise
    because of its neighbours, so each uses its own length. Noise is drawn from torch's generator of the device, whose
    state is stored in checkpoints.

    Args:
        embedded: (1, T, D).
        cu_seqlens: (documents + 1,) int, from 0 to T.
        alpha: The noise of a whole document has a norm of about alpha / sqrt(3), whatever its length.
    """
    lengths = cu_seqlens.diff()
    of_token = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])   # a size, or CUDA synchronises
    bound = alpha / (of_token * embedded.shape[-1]).sqrt()
    noise = torch.rand(embedded.shape, device=embedded.device) * 2 - 1
    return embedded + (noise * bound[None, :, None]).to(embedded.dtype)


# ---- prompt tuning ---------------------------------------------------------------------------------------------------

def _nll_behind_prompts(model: nn.Module, batch: "Batch") -> Sums:
    """Sums from the logits of a PEFT model with prompt, prefix or p-tuning."""
    ids, labels = batch["input_ids"].view(-1), batch["labels"].view(-1)
    identity = nn.Identity()
    total, correct = torch.zeros((), dtype=torch.float64, device=ids.device), torch.zeros_like(ids[0])
    measured: list[Tokens] = []
    for start, stop in pairwise(batch["cu_seqlens"].tolist()):
        if (labels[start:stop] == IGNORE_INDEX).all():
            continue
        logits = model(input_ids=ids[None, start:stop], use_cache=False).logits[0, start - stop:]
        if not torch.is_grad_enabled():
            measured.append(Tokens(*nll_sum(logits, labels[start:stop], identity, per_token=True)))
            continue
        part = nll_sum(logits, labels[start:stop], identity)
        total, correct = total + part.total, correct + part.correct
    if not torch.is_grad_enabled():
        none = Tokens(total.new_zeros(0), correct.new_zeros(0, dtype=torch.bool))
        return Sums.of_tokens(Nll(*(_joined([none, *measured]) or none)))
    if not total.requires_grad:                     # a graph on every rank
        total = total + sum(weight.sum() * 0.0 for weight in model.parameters() if weight.requires_grad)
    return Sums(total.float(), correct)
