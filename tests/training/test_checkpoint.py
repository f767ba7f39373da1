"""If this breaks: a stopped run cannot be resumed exactly: steps are lost or repeated, weights differ, an incomplete file is
loaded, the wrong checkpoint counts as best, or the export differs from the trained model.

Oracle: the same run without the stop; plain transformers and peft for what was written.
"""

import contextlib
import csv
import json
import math
import multiprocessing
import os
import resource
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from run_processes import assert_same_end
from safetensors.torch import load_file, save_file

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError
from lit_llm.exports.command import export
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.report.rows import MEASURED
from lit_llm.system import integrity
from lit_llm.training.module import CausalLMModule
from lit_llm.training.run import checkpoint, manifest
from lit_llm.training.run.checkpoint import StepCheckpoint
from lit_llm.training.trainer import Trainer

STEPS, STOP = 6, 3
WORDS = ["red", "blue", "green", "kite", "hill", "one two three", "风筝", "Tom"]


def write(file, count, words=WORDS):
    turns = [(f"say {words[at % len(words)]} {at}", f"{words[(at + 3) % len(words)]} {at}" * (1 + at % 3))
             for at in range(count)]
    lines = [json.dumps({"prompt": question, "completion": answer}, ensure_ascii=False) for question, answer in turns]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


class PowerFailure(Exception):
    """No error that the trainer explains."""


class StopAt(L.Callback):
    """Simulates a power failure in the middle of the step after this one."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step + 1 and batch["last_in_step"]:
            raise PowerFailure("stopped here")


@pytest.fixture
def fit(tiny_model, tmp_path):
    """`fit("name", ...)`: a fit with the real classes; its run folder."""
    val = write(tmp_path / "val.jsonl", 5, WORDS[::-1])

    def start(name, *, rows=10, lora=True, strategy="auto", resume=None, callbacks=(), max_steps=STEPS, lr=2e-2,
              schedule="cosine", kind="llama", base=None, rank=4, dropout=0.0, seed=42, **keys):
        data = write(tmp_path / f"train{rows}.jsonl", rows)
        base = base or tiny_model(kind)
        if dropout and kind == "gpt2":
            base = shutil.copytree(base, tmp_path / "dropping", dirs_exist_ok=True)
            facts = json.loads((base / "config.json").read_text()) | {"resid_pdrop": dropout, "embd_pdrop": dropout}
            (base / "config.json").write_text(json.dumps(facts))
        L.seed_everything(seed, verbose=False)
        module = CausalLMModule(base=str(base), lora=LoRA(r=rank, dropout=dropout) if lora else None, lr=lr,
                                weight_decay=0.1, schedule=schedule)
        datamodule = TextDataModule([Source(data)], val_sources=[Source(val)], tokenizer=str(base),
                                    seq_len=128, batch_size=1, packing="none")
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, max_steps=max_steps, accumulate_grad_batches=2,
            gradient_clip_val=1.0, log_every_n_steps=1, default_root_dir=str(tmp_path / name),
            enable_progress_bar=False, callbacks=list(callbacks), **keys)
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume)
        return tmp_path / name

    return start


def metrics_rows(run):
    with open(run / "metrics.csv", newline="") as handle:
        return [{key: float(value) for key, value in row.items() if value != "" and key not in MEASURED}
                for row in csv.DictReader(handle)]


def weights_of(run, name=f"step_{STEPS}"):
    (file,) = [path for path in (run / "checkpoints" / name).rglob("*.safetensors")]
    return load_file(file)


def same(one, other):
    """Largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize(("rows", "where"), [(10, "in an epoch"), (6, "at its end")])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_a_stopped_run_resumes_exactly(strategy, lora, rows, where, fit):
    how = dict(rows=rows, lora=lora, strategy=strategy)
    straight = fit("straight", callbacks=[StepCheckpoint(every_n_steps=STOP)], **how)
    with pytest.raises(PowerFailure):
        fit("stopped", callbacks=[StepCheckpoint(every_n_steps=STOP), StopAt(STOP)], **how)
    assert (straight.parent / "stopped" / "checkpoints" / "LATEST").read_text().strip() == f"step_{STOP}"
    resumed = fit("stopped", callbacks=[StepCheckpoint(every_n_steps=STOP)], resume="last", **how)
    assert [row["step"] for row in metrics_rows(resumed)] == list(range(STEPS + 1))
    assert metrics_rows(resumed) == metrics_rows(straight)
    assert same(weights_of(resumed), weights_of(straight)) == 0.0


