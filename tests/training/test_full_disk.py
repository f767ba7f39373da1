"""If this breaks: a run on a full disk ends in a traceback that does not mention the disk, leaves an incomplete checkpoint, loses
an earlier one, or leaves its other processes waiting.

Real commands on a real file system that is full and stays full; it is mounted in memory, which needs root on Linux.
"""

import csv
import shutil
import subprocess
from contextlib import suppress

import lightning as L
import pytest
from run_processes import config_of, metrics_rows, write_config, write_data

from lit_llm import CausalLMModule, InputError, Source, TextDataModule, Trainer
from lit_llm.training.run import manifest
from tests.test_cli import MANY, call, place, write

assert place                                        # a fixture
STEPS = 10


@pytest.fixture
def disk(tmp_path):
    """`disk(size)`: a folder on a file system of that size, mounted or changed to it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size):
        again = ["-o", f"remount,size={size}"] if folder.is_mount() else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        try:
            done = subprocess.run(["mount", *again, str(folder)], capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Take all that is left."""
    with suppress(OSError), open(folder / "ballast", "ab", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


def assert_whole(run, step):
    """Assert checkpoints up to a step, nothing of the one that did not fit, and the logged metrics."""
    assert not list(run.rglob("*.partial"))
    assert manifest.find(run, "last").name == f"step_{step}"
    with open(run / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows][:step] == list(range(1, step + 1))
    assert all(None not in row and None not in row.values() for row in rows)


@pytest.mark.parametrize(("strategy", "ranks", "size"), [
    ("auto", 1, "4096k"), ("ddp", 2, "4096k"), ("deepspeed_stage_2", 2, "4096k"),
    ("fsdp2", 2, "4096k")])
def test_a_disk_that_stays_full(strategy, ranks, size, disk, run_processes, tiny_model):
    """Every process ends with code 2, one of them prints the reason; with more space the run resumes."""
    folder = disk(size)
    words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=ranks, lora=False,
                                                 strategy=strategy, save_every=1, keep_last=99, limit_val_batches=0))
    result = run_processes.run(*words, folder / "run", ranks=ranks, limit=100)
    stderr = "".join(output["err"] for output in result["outputs"])
    assert result["codes"] == [2] * ranks, stderr[-3000:]
    assert "Traceback" not in stderr, stderr[-3000:]
    step = int(manifest.folders(folder / "run")[0].name.removeprefix("step_"))
    assert 1 <= step < STEPS
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert f"the checkpoint of step {step + 1} could not be written" in error
    assert "GiB are free" in error
    assert f"free some space, then resume from {folder}/run/checkpoints/step_{step} with --ckpt_path last" in stderr
    assert_whole(folder / "run", step)
    disk("64m")
    again = run_processes.run(*words, folder / "run", "--ckpt_path", "last", ranks=ranks, limit=100)
    assert again["codes"] == [0] * ranks, again["outputs"][0]["err"][-3000:]
    assert [int(row["step"]) for row in metrics_rows(folder / "run")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("strategy", "point"), [
    ("deepspeed_stage_2", "engine folder"), ("deepspeed_stage_2", "engine scripts"), ("deepspeed_stage_3", "zero written"),
    ("fsdp2", "shards written")])
def test_what_only_one_process_writes_does_not_fit(strategy, point, run_processes, tiny_model):
    """The other process is then in a barrier of DeepSpeed's or Lightning's, and must not wait there for ever."""
    words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=2, lora=False,
                                                 strategy=strategy, save_every=1, keep_last=99, limit_val_batches=0))
    run = f"run_{point.replace(' ', '_')}"
    result = run_processes.run(*words, run, ranks=2, limit=40, strike={"ranks": [0], "point": point, "turn": 4, "full": True})
    stderr = "".join(output["err"] for output in result["outputs"])
    assert result["codes"] == [2, 2], stderr[-3000:]
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written: No space left" in error
    assert manifest.find(run_processes.folder / run, "last").name.startswith("step_")
    assert not list((run_processes.folder / run).rglob("*.partial"))


class At(L.Callback):
    """Does something before a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.act()


def fit(folder, base, data, callback):
    module = CausalLMModule(base=base, lora=None, lr=1e-3)
    datamodule = TextDataModule([Source(data)], tokenizer=base, seq_len=128, batch_size=1, packing="none")
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=600, max_epochs=-1, log_every_n_steps=1, callbacks=[callback],
                      default_root_dir=str(folder / "run"), enable_progress_bar=False)
    trainer.fit(module, datamodule=datamodule)


def test_not_even_a_row_fits(disk, tiny_model, tmp_path):
    """Full between two checkpoints: the error is the disk's, and what was saved is named."""
    folder = disk("6m")
    with pytest.raises(InputError) as caught:
        fit(folder, tiny_model("llama"), write_data(tmp_path), At(12, lambda: fill(folder)))
    assert "No space left" in caught.value.what
    assert "GiB are free" in caught.value.what
    assert "step_10" in caught.value.fix
    assert_whole(folder / "run", 10)


def test_a_folder_that_is_gone_is_not_a_full_disk(tiny_model, tmp_path):
    with pytest.raises(InputError) as caught:
        fit(tmp_path, tiny_model("llama"), write_data(tmp_path), At(3, lambda: shutil.move(tmp_path / "run", tmp_path / "moved")))
    assert "free some space" not in str(caught.value)
    assert "free" not in str(caught.value)
    assert "move it back" in caught.value.fix
    assert not (tmp_path / "run").exists()          # not made again without its past


def test_an_export_that_does_not_fit(place, disk):
    assert call("fit", "--config", "ok.yaml")[0] == 0
    for room in (40, 160):                          # a model has 180 kB
        folder = disk(f"{room}k")
        code, _, err = call("export", "--run", "run", "--out", folder / "model")
        assert code == 2, err
        assert "Traceback" not in err
        stderr = err[err.index("error: "):]
        assert "the export could not be written" in stderr
        assert "free some space" in stderr
        assert "GiB are free" in stderr
        assert not list(folder.iterdir())
    disk("4m")
    assert call("export", "--run", "run", "--out", folder / "model")[0] == 0


def test_tokens_that_do_not_fit(place, disk):
    write("good.jsonl", *MANY[:2000])
    folder = disk("64k")
    code, _, err = call("prepare", "--config", "ok.yaml", "--data.cache_dir", folder / "cache")
    assert code == 2, err
    assert "Traceback" not in err
    assert "Free some space" in err
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]
    disk("64m")
    assert call("prepare", "--config", "ok.yaml", "--data.cache_dir", folder / "cache")[0] == 0


def test_a_run_that_cannot_even_begin(place, disk):
    folder = disk("8k")
    code, _, err = call("fit", "--config", "ok.yaml", "--trainer.default_root_dir", folder / "run")
    assert code == 2, err
    assert "Traceback" not in err
    assert "free some space" in err
