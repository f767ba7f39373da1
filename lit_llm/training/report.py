"""Logged figures in, `metrics.csv` and `metrics.json` out: what a run leaves behind without any account anywhere.

Knows nothing of models or training; a row is what somebody logged at a step.
"""

import csv
import io
import json
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_llm import disk
from lit_llm.redaction import redact_text

FIRST = ["step", "epoch", "seconds"]


class MetricsCSV(Logger):
    """`metrics.csv` of a run folder: one row for each step at which something was logged, a column for each metric.

    A resumed run continues the file: rows behind the step it resumes from are dropped, so that no step stands twice.

    Args:
        folder: The run folder; made with the first row.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = list(FIRST)
        self._started = time.monotonic()
        self.recording = True                       # false outside fit: the file is the record of the training

    @property
    def name(self) -> str:
        """Of the run."""
        return self.file.parent.name

    @property
    def version(self) -> str:
        """None: the folder is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` holds them."""

    def resume(self, step: int) -> None:
        """Keep the rows up to a step, in memory and in the file."""
        if not self.file.is_file():
            return
        with open(self.file, newline="", encoding="utf-8") as handle:
            rows = [row for row in csv.DictReader(handle) if int(row["step"]) <= step]
        self._rows = [{key: value for key, value in row.items() if value != ""} | {"step": int(row["step"])}
                      for row in rows]
        self._columns = list(FIRST)
        self._write()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add figures to the row of a step, which Lightning counts from 0 and this file, as all others do, from 1."""
        if self.recording:
            self.add(metrics, (step or 0) + 1)

    @rank_zero_only
    def add(self, metrics: dict[str, float], step: int) -> None:
        """Add figures to the row of a step.

        Args:
            metrics: By name; `epoch` has a column of its own.
            step: Optimizer steps done; 0 is before training.
        """
        figures = {key: value for key, value in metrics.items() if key != "epoch"}
        if not figures:
            return
        row = {"step": step, "epoch": int(metrics.get("epoch", 0)),
               "seconds": round(time.monotonic() - self._started, 3)}
        last = self._rows[-1] if self._rows else {}
        if last.get("step") == row["step"]:         # written for a checkpoint before Lightning did, or measured again
            if any(str(last.get(key)) != str(value) for key, value in figures.items()):
                last.update(figures)
                self._write()
            return
        self._rows.append(row | figures)
        if set(figures) - set(self._columns):
            self._write()
        else:
            with open(self.file, "a", newline="", encoding="utf-8") as handle:
                csv.DictWriter(handle, self._columns, restval="").writerow(self._rows[-1])

    def _write(self) -> None:
        """The whole file anew: a new column, or a row that grew."""
        self._columns = list(dict.fromkeys([*self._columns, *(key for row in self._rows for key in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        disk.replace_text(self.file, text.getvalue())


def last_logged(folder: Path, name: str) -> tuple[int, float] | None:
    """The last step at which a metric was logged in a run's `metrics.csv`, and its value; null if there is none."""
    try:
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as handle:
            found = [(int(row["step"]), float(row[name])) for row in csv.DictReader(handle) if row.get(name)]
    except OSError:
        return None
    return found[-1] if found else None


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON in one move; what is not finite becomes null."""
    clean = {key: (None if isinstance(value, float) and not math.isfinite(value) else value)
             for key, value in figures.items()}
    disk.replace_text(file, redact_text(json.dumps(clean, indent=1, ensure_ascii=False)) + "\n")