@pytest.mark.parametrize("every", [2, 6, 10])
def test_stopped_after_a_validation(every, fit):
    """The checkpoint was written by a validation, in an epoch (steps 1 and 3) and at its end (step 5)."""
    how = dict(val_check_interval=every, max_steps=8)
    straight = fit("straight", **how)
    stop = every // 2
    with pytest.raises(PowerFailure):
        fit("stopped", callbacks=[StepCheckpoint(keep_last=9), StopAt(stop)], **how)
    resumed = fit("stopped", resume=str(straight.parent / "stopped" / "checkpoints" / f"step_{stop}"), **how)
    assert metrics_rows(resumed) == metrics_rows(straight)
    assert same(weights_of(resumed, "step_8"), weights_of(straight, "step_8")) == 0.0


@pytest.mark.parametrize(("rows", "where"), [(10, "in an epoch"), (6, "at its end")])
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_a_finished_run_goes_further(strategy, rows, where, fit):
    """3 steps, then on to 6; the rate is constant, since a schedule would have come to its end."""
    how = dict(rows=rows, strategy=strategy, schedule="constant")
    straight = fit("straight", **how)
    short = fit("short", max_steps=STOP, **how)
    before = metrics_rows(short)
    further = fit("short", resume="last", **how)
    assert [row["step"] for row in metrics_rows(further)] == list(range(STEPS + 1))
    assert metrics_rows(further)[:STOP + 1] == before
    assert [row["train/loss"] for row in metrics_rows(further)[1:]] == [row["train/loss"] for row in metrics_rows(straight)[1:]]
    figures, wanted = metrics_rows(further)[-1], metrics_rows(straight)[-1]
    assert {key: figures[key] for key in wanted if key != "epoch"} == {
        key: wanted[key] for key in wanted if key != "epoch"}       # Lightning takes the stop for an epoch's end
    assert same(weights_of(further), weights_of(straight)) == 0.0


