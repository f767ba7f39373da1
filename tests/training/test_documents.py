"""If this breaks: a model whose layers would mix packed documents cannot be trained, or is trained across documents."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llm import CausalLMModule, InputError, LoRA, Source, TextDataModule, Trainer
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.training.checks.proof import way_of
from tests.conftest import SHAPES

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "num_key_value_heads": 2, "initializer_range": 0.2}
KINDS = {
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 0.5},                           # caps its scores
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},       # attention sinks
    "lfm2": {"layer_types": ["conv", "full_attention"]},                                # convolutions
    "nemotron": {}, "mamba": {"state_size": 4}, "bloom": {"n_head": 4, "n_layer": 2}, "falcon": {},
}


@pytest.fixture
def base(request, tiny_tokenizer, tmp_path):
    """A folder with a random model of a kind."""
    tokenizer = Tokenizer.load(tiny_tokenizer)
    config_keys = AutoConfig.for_model(request.param).to_dict()
    spec = {key: value for key, value in WIDTHS.items() if key in config_keys} | KINDS[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **spec, vocab_size=tokenizer.vocab_size, bos_token_id=None,
                                  eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    return str(tmp_path / "base")


def module_and_data(base, tmp_path, **options):
    rows = [{"messages": [{"role": "user", "content": f"say {n} times ok"},
                          {"role": "assistant", "content": "ok " * (n % 7) + str(n)}]} for n in range(24)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = TextDataModule(sources=[Source(str(tmp_path / "chats.jsonl"))], tokenizer=base, seq_len=64, batch_size=2)
    return CausalLMModule(base=base, lr=1e-3, router_aux_loss=0, **options), data        # `test_balance.py` has that loss


def fit(base, tmp_path, *, strategy="auto", devices=1, **options):
    module, data = module_and_data(base, tmp_path, **options)
    trainer = Trainer(default_root_dir=str(tmp_path / "run"), max_steps=1, accelerator="cpu", devices=devices,
                      strategy=strategy, log_every_n_steps=1, enable_progress_bar=False)
    trainer.fit(module, datamodule=data)
    return module, float(trainer.callback_metrics["train/loss"])


def expected(base, tmp_path):
    """Loss and gradients of the first step by plain transformers, each document separately."""
    _, data = module_and_data(base, tmp_path)
    data.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").train()
    ids, labels, total = batch["input_ids"].view(-1), batch["labels"].view(-1), 0.0
    for start, stop in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:], strict=True):
        logits = model(input_ids=ids[None, start:stop], use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[start + 1:stop], ignore_index=-100, reduction="sum")
    (total / batch["num_supervised"]).backward()
    return float(total / batch["num_supervised"]), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("base", KINDS, indirect=True)
def test_documents_that_cannot_be_packed_are_processed_one_by_one(base, tmp_path, caplog, monkeypatch):
    loss, grads = expected(base, tmp_path)
    seen = {}
    monkeypatch.setattr(CausalLMModule, "on_before_optimizer_step", lambda module, optimizer: seen.update(
        {name: weight.grad.clone() for name, weight in module.model.named_parameters() if weight.grad is not None}))
    _, loss_of_run = fit(base, tmp_path)
    assert loss_of_run == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        assert grad is None or (seen[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name
    assert "one by one" in caplog.text


@pytest.mark.parametrize("base", ["gemma2", "lfm2"], indirect=True)
def test_adapters_learn_there_too(base, tmp_path):
    module, loss = fit(base, tmp_path, lora=LoRA(r=2), gradient_checkpointing=True, neftune_alpha=5.0)
    assert loss > 0
    assert any(float(weight.abs().sum()) > 0 for name, weight in module.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("base", ["gemma2"], indirect=True)
def test_processes_that_share_layers_are_refused(base, tmp_path, monkeypatch):
    module, _ = module_and_data(base, tmp_path)
    from lit_llm.training.checks import compatible
    from lit_llm.training.parallel.zero import ZeroStrategy

    module.trainer = Trainer(accelerator="cpu", devices=1, strategy="deepspeed_stage_3", logger=False,
                             enable_checkpointing=False)
    module.choose_attention({})
    assert isinstance(module.trainer.strategy, ZeroStrategy)
    with pytest.raises(InputError, match="deepspeed_stage_2"):
        compatible.check(module, module.trainer.strategy, 2, precision="32-true", training=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_who_can_share_a_row_does(kind):
    way = way_of(None, SHAPES[kind], vocab_size=64)
    assert (way.packed, way.own_logits, way.why_unpacked) == (True, False, "")
