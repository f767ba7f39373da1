"""If this breaks: a continued adapter does not start from the model that it was, or an export lacks the merged adapter."""

import json

import pytest
import short_runs
import torch
from short_runs import plain_nll

from lit_llm import CausalLMModule, InputError, LoRA, Trainer
from lit_llm.exports.command import export
from lit_llm.inference import loading
from lit_llm.names import resolve


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of LoRA on the sample's base, with its data and its last validation."""
    folder = tmp_path_factory.mktemp("starting")
    rows = [{"messages": [{"role": "user", "content": f"Where is the {animal}?"},
                          {"role": "assistant", "content": f"The {animal} is here!"}]}
            for animal in ("cat", "dog", "owl", "fox", "hen", "pig")]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, trainer, _ = fit(folder, "one", lora=LoRA(r=4), steps=6)
    return folder, float(trainer.callback_metrics["val/nll"])


def fit(folder, name, **options):
    return short_runs.fit(folder, name, tokenizer="sample:base", passes=8, **options)


def before(folder, name):
    """nll of the validation before training, as the run keeps it."""
    return json.loads((folder / name / "metrics.json").read_text())["before/val/nll"]


@pytest.mark.parametrize("how", [
    {}, {"merge_adapter": True, "lora": LoRA(r=2)}, {"merge_adapter": True, "lr": 1e-4},
    {"merge_adapter": True, "peft": {"class_path": "LoHaConfig", "init_args": {"r": 2}}}],
    ids=["continued", "lora upon it", "all weights", "another method"])
def test_the_first_validation_is_the_adapters_last(trained, how, request):
    """Training continues; the checkpoint, the export and the model that chat loads are the trained one."""
    folder, last = trained
    name = request.node.callspec.id.replace(" ", "_")
    _, trainer, data = fit(folder, name, adapter=str(folder / "one"), **how)
    assert before(folder, name) == pytest.approx(last, rel=1e-5)
    now = float(trainer.callback_metrics["val/nll"])
    assert now != pytest.approx(last, rel=1e-5)
    assert plain_nll(export(str(folder / name), "last"), data)[0] == pytest.approx(now, rel=1e-5, abs=1e-6)     # float32
    if (step := next((folder / name / "checkpoints").glob("step_*"))).joinpath("adapter").is_dir():
        one = loading.load(resolve("sample:base"), "cpu", "auto", step / "adapter")
        two = loading.load(str(folder / name / "export"), "cpu", "auto", None)
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        assert all(torch.allclose(actual, expected, atol=1e-6) for actual, expected in pairs)
    whole, *_ = fit(folder, name + "_whole", steps=4, adapter=str(folder / "one"), **how)
    resumed, *_ = fit(folder, name, steps=4, adapter=str(folder / "one"), ckpt_path="last", **how)
    actual = dict(resumed.model.named_parameters())
    assert all(torch.equal(weight, actual[key]) for key, weight in whole.model.named_parameters())
    step = next((folder / name / "checkpoints").glob("step_*"))
    module = CausalLMModule(base="sample:base", adapter=str(folder / "one"), **how)
    measured = Trainer(default_root_dir=str(folder / name), accelerator="cpu", devices=1, enable_progress_bar=False,
                       logger=False)
    figures = measured.validate(module, datamodule=data, ckpt_path=str(step), verbose=False)[0]
    assert figures["val/nll"] == pytest.approx(plain_nll(export(str(folder / name), "last"), data)[0], rel=1e-5, abs=1e-6)


def test_wrong_company_is_refused_by_name(trained, tmp_path, stories):
    folder, _ = trained
    start = str(folder / "one")
    for keys, words in (
            ({"base": "sample:base", "adapter": start, "lora": LoRA(r=2)}, "--model.lora null"),
            ({"base": "sample:base", "merge_adapter": True, "lora": LoRA(r=2)}, "no adapter to merge"),
            ({"init": {"model_type": "llama"}, "adapter": start}, "give model.base"),
            ({"base": "sample:base", "adapter": start, "merge_adapter": True, "lora": LoRA(r=2), "quantize": "nf4"},
             "4 bits"),
            ({"base": stories, "adapter": start}, "was trained on sample:base"),
            ({"base": "sample:base", "adapter": str(tmp_path)}, "no adapter")):
        with pytest.raises(InputError) as caught:
            CausalLMModule(**keys)
        assert words in str(caught.value), keys
    step = next((folder / "one/checkpoints").glob("step_*")) / "adapter"
    (tmp_path / "adapter_config.json").write_text((step / "adapter_config.json").read_text())
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        CausalLMModule(base="sample:base", adapter=str(tmp_path))