@pytest.mark.parametrize("fails", [False, True])
def test_a_single_process_restores_its_environment(fails, fit):
    """Or a command started from a notebook after a fit there would try to listen at the notebook's own port."""
    before = dict(os.environ)
    with pytest.raises(PowerFailure) if fails else contextlib.nullcontext():
        fit("run", strategy="deepspeed_stage_1", max_steps=2, callbacks=[StopAt(0)] if fails else [])
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    assert {name: os.environ.get(name) for name in names} == {name: before.get(name) for name in names}


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_resumed_twice_at_an_epochs_end_without_validation(strategy, fit):
    """Each epoch is begun once, and `max_epochs` ends the run where it ends one that never stopped."""
    class Begun(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            begun.append(trainer.current_epoch)

    begun = []
    how = dict(rows=6, strategy=strategy, limit_val_batches=0, max_steps=-1, max_epochs=3)
    straight = fit("straight", callbacks=[StepCheckpoint(every_n_steps=STOP)], **how)
    for resume, stop in ((None, 3), ("last", 6), ("last", None)):
        with pytest.raises(PowerFailure) if stop else contextlib.nullcontext():
            fit("stopped", callbacks=[StepCheckpoint(every_n_steps=STOP), Begun(), *([StopAt(stop)] if stop else [])],
                resume=resume, **how)
    assert begun == [0, 1, 1, 2, 2]                 # each stop is in the epoch after the checkpoint
    assert_same_end(straight.parent / "stopped", straight, 9)


@pytest.mark.parametrize(("lora", "kind"), [(True, "llama"), (False, "gpt2")])
def test_resume_from_every_step(lora, kind, fit, tmp_path):
    """With dropout, in adapters and in the model: every file of the last checkpoint is the same, to the bit."""
    how = dict(rows=6, lora=lora, kind=kind, dropout=0.2)
    straight = fit("straight", callbacks=[StepCheckpoint(every_n_steps=1, keep_last=9)], **how)
    for step in range(1, STEPS):
        folder = tmp_path / "resumed"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(straight / "metrics.csv", folder)
        shutil.copytree(straight / "checkpoints" / f"step_{step}", folder / "checkpoints" / f"step_{step}")
        torch.rand(step)                            # the generators have other states in the new process
        fit("resumed", callbacks=[StepCheckpoint(every_n_steps=1, keep_last=9)], resume="last", seed=step, **how)
        assert_same_end(folder, straight, STEPS)


# ---- complete or not there -------------------------------------------------------------------------------------------

def test_a_folder_without_manifest_is_no_checkpoint(fit):
    run = fit("run", max_steps=2)
    (run / "checkpoints" / "step_2" / "manifest.json").unlink()
    for wanted in ("last", str(run / "checkpoints" / "step_2")):
        with pytest.raises(InputError, match="never completed"):
            manifest.find(run, wanted)
    with pytest.raises(InputError, match="no complete checkpoint"):
        export(str(run))


def test_ranks_that_a_process_starts_do_not_hash_again_what_it_has_hashed(fit):
    """Eight ranks would read a checkpoint of 100 GB eight times. They take the same folder, and compare sizes."""
    run = fit("run", max_steps=2, callbacks=[StepCheckpoint(every_n_steps=1, keep_last=9)])
    newest, older = (run / "checkpoints" / f"step_{step}" for step in (2, 1))
    forks = multiprocessing.get_context("fork")

    def find_in_rank(wanted, local_rank, answers):
        hashed, real = [], integrity.sha256
        os.environ["LOCAL_RANK"], integrity.sha256 = local_rank, lambda file: (hashed.append(file), real(file))[1]
        try:
            answers.put(f"{manifest.find(run, wanted).name} {bool(hashed)}")
        except InputError as error:
            answers.put(str(error))

    def rank(wanted, local_rank="1"):
        answers = forks.SimpleQueue()
        process = forks.Process(target=find_in_rank, args=(wanted, local_rank, answers))
        process.start()
        process.join()
        return answers.get()

    assert rank("last") == "step_2 True"
    with manifest.verified(older):                  # the newest was torn when the first process looked
        assert rank("last") == "step_1 False"
        assert rank(str(older)) == "step_1 False"
        assert rank(str(newest)) == "step_2 True"
        assert rank("last", "0") == "step_2 True"   # a command that a callback runs is no rank
        state = older / "state"
        state.write_bytes(state.read_bytes()[:-1])
        assert "bytes, not" in rank("last")
    assert manifest.VERIFIED not in os.environ


def test_the_newest_whole_one_is_taken(fit, caplog):
    """Cut short, changed in place, gone, or without manifest: it is named, and the one before is used."""
    run = fit("run", rows=6, callbacks=[StepCheckpoint(every_n_steps=1, keep_last=9)])
    adapter = "adapter/adapter_model.safetensors"

    def changed(file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    hurts = {6: (lambda file: file.write_bytes(file.read_bytes()[:-1]), adapter, "bytes, not"),
             5: (changed, "state", "was changed since"), 4: (os.remove, adapter, "is missing"),
             3: (os.remove, "manifest.json", "never completed"), 2: (lambda file: file.write_text("{"), "manifest.json", "damaged")}
    for step, (hurt, name, words) in hurts.items():
        hurt(run / "checkpoints" / f"step_{step}" / name)
        caplog.clear()
        assert manifest.find(run, "last") == run / "checkpoints" / f"step_{step - 1}"
        assert words in caplog.text
        assert f"resuming from step_{step - 1}" in caplog.text
        with pytest.raises(InputError, match=words):
            manifest.find(run, str(run / "checkpoints" / f"step_{step}"))
    resumed = fit("run", rows=6, resume="last")
    assert [row["step"] for row in metrics_rows(resumed)] == list(range(STEPS + 1))
    assert (run / "checkpoints" / "abandoned_step_6").is_dir()


def test_a_foreign_checkpoint_is_named(fit, tmp_path, tiny_model):
    """The message has the trained settings and the option to accept changes; a moved base counts as the same."""
    fit("run", max_steps=2)
    with pytest.raises(InputError, match=r"another peft \(r 4, not 8\)"):
        fit("run", resume="last", rank=8)
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tiny_model("llama"), moved)
    shutil.copytree(moved, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="another base") as caught:
        fit("run", resume="last", base=str(other), max_steps=4)
    assert "--trainer.accept_changes '[base]'" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6
    with open(other / "chat_template.jinja", "a") as stream:
        stream.write("{{ '' }}")
    with pytest.raises(InputError, match=r"another base .*another template"):
        fit("run", resume="last", base=str(other), max_steps=4)
    facts = json.loads((other / "tokenizer.json").read_text())
    facts["model"]["merges"].pop()
    shutil.copy(tmp_path / "moved" / "chat_template.jinja", other)
    (other / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"another base .*another tokenizer"):
        fit("run", resume="last", base=str(other), max_steps=4)
    with pytest.raises(InputError, match="written with SingleDeviceStrategy"):
        fit("run", resume="last", strategy="deepspeed_stage_1")
    fit("run", resume="last", base=str(moved), max_steps=3)
    fit("run", resume="last", base=str(moved), max_steps=4, accept_changes=["base"])


def test_the_disk_is_looked_at_before_the_first_step(fit, monkeypatch, tmp_path):
    """The estimate equals the size of a checkpoint; space for two is required."""
    run = fit("run", lora=False, max_steps=1)
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step_1").rglob("*") if path.is_file())
    estimates = []
    real = checkpoint.estimated_bytes
    monkeypatch.setattr(checkpoint, "estimated_bytes", lambda module: estimates.append(real(module)) or estimates[0])
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.9 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="are free"):
        fit("other", lora=False, max_steps=1)
    assert not (tmp_path / "other").exists()
    assert size < estimates[0] < size + (2 << 20)


