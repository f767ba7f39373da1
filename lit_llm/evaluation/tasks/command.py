"""`evaluate --tasks`: find the tasks, evaluate each model, print a table with intervals over questions."""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.evaluation.scoring.subject import Subject
from lit_llm.evaluation.tasks import code
from lit_llm.statistics import intervals

WRITTEN = ("results", "configs", "n-samples", "samples")        # of the results of lm_eval


def evaluate_tasks(subjects: Sequence[Subject], words: Sequence[str], *, chat: bool, num_fewshot: int | None,
                   limit: int | None, dtype: str, quantize: str | None, device: str, out: str | None) -> str:
    """Evaluate models on tasks of lm_eval.

    Args:
        subjects: The models.
        words: Names of tasks, or folders with task files, all of whose tasks are taken if no name is given.
        chat: Ask through the chat template.
        num_fewshot: Examples before each question; null for the number of the task.
        limit: Only the first questions of each task.
        dtype: As in `evaluate`.
        quantize: As in `evaluate`.
        device: As in `evaluate`.
        out: File for the results of lm_eval, with those of each question.

    Returns:
        The text to print.

    Raises:
        InputError: lm_eval is not installed, there is no such task, or a task runs code of its own.
    """
    if find_spec("lm_eval") is None:
        raise InputError("the package 'lm_eval' is not installed", where="tasks",
                         fix="pip install 'lit_llm[tasks]'")
    tasks, folders, own = _found(words)
    from lit_llm.evaluation.tasks import harness

    rows: list[tuple[str, str, str, float, dict[int, float]]] = []
    written: dict[str, Any] = {"lm_eval": version("lm_eval"), "chat": chat, "models": {}}
    for subject in subjects:
        model = harness.HarnessModel(subject, dtype=dtype, quantize=quantize, device=device)
        results = harness.run(model, tasks, folders, own=own, chat=chat, num_fewshot=num_fewshot, limit=limit)
        rows += [(subject.name, *row) for row in harness.values(results)]
        written["models"][subject.name] = {key: results.get(key) for key in WRITTEN}
        del model
    if out is not None:
        disk.replace_text(Path(out), json.dumps(written, ensure_ascii=False, default=str, indent=1) + "\n")
        print(f"wrote {out}", file=sys.stderr)
    return table(rows)


def _found(words: Sequence[str]) -> tuple[list[str], list[Path], bool]:
    """Names of tasks, folders of task files, and whether tasks of lm_eval itself are wanted."""
    places = [Path(word).expanduser() for word in words if Path(word).expanduser().is_dir() or
              word.endswith(code.ENDINGS)]
    names = [word for word in words if Path(word).expanduser() not in places]
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise InputError("there is no such file", where=str(place))
        files += code.files(place) if place.is_dir() else [place]
    code.check(files)
    folders = [place if place.is_dir() else place.parent for place in places]
    for folder in {folder.resolve() for folder in folders}:
        code.check(code.files(folder))              # lm_eval reads the neighbours of a file as well
    defined = [name for file in files for name in code.names(file)]
    if places and not names:
        if not defined:
            raise InputError("no file defines a task", where=str(places[0]), fix="a task file has the key `task`")
        return defined, folders, False
    return names, folders, not set(names) <= set(defined)


def table(rows: Sequence[tuple[str, str, str, float, dict[int, float]]]) -> str:
    """One line for each model, task and metric; then the differences from the first model on the same questions.

    Args:
        rows: (model, task, metric, value, value of each question by number).
    """
    lines = [("model", "task", "metric", "value", "95 % interval", "questions")]
    for model, task, metric, value, questions in rows:
        interval = intervals.ratio(list(questions.values()), np.ones(len(questions))) if questions else None
        lines.append((model, task, metric, f"{value:.4f}", _shown(interval), str(len(questions) or "-")))
    for model, task, metric, _, questions in rows:
        first = next(row for row in rows if row[1:3] == (task, metric))
        both = sorted(questions.keys() & first[4].keys())
        if model == first[0] or not both:
            continue
        new, old = ([values[at] for at in both] for values in (questions, first[4]))
        lines.append((f"{model} - {first[0]}", task, metric, f"{np.mean(new) - np.mean(old):+.4f}",
                      _shown(intervals.paired(new, old, np.ones(len(both)))), f"{len(both):,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def _shown(interval: intervals.Interval | None) -> str:
    return "-" if interval is None else f"[{interval.low:.4f}, {interval.high:.4f}]"
