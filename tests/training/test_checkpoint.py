"""If this breaks, a run that was stopped cannot go on where it stood: steps are lost or done twice, weights differ, a
torn file is loaded, the wrong checkpoint counts as best, or what `export` writes is not the model that was trained.

Oracle: the same run without the stop; plain transformers and peft for what was written.
"""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lit_llm.adapter import LoRA
from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.sources import Source
from lit_llm.errors import InputError
from lit_llm.inference.export import export
from lit_llm.training import checkpoint
from lit_llm.training.checkpoint import StepCheckpoint
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer

STEPS, STOP = 6, 3
ROOT = Path(__file__).resolve().parents[2]
WORDS = ["red", "blue", "green", "kite", "hill", "one two three", "风筝", "Tom"]


def write(file, count, words=WORDS):
    turns = [(f"say {words[at % len(words)]} {at}", f"{words[(at + 3) % len(words)]} {at}" * (1 + at % 3))
             for at in range(count)]
    lines = [json.dumps({"prompt": question, "completion": answer}, ensure_ascii=False) for question, answer in turns]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


class StopAt(L.Callback):
    """The power fails in the middle of the step behind this one."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step + 1 and batch["last_in_step"]:
            raise ConnectionError("stopped here")


@pytest.fixture
def fit(tiny_model, tmp_path):
    """`fit("name", ...)`: a fit with the real classes; its run folder."""
    val = write(tmp_path / "val.jsonl", 5, WORDS[::-1])

    def start(name, *, rows=10, lora=True, strategy="auto", resume=None, callbacks=(), max_steps=STEPS, lr=2e-2,
              schedule="cosine", **keys):
        data = write(tmp_path / f"train{rows}.jsonl", rows)
        base = tiny_model("llama")
        L.seed_everything(42, verbose=False)
        module = CausalLMModule(base=base, lora=LoRA(r=4) if lora else None, lr=lr, weight_decay=0.1,
                                schedule=schedule)
        datamodule = TextDataModule([Source(data)], val_sources=[Source(val)], tokenizer=base, seq_len=128,
                                    batch_size=1, packing="none")
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, max_steps=max_steps, accumulate_grad_batches=2,
            gradient_clip_val=1.0, log_every_n_steps=1, default_root_dir=str(tmp_path / name),
            enable_progress_bar=False, callbacks=list(callbacks), **keys)
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume)
        return tmp_path / name

    return start


def rows_of(run):
    with open(run / "metrics.csv", newline="") as handle:
        return [{key: float(value) for key, value in row.items() if value != "" and key != "seconds"}
                for row in csv.DictReader(handle)]


def weights_of(run, name=f"step_{STEPS}"):
    from safetensors.torch import load_file

    (file,) = [path for path in (run / "checkpoints" / name).rglob("*.safetensors")]
    return load_file(file)


def same(one, other):
    """Largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize(("rows", "where"), [(10, "in an epoch"), (6, "at its end")])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(strategy, lora, rows, where, fit):
    how = dict(rows=rows, lora=lora, strategy=strategy)
    straight = fit("straight", callbacks=[StepCheckpoint(every_n_steps=STOP)], **how)
    with pytest.raises(ConnectionError):
        fit("stopped", callbacks=[StepCheckpoint(every_n_steps=STOP), StopAt(STOP)], **how)
    assert (straight.parent / "stopped" / "checkpoints" / "LATEST").read_text().strip() == f"step_{STOP}"
    resumed = fit("stopped", callbacks=[StepCheckpoint(every_n_steps=STOP)], resume="last", **how)
    assert [row["step"] for row in rows_of(resumed)] == list(range(STEPS))
    assert rows_of(resumed) == rows_of(straight)
    print(f"weights apart by {same(weights_of(resumed), weights_of(straight)):.1e}")
    assert same(weights_of(resumed), weights_of(straight)) == 0.0


@pytest.mark.parametrize("every", [2, 6, 10])
def test_stopped_after_a_validation(every, fit):
    """The checkpoint was written by a validation, in an epoch (steps 1 and 3) and at its end (step 5)."""
    how = dict(val_check_interval=every, max_steps=8)
    straight = fit("straight", **how)
    stop = every // 2
    with pytest.raises(ConnectionError):
        fit("stopped", callbacks=[StepCheckpoint(keep_last=9), StopAt(stop)], **how)
    resumed = fit("stopped", resume=str(straight.parent / "stopped" / "checkpoints" / f"step_{stop}"), **how)
    assert rows_of(resumed) == rows_of(straight)
    assert same(weights_of(resumed, "step_8"), weights_of(straight, "step_8")) == 0.0


