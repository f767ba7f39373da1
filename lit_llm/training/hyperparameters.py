"""Apply changed optimization settings to a run that resumes from a checkpoint.

A restored optimizer and schedule have the values that they were saved with, whatever the config says.
"""

import logging
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_llm.system.private import torch as torch_private
from lit_llm.training import optim

if TYPE_CHECKING:

    from lit_llm.training.checks.interface import Module

log = logging.getLogger(__name__)
KEY = "hyperparameters"                             # key in a checkpoint
NAMES = ("lr", "schedule", "warmup", "cooldown", "min_lr_share", "weight_decay", "betas", "eps")
OF_GROUPS = ("lr", "weight_decay", "betas", "eps")  # settings of the optimizer's parameter groups


class Hyperparameters:
    """The settings of a run, from its config and from the checkpoint that it resumes from."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self._before: dict[str, Any] | None = None
        self._groups: list[dict[str, Any]] = []

    def scheduled(self, module: "Module", optimizer: Optimizer, total: int) -> LambdaLR:
        """Create the schedule of a new optimizer.

        Args:
            module: The module with the settings in `NAMES`.
            optimizer: The optimizer.
            total: Optimizer steps of the run.
        """
        self.now = {f"model.{name}": getattr(module, name) for name in NAMES}
        self.now |= {"model.betas": list(module.betas), "steps of the run": total}
        self._groups = [{key: group[key] for key in OF_GROUPS if key in group} for group in optimizer.param_groups]
        if module.trainer.is_global_zero and (rise := optim.warmup_steps(module.warmup, total)) >= total:
            log.warning("model.warmup: %d steps of warmup do not end within the run of %d steps, so the learning rate "
                        "never reaches %g", rise, total, module.lr)
        return optim.scheduler(optimizer, module.schedule, warmup=module.warmup, total=total,
                               floor=module.min_lr_share, cooldown=module.cooldown)

    def is_last(self, step: int) -> bool:
        """Whether the run ends with this step."""
        return step >= int(self.now.get("steps of the run", step + 1))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Store the settings in a checkpoint."""
        checkpoint[KEY] = self.now

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Read the settings of the checkpoint that a fit resumes from."""
        self._before = checkpoint.get(KEY, {})

    def take_effect(self, trainer: Any) -> None:
        """Set a restored optimizer and its schedule to the config's values, from the next step on.

        Without changes, the restored values are kept exactly.

        Args:
            trainer: The trainer before its first step, with everything restored.
        """
        before, self._before = self._before, None
        if before is None or before == self.now:
            return
        schedule: LambdaLR = trainer.lr_scheduler_configs[0].scheduler
        groups = schedule.optimizer.param_groups
        for place, (group, wanted) in enumerate(zip(groups, self._groups, strict=True)):
            group.update(wanted)
            group["initial_lr"] = schedule.base_lrs[place] = wanted["lr"]
            group["lr"] = wanted["lr"] * schedule.lr_lambdas[place](schedule.last_epoch)
        torch_private.set_last_rates(schedule, [group["lr"] for group in groups])
        if trainer.is_global_zero:
            for change in differences(before, self.now):
                log.info("changed on resume: %s", change)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that have changed.

    >>> differences({"model.lr": 0.003, "model.eps": 1e-8}, {"model.lr": 1e-6, "model.eps": 1e-8})
    ['model.lr 0.003 -> 1e-06']
    """
    return [f"{key} {before[key]} -> {value}" for key, value in now.items() if key in before and before[key] != value]
