"""Warn about a finished run that was too short, did not learn, or trained for too long.

Thresholds are where a user should look again, not proofs. Reads `metrics.csv`, `data.json` and the checkpoints' names.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llm.training.run.report import rows_of

FEW_STEPS = 50                                      # updates; warmup and schedule alone want some tens
LEARNED = 0.5                                       # nats: answers of which most tokens are known; no run is too short
HIGH_ANSWERS = 2.5                                  # nats for each token of answers, as a base has them before training
HIGH_AGAIN = 1.0                                    # the same after many passes, when the answers should be known
MANY_PASSES = 5.0
HIGH_TEXT = 5.0                                     # nats for each token of plain text, a perplexity of 148
RISES = 1.02                                        # last perplexity over the best: below, it is noise
LAST = 0.1                                          # share of the logged losses whose mean is the final loss


@dataclass(frozen=True, slots=True)
class Course:
    """How a run went.

    Args:
        steps: Optimizer steps.
        passes: How often the training data were gone through; null where that is not known.
        answers: Whether answers were learned, and not plain text alone.
        losses: Training loss in nats for each supervised token, as logged.
        validations: (step, nats), in their order; the one before training is not among them.
        before: Nats of the validation before training, if there was one.
    """

    steps: int
    passes: float | None = None
    answers: bool = True
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    before: float | None = None


def warnings(course: Course) -> list[str]:
    """Sentences on what the run could not do; none where nothing is wrong."""
    found = []
    losses = [loss for loss in course.losses if math.isfinite(loss)]
    last = losses[-max(1, round(LAST * len(losses))):] if losses else []
    final = sum(last) / len(last) if last else None
    if course.steps < FEW_STEPS and (final is None or final > LEARNED):
        passes = f" in {course.passes:.1f} passes over the data" if course.passes is not None else ""
        found.append(f"{course.steps:,} steps{passes} are too few to learn much: raise trainer.max_epochs, or lower "
                     "data.batch_size and trainer.accumulate_grad_batches, so that the same data give more steps")
    again = course.passes is not None and course.passes >= MANY_PASSES
    limit = (HIGH_AGAIN if again else HIGH_ANSWERS) if course.answers else HIGH_TEXT
    if final is not None and final > limit:
        after = f" after {course.passes:.0f} passes over the same data" if again and course.passes is not None else ""
        found.append(f"the training loss is still {final:.2f} nats a token{after} (perplexity {math.exp(final):,.1f}): "
                     "what was trained is not learned yet; raise trainer.max_epochs or model.lr, and with adapters "
                     "model.lora.r")
    found += _risen(course)
    return found


def _risen(course: Course) -> list[str]:
    """Whether validation is worse at the end than it was."""
    known = [(step, nll) for step, nll in course.validations if math.isfinite(nll)]
    if not known:
        return []
    step, best = min(known, key=lambda pair: pair[1])
    last = known[-1][1]
    if course.before is not None and course.before < best and best - course.before > math.log(RISES):
        return [f"validation is worse than before training (perplexity {math.exp(course.before):,.3f} before, "
                f"{math.exp(best):,.3f} at its best): training hurt on held-out data; lower model.lr or "
                "trainer.max_epochs, or add data"]
    if last - best > math.log(RISES):
        return [f"validation rises: perplexity {math.exp(best):,.3f} at step {step:,}, {math.exp(last):,.3f} at the "
                "end; the export holds the best checkpoint, and a shorter run (trainer.max_epochs) would do"]
    return []


def course_of(run: Path, before: float | None = None) -> Course:
    """Of a finished run.

    Args:
        run: Its folder.
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
    return Course(steps, _passes(data), _answers(data), losses, validations, before)


def _passes(data: dict[str, Any]) -> float | None:
    """Tokens drawn for each token there is; not known of a stream."""
    there = (data.get("train") or {}).get("tokens")
    drawn = sum(counts["tokens"] for counts in (data.get("ledger") or {}).values())
    return drawn / there if there and drawn else None


def _answers(data: dict[str, Any]) -> bool:
    """Whether the assistant's words were learned: marks are pairs, silent and learned, for each who speaks."""
    from lit_llm.text.tokenizer import SPEAKERS

    place = 2 * SPEAKERS.index("assistant") + 1
    return any(report.get("marks", [0] * (place + 1))[place] for report in data.get("sources") or [])
