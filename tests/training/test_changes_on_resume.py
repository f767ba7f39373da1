"""If this breaks: a learning rate given on resume is written into `config.yaml` but not used, a change of a fixed key is silently
ignored, or a finished run overwrites its own record.

Oracle: a step of AdamW moves a weight by about its learning rate at most; plain torch's optimizer state.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_processes import config_of, metrics_rows, write_config, write_data
from safetensors.torch import load_file

FIRST, LAST = 3, 6
ROUNDS = [("auto", 1), ("ddp", 2), ("deepspeed_stage_1", 1), ("deepspeed_stage_2", 2), ("deepspeed_stage_3", 2), ("fsdp2", 2)]


@pytest.fixture
def start(run_processes, tiny_model):
    """`start(ranks, ...)`: the command of a run that has made its first steps in `run`."""
    def begin(ranks=1, **keys):
        shutil.rmtree(run_processes.folder / "run", ignore_errors=True)
        words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=ranks,
                                                     keep_last=9, limit_val_batches=0, **keys))
        done = run_processes.run(*words, "run", "--trainer.max_steps", FIRST, "--model.weight_decay", 0.1, ranks=ranks)
        assert done["codes"] == [0] * ranks, done["outputs"][0]["err"][-3000:]
        return words

    return begin


def weights(run_processes, step):
    (file,) = (run_processes.folder / "run" / "checkpoints" / f"step_{step}").rglob("*.safetensors")
    return load_file(file)


def moved(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(("strategy", "ranks"), ROUNDS)
def test_what_is_typed_on_a_resume_takes_effect(strategy, ranks, run_processes, start):
    words = start(ranks, strategy=strategy)
    typed = ["--model.lr", 1e-6, "--model.schedule", "constant", "--model.weight_decay", 0.0, "--model.betas", "[0.5, 0.9]"]
    done = run_processes.run(*words, "run", "--ckpt_path", "last", "--trainer.max_steps", LAST, *typed, ranks=ranks)
    assert done["codes"] == [0] * ranks, done["outputs"][0]["err"][-3000:]
    changes = [line for line in done["outputs"][0]["err"].splitlines() if "changed on resume" in line]
    assert [line.split("resume: ")[1] for line in changes] == [
        "model.lr 0.01 -> 1e-06", "model.schedule cosine -> constant", "model.weight_decay 0.1 -> 0.0",
        "model.betas [0.9, 0.95] -> [0.5, 0.9]", f"steps of the run {FIRST} -> {LAST}"]
    rates = [float(row["train/lr"]) for row in metrics_rows(run_processes.folder / "run") if "train/lr" in row]
    assert rates[FIRST:] == pytest.approx([1e-6] * (LAST - FIRST))
    assert min(rates[:FIRST]) > 1e-4
    before, after = weights(run_processes, FIRST), weights(run_processes, LAST)
    assert 0 < moved(before, after) < 1e-4              # at the old rate it is a hundred times more
    if strategy == "auto":
        state = torch.load(run_processes.folder / "run" / "checkpoints" / f"step_{LAST}" / "state")
        for group in state["optimizer_states"][0]["param_groups"]:
            assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-6, 0.0, (0.5, 0.9))
            assert group["initial_lr"] == 1e-6


def test_an_untouched_resume_says_nothing(run_processes, start):
    words = start()
    done = run_processes.run(*words, "run", "--ckpt_path", "last", "--trainer.max_steps", FIRST + 1, "--model.weight_decay", 0.1,
                      "--seed_everything", 7)
    assert "seed_everything 42 -> 7 has no effect" in done["outputs"][0]["err"]
    changes = [line for line in done["outputs"][0]["err"].splitlines() if "changed on resume" in line]
    assert changes == [f"changed on resume: steps of the run {FIRST} -> {FIRST + 1}"]


def test_nothing_to_train(run_processes, start):
    """No file of the run changes if fewer steps are requested than were made."""
    words = start()
    before = content(run_processes.folder / "run")
    for limit in (["--trainer.max_steps", FIRST], ["--trainer.max_steps", FIRST - 1], ["--trainer.max_epochs", 1,
                  "--trainer.max_steps", FIRST]):
        done = run_processes.run(*words, "run", "--ckpt_path", "last", "--model.lr", 1e-6, *limit)
        assert done["codes"] == [2], done["outputs"][0]["err"][-2000:]
        stderr = done["outputs"][0]["err"]
        assert "there is nothing to train" in stderr
        assert f"step {FIRST}" in stderr
        assert "trainer.max_steps" in stderr
        assert content(run_processes.folder / "run") == before
    assert run_processes.run(*words, "epochs", "--trainer.max_epochs", 1)["codes"] == [0]
    before = content(run_processes.folder / "epochs")
    done = run_processes.run(*words, "epochs", "--trainer.max_epochs", 1, "--ckpt_path", "last", "--model.lr", 1e-6)
    assert done["codes"] == [2], done["outputs"][0]["err"][-2000:]
    assert "there is nothing to train: the checkpoint is at step 5, and trainer.max_epochs is 1" in done["outputs"][0]["err"]
    assert content(run_processes.folder / "epochs") == before
    automatic = run_processes.run(*words, "run", "--ckpt_path", "auto", "--trainer.max_steps", FIRST)     # a job started again
    assert automatic["codes"] == [0]
    assert "nothing is left to train" in automatic["outputs"][0]["err"]


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


@pytest.mark.parametrize(("words", "says"), [
    (["--model.optimizer", "muon"], "model.optimizer (adamw, not muon)"),
    (["--model.lora.r", 8], "r 4, not 8"),
])
def test_what_cannot_change_is_refused_by_name(words, says, run_processes, start):
    command = start()
    before = content(run_processes.folder / "run")
    done = run_processes.run(*command, "run", "--ckpt_path", "last", "--trainer.max_steps", LAST, *words)
    assert done["codes"] == [2]
    assert says in done["outputs"][0]["err"]
    assert content(run_processes.folder / "run") == before


def test_deepspeed_resumes_only_with_its_precision(run_processes, start):
    words = start(strategy="deepspeed_stage_1")
    done = run_processes.run(*words, "run", "--ckpt_path", "last", "--trainer.max_steps", LAST, "--trainer.precision", "bf16-mixed")
    assert done["codes"] == [2], done["outputs"][0]["err"][-2000:]
    assert "trainer.precision: the checkpoint was written with 32" in done["outputs"][0]["err"]


def test_another_architecture_is_refused_by_name(run_processes, tiny_model):
    shutil.rmtree(run_processes.folder / "run", ignore_errors=True)
    init = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4}
    config = config_of(None, write_data(run_processes.folder), lora=False, limit_val_batches=0)
    config["model"]["init"], config["data"]["tokenizer"] = init, tiny_model("llama")
    words = write_config(run_processes.folder, config)
    assert run_processes.run(*words, "run", "--trainer.max_steps", 1)["codes"] == [0]
    done = run_processes.run(*words, "run", "--ckpt_path", "last", "--trainer.max_steps", 2, "--model.init",
                      json.dumps(init | {"num_hidden_layers": 2}))
    assert done["codes"] == [2]
    assert "num_hidden_layers 1, not 2" in done["outputs"][0]["err"]


def test_a_warmup_longer_than_the_run_is_reported(run_processes, start):
    words = start()
    done = run_processes.run(*words, "other", "--trainer.max_steps", 2, "--model.warmup", 500)
    assert done["codes"] == [0]
    assert "500 steps of warmup do not end within the run of 2 steps" in done["outputs"][0]["err"]
