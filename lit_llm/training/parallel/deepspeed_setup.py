"""Import DeepSpeed without output on stdout, select its device, and close the process group at the end.

These settings belong to the whole process, not to one strategy.
"""

import os
from contextlib import redirect_stdout, suppress
from sys import __stdout__, stderr, stdout

import torch


def load() -> None:
    """Import DeepSpeed once without its output on stdout, where chat answers and reports are written."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")      # read at import; without it a warning is printed
    with redirect_stdout(stderr):
        import deepspeed

    for handler in deepspeed.utils.logging.logger.handlers:
        if getattr(handler, "stream", None) in (stdout, __stdout__):
            handler.setStream(stderr)


def select_device(kind: str) -> None:
    """Set DeepSpeed's device to the one that Lightning chose; on a machine with a GPU it would never use the CPU."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if kind == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        os.environ["DS_ACCELERATOR"] = "cpu"
        set_accelerator(CPU_Accelerator())
    if kind == "cpu":
        # otherwise the first run compiles C++, and if it is killed meanwhile its lock blocks all later runs
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def computes_float16(kind: str) -> bool:
    """Whether DeepSpeed supports float16 on a device of this kind, such as `cpu`."""
    if kind == "cpu":                               # also on a machine with a GPU
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        return bool(CPU_Accelerator().is_fp16_supported())
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def leave_process_group() -> None:
    """Close the process group when the process ends, if one is open."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
