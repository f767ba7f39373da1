"""Choose between the kernels of this project and the operations of torch and transformers that they replace.

`LIT_LLM_KERNELS=plain` in the environment, or `trainer.kernels: plain` for one run, turns every kernel of this package
off: blockwise attention, RMS norms, the loss from hidden states and its Triton kernel, tiles in evaluation. What is
computed stays the same up to rounding, so a doubtful result can be checked without them. `attention.py` itself stays:
it hands each document to torch's attention.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

from lit_llm.errors import InputError

Kernels = Literal["own", "plain"]
VARIABLE = "LIT_LLM_KERNELS"
_chosen: Kernels | None = None                      # by the run that is under way


def is_plain() -> bool:
    """Whether the kernels written here are off.

    Raises:
        InputError: The variable has another value than own or plain.
    """
    kernels = _chosen or os.environ.get(VARIABLE) or "own"
    if kernels not in ("own", "plain"):
        raise InputError(f"'{kernels[:40]}' is not one of own, plain", where=VARIABLE)
    return kernels == "plain"


@contextmanager
def using(kernels: Kernels | None) -> Generator[None, None, None]:
    """Use these kernels within the block, in all threads of the process; null leaves it to the environment."""
    global _chosen
    before, _chosen = _chosen, kernels or _chosen
    try:
        yield
    finally:
        _chosen = before
