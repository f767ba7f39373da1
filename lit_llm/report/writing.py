"""Write the report of a run into its folder, and the comparison of several runs."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.report import comparison, facts, page
from lit_llm.report.drawing import curves, picture

log = logging.getLogger(__name__)
REPORT, PAGE, PICTURE, PNG = "report.json", "report.html", "curves.svg", "curves.png"
FILES = (facts.RUN, REPORT, PAGE, PICTURE)          # what a run adds to its folder for its report


def report(runs: list[str], out: str = "comparison.html") -> str:
    """Write a run's report again from the files in its folder, or compare several runs on one page.

    Args:
        runs: Folders of runs, typed without an option: report runs/sft. The report of one is written into its folder;
            several are compared.
        out: The page that compares several runs.

    Returns:
        Which files were written.
    """
    if not runs:
        raise InputError("no run was given", where="report", fix="python -m lit_llm report runs/sft")
    folders = [Path(run).expanduser() for run in runs]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}", where="report", fix="give the folder of a run: runs/sft")
    if len(folders) == 1:
        write(folders[0])
        return f"wrote {folders[0] / PAGE} and {REPORT}"
    with _readable(", ".join(runs)):
        every = [facts.of(folder) for folder in folders]
        compared = comparison.compared(every)
    disk.replace_text(Path(out).expanduser(), compared)
    return f"wrote {out}, which compares {', '.join(comparison.names_of(every))}"


def write(run: Path) -> None:
    """Write `report.json`, `report.html` and `curves.svg`; a reader sees whole files only.

    Raises:
        InputError: The folder is not that of a run, or its files have another form.
        OSError: A file cannot be written.
    """
    with _readable(str(run)):
        values = facts.of(run)
        shown, drawn = page.page(values), curves.picture(values)
    disk.replace_text(run / REPORT, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    disk.replace_text(run / PAGE, shown)
    if drawn:
        disk.replace_text(run / PICTURE, drawn)


@contextmanager
def _readable(run: str) -> Iterator[None]:
    """Errors of files that have another form than a run writes, as errors of the user."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(f"the files of {run} do not have the form that a run writes "
                         f"({type(error).__name__}: {str(error)[:200]})", where="report",
                         fix="run.json, data.json and *.jsonl must be as the run wrote them") from error


def picture_of(run: Path) -> tuple[str, bytes] | None:
    """The curves of a run for a model card, as the name and the content of a file.

    A PNG where matplotlib is installed, and otherwise an SVG; null if the run has no curves, or if they cannot be
    drawn.
    """
    try:
        values = facts.of(run)
        drawn = curves.pictured(values)
        if drawn and picture.is_available():
            return PNG, picture.png(drawn, curves.best_step(values))
        return (PICTURE, curves.picture(values).encode()) if drawn else None
    except Exception as error:
        log.warning("the curves of %s could not be drawn: %s", run, disk.reason(error))
        return None


def try_to_write(run: Path) -> None:
    """Write the report; an error is logged and never raised, because the run matters more than its report."""
    try:
        write(run)
    except Exception as error:
        log.warning("the report of %s could not be written: %s", run, disk.reason(error))
