"""Find by computation which parts of our own forward pass give the loss of a config's architecture exactly.

A small model of the same config with random weights is given a few short documents. What plain transformers says of
them one by one, the loss and the gradient of every weight, is the standard. Ways of ours are tried from the fastest to
the plainest, and the first that gives the same is taken; the plainest is transformers' own forward pass of each
document, so no architecture is refused and none is computed differently.

    1  packed, our attention and our loss from hidden states     4  one by one, the model's own logits
    2  packed, our attention and the model's own logits
    3  one by one, our loss from hidden states

`proof_cache.py` keeps the answers by the small config, in the process and on disk.
"""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_llm.data.rows.loader import Batch, lay
from lit_llm.errors import InputError
from lit_llm.kernels import attention, rmsnorm, switch
from lit_llm.models import anatomy, miniature
from lit_llm.models import load as models
from lit_llm.text.tokenizer import IGNORE_INDEX
from lit_llm.training import forward
from lit_llm.training.checks import proof_cache
from lit_llm.training.forward import Choices, Way

log = logging.getLogger(__name__)
LENGTHS = (21, 12, 7, 2)                            # tokens of documents, most of them above miniature.WINDOW
PADDING = 6
SMALL, LARGE = 3_000_000, 40_000_000                # parameters: small enough as it is; too many to be tried
TOLERANCE = {torch.float64: (1e-8, 1e-7), torch.float32: (2e-5, 2e-3)}      # relative: of the loss, of gradients
WAYS = ((True, True, False), (True, True, True), (True, False, False), (True, False, True),
        (False, False, False), (False, False, True))    # (packed, our norms, its own logits)
PLAIN = Way(packed=False, own_logits=True, fast_norms=False)


def way_of(base: str | None, init: dict[str, Any] | None, *, seq_len: int | None = None, **defaults: Any) -> Way:
    """How a model's loss may be computed.

    Args:
        base: As in `model.skeleton`: the config alone is read.
        init: There too.
        seq_len: Tokens of a row of the run; null where it is not known.
        defaults: As in `model.skeleton`.

    Raises:
        InputError: No such base or architecture, it sees the tokens that follow, or it cannot be run with tokens alone.
    """
    skeleton = models.skeleton(base, init, **defaults)
    small = sum(weight.numel() for weight in skeleton.parameters()) <= SMALL
    obstacle = ""
    for config in miniature.candidates(skeleton.config, whole=small, seq_len=seq_len):
        facts = json.dumps(config.to_dict(), sort_keys=True, default=str) + (" plain" if switch.is_plain() else "")
        try:
            return proof_cache.answered(facts, partial(prove, skeleton, config))
        except _NotBuiltError as error:
            obstacle = str(error)
    because = f"no small model of this config could be built to compare with ({obstacle})"
    return replace(PLAIN, why_alone=because, why_own_logits=because)


class Wide(TorchFunctionMode):
    """Within it float64 stays float64, though models are written to norm, to rotate and to route in float32.

    Their rounding would otherwise be part of the comparison: layers magnify it, and choices (experts, kept tokens) turn
    over where two values are nearly the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation with float64 in place of float32 where it is asked for by name."""
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        more = kwargs or {}
        if any(each is torch.float32 for each in args) or any(each is torch.float32 for each in more.values()):
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            more = {name: torch.float64 if each is torch.float32 else each for name, each in more.items()}
        return func(*args, **more)


class _NotBuiltError(Exception):
    """This config makes no model, or one too large to be tried."""


# ---- the proof -------------------------------------------------------------------------------------------------------

def prove(like: Any, config: Any, *, seed: int = 0) -> Way:
    """The best way that gives what transformers gives, for a model of this config.

    Args:
        like: A model of the class, without weights.
        config: Small; a model of it is built.
        seed: Of weights and documents.

    Raises:
        InputError: The model sees tokens that follow, or cannot be run with tokens alone.
    """
    elsewhere = torch.get_default_device().type != "cpu"        # its context costs as much as these small operations do
    with torch.random.fork_rng(devices=[]), torch.device("cpu") if elsewhere else nullcontext():
        torch.manual_seed(seed)
        plain = _built(like, config, None)
        perturb(plain)
        packed, obstacle = _packing(plain)
        batch = documents(plain, seed, LENGTHS if packed is not None else LENGTHS[::2])
        for dtype in TOLERANCE:
            with Wide() if dtype == torch.float64 else nullcontext():
                try:
                    plain = plain.to(dtype)
                    standard = _standard(plain, batch)
                except Exception as error:          # parts that are written for float32 alone
                    failure = _line(error)
                    continue
                logits = _first_logits(plain, batch)
                _check_causal(plain, batch, logits)
                return _best(plain, packed.to(dtype) if packed is not None else None, obstacle, batch, standard, logits)
        raise _NotBuiltError(f"transformers cannot run it with tokens alone: {failure}")


