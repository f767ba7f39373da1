"""If this breaks: a run whose weights or perplexity became inf or nan ends with exit code 0 and an export."""

import os
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_llm import CausalLMModule, Source, TextDataModule, Trainer
from lit_llm.errors import InputError
from lit_llm.training.run import manifest
from lit_llm.training.run.checkpoint import StepCheckpoint
from tests.test_cli import call, place
from tests.training.run_processes import config_of, write_config, write_data

assert place                                        # a fixture
TOO_FAST = ("--model.lora", "null", "--model.lr", "10", "--model.warmup", "0", "--model.schedule", "constant",
            "--trainer.max_steps", "20", "--trainer.val_check_interval", "1")


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A base of which one weight of a layer is NaN."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2"])
def test_a_learning_rate_that_breaks_the_model(strategy, place):
    code, out, err = call("fit", "--config", "ok.yaml", *TOO_FAST, "--trainer.strategy", strategy)
    message = err[err.index("error: "):]
    assert code == 2
    assert "training diverged" in message
    assert message.startswith("error: step ")
    assert "learning rate, 10" in message
    assert "--trainer.gradient_clip_val" in message
    assert "times lower" not in out
    assert not Path("run/export").exists()
    for folder in manifest.folders(Path("run")):
        assert manifest.read(folder)["figures"]["val/perplexity"] is not None


@pytest.mark.parametrize(("words", "says"), [
    ((), ["model.base", "perplexity on the validation data is nan before the first step"]),
    (("--data.val_sources", "null"), ["all 2 steps were skipped", "nothing learned"]),
    (("--data.val_sources", "null", "--model.lora", "null"), ["model.base", "not finite", "before the first step"]),
])
def test_a_base_that_is_broken(words, says, broken, place):
    code, out, err = call("fit", "--config", "ok.yaml", "--model.base", broken, *words)
    assert code == 2, out + err
    assert "Traceback" not in err
    for expected in says:
        assert expected in err
    assert not Path("run/export").exists()
    assert Path("run").exists() == (says[0] != "model.base")        # an earlier run would have its name again


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_broken_model_is_not_measured_with_success(verb, broken, place):
    """The figures are printed, since they are true, and the command fails."""
    code, out, err = call(verb, "--config", "ok.yaml", "--model.base", broken, "--data.test_sources", "[{path: good.jsonl}]")
    assert code == 2, out + err
    assert f"{'val' if verb == 'validate' else 'test'}/perplexity" in out
    assert "error: model.base: perplexity is nan" in err


class Spoil(L.Callback):
    """Makes one trained weight infinite at the end of a step, as an overflow in the optimizer would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(weight for weight in module.parameters() if weight.requires_grad).view(-1)[0] = float("inf")


def test_broken_weights_are_never_saved(tiny_model, tmp_path):
    """The last good checkpoint stays the newest, and the error names it."""
    data = write_data(tmp_path)
    trainer = Trainer(default_root_dir=str(tmp_path / "run"), max_steps=5, accelerator="cpu", devices=1,
                      callbacks=[Spoil(3), StepCheckpoint(every_n_steps=1)], enable_progress_bar=False)
    module = CausalLMModule(base=tiny_model("llama"), lr=1e-3)
    with pytest.raises(InputError, match="diverged") as caught:
        trainer.fit(module, datamodule=TextDataModule([Source(data)], tokenizer=module.base, seq_len=128, batch_size=1))
    assert caught.value.where == "step 3"
    folders = tmp_path / "run" / "checkpoints"
    assert (folders / "LATEST").read_text().strip() == "step_2"
    assert str(folders / "step_2") in str(caught.value)
    assert [path.name for path in folders.glob("step_*")] == ["step_2"]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3", "fsdp2"])
def test_two_processes_end_alike(strategy, run_processes, tiny_model):
    config = config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=2, strategy=strategy, lora=False)
    config["model"] |= {"lr": 10.0, "warmup": 0, "schedule": "constant"}
    config["trainer"] |= {"val_check_interval": 1, "max_epochs": 10}
    result = run_processes.run(*write_config(run_processes.folder, config), "diverged", ranks=2)
    assert result["codes"] == [2, 2], result["outputs"]
    counts = [output["err"].count("training diverged") for output in result["outputs"]]
    assert counts == [1, 0]
    assert not (run_processes.folder / "diverged" / "export").exists()
