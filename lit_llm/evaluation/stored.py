"""Results as JSON: written by `evaluate --out`, and read again to compare a later model with them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.evaluation.material import Units
from lit_llm.evaluation.result import Difference, Figure, Result
from lit_llm.training.record.breakdowns import finite

FORMAT = 1
COLUMNS = {"source": "<i8", "content": "<u8", "tokens": "<i8", "bytes": "<i8", "characters": "<i8", "words": "<i8"}


def write(out: str, results: Sequence[Result], differences: Sequence[Difference]) -> None:
    """Write results and their differences; a reader sees the old or the new file."""
    facts = {"format": FORMAT, "models": [described(result) for result in results],
             "differences": [finite(asdict(difference)) for difference in differences]}
    disk.replace_text(Path(out).expanduser(), json.dumps(facts, ensure_ascii=False) + "\n")


def described(result: Result) -> dict[str, Any]:
    """A result as values: figures, those of each source, what was measured, and the sums of each document."""
    columns = {name: getattr(result.units, name) for name in COLUMNS} | {"nll": result.nll, "correct": result.correct}
    return {"name": result.name, "is_base": result.is_base, **_figures(result.figures()),
            "by_source": {name: _figures(figures) for name, figures in result.by_source().items()},
            **{f"by_{name.removesuffix('s')}": finite(groups) for name, groups in result.details.items()},
            "documents": int((result.units.tokens > 0).sum()), "notes": result.notes,
            "measured": result.measured | {"seed": 0},
            "sums": {name: values.tolist() for name, values in columns.items() if values is not None}}


def _figures(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: {"value": finite(figure.value), "low": finite(figure.low), "high": finite(figure.high),
                   "reliable": figure.reliable, figure.unit: figure.count} for name, figure in figures.items()}


def read(name: str) -> list[Result]:
    """Results of an earlier evaluation.

    Raises:
        InputError: The file is not one that `evaluate --out` wrote.
    """
    path = Path(name).expanduser()
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}")
        return [_result(entry) for entry in facts["models"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"it is not a result of `evaluate --out`: {type(error).__name__} {str(error)[:120]}",
                         where=name, fix="evaluate the model again: python -m lit_llm evaluate FOLDER --data FILE "
                         f"--out {path.name}") from None


def _result(entry: dict[str, Any]) -> Result:
    sums = entry["sums"]
    columns = {key: np.array(sums[key], dtype=kind) for key, kind in COLUMNS.items() if key in sums}
    nll, correct = np.array(sums["nll"], dtype=np.float64), np.array(sums["correct"], dtype=np.int64)
    measured = entry["measured"]
    if len({values.shape for values in (*columns.values(), nll, correct)}) != 1 or nll.ndim != 1:
        raise ValueError("its columns have different lengths")
    sources = [str(source) for source in measured["sources"]]
    if len(nll) and not 0 <= columns["source"].min() <= columns["source"].max() < len(sources):
        raise ValueError("a document of an unknown source")
    if not isinstance(measured["fingerprints"], dict) or not isinstance(measured["windows"], dict):
        raise TypeError("fingerprints and windows are mappings")
    return Result(str(entry["name"]), measured, Units(sources=sources, **columns), nll, correct,
                  is_base=bool(entry["is_base"]))
