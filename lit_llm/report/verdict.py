"""Warn about a finished run that was too short, did not learn, or trained for too long.

The thresholds are hints where to look, not proofs. Reads `metrics.csv`, `data.json` and the names of checkpoints.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llm.report.rows import rows_of

FEW_STEPS = 50                                      # optimizer steps; warmup and schedule need some tens
LEARNED = 0.5  # nats per token; below, answers are mostly known and no run is too short
HIGH_ANSWERS = 2.5                                  # nats per token of answers, typical of a base before training
HIGH_AGAIN = 1.0                                    # the same after many passes
MANY_PASSES = 5.0
HIGH_TEXT = 5.0                                     # nats per token of plain text, a perplexity of 148
RISES = 1.02                                        # ratio of last to best perplexity; below, it is noise
LAST = 0.1                                          # share of the logged losses that are averaged for the final loss


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a run.

    Args:
        steps: Number of optimizer steps.
        passes: Passes over the training data; null if unknown.
        answers: Whether answers of conversations were trained on, not only plain text.
        losses: Logged training losses in nats per supervised token.
        validations: (step, nats) in order, without the validation before training.
        before: Nats of the validation before training; null if there was none.
        forgetting: Step, nats, rise and its interval's low and high end of the guard documents, at the best checkpoint
            or at the end; null without guard documents.
    """

    steps: int
    passes: float | None = None
    answers: bool = True
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    before: float | None = None
    forgetting: tuple[int, float, float, float, float] | None = None


def warnings(course: Course, *, finished: bool = True) -> list[str]:
    """Warnings about a run; empty if nothing is wrong.

    Args:
        course: The course of the run.
        finished: Whether it has ended as planned; only then can it have been too short.
    """
    if not finished:
        return [*_risen(course), *_forgot(course)]
    messages = []
    losses = [loss for loss in course.losses if math.isfinite(loss)]
    last = losses[-max(1, round(LAST * len(losses))):] if losses else []
    final = sum(last) / len(last) if last else None
    if course.steps < FEW_STEPS and (final is None or final > LEARNED):
        passes = f" in {course.passes:.1f} passes over the data" if course.passes is not None else ""
        messages.append(f"{course.steps:,} steps{passes} are too few to learn much: raise trainer.max_epochs, or lower "
                        "data.batch_size and trainer.accumulate_grad_batches, so that the same data give more steps")
    again = course.passes is not None and course.passes >= MANY_PASSES
    limit = (HIGH_AGAIN if again else HIGH_ANSWERS) if course.answers else HIGH_TEXT
    if final is not None and final > limit:
        after = f" after {course.passes:.0f} passes over the same data" if again and course.passes is not None else ""
        messages.append(f"the training loss is still {final:.2f} nats per token{after} (perplexity "
                        f"{_perplexity(final):,.1f}): the training data are not learned yet; raise trainer.max_epochs "
                        "or model.lr, and with adapters model.lora.r")
    return [*messages, *_risen(course), *_forgot(course)]


def _forgot(course: Course) -> list[str]:
    """Warn if the loss of the guard documents has risen beyond its interval."""
    if course.forgetting is None or not course.forgetting[3] > 0:
        return []
    step, nll, rise, low, high = course.forgetting
    return [f"the loss of the guard documents has risen by {rise:.3f} nats per token at step {step:,} (95 % interval "
            f"{low:.3f} to {high:.3f}; perplexity {_perplexity(nll - rise):,.2f} before training, "
            f"{_perplexity(nll):,.2f} now): the model forgets; lower model.lr or trainer.max_epochs, train adapters "
            "(model.lora), or add such data to data.sources"]


def _risen(course: Course) -> list[str]:
    """Warn if validation is worse at the end than before."""
    finite = [(step, nll) for step, nll in course.validations if math.isfinite(nll)]
    if not finite:
        return []
    step, best = min(finite, key=lambda pair: pair[1])
    last = finite[-1][1]
    if course.before is not None and course.before < best and best - course.before > math.log(RISES):
        return [f"validation is worse than before training (perplexity {_perplexity(course.before):,.3f} before, "
                f"{_perplexity(best):,.3f} at its best): training made held-out data worse; lower model.lr or "
                "trainer.max_epochs, or add data"]
    if last - best > math.log(RISES):
        return [f"validation rises: perplexity {_perplexity(best):,.3f} at step {step:,}, {_perplexity(last):,.3f} at "
                "the end; the best checkpoint is exported, and a shorter run (trainer.max_epochs) would suffice"]
    return []


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def course_of(run: Path, before: float | None = None) -> Course:
    """The course of a finished run.

    Args:
        run: The run folder.
        before: Nats of the validation before training.
    """
    rows = rows_of(run / "metrics.csv")
    latest = run / "checkpoints" / "LATEST"
    step = latest.read_text(encoding="utf-8").strip().removeprefix("step_") if latest.is_file() else ""
    steps = int(step) if step.isdigit() else 0
    data = json.loads((run / "data.json").read_text(encoding="utf-8")) if (run / "data.json").is_file() else {}
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    validations = [(int(row["step"]), float(row["val/nll"])) for row in rows if row.get("val/nll")]
    if before is not None and validations and validations[0][0] == 0 and len(rows) > 1:
        validations = validations[1:]
    return Course(steps, _passes(data), _answers(data), losses, validations, before, _forgetting(run, rows))


def _forgetting(run: Path, rows: list[dict[str, str]]) -> tuple[int, float, float, float, float] | None:
    """The figures of the guard documents at the best checkpoint, or else the newest ones."""
    names = ("step", "guard/nll", "guard/rise", "guard/rise_low", "guard/rise_high")
    measured = [row for row in rows if all(row.get(name) for name in names)]
    best = run / "checkpoints" / "BEST"
    step = best.read_text(encoding="utf-8").strip().removeprefix("step_") if best.is_file() else ""
    row = next((row for row in measured if row["step"] == step), measured[-1] if measured else None)
    if row is None:
        return None
    _, nll, rise, low, high = (float(row[name]) for name in names)
    return int(row["step"]), nll, rise, low, high


def _passes(data: dict[str, Any]) -> float | None:
    """Drawn tokens per token of the data; unknown for a stream."""
    there = (data.get("train") or {}).get("tokens")
    drawn = sum(counts["tokens"] for counts in (data.get("ledger") or {}).values())
    return drawn / there if there and drawn else None


def _answers(data: dict[str, Any]) -> bool:
    """Whether assistant tokens were supervised."""
    return any(((report.get("speakers") or {}).get("assistant") or {}).get("supervised")
               for report in data.get("sources") or [])
