"""Stop a run whose weights or validation metrics are no longer finite.

Continuing, saving or exporting after that would only give a useless model, and a later checkpoint would replace the
last good one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_llm.errors import InputError
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.parallel.shards import own_part
from lit_llm.training.run import manifest


def check_weights(trainer: L.Trainer) -> None:
    """Refuse trained weights that are inf or nan, equally on all ranks. Collective.

    Args:
        trainer: The trainer within a fit, after a step.

    Raises:
        InputError: The error names the step, the learning rate and the last good checkpoint.
    """
    module: Any = trainer.lightning_module
    trained = [weight for weight in module.parameters() if weight.requires_grad and weight.is_floating_point()]
    parts = [part for part in map(own_part, trained) if part.numel()]
    finite = not parts or bool(torch.nn.utils.get_total_norm(parts, math.inf).isfinite())
    if trainer.strategy.reduce_boolean_decision(finite, all=True):
        return
    if trainer.global_step:
        raise _diverged(trainer, "the trained weights are no longer finite (inf or nan)")
    end_together(trainer)
    raise InputError(f"its weights are not finite in {trainer.precision} (inf or nan) before the first step",
                     where=_place(module), fix="give other weights, or set "
                     "--trainer.precision 32-true or bf16-true")


def check_figures(trainer: L.Trainer, split: str) -> None:
    """Refuse a validation with infinite or nan perplexity; data without supervised tokens are not checked.

    Args:
        trainer: The trainer after the evaluation.
        split: The evaluated split.

    Raises:
        InputError: Before training the error is about the model, later about the step and the learning rate.
    """
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{split}/")}
    if are_finite(figures, split):
        return
    module: Any = trainer.lightning_module
    seen = f"perplexity on the validation data is {figures.get(f'{split}/perplexity')}"
    if trainer.sanity_checking:
        end_together(trainer)
        raise InputError(f"{seen} before the first step, so the model is damaged, or its values exceed the range of "
                         f"{trainer.precision}", where=_place(module),
                         fix="set --trainer.precision 32-true or bf16-true; or use other weights")
    raise _diverged(trainer, seen)


def are_finite(figures: Mapping[str, object], split: str = "val") -> bool:
    """Whether loss and perplexity are finite; true if nothing was measured."""
    if not figures.get(f"{split}/tokens"):
        return True
    return all(isinstance(value := figures.get(f"{split}/{name}"), int | float) and math.isfinite(value)
               for name in ("nll", "perplexity"))


def check_learned(trainer: L.Trainer, skipped: int) -> None:
    """Refuse a finished run whose steps were all skipped.

    Raises:
        InputError: The error names their number.
    """
    if skipped and skipped >= trainer.global_step:
        end_together(trainer)
        raise InputError(f"all {skipped:,} steps were skipped because loss or gradient was inf or nan: nothing learned",
                         where=f"step {trainer.global_step}", fix="fix the records named above, lower model.lr, or "
                         "set --trainer.precision bf16-mixed or 32-true")


def _place(module: Any) -> str:
    """Where the weights come from, as a key of a config."""
    return "model.base" if getattr(module, "base", None) else "model.init" if hasattr(module, "init") else "model"


def _diverged(trainer: L.Trainer, what: str) -> InputError:
    """The error, once all ranks can raise it."""
    end_together(trainer)
    rate = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else math.nan
    good = [folder for folder in manifest.folders(Path(trainer.default_root_dir))
            if manifest.step_of(folder.name) < trainer.global_step and are_finite(
                manifest.read(folder).get("figures") or {})]
    last_good = f"; {good[-1]} is the last checkpoint before it" if good else ""
    return InputError(f"{what}: training diverged, and nothing of this step was saved or exported{last_good}",
                      where=f"step {trainer.global_step}", fix=f"the likely cause is the learning rate, {rate:.3g} in "
                      "this step: lower model.lr, raise model.warmup, or set --trainer.gradient_clip_val 1.0")