def test_a_full_disk_leaves_the_last_checkpoint_whole(fit):
    """A limit on the size of files, met in the middle of the second save."""
    class Limit(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match="step 2 could not be written"):
            fit("run", lora=False, callbacks=[StepCheckpoint(every_n_steps=1), Limit()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = fit("run", lora=False, resume="last", max_steps=3)
    assert [row["step"] for row in metrics_rows(run)] == [0, 1, 2, 3]


def test_adapters_do_not_carry_the_base(fit):
    run = fit("run", max_steps=1)
    state = torch.load(run / "checkpoints" / "step_1" / "state")["state_dict"]
    assert state
    assert all("lora_" in name for name in state)


def test_a_missing_checkpoint_says_what_there_is(fit, tmp_path):
    with pytest.raises(InputError, match="no last checkpoint"):
        fit("run", resume="last")
    with pytest.raises(InputError, match="no checkpoint folder nowhere"):
        fit("run", resume="nowhere")
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused(fit, tmp_path):
    fit("run", max_steps=2)
    def content():
        return {path: path.is_file() and path.read_bytes() for path in (tmp_path / "run").rglob("*")}

    before = content()
    with pytest.raises(InputError, match="cannot continue"):
        fit("run", rows=6, resume="last")
    assert content() == before


# ---- best and newest -------------------------------------------------------------------------------------------------

class Scores(L.Callback):
    """Logs a given metric in each validation; runs before the checkpoint callback."""

    def __init__(self, values, name="val/nll"):
        self.values, self.name = list(values), name

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            trainer.callback_metrics[self.name].fill_(self.values.pop(0))


def score_of(run, name):
    return json.loads((run / "checkpoints" / name / "manifest.json").read_text())["score"]


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 5)])
def test_best_follows_the_metric(mode, best, fit):
    """A validation after each step; a value that is no number is never best, and is no reason to keep a folder."""
    values = [2.0, math.nan, 1.0, 1.5, 7.0, math.nan]
    name = "val/token_accuracy"                         # of perplexity, no number would end the run
    keeper = StepCheckpoint(monitor=name, mode=mode, keep_best=2, keep_last=1)
    run = fit("run", callbacks=[Scores(values, name), keeper], val_check_interval=2)
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
    assert manifest.find(run, "best") == folders / "step_6"       # its manifest still fits


