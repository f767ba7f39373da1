"""Import DeepSpeed without output on stdout, select its device, and close the process group at the end.

These settings belong to the whole process, not to one strategy.
"""

import os
from contextlib import redirect_stdout, suppress
from sys import __stdout__, stderr, stdout
from typing import Any

import torch

from lit_llm.errors import InputError


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


def check_config(config: dict[str, Any], *, clips: bool) -> None:
    """Refuse a DeepSpeed config that contradicts the keys of the run.

    Args:
        config: The config of the user, before Lightning adds its own keys.
        clips: Whether `trainer.gradient_clip_val` is set.

    Raises:
        InputError: It has no stage, or it sets a value that belongs to another key.
    """
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):                      # DeepSpeed ignores a misspelt key; resuming would fail
        raise InputError(f"the DeepSpeed config has stage {stage}, which must be 1, 2 or 3", where="trainer.strategy",
                         fix="add zero_optimization: {stage: 2} to it")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise InputError(f"'{key}' of the DeepSpeed config would replace what model.optimizer, model.lr and "
                             "model.schedule say", where="trainer.strategy", fix="Remove it")
    if clips and "gradient_clipping" in config:
        raise InputError("gradient clipping is set twice: here and as gradient_clipping in the DeepSpeed config",
                         where="trainer.gradient_clip_val", fix="remove one of them")


def check_float16(precision: str) -> None:
    """Refuse float16 where DeepSpeed does not support it.

    Args:
        precision: `trainer.precision`, such as `16-mixed`.

    Raises:
        InputError: DeepSpeed does not support float16 on this device.
    """
    from deepspeed.accelerator import get_accelerator

    if precision.startswith("16") and not get_accelerator().is_fp16_supported():
        raise InputError("DeepSpeed does not support float16 on this processor", where="trainer.precision",
                         fix="set it to bf16-mixed or 32-true")


def leave_process_group() -> None:
    """Close the process group when the process ends, if one is open."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