def _best(plain: Any, packed: Any, alone: str, batch: Batch, standard: "_Sums", logits: Tensor) -> Way:
    """Walks down from the fastest way; norms of ours are tried where attention is ours too.

    Args:
        plain: Has transformers' attention.
        packed: The same with ours, or nothing.
        alone: Why there is nothing.
        batch: Documents.
        standard: What plain says of them.
        logits: Of the first document by plain, in evaluation mode.
    """
    keep, adjusted = _keeps(plain, batch, logits), _adjustment(plain, batch, logits)
    own = "" if adjusted else "what it does to hidden states or logits around its output matrix is its own"
    for is_packed, fast_norms, own_logits in WAYS:
        model = packed if is_packed else plain
        if model is None or not (own_logits or adjusted):
            continue
        factor, cap = adjusted if adjusted and not own_logits else (1.0, None)
        way = Way(is_packed, own_logits, factor, cap, keep, fast_norms, "" if is_packed else alone,
                  own if own_logits else "")
        reason = _differs(model, batch, way, standard)
        if not reason:
            return way
        if own_logits:                              # not for its head, then
            alone = reason if is_packed else alone
        else:
            own = reason
    return replace(PLAIN, why_alone=alone or own, why_own_logits=own or alone)


def _packing(plain: Any) -> tuple[Any, str]:
    """The same model with packed attention, or none and why there is none."""
    try:
        models.check_packable(plain)
        packed = _built(plain, plain.config, attention.NAME)
        packed.load_state_dict(plain.state_dict())
        return packed, ""
    except Exception as error:                      # an attention of its own, which knows no other
        return None, error.what if isinstance(error, InputError) else _line(error)


class _Sums:
    """Loss in training and in evaluation, and gradients in training."""

    def __init__(self, model: Any, sums: Any) -> None:
        self.model = model
        model.zero_grad()
        model.train()
        total = sums()
        total.backward()
        self.training = float(total.detach())
        self.gradients = {name: weight.grad.clone() if weight.grad is not None else torch.zeros_like(weight)
                          for name, weight in model.named_parameters()}
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            self.evaluation = float(sums())


def _standard(plain: Any, batch: Batch) -> _Sums:
    """By transformers alone, document by document."""
    def sums() -> Tensor:
        ids, labels = batch["input_ids"].view(-1), batch["labels"].view(-1)
        totals = []
        for start, stop in pairwise(batch["cu_seqlens"].tolist()):
            if (labels[start:stop] != IGNORE_INDEX).any():
                logits = plain(input_ids=ids[None, start:stop]).logits[0, :-1]
                totals.append(F.cross_entropy(logits, labels[start + 1:stop], ignore_index=IGNORE_INDEX,
                                              reduction="sum"))
        return torch.stack(totals).sum()

    found = _Sums(plain, sums)
    if not math.isfinite(found.training):
        raise FloatingPointError("its loss is no number")
    return found


def _differs(model: Any, batch: Batch, way: Way, standard: _Sums) -> str:
    """How what a way computes differs from the standard; empty where it does not."""
    touched = rmsnorm.quicken(model) if way.fast_norms else 0
    try:
        ours = _Sums(model, lambda: forward.nll(model, batch, Choices(way)).total)
    except Exception as error:                      # a forward pass that wants other arguments, or meets other shapes
        return error.what if isinstance(error, InputError) else _line(error)
    finally:
        if touched:
            rmsnorm.slow(model)
    dtype = next(model.parameters()).dtype
    loss, gradient = TOLERANCE[dtype]
    for name in ("training", "evaluation"):
        given, right = getattr(ours, name), getattr(standard, name)
        if not abs(given - right) <= loss * abs(right):
            return f"its loss would be {given:.6g} instead of {right:.6g}"
    scale = float(torch.stack([each.norm() for each in standard.gradients.values()]).norm())
    for name, right in standard.gradients.items():
        if not float((ours.gradients[name] - right).norm()) <= gradient * (float(right.norm()) + 1e-3 * scale):
            return f"the gradient of {name} would be another one"
    return ""


# ---- what stands around the output matrix ----------------------------------------------------------------------------

def _first_logits(plain: Any, batch: Batch) -> Tensor:
    """Of the first document, (tokens, V), in evaluation mode."""
    plain.eval()
    with torch.no_grad():
        return plain(input_ids=batch["input_ids"][:, :LENGTHS[0]]).logits[0]