def test_a_resumed_run_remembers_what_was_best(fit):
    with pytest.raises(PowerFailure):
        fit("run", rows=6, callbacks=[Scores([1.0]), StepCheckpoint(every_n_steps=3), StopAt(3)])
    run = fit("run", rows=6, callbacks=[Scores([2.0]), StepCheckpoint(every_n_steps=3)], resume="last")
    assert (run / "checkpoints" / "BEST").read_text().strip() == "step_3"


def test_going_back_to_an_earlier_checkpoint(fit):
    """The next checkpoint is the newest, whatever the numbers of the abandoned folders."""
    run = fit("run", rows=6, callbacks=[Scores([1.0, 2.0]), StepCheckpoint(every_n_steps=1)])
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_3", "step_6"}
    fit("run", rows=6, max_steps=4, callbacks=[Scores([3.0]), StepCheckpoint()], resume="best")
    assert manifest.find(run, "last").name == "step_4"
    assert manifest.find(run, "best").name == "step_3"
    assert (run / "checkpoints" / "abandoned_step_6").is_dir()


def test_milestones_stay(fit):
    run = fit("run", callbacks=[StepCheckpoint(keep_every_n_steps=2)])
    assert {path.name for path in (run / "checkpoints").glob("step_*")} >= {"step_2", "step_4", "step_6"}


def test_early_stopping(fit):
    stop = EarlyStopping(monitor="val/nll", patience=2)
    run = fit("run", callbacks=[Scores([2.0, 1.0, 1.5, 1.2, 0.1]), stop], val_check_interval=2, max_steps=20)
    assert manifest.find(run, "last").name == "step_4"
    assert manifest.find(run, "best").name == "step_2"


# ---- what comes out --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("out", ["run", ".", "other", "other/thesis.txt", "run/checkpoints", "base"])
def test_an_export_replaces_no_run_and_nothing_else_of_the_users(out, fit, monkeypatch, tiny_model):
    run = fit("run", lora=True)
    (run.parent / "other").mkdir()
    (run.parent / "other" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(run.parent)
    with pytest.raises(InputError) as caught:
        export(run.name, "last", out=tiny_model("llama") if out == "base" else out.replace("run", run.name))
    assert caught.value.where == "out"
    assert (run / "checkpoints" / "step_6" / "manifest.json").is_file()
    assert (run.parent / "other" / "thesis.txt").is_file()
    export(run.name, "last", out="new")
    export(run.name, "last", out="new")             # an older export is what it may replace


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
        logits, wanted = exported.eval()(chat).logits, trained.eval()(chat).logits
        start = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))(chat).logits
    apart = (logits - wanted).abs().max().item()
    print(f"export apart from what was trained by {apart:.1e}, which moved by {(wanted - start).abs().max():.1e}")
    assert apart < 1e-5 < 0.1 < (wanted - start).abs().max()
    assert exported.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


@pytest.mark.parametrize("lora", [True, False])
def test_validate_a_checkpoint_gives_the_logged_figure(lora, fit, tiny_model, tmp_path):
    run = fit("run", rows=6, lora=lora, callbacks=[StepCheckpoint(every_n_steps=1, keep_last=9)])
    logged = {int(row["step"]): row["val/nll"] for row in metrics_rows(run) if "val/nll" in row and row["step"]}
    assert sorted(logged) == [3, 6]
    for wanted, step in (("best", min(logged, key=logged.get)), ("last", 6), (run / "checkpoints" / "step_3", 3)):
        module = CausalLMModule(base=tiny_model("llama"), lora=LoRA(r=4) if lora else None)
        train, val = (Source(str(tmp_path / name)) for name in ("train6.jsonl", "val.jsonl"))
        data = TextDataModule([train], val_sources=[val], tokenizer=tiny_model("llama"), seq_len=128, batch_size=4)
        trainer = Trainer(accelerator="cpu", default_root_dir=str(run), enable_progress_bar=False)
        (measured,) = trainer.validate(module, datamodule=data, ckpt_path=str(wanted))
        assert measured["val/nll"] == pytest.approx(logged[step], rel=1e-6)
