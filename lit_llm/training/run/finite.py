"""Skip optimizer steps whose gradient is not finite, equally on all ranks, and name the records of such a step.

A single NaN in the weights would otherwise ruin a run silently.
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
NAMED = 5                                           # records named in one message
LOWEST = 1.0                                        # loss scale below which lowering it is pointless


class FiniteGuard(Callback):
    """Skips steps whose loss or gradient is not finite; stops the run after several in a row.

    It costs one pass over the gradients and one synchronisation with the device per step; DeepSpeed does this itself.
    Gradients are checked after their reduction over ranks, so all ranks agree.
    float16 multiplies the loss by a scale that grows until a gradient overflows and is then lowered. Such steps are
    skipped, counted and named as well, but they are normal and do not stop the run while the scale can be lowered.

    Args:
        max_skipped_steps: Number of consecutive skipped steps after which the run stops.
    """

    def __init__(self, max_skipped_steps: int = 5) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.skipped = self.in_a_row = 0
        self._window: list[tuple[int, Any]] = []    # micro-batches of the step: (index in the loader, loss)

    def state_dict(self) -> dict[str, Any]:
        """Counts, which continue when a run is resumed."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep fused optimizers from unscaling float16 gradients in their step, after clipping and this check."""
        torch_private.leave_scaling_to_trainer(trainer.optimizers)
        divergence.check_weights(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Remove the gradients of a step that is not finite, so that the optimizer skips it."""
        if distribution.of(trainer.strategy).owns_gradients:
            return
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        module.gradient_norm = shards.gradient_norm(weights)
        module.step_skipped = not bool(module.gradient_norm.isfinite())         # synchronises with the device
        for weight in weights if module.step_skipped else ():
            weight.grad = None

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of a step, count a skipped step and name its records."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):                # a module of another kind may give none
            self._window.append((getattr(trainer.train_dataloader, "position", 0) - 1, loss))
        if private.accumulates(trainer):
            return
        window, self._window = self._window, []
        if not getattr(module, "step_skipped", False):
            self.in_a_row = 0
        else:
            divergence.check_weights(trainer)       # with non-finite weights, all later steps fail as well
            self.skipped += 1
            reason = _reason(trainer, module, window)
            scale = distribution.of(trainer.strategy).float16_scale if reason is None else None
            self.in_a_row += scale is None or scale <= LOWEST
            _warn(f"step {trainer.global_step} was skipped: " + (
                reason or ("its loss is finite, but its gradient is not" if scale is None else
                           f"its gradient overflowed in float16; the loss scale is now {scale:,.0f}")))
        if self.skipped:
            module.log("train/skipped_steps", float(self.skipped), rank_zero_only=True)
        norm = getattr(module, "gradient_norm", None)
        if private.logs_this_step(trainer) and norm is not None:
            module.log("train/grad_norm", float(norm), rank_zero_only=True)     # before clipping
        if self.in_a_row >= self.max_skipped_steps:
            end_together(trainer)
            raise InputError(
                f"{self.in_a_row} consecutive steps had a non-finite loss or gradient (of {trainer.global_step:,} "
                f"steps {self.skipped:,} were skipped)", where=f"step {trainer.global_step}",
                fix="the checkpoints have the weights before them; fix the records named above, or lower model.lr, and "
                    "resume with --ckpt_path last")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Check that the validation metrics are finite before they are stored and a checkpoint is written."""
        if trainer.state.fn == "fit":
            divergence.check_figures(trainer, "val")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Report the number of skipped steps."""
        divergence.check_learned(trainer, self.skipped)
        if self.skipped:
            _warn(f"{self.skipped:,} of {trainer.global_step:,} steps were skipped because they were not finite")


def _reason(trainer: L.Trainer, module: Any, window: list[tuple[int, Any]]) -> str | None:
    """Which records had a non-finite loss, on all ranks; None if only the gradient was. Collective."""
    losses = torch.stack([loss.float() for _, loss in window]) if window else torch.zeros(0)
    bad = [number for (number, _), finite in zip(window, losses.isfinite().tolist(), strict=True) if not finite]
    places = _places(trainer, module, bad)
    of_ranks: list[Any] = [(len(bad), places)]
    if trainer.world_size > 1:
        of_ranks = [None] * trainer.world_size
        dist.all_gather_object(of_ranks, (len(bad), places))
    if not sum(count for count, _ in of_ranks):
        return None
    places = list(dict.fromkeys(place for _, some in of_ranks for place in some))
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return "its loss is not finite" + (f", at {', '.join(places[:NAMED])}{more}" if places else "")


def _places(trainer: L.Trainer, module: Any, numbers: list[int]) -> list[str]:
    """Records with a non-finite loss; all records of the micro-batches if none can be singled out."""
    loader: Any = trainer.train_dataloader
    if not hasattr(loader, "alone"):
        return []
    everything = [one for number in numbers for one in loader.alone(number)]
    together = distribution.of(trainer.strategy).gathers_layers     # then a forward pass needs all ranks
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