def _adjustment(plain: Any, batch: Batch, logits: Tensor) -> tuple[float, float | None] | None:
    """(factor, cap) that turn hidden states times the output matrix into the model's logits; null where none does.

    Only values of the config that speak of logits are tried, because another factor might depend on the model's width.
    """
    ids = batch["input_ids"][:, :LENGTHS[0]]
    try:
        with torch.no_grad():
            multiplied = anatomy.head(plain)(anatomy.backbone(plain)(input_ids=ids).last_hidden_state[0])
    except Exception:                               # no backbone, no head, other outputs
        return None
    if multiplied.shape != logits.shape:
        return None
    facts = plain.config.get_text_config(decoder=True).to_dict()
    numbers = {key: float(value) for key, value in facts.items() if isinstance(value, int | float) and value and
               not isinstance(value, bool) and ("logit" in key or "lm_head" in key)}
    caps = [None, *(value for key, value in numbers.items() if "cap" in key)]
    scales = [value for key, value in numbers.items() if "cap" not in key]
    factors = [1.0, *scales, *(1 / value for value in scales)]
    factors += [left * right for left, right in product(factors[1:], repeat=2)]
    tolerance = TOLERANCE[plain.dtype][0] * float(logits.abs().max())
    for factor, cap in product(factors, caps):
        ours = multiplied * factor
        ours = torch.tanh(ours / cap) * cap if cap else ours
        if float((ours - logits).abs().max()) <= tolerance:
            return factor, cap
    return None


def _keeps(plain: Any, batch: Batch, logits: Tensor) -> bool:
    """Whether the model can be asked for the logits of some positions alone."""
    ids, places = batch["input_ids"][:, :LENGTHS[0]], torch.tensor([1, 4, 5])
    if not forward.accepts(plain, "logits_to_keep"):
        return False
    try:
        with torch.no_grad():
            some = plain(input_ids=ids, logits_to_keep=places).logits[0]
    except Exception:                               # it knows a number of positions, but not which ones
        return False
    return some.shape == logits[places].shape and torch.allclose(some, logits[places], rtol=1e-5, atol=1e-7)


def _check_causal(plain: Any, batch: Batch, logits: Tensor) -> None:
    """Encoders get a head for words too, and would see the words that they shall predict."""
    ids = batch["input_ids"][:, :LENGTHS[0]].clone()
    before = logits[:-1]
    with torch.no_grad():
        ids[0, -1] = ids[0, -2]
        after = plain(input_ids=ids).logits[0, :-1]
    if float((after - before).abs().max()) > 1e-5 * float(before.abs().max()):
        raise InputError(f"{type(plain).__name__} is an encoder here: each token sees those that follow it",
                         where="model", fix="take a causal model, like Llama or Qwen; of BERT's kin those with "
                         "is_decoder: true are")


# ---- a model and documents -------------------------------------------------------------------------------------------

def _built(like: Any, config: Any, kind: str | None) -> Any:
    """A model with random weights.

    Raises:
        _NotBuiltError: There is none of this config, or it has too many weights.
    """
    try:
        with torch.device("meta"):
            size = sum(weight.numel() for weight in models.like(like, config, kind).parameters())
        if size <= LARGE:
            model = models.like(like, config, kind)
            with suppress(Exception):               # the product of all experts at once knows no float64
                model.set_experts_implementation("eager")
            return model
    except Exception as error:                      # each architecture refuses in its own way
        raise _NotBuiltError(_line(error)) from None
    raise _NotBuiltError(f"the smallest one has {size:,} parameters")


def perturb(model: nn.Module) -> None:
    """Noise on every weight, so that norms are not 1, biases not 0, and no transform is the identity."""
    for weight in model.parameters():
        if weight.is_floating_point():
            with torch.no_grad():
                scale = 0.1 if weight.dim() < 2 else 0.5 / max(1, weight.shape[-1]) ** 0.5
                weight.nan_to_num_(0.0).add_(torch.randn(weight.shape, dtype=weight.dtype), alpha=scale)


def documents(model: Any, seed: int, lengths: Sequence[int] = LENGTHS) -> Batch:
    """A row of random documents of these lengths, some tokens of which are unsupervised, with padding at its end."""
    draw = np.random.default_rng(seed)
    rows = min(len(model.get_input_embeddings().weight), model.config.get_text_config(decoder=True).vocab_size)
    special = {value for key, value in model.config.to_dict().items() if isinstance(value, int)
               and key.endswith(("_token_id", "_token_index")) and not key.startswith(("bos", "eos", "pad"))}
    words = np.array([word for word in range(rows) if word not in special])
    segments = []
    for number, length in enumerate(lengths):
        ids = draw.choice(words, length)
        segments.append((ids, np.arange(length) >= number % 3))
    return lay([segments], seq_len=sum(lengths) + PADDING, pad_id=int(words[0]),
               token_bytes=np.ones((2, rows), np.int64))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
