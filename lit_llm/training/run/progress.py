"""Show the progress of a run in the terminal."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lit_llm.system import ranges

REFRESH = 0.2                                       # seconds between updates of a bar


class Progress(ProgressBar):
    """One progress bar for the whole run: steps, loss, validation perplexity, tokens/s, remaining time.

    If stderr is not a terminal, it prints a plain line every `every_seconds` instead.

    Args:
        every_seconds: Seconds between two plain lines.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        ranges.check("Progress.every_seconds", every_seconds)
        self.every_seconds = every_seconds
        self._bar: Any = None
        self._enabled = True
        self._tokens, self._since, self._last_shown = 0, 0.0, 0.0
        self._first = self._seen = 0                # optimizer steps

    def disable(self) -> None:
        """Disable output on this rank."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        """Open the bar at the current step."""
        self._tokens, self._since = 0, time.monotonic()
        self._last_shown, self._first, self._seen = self._since, trainer.global_step, trainer.global_step
        if self._enabled and trainer.is_global_zero:
            self._bar = _bar(int(trainer.estimated_stepping_batches), trainer.global_step, "train")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        """Count tokens; update at the end of steps."""
        if isinstance(batch, Mapping) and "num_tokens" in batch:    # an own data module may give other batches
            self._tokens += int(batch["num_tokens"]) * trainer.world_size
        moved, self._seen = trainer.global_step - self._seen, trainer.global_step
        if self._bar is None or not moved:
            return
        now = time.monotonic()
        self._bar.update(moved)
        if now - self._last_shown < (self.every_seconds if self._bar.disable else REFRESH):
            return                                  # reading metrics would synchronise with the device
        self._last_shown = now
        shown = self._figures(trainer) | {"tok/s": f"{self._tokens / max(1e-9, now - self._since):,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            total = int(trainer.estimated_stepping_batches)
            left = (now - self._since) / (self._seen - self._first) * (total - self._seen)
            facts = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self._seen}/{total}: {facts}, {left:.0f} s left", file=sys.stderr, flush=True)

    @staticmethod
    def _figures(trainer: L.Trainer) -> dict[str, str]:
        metrics = trainer.callback_metrics
        keys = {"loss": ("train/loss", ".3f"), "val ppl": ("val/perplexity", ".3f"),
                "skipped": ("train/skipped_steps", ".0f")}
        return {name: format(float(metrics[key]), form) for name, (key, form) in keys.items() if key in metrics}

    def on_train_end(self, *_: object) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, *_: object) -> None:
        """Close the bar, so that the error starts on a new line."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_validation_start(self, trainer: L.Trainer, *_: object) -> None:
        """A separate bar for validation outside fit."""
        if self._enabled and trainer.is_global_zero and trainer.state.fn != "fit":
            self._bar = _bar(sum(int(count) for count in trainer.num_val_batches), 0, "validate", unit="batch")

    on_test_start = on_validation_start  # type: ignore[assignment]

    def on_validation_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Update the bar."""
        if self._bar is not None and trainer.state.fn != "fit":
            self._bar.update(1)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        """Close the bar."""
        if trainer.state.fn != "fit":
            self._close()

    on_test_end = on_validation_end  # type: ignore[assignment]


def _bar(total: int, initial: int, name: str, unit: str = "step") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc=name, unit=unit, dynamic_ncols=True, file=sys.stderr,
                disable=not sys.stderr.isatty(), mininterval=REFRESH)
