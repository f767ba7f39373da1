"""External cross-entropy kernels with the interface of `cross_entropy.nll`: cut-cross-entropy and Liger.

Neither is imported unless `model.cross_entropy` selects it. Both run Triton on CUDA; their speed and memory there were
not measured here. Their exactness, in Triton's interpreter on a CPU: |error| / |gradient| of hidden states and of the
head against float64; 256 tokens in bfloat16, width 64, logits with a standard deviation of 1.2.

    vocabulary                              8,192               32,768              131,072
    fused, on a CPU                     1.6e-3   1.6e-3     9.0e-4   6.4e-4     4.8e-4   1.9e-4
    liger-kernel 0.8.5                  1.6e-3   1.6e-3     9.0e-4   6.4e-4     4.8e-4   1.9e-4
    cut-cross-entropy 25.1.1            1.6e-2   2.7e-3     5.8e-2   1.2e-3     8.5e-2   1.9e-4
    cut-cross-entropy, git d42911f      1.6e-3   1.6e-3     8.6e-4   6.3e-4     not measured

    liger               Rounds logits to the precision of hidden states, as this project does on a CPU but not on CUDA.
                        Sums the head's gradient in float32 and rounds it once. Synchronises with the device once per
                        micro-batch, to count targets.
    cut_cross_entropy   Has no logits in memory at all. 25.1.1, the last release, sums a hidden state's gradient in
                        bfloat16, 128 vocabulary entries at a time; its repository can use float32, which is requested
                        if available. The order of sums varies, so a resumed run is not bit-identical. Small gradients
                        are kept (`filter_eps`), although skipping blocks of them is what makes it fast: at the start of
                        a run that would be nearly all. It counts the entries missing in the last block of 128 as logits
                        of -cap, which matters only for a small cap.
                        last block of 128 as logits of -cap, which matters only where a cap is small.

A factor is multiplied into hidden states: exact where it is a power of two, else rounded once more.
"""

import importlib
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lit_llm.errors import InputError
from lit_llm.kernels.cross_entropy import Head, computed_in, slice_rows

KEY = "model.cross_entropy"
OURS = "--model.cross_entropy fused"
PACKAGES = {"cut_cross_entropy": "cut-cross-entropy", "liger": "liger-kernel"}
MODULES = {"cut_cross_entropy": "cut_cross_entropy.cce", "liger": "liger_kernel.ops.fused_linear_cross_entropy"}


# ---- what cannot be --------------------------------------------------------------------------------------------------

def check(name: str, precision: str) -> None:
    """Refuse a choice that is not installed, or whose release cannot do what this run needs.

    Args:
        name: Of the choice.
        precision: `trainer.precision`.

    Raises:
        InputError: It names the key and what to set.
    """
    module = _module(name)
    if name == "cut_cross_entropy" and "16" not in precision and not _sums_in_float32(module):
        raise InputError(f"this release of {PACKAGES[name]} makes gradients of half precision only",
                         where="trainer.precision", fix=f"set it to bf16-mixed or bf16-true, or {OURS}")


def check_head(name: str, head: Head | None) -> None:
    """Refuse a head that a choice cannot do.

    Args:
        name: Of the choice.
        head: As plain matrices; null where another thing is on it.

    Raises:
        InputError: It names the key and what to set.
    """
    if head is None:
        raise InputError(f"{name} needs a plain output head, and an adapter is on it", where=KEY,
                         fix=f"leave the head out of the adapter's layers, or set {OURS}")
    if head.rows_KD is not None:
        raise InputError(f"{name} cannot train single rows of a frozen head", where=KEY,
                         fix=f"set {OURS}, or --model.lora.train_tokens null (no trainable_token_indices)")
    if head.bias_V is not None and name == "cut_cross_entropy" and not _takes_bias(_module(name)):
        raise InputError(f"this model's head has a bias, which this release of {PACKAGES[name]} does not know",
                         where=KEY, fix=f"set --model.cross_entropy liger, or {OURS}")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        why = f"needs {PACKAGES[name]}, which cannot be imported here ({' '.join(str(error).split())[:100]})"
        raise InputError(f"{name} {why}", where=KEY, fix=f"pip install {PACKAGES[name]}, or set {OURS}") from None


