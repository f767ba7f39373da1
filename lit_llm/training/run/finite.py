"""Skip a step whose gradient is not finite, on all ranks alike, and name the records in it.

A NaN in one weight ends a run silently.
"""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_llm.errors import InputError
from lit_llm.system.private import lightning as private
from lit_llm.system.private import torch as torch_private
from lit_llm.training.checks import divergence
from lit_llm.training.parallel import distribution, shards
from lit_llm.training.parallel.processes import end_together

log = logging.getLogger(__name__)
NAMED = 5                                           # records in one message
LOWEST = 1.0                                        # loss scale below which float16 gains nothing


class FiniteGuard(Callback):
    """Skips a step whose loss or gradient is not finite; stops after several in a row.

    Costs one pass over the gradients and one wait for the device a step, on every rank the same; DeepSpeed does that by
    itself. Gradients are checked after they were summed over ranks, so all ranks see the same.

    float16 multiplies the loss by a scale that grows until a gradient overflows, and then is lowered: such a step is
    skipped, counted and named too, but is daily work and stops no run while there is something to lower.

    Args:
        max_skipped_steps: Steps in a row that may be skipped before the run stops.
    """

    def __init__(self, max_skipped_steps: int = 5) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.skipped = self.in_a_row = 0
        self._window: list[tuple[int, Any]] = []    # the step's micro-batches: number in the loader, loss

    def state_dict(self) -> dict[str, Any]:
        """The counts go on after a stop."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Fused optimizers would undo float16's loss scale in their step, after clipping and after this look."""
        torch_private.leave_scaling_to_trainer(trainer.optimizers)
        divergence.check_weights(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Without gradients, the optimizer has nothing to do."""
        if distribution.of(trainer.strategy).owns_gradients:
            return
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        module.gradient_norm = shards.gradient_norm(weights)
        module.step_skipped = not bool(module.gradient_norm.isfinite())         # here the device is waited for
        for weight in weights if module.step_skipped else ():
            weight.grad = None

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At a step's end: count what was skipped, and name it."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):                # a module of another kind may give none
            self._window.append((getattr(trainer.train_dataloader, "position", 0) - 1, loss))
        if private.accumulates(trainer):
            return
        window, self._window = self._window, []
        if not getattr(module, "step_skipped", False):
            self.in_a_row = 0
        else:
            divergence.check_weights(trainer)       # with broken weights, no later step would be better
            self.skipped += 1
            reason = _reason(trainer, module, window)
            scale = distribution.of(trainer.strategy).float16_scale if reason is None else None
            self.in_a_row += scale is None or scale <= LOWEST
            _warn(f"step {trainer.global_step} is skipped: " + (
                reason or ("its loss is finite, its gradient is not" if scale is None else
                           f"its gradient overflowed float16; the loss scale is {scale:,.0f} now")))
        if self.skipped:
            module.log("train/skipped_steps", float(self.skipped), rank_zero_only=True)
        norm = getattr(module, "gradient_norm", None)
        if private.logs_this_step(trainer) and norm is not None:
            module.log("train/grad_norm", float(norm), rank_zero_only=True)     # before clipping
        if self.in_a_row >= self.max_skipped_steps:
            end_together(trainer)
            raise InputError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (of {trainer.global_step:,} "
                f"steps {self.skipped:,} were skipped)", where=f"step {trainer.global_step}",
                fix="checkpoints hold the weights before them; mend the records named above, or lower model.lr, and go "
                    "on with --ckpt_path last")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Before its figures are kept and its checkpoint is written: they must be numbers."""
        if trainer.state.fn == "fit":
            divergence.check_figures(trainer, "val")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The count, once more."""
        divergence.check_learned(trainer, self.skipped)
        if self.skipped:
            _warn(f"{self.skipped:,} of {trainer.global_step:,} steps were skipped, since they were not finite")


def _reason(trainer: L.Trainer, module: Any, window: list[tuple[int, Any]]) -> str | None:
    """Whose loss was not finite, on all ranks; None where that is the gradient alone. A collective."""
    losses = torch.stack([loss.float() for _, loss in window]) if window else torch.zeros(0)
    bad = [number for (number, _), finite in zip(window, losses.isfinite().tolist(), strict=True) if not finite]
    places = _places(trainer, module, bad)
    found: list[Any] = [(len(bad), places)]
    if trainer.world_size > 1:
        found = [None] * trainer.world_size
        dist.all_gather_object(found, (len(bad), places))
    if not sum(count for count, _ in found):
        return None
    places = list(dict.fromkeys(place for _, some in found for place in some))
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return "its loss is not finite" + (f", at {', '.join(places[:NAMED])}{more}" if places else "")


def _places(trainer: L.Trainer, module: Any, numbers: list[int]) -> list[str]:
    """Records whose loss alone is not finite; all of these micro-batches where none is, or none can be tried alone."""
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "alone"):
        return []
    everything = [one for number in numbers for one in loader.alone(number)]
    together = distribution.of(trainer.strategy).gathers_layers     # then a forward needs all ranks at once
    culprits = []
    with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
        for place, batch in everything if not together else ():
            batch = trainer.strategy.batch_to_device(batch)
            if not module._nll(batch).total.isfinite():
                culprits.append(place)
    return culprits or [place for place, _ in everything]


@rank_zero_only
def _warn(words: str) -> None:
    log.warning(words)
