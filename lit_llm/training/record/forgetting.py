"""Measure during a fit how much worse the model becomes on its guard documents, text that it should not forget.

The documents are those of `data.guard_sources`. Their NLL before training is kept in the checkpoints, so a resumed run
compares with the same values. Scoring restores random generators and the mode of each layer, so that the run is
bit-identical to one without guard documents.
"""

import logging
import math
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from lit_llm.data.rows.cells import short_names
from lit_llm.data.rows.identity import differences
from lit_llm.data.rows.loader import Batch
from lit_llm.errors import InputError
from lit_llm.statistics import intervals
from lit_llm.text.tokenizer import IGNORE_INDEX
from lit_llm.training.checks.in_memory import scored, undisturbed
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.run.report import MetricsCSV

log = logging.getLogger(__name__)
NLL, RISE = "guard/nll", "guard/rise"


class Forgetting(Callback):
    """Scores the guard documents before the first step, at each validation and at the end.

    Logged are `guard/nll` and, of several sources, `guard/nll/<source>` in nats per supervised token, `guard/tokens`,
    `guard/worse`, the share of documents whose loss has increased, and `guard/rise`, the increase over the value before
    training, with the ends of its paired 95 % interval over documents, `guard/rise_low` and `guard/rise_high`. A rise
    whose interval is above 0 is reported. With `trainer.limit_val_batches: 0` nothing is measured.

    Args:
        stop_beyond: Stop the run when the rise is greater than this number of nats and its interval is above 0; null
            does not stop.
    """

    def __init__(self, stop_beyond: float | None = None) -> None:
        self.stop_beyond = stop_beyond
        self.reason: str | None = None              # why this run was stopped
        self.seconds = 0.0                          # spent on scoring in this process
        self._reference: dict[str, Any] = {}        # `step`, `data`, and the (N,) `nll` of each document
        self._step = -1                             # of the newest measurement

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a limit without guard documents.

        Raises:
            InputError: The error names both keys.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and self.stop_beyond is not None and not getattr(data, "guard_sources", None):
            raise InputError("there are no guard documents whose loss could rise", where="trainer.stop_on_forgetting",
                             fix="set data.guard_sources, or leave it out")

    def state_dict(self) -> dict[str, Any]:
        """The values before training."""
        return {"reference": dict(self._reference), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values before training."""
        self._reference, self._step = dict(state_dict["reference"]), state_dict["step"]

    # ---- when to measure ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure before the first step; a resumed run has that value in its checkpoint.

        Raises:
            InputError: The value is not finite.
        """
        plan = _plan(trainer)
        if plan is None:
            return
        changes = differences(self._reference["data"], plan.fingerprint) if self._reference else []
        if self._reference and not changes:
            return
        figures = self._measure(trainer)
        if not math.isfinite(figures[NLL]):
            end_together(trainer)
            raise InputError(f"the loss of the guard documents is {figures[NLL]} before the first step",
                             where="data.guard_sources", fix="give other documents, or set --trainer.precision 32-true")
        if trainer.global_step and trainer.is_global_zero:
            why = f"the guard documents have changed ({'; '.join(changes)})" if changes else "they are new in this run"
            log.warning("data.guard_sources: %s, so a rise is measured from step %d on, not from the start of the run",
                        why, trainer.global_step)
        if not trainer.global_step:
            self._keep(trainer, figures)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure within a validation, and log the values as its metrics."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and _plan(trainer) is not None:
            figures = self._measure(trainer)
            module.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()},
                            rank_zero_only=False, sync_dist=False)
            self._judge(trainer, figures)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure at the end of a run without validation data."""
        if self._step != trainer.global_step and _plan(trainer) is not None:
            figures = self._measure(trainer)
            _record(trainer, figures, trainer.global_step)
            self._judge(trainer, figures)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def _measure(self, trainer: L.Trainer) -> dict[str, float]:
        """The metrics of the model in memory. Collective."""
        begun = time.monotonic()
        plan: Any = _plan(trainer)
        nll, tokens = _scores(trainer), _tokens(plan)
        changed = self._reference and differences(self._reference["data"], plan.fingerprint)
        if not self._reference or changed:
            self._reference = {"step": trainer.global_step, "data": plan.fingerprint, "nll": nll.tolist()}
        before = np.array(self._reference["nll"])
        figures = {NLL: _ratio(nll, tokens)}
        names = short_names(plan.corpus.names)
        for number, name in enumerate(names if len(names) > 1 else ()):
            own = plan.corpus.store_of == number
            if own.any():
                figures[f"{NLL}/{name}"] = _ratio(nll[own], tokens[own])
        figures |= {"guard/tokens": float(tokens.sum()), RISE: _ratio(nll - before, tokens)}
        if (interval := intervals.paired(nll, before, tokens)) is not None:
            figures |= {f"{RISE}_low": interval.low, f"{RISE}_high": interval.high}
        figures["guard/worse"] = float((nll > before).mean())
        self._step = trainer.global_step
        self.seconds += time.monotonic() - begun
        return figures

    def _judge(self, trainer: L.Trainer, figures: dict[str, float]) -> None:
        """Report a rise beyond its interval, and stop the run where that is wanted. Collective."""
        rise, low, now = figures[RISE], figures.get(f"{RISE}_low", math.nan), figures[NLL]
        risen = low > 0 or not math.isfinite(now)
        stops = self.stop_beyond is not None and risen and not rise <= self.stop_beyond
        stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if trainer.is_global_zero and risen:
            log.warning("%s", self._words(trainer, figures))
        if stops:
            self.reason = (f"at step {trainer.global_step:,} the loss of the guard documents has risen by {rise:.3f} "
                           f"nats per token, more than trainer.stop_on_forgetting: {self.stop_beyond:g}")
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.warning("the run ends here: %s", self.reason)

    def _words(self, trainer: L.Trainer, figures: dict[str, float]) -> str:
        """A rise in one line."""
        now, rise, start = figures[NLL], figures[RISE], self._reference["step"]
        interval = (f", 95 % interval {figures[f'{RISE}_low']:+.3f} to {figures[f'{RISE}_high']:+.3f}"
                    if f"{RISE}_low" in figures else "")
        since = f"at step {start:,}" if start else "before training"
        return (f"forgetting: the loss of the guard documents is {now:.3f} nats per token at step "
                f"{trainer.global_step:,}, {now - rise:.3f} {since} ({rise:+.3f}{interval}; perplexity "
                f"{_perplexity(now - rise):,.2f} before, {_perplexity(now):,.2f} now; {figures['guard/worse']:.0%} of "
                f"{len(self._reference['nll']):,} documents are worse, {figures['guard/tokens']:,.0f} tokens)")

    @staticmethod
    def _keep(trainer: L.Trainer, figures: dict[str, float]) -> None:
        """Store the values before training with those of the validation data."""
        _record(trainer, figures, 0)
        if hasattr(trainer, "run"):
            trainer.run.before |= {name: value for name, value in figures.items() if name.startswith(NLL)}


def _record(trainer: L.Trainer, figures: dict[str, float], step: int) -> None:
    """Write metrics to `metrics.csv` outside of a validation."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.add(figures | {"epoch": trainer.current_epoch}, step)


