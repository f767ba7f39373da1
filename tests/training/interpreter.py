"""Adapt Triton's interpreter for cut-cross-entropy and Liger; Triton 3.9 by itself cannot run them on a CPU.

Import it in a process with TRITON_INTERPRET=1, before either library; as a script it is strategy_probe.py. It corrects, for
the interpreter only:

    tanh, log1p    `triton.language.extra.libdevice` has stubs that a GPU's compiler replaces; here they return None
    bfloat16       is stored as bits, and sums and products are computed with the bits as if they were integers; float32
                   is truncated, not rounded, on conversion
    a cap          stays Python's float, which has no `.to`; see `Cap`
"""

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
cast, combine, multiply = Builder.cast_impl, Builder.binary_op, Builder.create_dot


class Cap(float):
    """A kernel's argument that is a float, as the compiler has it."""

    def to(self, dtype):
        return self


def wide(value):
    """Bits of bfloat16 as the float32 that they are."""
    if value.dtype.scalar != tl.bfloat16:
        return value
    return Handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def half(values):
    """float32 rounded to bits of bfloat16, by torch."""
    return Handle(torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def cast_impl(self, value, to):
    return half(value.data) if (value.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16) else cast(self, value, to)


def binary_op(self, left, right, operation):
    out = combine(self, wide(left), wide(right), operation)
    return half(out.data) if left.dtype.scalar == tl.bfloat16 and out.dtype.scalar == tl.float32 else out


def create_dot(self, left, right, total, *rest):
    return multiply(self, wide(left), wide(right), total, *rest)


libdevice.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0
libdevice.log1p = lambda x: tl.log(1.0 + x)
Builder.cast_impl, Builder.binary_op, Builder.create_dot = cast_impl, binary_op, create_dot

if __name__ == "__main__":
    import strategy_probe

    from lit_llm.kernels import borrowed

    calls, nll = [], borrowed.nll
    borrowed.nll = lambda name, *arguments: calls.append(name) or nll(name, *arguments)
    strategy_probe.main()
    print(f"{calls[0]} made {len(calls)} losses")
