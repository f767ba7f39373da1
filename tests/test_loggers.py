"""If this breaks, a run with TensorBoard or SwanLab does not start, or shows other values than `metrics.csv`.

Both packages are optional: without them the runs are skipped here. Oracles: TensorBoard's own reader, and the files of SwanLab.
"""

import csv
import importlib
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_llm.cli import settings
from lit_llm.errors import InputError
from tests.test_cli import call, place

assert place                                        # a fixture


def logged(run, name):
    with open(Path(run, "metrics.csv"), newline="") as stream:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(stream) if row[name]]


def test_tensorboard_has_the_rows_of_the_run(place):
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    code, _, err = call("fit", "--config", "ok.yaml", "--config", "configs/with/tensorboard.yaml")
    assert code == 0, err
    events = reader.EventAccumulator("runs/tensorboard/version_0").Reload()
    for name in ("train/loss", "train/lr", "train/grad_norm"):
        assert [(event.step + 1, event.value) for event in events.Scalars(name)] == [      # Lightning counts steps from 0
            (step, pytest.approx(value, rel=1e-6)) for step, value in logged("run", name)]
    again = call("validate", "--config", "run/config.yaml", "--ckpt_path", "best")          # the logger is in the run's config
    assert again[0] == 0, again[2]


def test_swanlab_keeps_a_run_offline(place):
    pytest.importorskip("swanlab")
    words = ["fit", "--config", "ok.yaml", "--config", "configs/with/swanlab.yaml"]
    code, _, err = call(*words)
    assert code == 2
    assert "--allow swanlab" in err
    code, _, err = call(*words, "--allow", "swanlab")
    assert code == 0, err
    (record,) = Path("runs/swanlab").glob("run-*/*.swanlab")
    assert b"train/loss" in record.read_bytes()
    assert len(logged("run", "train/loss")) == 2


def test_an_empty_default_that_is_in_no_signature_is_accepted():
    """TensorBoardLogger passes `comment: ""` on to the writer; an empty text of its own arguments is refused as before."""
    settings.check_arguments("trainer.logger.init_args", {"comment": "", "prefix": ""}, TensorBoardLogger)
    with pytest.raises(InputError, match="empty"):
        settings.check_arguments("trainer.logger.init_args", {"save_dir": ""}, TensorBoardLogger)