@pytest.mark.parametrize(("rows", "where"), [(10, "in an epoch"), (6, "at its end")])
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_a_finished_run_goes_further(strategy, rows, where, fit):
    """3 steps, then on to 6; the rate is constant, since a schedule would have come to its end."""
    how = dict(rows=rows, strategy=strategy, schedule="constant")
    straight = fit("straight", **how)
    short = fit("short", max_steps=STOP, **how)
    before = rows_of(short)
    further = fit("short", resume="last", **how)
    assert [row["step"] for row in rows_of(further)] == list(range(STEPS))
    assert rows_of(further)[:STOP] == before
    assert [row["train/loss"] for row in rows_of(further)] == [row["train/loss"] for row in rows_of(straight)]
    figures, wanted = rows_of(further)[-1], rows_of(straight)[-1]
    assert {key: figures[key] for key in wanted if key != "epoch"} == {
        key: wanted[key] for key in wanted if key != "epoch"}       # Lightning takes the stop for an epoch's end
    assert same(weights_of(further), weights_of(straight)) == 0.0


@pytest.mark.parametrize("fails", [False, True])
def test_a_lone_process_leaves_its_environment_alone(fails, fit):
    """Or a command started from a notebook after a fit there would try to listen at the notebook's own port."""
    before = dict(os.environ)
    with pytest.raises(ConnectionError) if fails else contextlib.nullcontext():
        fit("run", strategy="deepspeed_stage_1", max_steps=2, callbacks=[StopAt(0)] if fails else [])
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    assert {name: os.environ.get(name) for name in names} == {name: before.get(name) for name in names}


