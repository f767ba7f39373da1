"""Trace the memory of a training step without weights or data, on fake tensors.

The traced step is the real one, module by module and kernel by kernel, on torch's fake tensors: they have shapes,
lifetimes and gradients, but no values. So query norms, attention dropout, tied heads, trained token rows and anything
else that an architecture contains is counted without special cases. The loss is that of `cross_entropy.py`, whatever
`model.cross_entropy` says: other kernels do not run without values.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.kernels import attention, blockwise, rmsnorm
from lit_llm.kernels.cross_entropy import sliced_as_on
from lit_llm.models import anatomy, recompute
from lit_llm.models.adapters import adapter
from lit_llm.system.private import torch as torch_private
from lit_llm.system.private import transformers as transformers_private
from lit_llm.training.loss import nll_sum


@dataclass(frozen=True, slots=True)
class Step:
    """Temporary bytes of a step, beside weights and optimizer.

    Args:
        layers: Activations that the backbone saves for its backward pass.
        head: Peak of the loss: a chunk of logits, gradients of hidden states and head.
        backward: Peak of the backward pass, including gradients.
        bare: The same without gradients of weights.
        layer: Part of `layers` that one layer uses while it is computed.
    """

    layers: float
    head: float
    backward: float
    bare: float
    layer: float

    def towards(self, other: "Step", share: float) -> "Step":
        """Interpolate to a step with more tokens: memory is linear in tokens."""
        def between(name: str) -> float:
            return getattr(self, name) + share * (getattr(other, name) - getattr(self, name))

        return Step(between("layers"), between("head"), between("backward"), between("bare"), between("layer"))

    def times(self, share: float) -> "Step":
        """The step for sequences that are shorter by a factor."""
        return Step(*(share * getattr(self, name) for name in self.__slots__))


class Borders(list[int]):
    """`cu_seqlens` with values: a fake tensor has none."""

    def tolist(self) -> list[int]:
        """As `Tensor.tolist`."""
        return list(self)


_DispatchMode: Any = torch_private.dispatch_mode()


class _Ledger(_DispatchMode):
    """Tracks the bytes of live storages."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.bare = self.gradients = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        out = _as_here(func, args, kwargs or {})
        for value in torch_private.leaves(out):
            if isinstance(value, Tensor):
                self.enter(value)
        return out

    def enter(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; views of known storages add nothing."""
        storage: Any = tensor.untyped_storage()
        key, size = torch_private.storage_key(storage), storage.nbytes()
        if key in self._held:
            return

        def leave(_: object) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.bare = max(self.bare, self.live - self.gradients)

    def restart(self) -> int:
        """Reset the peak; return the live bytes."""
        self.peak = self.bare = self.live
        return self.live


def step(build: Callable[[], Any], borders: Sequence[int], *, supervised: int, recompute_: recompute.Recompute = "none",
         half: bool = False, autocast: bool = False, quantized: bool = False, cuda: bool = False) -> Step:
    """Trace the memory of a step of one micro-batch.

    Args:
        build: Builds the model on the meta device with adapters and packed attention; its layers are modified.
        borders: Document boundaries in the flattened micro-batch, from 0 to its tokens.
        supervised: Its supervised tokens.
        recompute_: Gradient checkpointing mode.
        half: Whether frozen weights (without `autocast` all weights) have two bytes.
        autocast: Whether matrix products use bfloat16 regardless of the weights' dtype.
        quantized: Whether frozen linear layers are in 4 bits and expanded to two bytes for each product.
        cuda: Whether to trace as on CUDA: larger slices of logits, no attention matrices with dropout.
    """
    whole, ledger, fake, tokens = build(), _Ledger(), torch_private.fake_mode(), borders[-1]
    inner = anatomy.causal_lm(whole)
    inner.config.use_cache = False
    recompute.apply(inner, recompute_)
    whole.train()
    with fake:
        _embody(whole, frozen=torch.bfloat16 if half else torch.float32,
                trained=torch.bfloat16 if half and not autocast else torch.float32,
                halved=_linears(inner) if quantized else set())
    if cuda:
        _without_attention_dropout(whole)
    else:
        rmsnorm.use_fast_norms(whole)
    try:
        with fake, ledger, sliced_as_on("cuda" if cuda else "cpu"):
            for tensor in (*whole.parameters(), *whole.buffers()):
                ledger.enter(tensor)
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            labels, weights = ids[0].clone(), ledger.restart()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = _hidden(whole, ids, borders)
                layers, top = ledger.live - weights, ledger.peak
                factor, cap = anatomy.logit_adjustment(whole)
                loss = nll_sum(hidden, labels, anatomy.head(whole), factor=factor, cap=cap, count=supervised).total
            del hidden
            forward = max(top, ledger.peak) - weights
            _count_gradients(whole, ledger)
            ledger.restart()
            loss.backward()
    finally:
        blockwise.stacks.cache_clear()              # its cached tensors are fake as well
    depth = max(1, len(anatomy.decoder_layers(whole)))
    bare = ledger.bare - weights
    head = max(0, forward - layers)
    layer = layers / depth if recompute_ == "none" else max(layers / depth, bare - layers)
    return Step(layers, head, ledger.peak - weights, bare, layer)


def _as_here(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; torch's fake tensors support grouped products in bfloat16 only."""
    if func is torch_private.grouped_product() and args[0].dtype != torch.bfloat16:
        return func(*(value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
                      for value in args), **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _hidden(whole: object, ids: Tensor, borders: Sequence[int]) -> Tensor:
    """(T, D) hidden states of a packed sequence, or of one document after the other, as in training."""
    if adapter.has_virtual_tokens(whole):
        return _behind_prompts(whole, ids, borders)
    if transformers_private.attention_of(anatomy.causal_lm(whole).config) != attention.NAME:
        return torch.cat([anatomy.backbone(whole)(input_ids=ids[:, start:stop], use_cache=False).last_hidden_state[0]
                          for start, stop in pairwise(borders)])
    out = anatomy.backbone(whole)(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False,
                                cu_seqlens=Borders(borders), max_seqlen=borders[-1])
    return out.last_hidden_state[0]


def _behind_prompts(whole: Any, ids: Tensor, borders: Sequence[int]) -> Tensor:
    """(T, D) the same with trained virtual tokens before each document."""
    prompt = whole.get_prompt(batch_size=1)
    keys: Any = {"past_key_values": prompt} if whole.active_peft_config.peft_type.value == "PREFIX_TUNING" else {}
    parts = []
    for start, stop in pairwise(borders):
        embedded = whole.word_embeddings(ids[:, start:stop])
        if not keys:
            embedded = torch.cat([prompt, embedded], dim=1)
        place = torch.arange(embedded.shape[1])[None]
        parts.append(anatomy.backbone(whole)(inputs_embeds=embedded, position_ids=place, use_cache=False, **keys)
                     .last_hidden_state[0, start - stop:])
    return torch.cat(parts)


def _linears(inner: Any) -> set[int]:
    """Ids of the weights of linear layers except the head."""
    out = inner.get_output_embeddings()
    return {id(part.weight) for part in inner.modules() if isinstance(part, nn.Linear) and part is not out}


def _embody(whole: nn.Module, *, frozen: torch.dtype, trained: torch.dtype, halved: set[int]) -> None:
    """Replace meta tensors by fake CPU tensors, keeping ties; frozen ones of `halved` become bfloat16."""
    made: dict[int, Tensor] = {}
    for part in whole.modules():
        for table in torch_private.own_tensors(part):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in made:
                    dtype = tensor.dtype
                    if isinstance(tensor, nn.Parameter) and dtype.is_floating_point:
                        dtype = trained if tensor.requires_grad else torch.bfloat16 if id(tensor) in halved else frozen
                    own = torch.empty(tensor.shape, dtype=dtype, device="cpu")
                    made[id(tensor)] = (nn.Parameter(own, requires_grad=tensor.requires_grad)
                                        if isinstance(tensor, nn.Parameter) else own)
                table[name] = None if tensor is None else made[id(tensor)]


def _count_gradients(whole: nn.Module, ledger: _Ledger) -> None:
    def arrived(weight: Tensor) -> None:
        assert weight.grad is not None
        ledger.gradients += weight.grad.untyped_storage().nbytes()

    for weight in whole.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(arrived)


def _without_attention_dropout(whole: nn.Module) -> None:
    for name, part in whole.named_modules():
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0
        if isinstance(part, nn.Dropout) and name.rpartition(".")[2].startswith("attn"):
            part.p = 0.0
