"""If this breaks: a power failure within a line of `metrics.csv` makes a run unresumable or repeats a step, a long run rewrites
its metrics at each validation and keeps all of them in memory, or a full disk leaves an incomplete line.

Oracle: the rows that were logged, read by Python's csv module.
"""

import csv
import os
import resource
import shutil
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_llm.report.rows import MEASURED, last_logged, rows_of
from lit_llm.training.run.report import MetricsCSV
from tests.test_cli import call, place

assert place                                        # a fixture


def logged(folder, steps, first=0):
    """A file with a validation before training and a row for each step, and a validation after every second step."""
    logger = MetricsCSV(folder)
    if first:
        logger.resume(first)
    else:
        logger.add({"val/nll": 5.0}, 0)
    for step in range(first, steps):
        logger.log_metrics({"train/loss": 3.0 - step / 100, "lr": 1e-3, "epoch": step // 4}, step)
        if step % 2:
            logger.log_metrics({"val/nll": 4.0 - step / 100, "epoch": step // 4}, step)
    return logger


def plain(folder):
    with open(Path(folder) / "metrics.csv", newline="") as handle:
        return [{key: value for key, value in row.items() if value and key not in MEASURED} for row in csv.DictReader(handle)]


def test_rows_are_what_was_logged(tmp_path):
    logged(tmp_path, 4)
    assert plain(tmp_path) == [
        {"step": "0", "epoch": "0", "val/nll": "5.0"},
        {"step": "1", "epoch": "0", "train/loss": "3.0", "lr": "0.001"},
        {"step": "2", "epoch": "0", "train/loss": "2.99", "lr": "0.001", "val/nll": "3.99"},
        {"step": "3", "epoch": "0", "train/loss": "2.98", "lr": "0.001"},
        {"step": "4", "epoch": "0", "train/loss": "2.97", "lr": "0.001", "val/nll": "3.97"}]
    assert last_logged(tmp_path, "lr") == (4, 0.001)
    assert last_logged(tmp_path, "nothing") is None


DAMAGES = {
    "half a row": lambda content: content[:-9], "no line end": lambda content: content[:-1],
    "a step alone": lambda content: content[:content.rindex(b"\n", 0, -2) + 2],
    "zeros behind": lambda content: content + bytes(3000), "zeros at the end": lambda content: content[:-60] + bytes(60),
    "a page of zeros": lambda content: content + bytes(200_000) + b"\r\n",
    "appended to half a row": lambda content: content[:-9] + b"9,2,1.5,,2.9,0.001\r\n",
    "a step twice": lambda content: content + content[content[:-2].rindex(b"\n") + 1:],
    "no text": lambda content: content[:-20] + os.urandom(18) + b"\r\n"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_last_whole_row_is_found(tmp_path, damage, caplog):
    """A run resumes from step 6, whose row is complete, or from step 8, whose row may be incomplete."""
    logged(tmp_path, 8)
    file, whole = tmp_path / "metrics.csv", plain(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    steps = [int(row["step"]) for row in rows_of(file)]
    assert steps == sorted(set(steps))              # a reader before the file is repaired
    logged(tmp_path, 12, first=8)
    rows = plain(tmp_path)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-4:] == [9, 10, 11, 12]
    assert all(row in whole for row in rows[:-4])
    assert set(range(6)) <= set(steps)
    assert "incomplete lines" in caplog.text
    assert b"\0" not in file.read_bytes()


def test_rows_behind_the_checkpoint_are_dropped(tmp_path):
    logged(tmp_path, 8)
    logged(tmp_path, 8, first=5)
    assert [int(row["step"]) for row in plain(tmp_path)] == list(range(9))


def test_a_file_without_a_first_line_is_put_aside(tmp_path, caplog):
    (tmp_path / "metrics.csv").write_bytes(bytes(500))
    logged(tmp_path, 8, first=5)
    assert [int(row["step"]) for row in plain(tmp_path)] == [6, 7, 8]
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == bytes(500)
    assert "metrics.csv.damaged" in caplog.text


def test_rows_are_appended_and_not_kept(tmp_path):
    """After the columns are known the file is never replaced, and memory does not grow with it."""
    logger = logged(tmp_path, 4)
    file = logger.file.stat().st_ino
    tracemalloc.start()
    for step in range(4, 4000):
        logger.log_metrics({"train/loss": 3.0, "lr": 1e-3, "epoch": 0}, step)
        logger.log_metrics({"val/nll": 4.0 + step, "epoch": 0}, step)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert logger.file.stat().st_ino == file
    assert memory < 100_000
    assert len(plain(tmp_path)) == 4001


@contextmanager
def limit(size):
    """A limit on the size of files, met as a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("figures", [{"train/loss": 1.23456789}, {"val/nll": 1.23456789012345}, {"another": 3.0}])
@pytest.mark.parametrize("room", [0, 3, 12])
def test_a_full_disk_leaves_whole_rows(tmp_path, figures, room):
    """A new row, a longer row, a new column: the previous content is unchanged."""
    logger = logged(tmp_path, 3)
    before, whole, step = logger.file.read_bytes(), plain(tmp_path), 2 if "val/nll" in figures else 3
    with limit(len(before) + room), pytest.raises(OSError, match="File too large"):
        logger.log_metrics(figures, step)
    assert plain(tmp_path) == whole                 # perhaps with one more empty column
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    logger.log_metrics(figures, step)               # there is room again
    assert {name: float(rows_of(logger.file)[-1][name]) for name in figures} == figures


def test_a_run_with_an_incomplete_metrics_row_resumes(place):
    """Real commands: the rows are those of the uninterrupted run."""
    words = ["fit", "--config", "ok.yaml", "--trainer.max_epochs", "null"]
    assert call(*words, "--trainer.max_steps", "4", "--trainer.default_root_dir", "straight")[0] == 0
    assert call(*words, "--trainer.max_steps", "2")[0] == 0
    file = Path("run/metrics.csv")
    file.write_bytes(file.read_bytes() + b"3,0,1.25,2." + bytes(700))
    code, _, err = call(*words, "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert code == 0, err
    steps = [row["step"] for row in plain("run")]
    assert steps == [row["step"] for row in plain("straight")] == ["0", "1", "2", "3", "4"]
    losses = [[row.get("train/loss") for row in plain(run)] for run in ("run", "straight")]
    assert losses[0][:3] == losses[1][:3]
    shutil.rmtree("straight")
