"""Store the figures of an evaluation by source, answer and position, and the sums of each document.

`breakdown.jsonl` has a line for each validation of a fit. `val_documents.jsonl` and `test_documents.jsonl` have a line
for each document of the last `validate` or `test`; two such files are compared document by document
(`lit_llm/statistics/intervals.paired`).
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lit_llm import disk
from lit_llm.data.rows.cells import short_names
from lit_llm.system.redaction import redact_text
from lit_llm.training.step.breakdown import Breakdown

log = logging.getLogger(__name__)
BREAKDOWNS = "breakdown.jsonl"


def breakdown_of(trainer: L.Trainer, split: str) -> Breakdown | None:
    """The breakdown of the last evaluation of a split; null for modules and loaders without one."""
    metrics: Any = getattr(trainer.lightning_module, "perplexity", None) or {}
    return getattr(metrics[split], "breakdown", None) if split in metrics else None


def keep(trainer: L.Trainer, split: str) -> None:
    """Add the breakdown of a validation within a fit to `breakdown.jsonl`, on rank 0; later steps are dropped.

    A file that cannot be written is a warning, because the run must not end for it.
    """
    breakdown, file = breakdown_of(trainer, split), Path(trainer.default_root_dir) / BREAKDOWNS
    if not trainer.is_global_zero or breakdown is None or not file.parent.is_dir():
        return
    step = trainer.global_step
    try:
        before = [line for line in _lines(file) if json.loads(line).get("step", step) < step]
        line = json.dumps({"step": step, "split": split, **finite(breakdown.details())}, ensure_ascii=False)
        disk.replace_text(file, "".join(f"{text}\n" for text in [*before, redact_text(line)]))
    except (OSError, ValueError) as error:
        log.warning("%s could not be written: %s", file, disk.reason(error))


def write_documents(trainer: L.Trainer, split: str) -> None:
    """Write the sums of each document of `validate` or `test` to `{split}_documents.jsonl`, on rank 0."""
    breakdown = breakdown_of(trainer, split)
    if not trainer.is_global_zero or breakdown is None:
        return
    documents, more = breakdown.documents, {}
    plan = getattr(trainer.datamodule, "plans", {}).get(split)  # type: ignore[attr-defined]
    if plan is not None:
        more["place"] = _places(plan.corpus, documents.document, [documents.names[at] for at in documents.source])
    text = redact_text("".join(documents.lines(more)))
    disk.replace_text(Path(trainer.default_root_dir) / f"{split}_documents.jsonl", text)


def finite(values: Any) -> Any:
    """Values for JSON: those that are not finite are null."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _places(corpus: Any, records: np.ndarray, sources: list[str]) -> list[str]:
    """The place of each record in its source."""
    names = short_names(corpus.names)
    first: dict[tuple[str, int], int] = {}          # the first sequence of each record
    records_of = corpus.record_of(np.arange(len(corpus))).tolist()
    for sequence, (store, record) in enumerate(zip(corpus.store_of.tolist(), records_of, strict=True)):
        first.setdefault((names[store], record), sequence)
    return [corpus.place(first[pair]) for pair in zip(sources, records.tolist(), strict=True)]


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
