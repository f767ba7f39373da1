"""If this breaks: a model with added tokens cannot be trained, or its export maps ids to other tokens than the training."""

import json
from pathlib import Path

import pytest
import short_runs
import torch
from short_runs import plain_nll

from lit_llm import CausalLMModule, InputError, LoRA, Source, TextDataModule, Trainer
from lit_llm.exports.command import export
from lit_llm.inference.completion import TextEngine
from lit_llm.models import vocabulary
from lit_llm.models.load import load_causal_lm
from lit_llm.names import resolve

NEW = ["<tool>", "</tool>", "<zzz>"]


@pytest.fixture
def more(tmp_path):
    """The sample's tokenizer with three additional tokens, and chats that contain two of them."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(resolve("sample:base"))
    hf.add_tokens(NEW[:2], special_tokens=True)
    hf.add_tokens(NEW[2:])
    hf.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": [{"role": "user", "content": f"{animal}?"},
                          {"role": "assistant", "content": f"<zzz> {animal} <zzz>"}]} for animal in ("cat", "dog", "owl")]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def fit(folder, name="run", **options):
    return short_runs.fit(folder, name, **{"tokenizer": str(folder / "tokenizer"), "passes": 4, "lora": LoRA(r=4)} | options)


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_base_trains_resumes_and_exports(more, tied, caplog):
    """All new rows are trained beside LoRA; the export has them, tied as before, with the NLL measured in training."""
    base = "sample:base"
    if not tied:
        model = load_causal_lm(base)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        base = str(more / "untied")
        model.save_pretrained(base)
    with caplog.at_level("INFO", logger="lit_llm"):
        module, trainer, data = fit(more, base=base)
    assert "3 rows are added" in caplog.text
    indices = module.model.active_peft_config.trainable_token_indices
    assert len(indices) == 1 + (not tied)
    assert all({1536, 1537, 1538} <= set(ids) for ids in indices.values())
    expected = float(trainer.callback_metrics["val/nll"])
    folder = export(str(more / "run"), "last")
    nll, model = plain_nll(folder, data)
    assert nll == pytest.approx(expected, rel=1e-5)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 1539
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    (step,) = (more / "run/checkpoints").glob("step_*")
    engine = TextEngine.load(resolve(base), adapter=step / "adapter")       # grows as training did
    assert engine.engine.vocab_size == 1539
    whole, *_ = fit(more, "whole", steps=4, base=base)
    _, resumed, _ = fit(more, steps=4, ckpt_path="last", base=base)
    nll = dict(resumed.lightning_module.model.named_parameters())
    assert all(torch.equal(weight, nll[name]) for name, weight in whole.model.named_parameters())


def test_every_weight_may_learn_with_new_tokens(more):
    _, trainer, data = fit(more, lora=None, lr=1e-3)
    nll, model = plain_nll(export(str(more / "run"), "last"), data)
    assert nll == pytest.approx(float(trainer.callback_metrics["val/nll"]), rel=1e-5)
    assert model.config.vocab_size == 1539


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_new_rows_are_the_mean_of_the_old(kind):
    """Embedding, head and the head's bias (Phi has one); what is padded already stays as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=50, **sizes))
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    tied = head.weight is model.get_input_embeddings().weight
    before = [head.weight.detach().clone(), model.get_input_embeddings().weight.detach().clone()]
    bias = head.bias.detach().clone() if head.bias is not None else None
    assert vocabulary.grow(model, 50) == vocabulary.grow(model, 40) == 0
    assert vocabulary.grow(model, 53) == 3
    head = model.get_output_embeddings()
    for old, new in zip(before, [head.weight, model.get_input_embeddings().weight], strict=True):
        assert torch.equal(new[:50], old)
        assert torch.allclose(new[50:], old.mean(0).expand(3, -1), atol=1e-6)
    if bias is not None:
        assert torch.allclose(head.bias, torch.cat([bias, bias.mean().expand(3)]), atol=1e-6)
    assert (kind == "phi") == (bias is not None)
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 53
    assert model(input_ids=torch.tensor([[1, 52]])).logits.shape[-1] == 53


def test_another_tokenizer_than_the_bases_is_refused(more, stories):
    """Whatever its size: ids would mean other tokens. A base without a tokenizer accepts any that fits."""
    data = TextDataModule(sources=[Source(str(more / "chats.jsonl"))], tokenizer=stories, seq_len=64)
    module = CausalLMModule(base="sample:base", lora=LoRA(r=4))
    trainer = Trainer(default_root_dir=str(more / "other"), max_steps=1, accelerator="cpu", devices=1,
                      enable_progress_bar=False)
    with pytest.raises(InputError, match=r"another tokenizer than the base's: .* tokens of the base model's own") as caught:
        trainer.fit(module, datamodule=data)
    assert "data.tokenizer" in str(caught.value)
    assert not Path(more / "other/checkpoints").exists()
