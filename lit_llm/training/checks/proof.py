"""Determine by computation which parts of this project's forward pass give the exact loss of an architecture.

A small model of the same config with random weights processes a few short documents. The reference is plain
transformers on the single documents: the loss and the gradient of every weight. Ways are tried from the fastest to the
plainest, and the first with equal results is used; the plainest is transformers' own forward pass of each document, so
no architecture is refused and none is computed differently.

    1  packed, our attention and our loss from hidden states     4  one by one, the model's own logits
    2  packed, our attention and the model's own logits
    3  one by one, our loss from hidden states

`proof_cache.py` caches the results by the small config, in memory and on disk.
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

from lit_llm.data.rows.loader import Batch, batch_of
from lit_llm.errors import InputError
from lit_llm.kernels import attention, rmsnorm, switch
from lit_llm.models import anatomy, miniature
from lit_llm.models import load as models
from lit_llm.text.tokenizer import IGNORE_INDEX
from lit_llm.training import forward
from lit_llm.training.checks import proof_cache
from lit_llm.training.forward import Choices, Way

log = logging.getLogger(__name__)
LENGTHS = (21, 12, 7, 2)                            # tokens of documents, mostly more than miniature.WINDOW
PADDING = 6
SMALL, LARGE = 3_000_000, 40_000_000                # parameters: used unchanged; too many to try
TOLERANCE = {torch.float64: (1e-8, 1e-7), torch.float32: (2e-5, 2e-3)}      # relative: of the loss, of gradients
WAYS = ((True, True, False), (True, True, True), (True, False, False), (True, False, True),
        (False, False, False), (False, False, True))    # (packed, our norms, its own logits)
PLAIN = Way(packed=False, own_logits=True, fast_norms=False)


def way_of(base: str | None, init: dict[str, Any] | None, *, seq_len: int | None = None, **defaults: Any) -> Way:
    """Determine how a model's loss is computed.

    Args:
        base: As in `load.skeleton`; only the config is read.
        init: As in `load.skeleton`.
        seq_len: Tokens per packed sequence of the run; null if unknown.
        defaults: As in `load.skeleton`.

    Raises:
        InputError: No such base or architecture, it is not causal, or it needs more than token ids.
    """
    skeleton = models.skeleton(base, init, **defaults)
    small = sum(weight.numel() for weight in skeleton.parameters()) <= SMALL
    obstacle = ""
    for config in miniature.candidates(skeleton.config, whole=small, seq_len=seq_len):
        facts = json.dumps(config.to_dict(), sort_keys=True, default=str) + (" plain" if switch.is_plain() else "")
        try:
            return proof_cache.cached(facts, partial(prove, skeleton, config))
        except _NotBuiltError as error:
            obstacle = str(error)
    because = f"no small model of this config could be built to compare with ({obstacle})"
    return replace(PLAIN, why_unpacked=because, why_own_logits=because)


class Wide(TorchFunctionMode):
    """Keep float64 where models convert to float32 for norms, rotary embeddings and routing.

    Their rounding would otherwise be part of the comparison: layers amplify it, and discrete choices (experts, selected
    tokens) change where two values are nearly equal.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation with float64 where float32 is requested by name."""
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        more = kwargs or {}
        if any(value is torch.float32 for value in (*args, *more.values())):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            more = {name: torch.float64 if value is torch.float32 else value for name, value in more.items()}
        return func(*args, **more)


class _NotBuiltError(Exception):
    """No model can be built from this config, or it is too large to try."""


# ---- the proof -------------------------------------------------------------------------------------------------------

def prove(like: object, config: object, *, seed: int = 0) -> Way:
    """The fastest way with the same results as transformers, for a model of this config.

    Args:
        like: A model of the class, without weights.
        config: A small config, of which a model is built.
        seed: Seed of weights and documents.

    Raises:
        InputError: The model is not causal, or needs more than token ids.
    """
    elsewhere = torch.get_default_device().type != "cpu"        # its context costs more than these small operations
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
                except Exception as error:          # parts that support float32 only
                    failure = _line(error)
                    continue
                logits = _first_logits(plain, batch)
                _check_causal(plain, batch, logits)
                return _best(plain, packed.to(dtype) if packed is not None else None, obstacle, batch, standard, logits)
        raise _NotBuiltError(f"transformers cannot run it with token ids only: {failure}")


def _best(plain: Any, packed: Any, why_unpacked: str, batch: Batch, standard: "_Sums", logits: Tensor) -> Way:
    """Try ways from the fastest on; fast norms are tried only with packed attention.

    Args:
        plain: Model with transformers' attention.
        packed: The same model with packed attention, or None.
        why_unpacked: Why there is none.
        batch: The documents.
        standard: Results of `plain`.
        logits: Logits of the first document by `plain`, in evaluation mode.
    """
    keep, adjusted = _keeps(plain, batch, logits), _adjustment(plain, batch, logits)
    why_own_logits = "" if adjusted else "it transforms hidden states or logits around its head in its own way"
    for is_packed, fast_norms, own_logits in WAYS:
        model = packed if is_packed else plain
        if model is None or not (own_logits or adjusted):
            continue
        factor, cap = adjusted if adjusted and not own_logits else (1.0, None)
        way = Way(is_packed, own_logits, factor, cap, keep, fast_norms, "" if is_packed else why_unpacked,
                  why_own_logits if own_logits else "")
        reason = _differs(model, batch, way, standard)
        if not reason:
            return way
        if own_logits:                              # then not because of its head
            why_unpacked = reason if is_packed else why_unpacked
        else:
            why_own_logits = reason
    return replace(PLAIN, why_unpacked=why_unpacked or why_own_logits, why_own_logits=why_own_logits or why_unpacked)


def _packing(plain: Any) -> tuple[Any, str]:
    """The same model with packed attention, or None with the reason."""
    try:
        models.check_packable(plain)
        packed = _built(plain, plain.config, attention.NAME)
        packed.load_state_dict(plain.state_dict())
        return packed, ""
    except Exception as error:                      # its own attention implementation
        return None, error.what if isinstance(error, InputError) else _line(error)


class _Sums:
    """Losses in training and evaluation, and gradients in training."""

    def __init__(self, model: nn.Module, sums: Any) -> None:
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
    """Results of plain transformers, document by document."""
    def sums() -> Tensor:
        ids, labels = batch["input_ids"].view(-1), batch["labels"].view(-1)
        totals = []
        for start, stop in pairwise(batch["cu_seqlens"].tolist()):
            if (labels[start:stop] != IGNORE_INDEX).any():
                logits = plain(input_ids=ids[None, start:stop]).logits[0, :-1]
                totals.append(F.cross_entropy(logits, labels[start + 1:stop], ignore_index=IGNORE_INDEX,
                                              reduction="sum"))
        return torch.stack(totals).sum()

    sums_of_plain = _Sums(plain, sums)
    if not math.isfinite(sums_of_plain.training):
        raise FloatingPointError("its loss is not finite")
    return sums_of_plain


def _differs(model: nn.Module, batch: Batch, way: Way, standard: _Sums) -> str:
    """How the results of a way differ from the reference; empty if they are equal."""
    touched = rmsnorm.use_fast_norms(model) if way.fast_norms else 0
    try:
        results = _Sums(model, lambda: forward.nll(model, batch, Choices(way)).total)
    except Exception as error:                      # a forward pass with other arguments or shapes
        return error.what if isinstance(error, InputError) else _line(error)
    finally:
        if touched:
            rmsnorm.use_plain_norms(model)
    dtype = next(model.parameters()).dtype
    loss, gradient = TOLERANCE[dtype]
    for name in ("training", "evaluation"):
        value, reference = getattr(results, name), getattr(standard, name)
        if not abs(value - reference) <= loss * abs(reference):
            return f"its loss would be {value:.6g} instead of {reference:.6g}"
    scale = float(torch.stack([right.norm() for right in standard.gradients.values()]).norm())
    for name, reference in standard.gradients.items():
        limit = gradient * (float(reference.norm()) + 1e-3 * scale)
        if not float((results.gradients[name] - reference).norm()) <= limit:
            return f"the gradient of {name} would differ"
    return ""


# ---- the output head -------------------------------------------------------------------------------------------------

def _first_logits(plain: Any, batch: Batch) -> Tensor:
    """Logits of the first document, (tokens, V), in evaluation mode."""
    plain.eval()
    with torch.no_grad():
        return plain(input_ids=batch["input_ids"][:, :LENGTHS[0]]).logits[0]


def _adjustment(plain: Any, batch: Batch, logits: Tensor) -> tuple[float, float | None] | None:
    """(factor, cap) from hidden states times head to the model's logits; null if there are none.

    Only config values about logits are tried, because another factor might depend on the model's width.
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
        candidate = multiplied * factor
        candidate = torch.tanh(candidate / cap) * cap if cap else candidate
        if float((candidate - logits).abs().max()) <= tolerance:
            return factor, cap
    return None