def _plan(trainer: L.Trainer) -> Any:
    """The plan of the guard documents; null without any, and where validation is switched off."""
    if trainer.limit_val_batches == 0:
        return None
    return getattr(trainer.datamodule, "plans", {}).get("guard")  # type: ignore[attr-defined]


def _scores(trainer: L.Trainer) -> np.ndarray:
    """(N,) summed NLL of each guard document in nats, equal on all ranks. Collective."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    strategy = trainer.strategy
    totals = np.zeros(len(data.plans["guard"].corpus))
    with undisturbed(trainer), trainer.precision_plugin.val_step_context():
        for documents, batch in data.guard_batches():
            nll = scored(trainer, strategy.batch_to_device(batch)).tokens.nll.double().cpu().numpy()
            which = np.repeat(documents, _supervised(batch, len(documents)))
            totals += np.bincount(which, nll, len(totals))
    whole: Any = strategy.reduce(torch.from_numpy(totals).to(strategy.root_device), reduce_op="sum")
    return np.asarray(whole.cpu().numpy(), dtype=np.float64)


def _supervised(batch: Batch, documents: int) -> np.ndarray:
    """(documents,) supervised tokens of each document of a batch."""
    ends = np.cumsum(batch["labels"].view(-1).numpy() != IGNORE_INDEX)[batch["cu_seqlens"].numpy()[1:] - 1]
    return np.diff(ends, prepend=0)[:documents]


def _tokens(plan: Any) -> np.ndarray:
    """(N,) supervised tokens of each document that are scored."""
    counts = np.zeros(len(plan.corpus), np.int64)
    counts[plan.rows.segments.sequence] = plan.rows.segment_supervised
    return counts


def _ratio(nll: np.ndarray, tokens: np.ndarray) -> float:
    return float(nll.sum() / tokens.sum())


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
