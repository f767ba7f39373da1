"""Write logged metrics to `metrics.csv` and `metrics.json`; no external service is needed."""

import csv
import io
import json
import logging
import math
import os
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_llm import disk
from lit_llm.report.rows import FIRST, columns_of, whole_rows
from lit_llm.system.redaction import redact_text

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """`metrics.csv` of a run folder: one row per step with logged metrics, one column per metric.

    Rows are appended, and only the last one is kept in memory. The file is rewritten, row by row, when a new metric
    needs a column and when a run is resumed. A resumed run continues the file: rows after the step that it resumes
    from are dropped, so that no step occurs twice, and so are incomplete rows left by a power failure.

    Args:
        folder: The run folder; created with the first row.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._columns: list[str] = []               # empty: the file does not belong to this run yet
        self._last: dict[str, Any] = {}             # the last row,
        self._at = self._end = 0                    # and its start and end offsets in the file
        self._started = time.monotonic()
        self.recording = True                       # false outside fit: the file records the training only

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.file.parent.name

    @property
    def version(self) -> str:
        """Empty: the folder identifies the run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `config.yaml` contains them."""

    def resume(self, step: int) -> None:
        """Keep the complete rows up to a step."""
        if not self.file.is_file():
            return
        columns = columns_of(self.file)
        if not columns:
            aside = self.file.with_name("metrics.csv.damaged")
            os.replace(self.file, aside)
            log.warning("%s had no complete header; it was moved to %s and a new file was started", self.file, aside)
            return
        if broken := self._rewrite(columns, step):
            log.warning("%s: %d incomplete lines, as after a power failure, were dropped", self.file, broken)

    def sync(self) -> None:
        """Flush all rows to disk."""
        if self._columns:
            disk.sync(self.file)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step; Lightning counts steps from 0, this file from 1."""
        if self.recording:
            self.add(metrics, (step or 0) + 1)

    @rank_zero_only
    def add(self, metrics: dict[str, float], step: int) -> None:
        """Add metrics to the row of a step.

        Args:
            metrics: Values by name; `epoch` has its own column.
            step: Number of completed optimizer steps; 0 is before training.
        """
        figures = {key: value for key, value in metrics.items() if key != "epoch"}
        if not figures:
            return
        if self._columns and self.file.stat().st_size != self._end:     # another program wrote to it
            self.resume(step)
        row = {"step": step, "epoch": int(metrics.get("epoch", 0)),
               "seconds": round(time.monotonic() - self._started, 3)} | figures
        at = self._end
        if self._last.get("step") == step:  # written for a checkpoint before Lightning logged it, or measured again
            if all(str(self._last.get(key)) == str(value) for key, value in figures.items()):
                return
            row, at = self._last | figures, self._at
        columns = list(dict.fromkeys([*(self._columns or FIRST), *figures]))
        if columns != self._columns:
            grown = at == self._at and self._end > at
            self._rewrite(columns, step, keeping=bool(self._columns))
            at = self._at if grown else self._end
        line = _line(row, self._columns)
        _replace_end(self.file, at, line)
        self._last, self._at, self._end = row, at, at + len(line)

    def _rewrite(self, columns: list[str], step: int, *, keeping: bool = True) -> int:
        """Rewrite the file with these columns and, if wanted, complete rows up to a step; return the dropped rows."""
        fresh, last, at, broken = self.file.with_name("metrics.csv.partial"), {}, 0, 0
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(fresh, "wb") as stream:
                end = stream.write(_line(dict(zip(columns, columns, strict=True)), columns))
                for row in whole_rows(self.file) if keeping else ():
                    if row is None:
                        broken += 1
                    elif int(row["step"]) <= step:
                        last, at = row, end
                        end += stream.write(_line(row, columns))
            disk.sync(fresh)
            os.replace(fresh, self.file)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        self._columns, self._at, self._end = columns, at, end
        self._last = {key: value for key, value in last.items() if value != ""}
        if last:
            self._last["step"] = int(last["step"])
        return broken


def _line(row: dict[str, Any], columns: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="").writerow(row)
    return text.getvalue().encode()


def _replace_end(file: Path, at: int, line: bytes) -> None:
    """Write a line at an offset to the end of a file; if the disk is full, the file is unchanged."""
    with open(file, "r+b", buffering=0) as handle:
        handle.seek(at)
        before = handle.readall()
        try:
            _write(handle, at, line)
        except OSError:
            with suppress(OSError):                 # restores the old bytes, which need no new space
                _write(handle, at, before)
            raise


def _write(handle: io.FileIO, at: int, content: bytes) -> None:
    handle.seek(at)
    left = memoryview(content)
    while left:
        left = left[handle.write(left):]
    handle.truncate()


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write metrics as JSON atomically; values that are not finite become null."""
    clean = {key: (None if isinstance(value, float) and not math.isfinite(value) else value)
             for key, value in figures.items()}
    disk.replace_text(file, redact_text(json.dumps(clean, indent=1, ensure_ascii=False)) + "\n")
