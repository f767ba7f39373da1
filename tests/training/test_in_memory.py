"""If this breaks: a fault in writing a checkpoint's weights is not detected, and the export differs from the trained model.

Oracle: plain transformers and peft on the files of the checkpoint.
"""

import json

import lightning as L
import pytest
import torch
from peft import PeftModel
from test_checkpoint import fit  # noqa: F401
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.exports.command import export
from lit_llm.models import load as model
from lit_llm.models.adapters import adapter, trained_rows
from lit_llm.text import check
from lit_llm.training import learned_tokens
from lit_llm.training.checks.in_memory import ReferenceScores
from lit_llm.training.run import manifest, rng

HOW = dict(rows=6, max_steps=3, limit_val_batches=0)


def reference_check(run, step=3):
    """The manifest's entry about the model in memory."""
    return manifest.read(run / "checkpoints" / f"step_{step}")["check"]


def nll_of(plain, run):
    """Mean nats per token of the reference sequences of an export, each computed separately."""
    total = count = 0
    for row in json.loads((run / "export" / check.NAME).read_text())["rows"]:
        ids = torch.tensor([row["ids"][:48]])
        with torch.no_grad():
            total += float(plain.eval()(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize(("strategy", "kind", "lora"), [
    ("auto", "qwen3", True), ("auto", "gpt2", False), ("deepspeed_stage_1", "llama", True),
    ("deepspeed_stage_3", "llama", True), ("deepspeed_stage_3", "llama", False), ("fsdp2", "llama", True)])
def test_the_nll_in_memory_is_that_of_the_files(strategy, kind, lora, fit, tiny_model, caplog):  # noqa: F811
    """With dropout in training, under strategies that shard weights, and for models without packing."""
    run = fit("run", strategy=strategy, kind=kind, lora=lora, dropout=0.2, **HOW)
    with caplog.at_level("INFO", "lit_llm"):
        export(str(run))
    assert any("in memory and is" in line for line in caplog.messages)
    folder = run / "checkpoints" / "step_3"
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(kind) if lora else folder / "model")
    before = nll_of(AutoModelForCausalLM.from_pretrained(tiny_model(kind)), run)
    plain = PeftModel.from_pretrained(plain, folder / "adapter") if lora else plain
    assert reference_check(run)["nll"] == pytest.approx(nll_of(plain, run), rel=1e-5)
    assert abs(reference_check(run)["nll"] - before) > 1e-2    # the model has changed, so the value of the initial model would be detected


def test_rows_of_tokens_that_learn_under_fsdp2(fit, tiny_model, monkeypatch):  # noqa: F811
    """Their matrix is rebuilt at each access, from parts of which some are sharded."""
    monkeypatch.setattr(learned_tokens, "choose", lambda *_, **__: learned_tokens.Choice([1, 2, 5]))
    run = fit("run", strategy="fsdp2", **HOW)
    assert trained_rows.stored_tokens(run / "checkpoints" / "step_3" / "adapter") == [1, 2, 5]
    export(str(run))
    assert reference_check(run)["nll"] == pytest.approx(nll_of(AutoModelForCausalLM.from_pretrained(run / "export"), run), rel=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_weights_that_are_written_wrongly_are_refused(lora, fit, monkeypatch):  # noqa: F811
    """The message has both numbers, and nothing is exported; one changed tensor is enough."""
    home, name = (adapter, "save_adapter") if lora else (model, "save_weights")
    real = getattr(home, name)

    def scaled(module, folder, state, *rest, **more):
        wrong = next(key for key in state if "v_proj" in key and state[key].any())
        return real(module, folder, state | {wrong: state[wrong] * 1.5}, *rest, **more)

    monkeypatch.setattr(home, name, scaled)
    run = fit("run", lora=lora, **HOW)
    with pytest.raises(InputError, match=r"nll [\d.]+ in memory when it was written, and have [\d.]+ reloaded \(tol"):
        export(str(run))
    assert not (run / "export").exists()


def test_a_tensor_that_is_not_written_is_refused(fit, monkeypatch):  # noqa: F811
    """Weights of zeros look to PEFT like an untrained adapter."""
    real = adapter.save_adapter

    def dropped(module, folder, state, base):
        wrong = next(key for key in state if "lora_B" in key)
        real(module, folder, state | {wrong: torch.zeros_like(state[wrong])}, base)

    monkeypatch.setattr(adapter, "save_adapter", dropped)
    run = fit("run", **HOW)
    with pytest.raises(InputError, match="in memory when it was written"):
        export(str(run))


def test_scoring_disturbs_nothing(fit, tiny_model):  # noqa: F811
    """Generators, modes and gradients are unchanged within an accumulation window, and dropout is off."""
    class Scores(L.Callback):
        def on_after_backward(self, trainer, module):
            for layer in list(module.modules())[::3]:
                layer.training = False              # some layers in each mode
            modes = [layer.training for layer in module.modules()]
            state = rng.current()
            gradients = {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.requires_grad}
            states.extend(ReferenceScores().measured(trainer)["nll"] for _ in range(2))
            assert [layer.training for layer in module.modules()] == modes
            assert torch.equal(rng.current()["torch"], state["torch"])
            assert rng.current()["python"] == state["python"]
            assert gradients
            assert all(torch.equal(weight.grad, gradients[name]) for name, weight in module.named_parameters()
                       if weight.requires_grad)
            assert torch.is_grad_enabled()

    states = []
    fit("run", dropout=0.5, callbacks=[Scores()], **HOW)
    assert len(states) == 12
    assert states[::2] == states[1::2]


def test_a_checkpoint_of_an_earlier_version_is_exported(fit, caplog):  # noqa: F811
    """Its manifest has no such value; the export logs that it was not compared."""
    run = fit("run", **HOW)
    folder = run / "checkpoints" / "step_3"
    facts = manifest.read(folder)
    del facts["check"]
    manifest._replace(folder, facts)
    with caplog.at_level("INFO", "lit_llm"):
        export(str(run))
    assert any("not compared with the model in memory" in line for line in caplog.messages)
    assert (run / "export" / check.NAME).is_file()