def _keeps(plain: Any, batch: Batch, logits: Tensor) -> bool:
    """Whether the model can compute the logits of selected positions only."""
    ids, places = batch["input_ids"][:, :LENGTHS[0]], torch.tensor([1, 4, 5])
    if not forward.accepts(plain, "logits_to_keep"):
        return False
    try:
        with torch.no_grad():
            some = plain(input_ids=ids, logits_to_keep=places).logits[0]
    except Exception:                               # it accepts a number of positions, but not indices
        return False
    return some.shape == logits[places].shape and torch.allclose(some, logits[places], rtol=1e-5, atol=1e-7)


def _check_causal(plain: Any, batch: Batch, logits: Tensor) -> None:
    """Refuse encoders: they also have a language-modeling head, but see the tokens that they should predict."""
    ids = batch["input_ids"][:, :LENGTHS[0]].clone()
    before = logits[:-1]
    with torch.no_grad():
        ids[0, -1] = ids[0, -2]
        after = plain(input_ids=ids).logits[0, :-1]
    if float((after - before).abs().max()) > 1e-5 * float(before.abs().max()):
        raise InputError(f"{type(plain).__name__} is an encoder: each token attends to those that follow it",
                         where="model", fix="use a causal model, such as Llama or Qwen, or a BERT-like model with "
                         "is_decoder: true")


