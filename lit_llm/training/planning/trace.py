"""Trace the memory of a training step without weights or data, on fake tensors.

The step is the real one, module for module and kernel for kernel, on torch's fake tensors: they have shapes, lifetimes
and gradients, but no numbers. So norms of queries, dropout of attention, tied heads, rows of tokens that learn beside
adapters and whatever an architecture brings with it are counted, not known by name. The loss is that of
`cross_entropy.py`, whatever `model.cross_entropy` says: others' kernels do not run without numbers.
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
    """Bytes that come and go in a step, beside weights and optimizer.

    Args:
        layers: What the backbone leaves for its backward pass.
        head: The most that the loss takes beside it: a chunk of logits, gradients of hidden states and head.
        backward: The most at once in the backward pass, gradients as they come among it.
        bare: The same without gradients of weights.
        layer: Of `layers`, what one layer holds while it is computed.
    """

    layers: float
    head: float
    backward: float
    bare: float
    layer: float

    def towards(self, other: "Step", share: float) -> "Step":
        """Between this step and another of more tokens: all of it grows with tokens in a straight line."""
        def between(name: str) -> float:
            return getattr(self, name) + share * (getattr(other, name) - getattr(self, name))

        return Step(between("layers"), between("head"), between("backward"), between("bare"), between("layer"))

    def times(self, share: float) -> "Step":
        """Of so much shorter rows."""
        return Step(*(share * getattr(self, name) for name in self.__slots__))


class Borders(list[int]):
    """`cu_seqlens` that the host knows: a fake tensor could not say where its documents end."""

    def tolist(self) -> list[int]:
        """As a tensor's."""
        return list(self)


_DispatchMode: Any = torch_private.dispatch_mode()


class _Ledger(_DispatchMode):
    """Counts storages while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.bare = self.given = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _as_here(func, args, kwargs or {})
        for value in torch_private.leaves(out):
            if isinstance(value, Tensor):
                self.enter(value)
        return out

    def enter(self, tensor: Tensor) -> None:
        """From here on until its storage dies; a view of one that is known is nothing new."""
        storage: Any = tensor.untyped_storage()
        key, size = torch_private.storage_key(storage), storage.nbytes()
        if key in self._held:
            return

        def leave(_: Any) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.bare = max(self.bare, self.live - self.given)

    def restart(self) -> int:
        """Forget the peaks; what lives now."""
        self.peak = self.bare = self.live
        return self.live


def step(build: Callable[[], Any], borders: Sequence[int], *, supervised: int, recompute_: recompute.Recompute = "none",
         half: bool = False, autocast: bool = False, quantized: bool = False, cuda: bool = False) -> Step:
    """What a step of one micro-batch holds.

    Args:
        build: Makes the model on the meta device, with its adapters and packed attention; its layers are changed.
        borders: Of documents in the flattened micro-batch, from 0 to its tokens.
        supervised: Tokens of it that are learned.
        recompute_: What is computed again.
        half: Whether frozen weights, and without `autocast` all weights, lie in two bytes.
        autocast: Whether matrices are multiplied in bfloat16 whatever they lie in.
        quantized: Whether frozen linear layers lie in 4 bits, which are made two bytes for a product and dropped again.
        cuda: As there: larger slices of logits, no matrices of attention weights where they are dropped.
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
        rmsnorm.quicken(whole)
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
        blockwise.stacks.cache_clear()              # its answers are fake too
    depth = max(1, len(anatomy.decoder_layers(whole)))
    bare = ledger.bare - weights
    head = max(0, forward - layers)
    layer = layers / depth if recompute_ == "none" else max(layers / depth, bare - layers)
    return Step(layers, head, ledger.peak - weights, bare, layer)


def _as_here(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives; of experts' products torch's fake tensors know bfloat16 alone."""
    if func is torch_private.grouped_product() and args[0].dtype != torch.bfloat16:
        return func(*(value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
                      for value in args), **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _hidden(whole: Any, ids: Tensor, borders: Sequence[int]) -> Tensor:
    """(T, D) hidden states of a packed row, or of one document after the other, as it is in training."""
    if adapter.has_virtual_tokens(whole):
        return _behind_prompts(whole, ids, borders)
    if transformers_private.attention_of(anatomy.causal_lm(whole).config) != attention.NAME:
        return torch.cat([anatomy.backbone(whole)(input_ids=ids[:, start:stop], use_cache=False).last_hidden_state[0]
                          for start, stop in pairwise(borders)])
    out = anatomy.backbone(whole)(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False,
                                cu_seqlens=Borders(borders), max_seqlen=borders[-1])
    return out.last_hidden_state[0]


def _behind_prompts(whole: Any, ids: Tensor, borders: Sequence[int]) -> Tensor:
    """(T, D) the same behind virtual tokens that learn."""
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
    """Weights of linear layers but the head."""
    out = inner.get_output_embeddings()
    return {id(part.weight) for part in inner.modules() if isinstance(part, nn.Linear) and part is not out}


def _embody(whole: nn.Module, *, frozen: torch.dtype, trained: torch.dtype, halved: set[int]) -> None:
    """Fake tensors of the CPU in the place of meta ones, tied ones tied; frozen ones of `halved` in bfloat16."""
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
        ledger.given += weight.grad.untyped_storage().nbytes()

    for weight in whole.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(arrived)


def _without_attention_dropout(whole: nn.Module) -> None:
    for name, part in whole.named_modules():
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0
        if isinstance(part, nn.Dropout) and name.rpartition(".")[2].startswith("attn"):
            part.p = 0.0
