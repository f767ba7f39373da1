"""Parameters in, an optimizer and its schedule out. Knows nothing of models, data or Lightning."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_llm.errors import InputError

Schedule = Literal["cosine", "linear", "wsd", "constant"]
COOLDOWN = 0.2                                      # share of a WSD run that decays (arXiv:2405.18392)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices are decayed; norms, biases and other vectors are not.

    Under ZeRO-3 a parameter's own shape is that of a shard, so its full shape is asked.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, weight in named:
        if weight.requires_grad:
            shape = getattr(weight, "ds_shape", weight.shape)
            (decayed if len(shape) >= 2 else plain).append(weight)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(named: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float, betas: tuple[float, float],
          eps: float) -> AdamW:
    """AdamW (arXiv:1711.05101) in its fused form, which is quicker on CUDA and on CPU alike.

    Raises:
        InputError: No parameter is trainable.
    """
    groups = parameter_groups(named, weight_decay)
    if not groups:
        raise InputError("no parameter is trainable", where="model")
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def warmup_steps(warmup: float, total: int) -> int:
    """Steps from a share below 1 or a number of steps.

    >>> warmup_steps(0.1, 250), warmup_steps(30, 250)
    (25, 30)
    """
    return round(warmup * total) if warmup < 1 else int(warmup)


def shape(schedule: Schedule, *, warmup: int, total: int, floor: float) -> Callable[[int], float]:
    """The learning rate's course as a factor on its peak, by the number of steps already taken.

    Args:
        schedule: `cosine` (arXiv:1608.03983), `linear`, `wsd` (flat, then a linear cool-down over the last fifth),
            `constant`.
        warmup: Steps of linear rise; the first step already moves.
        total: Steps of the run.
        floor: Factor at the end of the decay.
    """
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        if schedule == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        if schedule == "linear":
            return floor + (1 - floor) * (1 - progress)
        if schedule == "wsd":
            return floor + (1 - floor) * min(1.0, (1 - progress) / COOLDOWN)
        return 1.0

    return factor


def scheduler(optimizer: Optimizer, schedule: Schedule, *, warmup: float, total: int, floor: float) -> LambdaLR:
    """The schedule on an optimizer, to be stepped after every optimizer step."""
    return LambdaLR(optimizer, shape(schedule, warmup=warmup_steps(warmup, total), total=total, floor=floor))