def _sums_in_float32(module: Any) -> bool:
    """Whether cut-cross-entropy is newer than 25.1.1: gradients may be summed in float32, and come in float32."""
    return "accum_e_fp32" in {field.name for field in fields(module.CCEParams)}


def _takes_bias(module: Any) -> bool:
    return "bias" in signature(module.linear_cross_entropy_apply).parameters


# ---- what is ---------------------------------------------------------------------------------------------------------

def nll(name: str, hidden_ND: Tensor, targets_N: Tensor, head: Head | None) -> Tensor:
    """() sum of losses, with gradients for hidden states and the head; see `fused.nll`.

    Args:
        name: `cut_cross_entropy` or `liger`.
        hidden_ND: (N, D), of supervised tokens only.
        targets_N: (N,) int64.
        head: As plain matrices.

    Raises:
        InputError: The head is none that the choice can do.
    """
    check_head(name, head)
    assert head is not None
    if head.factor != 1.0:
        hidden_ND = hidden_ND * head.factor
    with torch.cuda.device_of(hidden_ND):           # Triton launches on whatever device is the current one
        total = CHOICES[name](hidden_ND, targets_N, head)
    assert isinstance(total, Tensor)
    return total


def _cut(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Any:
    """By cut-cross-entropy, at its most exact.

    Behind its front door, which asks the device how many targets are to be ignored: here none are.
    """
    module, dtype = _module("cut_cross_entropy"), computed_in(hidden_ND)
    wanted = {"targets": targets_N.contiguous(), "valids": None, "softcap": head.cap, "reduction": "sum",
              "filter_eps": None, "shift": 0, "batch_shape": targets_N.shape,
              "accum_e_fp32": True, "accum_c_fp32": True, "filter_e_grad": False, "filter_c_grad": False,
              "vocab_parallel_options": None, "return_lse": False}
    params = module.CCEParams(**{field.name: wanted[field.name] for field in fields(module.CCEParams)})
    parts: list[Tensor | None] = [hidden_ND.to(dtype).contiguous(), head.weight_VD.to(dtype)]
    if _takes_bias(module):
        parts.append(None if head.bias_V is None else head.bias_V.to(dtype))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        out = module.linear_cross_entropy_apply(*parts, params)
    return out[0] if isinstance(out, tuple) else out


def _liger(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Any:
    return _Liger.apply(hidden_ND, targets_N, head.weight_VD, head.bias_V, head.cap)


class _Liger(torch.autograd.Function):
    """Liger's forward pass, which makes the gradients too.

    Not its own Function: that one waits for the device in the backward pass as well, to see whether the loss was
    multiplied, and casts the head anew for each chunk under autocast.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                cap: float | None) -> Tensor:
        dtype, device = computed_in(hidden_ND), hidden_ND.device.type
        with torch.autocast(device, enabled=False):
            hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
            rows, _ = slice_rows(len(weight), dtype.itemsize, device)
            total, _, _, _, *grads = _module("liger").fused_linear_cross_entropy_forward(
                hidden, weight, targets_N, bias=None if bias_V is None else bias_V.to(dtype), reduction="sum",
                softcap=cap, accum_dtype=torch.float32, compute_gradients=True,
                weight_requires_grad=ctx.needs_input_grad[2],
                chunk_mem_const=max(1, rows * len(weight) // hidden.numel()))      # chunks as ours: V / D may be many
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden_ND, weight_VD, bias_V)]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (None if part is None else (part.float() * grad).to(dtype)
                                for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return hidden, None, weight, bias, None


CHOICES: dict[str, Callable[[Tensor, Tensor, Head], Any]] = {"cut_cross_entropy": _cut, "liger": _liger}
