"""If this breaks, a user learns from a crash after hours what `plan` should have said in seconds: that a run does not fit,
or what it would cost.

Oracles: the model built with its weights, one real step of plain torch, the storages that autograd keeps.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import call, place  # noqa: F401

from lit_llm import attention
from lit_llm.adapter import LoRA, wrap_peft
from lit_llm.model import backbone, init_causal_lm, load_causal_lm, skeleton
from lit_llm.training import estimate, plan

SHAPE = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=300)
INITS = {"llama": SHAPE | {"model_type": "llama"}, "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 16},
         "gpt2": dict(model_type="gpt2", n_embd=64, n_layer=4, n_head=4, vocab_size=300, attn_pdrop=0.0, resid_pdrop=0.0,
                      embd_pdrop=0.0)}
TOKENS = 192


def built(kind, lora, *, meta):
    make = (lambda init: skeleton(None, init)) if meta else (lambda init: init_causal_lm(init, attention=attention.NAME))
    with torch.device("meta" if meta else "cpu"):
        inner = make(INITS[kind])
        return (wrap_peft(inner, LoRA(r=4).as_peft()) if lora else inner), inner


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("lora", [False, True])
def test_memory_of_a_step(kind, lora):
    """Weights, gradients and optimizer to the byte; activations within 15 % of what autograd keeps."""
    counts = plan.count(*built(kind, lora, meta=True))
    model, inner = built(kind, lora, meta=False)
    weights = list({id(weight): weight for weight in model.parameters()}.values())
    known, kept, alive = {weight.untyped_storage().data_ptr() for weight in weights}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)                        # else another tensor may get its address
        return tensor

    ids = torch.arange(TOKENS)[None] % 300
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backbone(model)(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False, max_seqlen=TOKENS,
                                 cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32)).last_hidden_state
    hidden.square().sum().backward()
    if not lora:
        inner.get_output_embeddings()(hidden[:, :1].detach()).sum().backward()
    optimizer = torch.optim.AdamW([weight for weight in weights if weight.requires_grad], fused=True)
    optimizer.step()
    need = estimate.memory(counts, estimate.Setting(0, 1, TOKENS, TOKENS), inner.config)
    assert need.weights == sum(weight.nbytes for weight in weights)
    assert need.gradients == sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    assert need.optimizer == sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert need.activations == pytest.approx(sum(kept.values()), rel=0.15)


def test_flops_and_shares_of_devices():
    """By hand: 4 layers of llama; ZeRO splits one part more with each stage."""
    counts = plan.count(*built("llama", False, meta=True))
    matrices = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 192) + 300 * 64
    assert counts.matrices == matrices
    assert estimate.flops_per_token(counts, 100.0) == 6 * matrices + 6 * 4 * 64 * 100
    lora = plan.count(*built("llama", True, meta=True))
    assert estimate.flops_per_token(lora, 0.0) == 4 * matrices + 6 * lora.trained
    config = built("llama", False, meta=True)[1].config
    setting = estimate.Setting(0, 4, TOKENS, TOKENS)
    parts = [estimate.memory(counts, replace(setting, stage=stage), config) for stage in range(4)]
    size = 4 * counts.total
    assert [part.optimizer for part in parts] == [2 * size] + [3 * size // 4] * 3
    assert [part.gradients for part in parts] == [size, size, size // 4, size // 4]
    assert [part.weights for part in parts] == [size, size, size, size // 4]


def test_the_nearest_change_is_the_smallest_that_fits():
    counts, config = plan.count(*built("llama", False, meta=True)), built("llama", False, meta=True)[1].config
    setting = estimate.Setting(1, 2, 4 * TOKENS, 4 * TOKENS)
    need = estimate.memory(counts, setting, config).total
    light = estimate.memory(counts, replace(setting, recompute="selective"), config).total
    assert light < need
    said, after = estimate.nearest(counts, setting, config, light + 1, rows=4, quantizable=0)
    assert (said, after.total) == (["model.gradient_checkpointing: selective"], light)
    full = estimate.memory(counts, replace(setting, recompute="full"), config).total
    said, after = estimate.nearest(counts, setting, config, full - 1, rows=4, quantizable=0)
    assert any("data.batch_size / 2" in line for line in said)
    assert after.total < full - 1
    assert estimate.nearest(counts, setting, config, 1000, rows=4, quantizable=0) is None


def test_the_verb_says_it_all_and_loads_no_weights(place, monkeypatch):  # noqa: F811
    import yaml

    base = Path(yaml.safe_load(Path("ok.yaml").read_text())["model"]["base"])
    total = sum(weight.numel() for weight in load_causal_lm(str(base)).parameters())
    monkeypatch.setattr("lit_llm.model.load_causal_lm", None)
    code, out, err = call("plan", "--config", "ok.yaml", "--json", "plan.json")
    assert code == 0, err
    seen = json.loads(Path("plan.json").read_text())
    assert seen["counts"]["total"] == total + seen["counts"]["trained"]
    assert seen["steps_in_run"] == 2
    assert seen["tokens"] > seen["supervised"] > 0
    assert f"{seen['counts']['total']:,} parameters" in out
    assert "fits " in out
    assert max(map(len, out.splitlines())) <= 100
    assert not Path("run").exists()
    code, out, err = call("plan", "--config", "ok.yaml", "--memory", 0.0001)
    assert code == 0, err
    assert "does not fit" in out