# ---- a model and documents -------------------------------------------------------------------------------------------

def _built(like: Any, config: Any, kind: str | None) -> Any:
    """A model with random weights.

    Raises:
        _NotBuiltError: It cannot be built, or it has too many weights.
    """
    try:
        with torch.device("meta"):
            size = sum(weight.numel() for weight in models.like(like, config, kind).parameters())
        if size <= LARGE:
            model = models.like(like, config, kind)
            with suppress(Exception):               # grouped expert products do not support float64
                model.set_experts_implementation("eager")
            return model
    except Exception as error:                      # architectures raise errors of many types
        raise _NotBuiltError(_line(error)) from None
    raise _NotBuiltError(f"the smallest one has {size:,} parameters")


def perturb(model: nn.Module) -> None:
    """Add noise to every weight, so that norms are not 1, biases not 0, and no transform is the identity."""
    for weight in model.parameters():
        if weight.is_floating_point():
            with torch.no_grad():
                scale = 0.1 if weight.dim() < 2 else 0.5 / max(1, weight.shape[-1]) ** 0.5
                weight.nan_to_num_(0.0).add_(torch.randn(weight.shape, dtype=weight.dtype), alpha=scale)


def documents(model: Any, seed: int, lengths: Sequence[int] = LENGTHS) -> Batch:
    """A packed sequence of random documents of these lengths, with some unsupervised tokens, and padding."""
    draw = np.random.default_rng(seed)
    rows = min(len(model.get_input_embeddings().weight), model.config.get_text_config(decoder=True).vocab_size)
    special = {value for key, value in model.config.to_dict().items() if isinstance(value, int)
               and key.endswith(("_token_id", "_token_index")) and not key.startswith(("bos", "eos", "pad"))}
    words = np.array([word for word in range(rows) if word not in special])
    segments = []
    for number, length in enumerate(lengths):
        ids = draw.choice(words, length)
        segments.append((ids, np.arange(length) >= number % 3))
    return batch_of([segments], seq_len=sum(lengths) + PADDING, pad_id=int(words[0]),
               token_bytes=np.ones((2, rows), np.int64))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
