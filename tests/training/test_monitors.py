"""If this breaks: a user's own metric cannot decide about checkpoints or early stopping, or a misspelt one ends a run with loss."""

import json
import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lit_llm import CausalLMModule, InputError, Source, StepCheckpoint, TextDataModule, Trainer


class Mine(Callback):
    """Logs figures of its own: one that falls from validation to validation, and others at other times."""

    def __init__(self):
        self.count = 0

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:             # as many callbacks do it
            self.count += 1
            module.log("val/mine", 10.0 - self.count)

    def on_train_epoch_end(self, trainer, module):
        module.log("epochs_end", float(trainer.current_epoch))


@pytest.fixture
def fit(tiny_model, tmp_path):
    """Three epochs of two steps on eight chats, each with a validation, with these callbacks."""
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"one {n}"}) + "\n" for n in range(8)))

    def run(*callbacks, ckpt_path=None, validate=True, **options):
        sources = [Source(str(chats))]
        data = TextDataModule(sources, val_sources=sources if validate else None, seq_len=64, batch_size=2)
        trainer = Trainer(default_root_dir=str(tmp_path / "run"), max_epochs=3, accelerator="cpu", devices=1,
                          enable_progress_bar=False, callbacks=list(callbacks), **options)
        trainer.fit(CausalLMModule(base=tiny_model("llama"), lr=1e-3), datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


def best(tmp_path):
    return (tmp_path / "run/checkpoints/BEST").read_text().strip()


def test_any_figure_that_was_logged_decides(fit, tmp_path):
    """Decides about the best checkpoint, early stopping and Lightning's own checkpoints, also after a resume."""
    keeper, stop = StepCheckpoint(monitor="val/mine", keep_best=2), EarlyStopping(monitor="val/mine", mode="max", patience=1)
    model_checkpoint = ModelCheckpoint(tmp_path / "theirs", monitor="val/mine")
    trainer = fit(Mine(), keeper, stop, model_checkpoint)
    assert trainer.current_epoch == 2, "it falls at once, and two epochs show it"
    steps = trainer.global_step
    assert best(tmp_path) == f"step_{steps}"
    facts = json.loads((tmp_path / "run/checkpoints" / best(tmp_path) / "manifest.json").read_text())
    assert (facts["score"], facts["figures"]["val/mine"]) == (8.0, 8.0)
    assert float(model_checkpoint.best_model_score) == 8.0
    again = StepCheckpoint(monitor="val/mine", keep_best=2)
    fit(Mine(), again, ckpt_path="last")
    assert again.scores[f"step_{steps}"] == 8.0, "an earlier checkpoint keeps its score"


@pytest.mark.parametrize("callback", [
    lambda: EarlyStopping(monitor="epochs_end"),                    # read when a training epoch has ended
    lambda: ModelCheckpoint(monitor="epochs_end", save_on_train_epoch_end=True),
    lambda: EarlyStopping(monitor="train/lr"), lambda: StepCheckpoint(monitor="val/tokens"),
    lambda: StepCheckpoint(monitor="train/loss"), lambda: EarlyStopping(monitor="never", strict=False),
])
def test_a_right_name_is_never_refused(callback, fit, tmp_path):
    trainer = fit(Mine(), callback(), log_every_n_steps=1)
    assert trainer.current_epoch >= 1
    assert (tmp_path / "run/checkpoints/LATEST").is_file()


@pytest.mark.parametrize("callback", [
    lambda: StepCheckpoint(monitor="val/mien"), lambda: EarlyStopping(monitor="val/mien", check_on_train_epoch_end=False),
    lambda: ModelCheckpoint(monitor="val/mien", save_on_train_epoch_end=False),
])
def test_a_wrong_name_is_reported_after_the_first_validation_without_loss(callback, fit, tmp_path):
    with pytest.raises(InputError) as caught:
        fit(Mine(), callback())
    message = str(caught.value)
    for words in ("no metric 'val/mien' is logged", "val/mine", "val/nll", "Did you mean 'val/mine'?", "--ckpt_path last"):
        assert words in message
    step = int((tmp_path / "run/checkpoints/LATEST").read_text().split("_")[1])
    resumed = fit(Mine(), ckpt_path="last")
    assert resumed.run.resumed
    assert step < resumed.global_step


def test_lightnings_own_error_comes_after_a_warning_and_a_checkpoint(fit, tmp_path, caplog):
    """It reads the figure when the epoch has ended, until when it may still be logged."""
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=r"val/mien.*val/mine"):
        fit(Mine(), EarlyStopping(monitor="val/mien"))
    warned = [record.getMessage() for record in caplog.records if "was not logged" in record.getMessage()]
    assert len(warned) == 1
    assert "val/nll" in warned[0], "in the validation before the first step"
    assert (tmp_path / "run/checkpoints/LATEST").is_file()


@pytest.mark.parametrize(("name", "says"), [("val_nll", "Did you mean 'val/nll'?"), ("train/los", "'train/loss'")])
def test_where_all_names_are_known_a_wrong_one_is_refused_before_the_first_step(name, says, fit, tmp_path):
    with pytest.raises(InputError, match=r"no metric .* is logged") as caught:
        fit(EarlyStopping(monitor=name), LearningRateMonitor())
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_validation_nothing_of_it_stops_early(fit):
    with pytest.raises(InputError, match="never measured"):
        fit(EarlyStopping(monitor="val/nll"), validate=False)


def test_a_module_of_ones_own_logs_what_it_likes(tmp_path):
    class Own(BoringModel):
        def validation_step(self, batch, batch_idx):
            self.log("x", torch.tensor(3.0))

    trainer = Trainer(default_root_dir=str(tmp_path / "run"), max_epochs=1, limit_train_batches=2, accelerator="cpu",
                      devices=1, enable_progress_bar=False, callbacks=[StepCheckpoint(monitor="x")])
    trainer.fit(Own(), datamodule=BoringDataModule())
    assert best(tmp_path) == "step_2"
