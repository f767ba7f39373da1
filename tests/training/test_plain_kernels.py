"""If this breaks: a result cannot be verified without this project's kernels, or the switch has no effect."""

import json

import pytest
import torch

from lit_llm import CausalLMModule, InputError, Source, TextDataModule, Trainer
from lit_llm.kernels import blockwise, cross_entropy, rmsnorm, switch, tiles

RECORDS = [{"prompt": f"say {word}", "completion": f"{word} " * times} for word, times in (("one", 1), ("two", 9), ("six", 4))]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(file)


def figures(base, chats, folder, kernels, **options):
    """Losses of three steps and of the validation after them."""
    torch.manual_seed(0)
    module = CausalLMModule(base=base, lr=1e-3, **options)
    data = TextDataModule([Source(chats)], val_sources=[Source(chats)], tokenizer=base, seq_len=64, batch_size=1)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=3, max_epochs=-1, enable_progress_bar=False, kernels=kernels,
                      enable_checkpointing=False, log_every_n_steps=1, num_sanity_val_steps=0, default_root_dir=str(folder))
    trainer.exports = False
    trainer.fit(module, datamodule=data)
    return [float(trainer.callback_metrics[name]) for name in ("train/loss", "val/nll", "val/token_accuracy")]


def test_a_run_without_the_kernels_is_the_same_run(tiny_model, chats, tmp_path, monkeypatch):
    """None of them is called, and every figure stays as it was but for rounding."""
    own = figures(tiny_model("llama"), chats, tmp_path / "own", None)
    called = []

    def counted(name, real):
        return lambda *args, **keys: (called.append(name), real(*args, **keys))[1]

    for module, name in ((blockwise, "causal"), (rmsnorm, "norm"), (cross_entropy, "nll"), (tiles, "measure")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    plain = figures(tiny_model("llama"), chats, tmp_path / "plain", "plain")
    assert not called
    assert plain == pytest.approx(own, rel=1e-5)
    assert figures(tiny_model("llama"), chats, tmp_path / "again", None) == own
    assert set(called) == {"causal", "norm", "nll", "measure"}


def test_the_environment_decides_where_the_trainer_does_not(monkeypatch):
    monkeypatch.setenv(switch.VARIABLE, "plain")
    assert switch.is_plain()
    with switch.using("own"):
        assert not switch.is_plain()
        with switch.using(None):
            assert not switch.is_plain()
    assert switch.is_plain()
    monkeypatch.setenv(switch.VARIABLE, "plian")
    with pytest.raises(InputError, match="LIT_LLM_KERNELS: 'plian' is not one of own, plain"):
        switch.is_plain()


def test_kernels_of_others_are_kernels_too(tiny_model, chats, tmp_path):
    with pytest.raises(InputError, match=r"plain kernels are selected, but liger is an external kernel"):
        figures(tiny_model("llama"), chats, tmp_path, "plain", cross_entropy="liger")