def test_a_killed_command_goes_on(tiny_model, tmp_path, lit_llm):
    """kill -9 at some moment of a real run, then `--ckpt_path last`: the metrics and weights of a run never killed."""
    data = write(tmp_path / "train.jsonl", 9)
    config = {
        "model": {"base": tiny_model("llama"), "lora": {"r": 4}, "lr": 1e-2},
        "data": {"sources": [{"path": data}], "val_sources": [{"path": data}], "seq_len": 128, "batch_size": 1},
        "trainer": {"strategy": "deepspeed_stage_1", "accelerator": "cpu", "devices": 1, "max_steps": 30,
                    "accumulate_grad_batches": 2, "log_every_n_steps": 1, "check_val_every_n_epoch": 4,
                    "callbacks": [{"class_path": "lit_llm.training.checkpoint.StepCheckpoint",
                                   "init_args": {"every_n_steps": 4}}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = ("fit", "--config", "run.yaml", "--trainer.default_root_dir")
    done = lit_llm(*words, "straight")
    assert done.code == 0, done.err
    latest = tmp_path / "killed" / "checkpoints" / "LATEST"
    with subprocess.Popen([sys.executable, "-m", "lit_llm", *words, "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while not latest.is_file() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "export").exists()
    assert 0 < int(latest.read_text().strip().removeprefix("step_")) < 30
    done = lit_llm(*words, "killed", "--ckpt_path", "last")
    assert done.code == 0, done.err
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    assert [row["step"] for row in rows_of(killed)] == list(range(30))
    assert rows_of(killed) == rows_of(straight)
    assert same(weights_of(killed, "step_30"), weights_of(straight, "step_30")) == 0.0


# ---- complete or not there -------------------------------------------------------------------------------------------

def test_a_folder_without_manifest_is_no_checkpoint(fit):
    run = fit("run", max_steps=2)
    (run / "checkpoints" / "step_2" / "manifest.json").unlink()
    for wanted in ("last", str(run / "checkpoints" / "step_2")):
        with pytest.raises(InputError, match="never completed"):
            checkpoint.find(run, wanted)
    with pytest.raises(InputError, match="no complete checkpoint"):
        export(str(run))


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_a_torn_file_is_named(strategy, fit):
    run = fit("run", max_steps=2, strategy=strategy)
    folder = run / "checkpoints" / "step_2"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert any(folder / "state" in [path, *path.parents] for path in files)
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(InputError, match=file.name):
            fit("run", resume="last", strategy=strategy)
        file.write_bytes(whole)
    assert checkpoint.find(run, "last") == folder


def test_a_missing_checkpoint_says_what_there_is(fit, tmp_path):
    with pytest.raises(InputError, match="no last checkpoint"):
        fit("run", resume="last")
    with pytest.raises(InputError, match="no checkpoint folder nowhere"):
        fit("run", resume="nowhere")
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused(fit, tmp_path):
    fit("run", max_steps=2)
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(InputError, match="cannot continue"):
        fit("run", rows=6, resume="last")
    assert sorted((tmp_path / "run").rglob("*")) == before


# ---- best and newest -------------------------------------------------------------------------------------------------

class Scores(L.Callback):
    """Gives each validation the figure it is told to; stands before the checkpoint callback."""

    def __init__(self, values):
        self.values = list(values)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            trainer.callback_metrics["val/nll"].fill_(self.values.pop(0))


def score_of(run, name):
    return json.loads((run / "checkpoints" / name / "manifest.json").read_text())["score"]


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 5)])
def test_best_follows_the_metric(mode, best, fit):
    """A validation after each step; a value that is no number is never best, and is no reason to keep a folder."""
    values = [2.0, math.nan, 1.0, 1.5, 7.0, math.nan]
    keeper = StepCheckpoint(mode=mode, keep_best=2, keep_last=1)
    run = fit("run", callbacks=[Scores(values), keeper], val_check_interval=2)
    names = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert (run / "checkpoints" / "BEST").read_text().strip() == f"step_{best}"
    assert (run / "checkpoints" / "LATEST").read_text().strip() == "step_6"
    assert names == {"step_6", f"step_{best}", "step_4" if mode == "min" else "step_1"}
    assert score_of(run, f"step_{best}") == values[best - 1]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_best_is_measured_where_saves_and_validations_meet(every, fit):
    """Steps 3 and 6 are validated. A folder saved in between has no score, one saved before its validation gets its."""
    run = fit("run", rows=6, callbacks=[Scores([2.0, 1.0]), StepCheckpoint(every_n_steps=every, keep_last=9)])
    folders = run / "checkpoints"
    scores = {path.name: score_of(run, path.name) for path in folders.glob("step_*")}
    measured = {"step_3": 2.0, "step_6": 1.0}
    assert scores == {f"step_{step}": measured.get(f"step_{step}") for step in range(1, 7)
                      if step % every == 0 or f"step_{step}" in measured}
    assert (folders / "BEST").read_text().strip() == "step_6"
    assert checkpoint.find(run, "best") == folders / "step_6"       # its manifest still fits


def test_a_resumed_run_remembers_what_was_best(fit):
    with pytest.raises(ConnectionError):
        fit("run", rows=6, callbacks=[Scores([1.0]), StepCheckpoint(every_n_steps=3), StopAt(3)])
    run = fit("run", rows=6, callbacks=[Scores([2.0]), StepCheckpoint(every_n_steps=3)], resume="last")
    assert (run / "checkpoints" / "BEST").read_text().strip() == "step_3"


def test_going_back_to_an_earlier_checkpoint(fit):
    """What is saved next is the newest, whatever number the abandoned folders have."""
    run = fit("run", rows=6, callbacks=[Scores([1.0, 2.0]), StepCheckpoint(every_n_steps=1)])
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_3", "step_6"}
    fit("run", rows=6, max_steps=4, callbacks=[Scores([3.0]), StepCheckpoint()], resume="best")
    assert checkpoint.find(run, "last").name == "step_4"
    assert checkpoint.find(run, "best").name == "step_3"
    assert (run / "checkpoints" / "abandoned_step_6").is_dir()


def test_early_stopping(fit):
    from lightning.pytorch.callbacks import EarlyStopping

    stop = EarlyStopping(monitor="val/nll", patience=2)
    run = fit("run", callbacks=[Scores([2.0, 1.0, 1.5, 1.2, 0.1]), stop], val_check_interval=2, max_steps=20)
    assert checkpoint.find(run, "last").name == "step_4"
    assert checkpoint.find(run, "best").name == "step_2"


# ---- what comes out --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [True, False])
def test_the_export_is_the_trained_model(lora, fit, tiny_model):
    """Its logits equal those of base plus adapter under peft, or of the trained weights under transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = fit("run", lora=lora)
    folder = export(str(run), "last")
    if lora:
        base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        trained = PeftModel.from_pretrained(base, run / "checkpoints" / "step_6" / "adapter")
    else:
        trained = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        missing = trained.load_state_dict(weights_of(run), strict=False)
        assert not missing.unexpected_keys
    exported, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "say red 0"}], add_generation_prompt=True,
                                         return_dict=False, return_tensors="pt")
    with torch.no_grad():
        ours, wanted = exported.eval()(chat).logits, trained.eval()(chat).logits
        start = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))(chat).logits
    apart = (ours - wanted).abs().max().item()
    print(f"export apart from what was trained by {apart:.1e}, which moved by {(wanted - start).abs().max():.1e}")
    assert apart < 1e-5 < 0.1 < (wanted - start).abs().max()
    assert exported.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


@pytest.mark.parametrize("lora", [True, False])
def test_validate_a_checkpoint_gives_the_logged_figure(lora, fit, tiny_model, tmp_path):
    run = fit("run", rows=6, lora=lora, callbacks=[StepCheckpoint(every_n_steps=1, keep_last=9)])
    logged = {int(row["step"]) + 1: row["val/nll"] for row in rows_of(run) if "val/nll" in row}
    assert sorted(logged) == [3, 6]
    for wanted, step in (("best", min(logged, key=logged.get)), ("last", 6), (run / "checkpoints" / "step_3", 3)):
        module = CausalLMModule(base=tiny_model("llama"), lora=LoRA(r=4) if lora else None)
        train, val = (Source(str(tmp_path / name)) for name in ("train6.jsonl", "val.jsonl"))
        data = TextDataModule([train], val_sources=[val], tokenizer=tiny_model("llama"), seq_len=128, batch_size=4)
        trainer = Trainer(accelerator="cpu", default_root_dir=str(run), enable_progress_bar=False)
        (measured,) = trainer.validate(module, datamodule=data, ckpt_path=str(wanted))
        assert measured["val/nll"] == pytest.approx(logged[step], rel=1e-6)
