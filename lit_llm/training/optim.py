"""Build an optimizer and its learning rate schedule for parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_llm.errors import InputError
from lit_llm.training.parallel import shards

Schedule = Literal["cosine", "linear", "wsd", "constant"]
Name = Literal["adamw", "adamw_8bit", "muon"]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices are decayed; norms, biases and other vectors are not.

    Under ZeRO-3 a parameter's shape is that of a shard, so the full shape is used.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, weight in named:
        if weight.requires_grad:
            (decayed if len(shards.shape_of(weight)) >= 2 else plain).append(weight)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build(optimizer: Name, named: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float,
          betas: tuple[float, float], eps: float, embeddings: Iterable[nn.Parameter] = ()) -> Optimizer:
    """Create an optimizer for the trainable parameters.

    Args:
        optimizer: `adamw` (arXiv:1711.05101) in its fused form, which is faster on CUDA and CPU; `adamw_8bit`; `muon`.
        named: Parameters; frozen ones are left out.
        lr: Peak learning rate.
        weight_decay: Decoupled decay of matrices.
        betas: Averages of AdamW.
        eps: AdamW's guard against division by zero.
        embeddings: Matrices that are trained with AdamW under `muon`: embeddings and the head.

    Raises:
        InputError: No parameter is trainable, or bitsandbytes is not installed.
    """
    groups = parameter_groups(named, weight_decay)
    if not groups:
        raise InputError("no parameter is trainable", where="model")
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    if optimizer == "muon":
        return Muon(groups, embeddings, **settings)
    if optimizer == "adamw_8bit":
        return _bitsandbytes().AdamW8bit(groups, **settings)
    return AdamW(groups, **settings, fused=True)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim
    except ImportError:
        raise InputError("adamw_8bit needs bitsandbytes, which is not installed", where="model.optimizer",
                         fix="pip install bitsandbytes") from None
    return optim


class Muon(Optimizer):
    """Muon (arXiv:2502.16982) for hidden matrices, AdamW for everything else, with one learning rate.

    A matrix is updated by its momentum with all singular values set to about 1, times 0.2 * sqrt(larger side): the root
    mean square of an update is then that of AdamW, so learning rate, decay and schedule carry over. Stores one number
    per weight of a matrix, where AdamW stores two. It needs whole matrices, but ZeRO gives optimizers flat shards.

    Args:
        groups: Result of `parameter_groups`.
        embeddings: Matrices that AdamW updates.
        lr: Learning rate of both.
        betas: Betas of AdamW; Muon's momentum is 0.95, with Nesterov momentum.
        eps: Epsilon of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], embeddings: Iterable[nn.Parameter], *, lr: float,
                 betas: tuple[float, float], eps: float) -> None:
        tables = {id(weight) for weight in embeddings}
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            for matrices, part in parts.items():
                chosen = [weight for weight in group["params"]
                          if (weight.ndim == 2 and id(weight) not in tables) == matrices]
                if chosen:
                    part.append({"params": chosen, "weight_decay": group["weight_decay"], "matrices": matrices})
        self._inner: dict[bool, Optimizer] = {}
        if parts[True]:
            self._inner[True] = torch.optim.Muon(parts[True], lr=lr, adjust_lr_fn="match_rms_adamw")
        if parts[False]:
            self._inner[False] = AdamW(parts[False], lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([group for inner in self._inner.values() for group in inner.param_groups], {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrices, inner in self._inner.items():             # a loaded checkpoint has replaced them
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if group["matrices"] == matrices]
            inner.step()
        return loss


# ---- schedule --------------------------------------------------------------------------------------------------------

def warmup_steps(warmup: float, total: int) -> int:
    """Steps from a share below 1 or a number of steps.

    >>> warmup_steps(0.1, 250), warmup_steps(30, 250)
    (25, 30)
    """
    return round(warmup * total) if warmup < 1 else int(warmup)


def shape(schedule: Schedule, *, warmup: int, total: int, floor: float,
          cooldown: float = 0.2) -> Callable[[int], float]:
    """The learning rate schedule as a factor of its peak, by the number of completed steps.

    Args:
        schedule: `cosine` (arXiv:1608.03983), `linear`, `wsd` (arXiv:2405.18392: flat, then a linear cool-down),
            `constant`.
        warmup: Steps of linear warmup; the rate of the first step is above 0.
        total: Steps of the run.
        floor: Factor at the end of the decay.
        cooldown: Share of all steps that a `wsd` run cools down; the warmup is never shortened.
    """
    falling = max(1.0, min(cooldown * total, total - warmup))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        if schedule == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        if schedule == "linear":
            return floor + (1 - floor) * (1 - progress)
        if schedule == "wsd":
            return floor + (1 - floor) * min(1.0, max(0, total - step) / falling)
        return 1.0

    return factor


def scheduler(optimizer: Optimizer, schedule: Schedule, *, warmup: float, total: int, floor: float,
              cooldown: float = 0.2) -> LambdaLR:
    """Create the schedule of an optimizer, to be stepped after every optimizer step."""
    steps = warmup_steps(warmup, total)
    return LambdaLR(optimizer, shape(schedule, warmup=steps, total=total, floor=floor, cooldown=cooldown))


def keep_masters(module: nn.Module) -> None:
    """Convert trained weights to float32, because half precision would lose small updates.

    Args:
        module: Its weights that require gradients are converted in place.
    """
    for weight in module.parameters():
        if weight.requires_grad and weight.element_size() < 4:
            weight.data = weight.data.float()
