"""If this breaks: `plan` does not predict that a run does not fit, or its cost, and the user notices only after hours.

Oracles: the model built with its weights, one real step of plain torch, the storages that autograd keeps, and the peak
memory of the process of a real fit according to Linux.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import call, place  # noqa: F401

from lit_llm.kernels import attention, rmsnorm
from lit_llm.models.adapters.adapter import wrap_peft
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.models.anatomy import backbone
from lit_llm.models.load import init_causal_lm, load_causal_lm, skeleton
from lit_llm.training.planning import estimate, footprint, trace

SHAPE = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=300)
INITS = {"llama": SHAPE | {"model_type": "llama"}, "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 16},
         "gpt2": dict(model_type="gpt2", n_embd=64, n_layer=4, n_head=4, vocab_size=300),
         "qwen3_moe": SHAPE | {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 64},
         "deepseek_v3": SHAPE | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                                 "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4,
                                 "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                                 "moe_intermediate_size": 32},
         "gemma2": SHAPE | {"model_type": "gemma2", "head_dim": 16, "attn_logit_softcapping": None}}
TOKENS = 192


def built(kind, lora, *, meta):
    make = (lambda init: skeleton(None, init, attention=attention.NAME)) if meta else (lambda init: init_causal_lm(init, attention=attention.NAME))
    with torch.device("meta" if meta else "cpu"):
        inner = make(INITS[kind])
        return (wrap_peft(inner, LoRA(r=4).as_peft()) if lora else inner), inner


@cache
def traced(kind, lora=False, **more):
    return trace.step(lambda: built(kind, lora, meta=True)[0], [0, TOKENS], supervised=TOKENS - 1, **more)


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("lora", [False, True])
def test_memory_of_a_step(kind, lora):
    """Weights, gradients and optimizer exactly; activations within 2 % of what autograd saves, also with dropout."""
    counts = footprint.count(*built(kind, lora, meta=True))
    model, inner = built(kind, lora, meta=False)
    rmsnorm.use_fast_norms(model)
    weights = list({id(weight): weight for weight in model.parameters()}.values())
    weight_storages, saved, alive = {weight.untyped_storage().data_ptr() for weight in weights}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weight_storages:
            saved[storage.data_ptr()] = storage.nbytes()
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
    step = traced(kind, lora)
    need = estimate.memory(counts, estimate.Setting(0, 1, TOKENS, TOKENS), step)
    assert need.weights == sum(weight.nbytes for weight in weights)
    assert need.gradients == sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    assert need.optimizer == sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert step.layers == pytest.approx(sum(saved.values()), rel=0.02)


def test_flops_and_shares_of_devices():
    """By hand: 4 layers of llama; ZeRO splits one part more with each stage."""
    counts = footprint.count(*built("llama", False, meta=True))
    matrices = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 192) + 300 * 64
    assert counts.matrices == matrices
    assert estimate.flops_per_token(counts, 100.0) == 6 * matrices + 6 * 4 * 64 * 100
    experts = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 2 * 3 * 64 * 64) + 300 * 64      # two of four
    assert footprint.count(*built("qwen3_moe", False, meta=True)).matrices == experts
    assert footprint.count(*built("deepseek_v3", False, meta=True)).attention == 4 * 4 * (8 + 8 + 12) // 2
    lora = footprint.count(*built("llama", True, meta=True))
    assert estimate.flops_per_token(lora, 0.0) == 4 * matrices + 6 * lora.trained
    setting = estimate.Setting(0, 4, TOKENS, TOKENS)
    parts = [estimate.memory(counts, replace(setting, stage=stage), traced("llama")) for stage in range(4)]
    size = 4 * counts.total
    assert [part.optimizer for part in parts] == [2 * size] + [3 * size // 4] * 3
    assert [part.gradients for part in parts] == [size, size, size // 4, size // 4]
    assert [part.weights for part in parts] == [size, size, size, size // 4]


def test_the_nearest_change_is_the_least_that_fits():
    counts, rows = footprint.count(*built("llama", False, meta=True)), 4
    setting = estimate.Setting(0, 2, rows * TOKENS, rows * TOKENS, cpu=False)
    kinds = [estimate.Kind(counts, lambda size, way: traced("llama", recompute_=way).times(size))]

    def total(size=rows, **changes):
        return estimate.memory(counts, replace(setting, **changes), kinds[0].step(size, changes.get("recompute", "none"))).total

    def nearest(room, kinds=kinds):
        return estimate.nearest(kinds, setting, room, rows=rows)

    assert total(recompute="full") < total(recompute="selective") < total()
    changes, after = nearest(total(recompute="selective") + 1)
    assert (changes, after.total) == (["--model.gradient_checkpointing selective"], total(recompute="selective"))
    changes, after = nearest(total(recompute="full"))
    assert "data.batch_size / 2" in changes[-1]
    assert after.total < total(recompute="full")
    alone = estimate.Setting(0, 1, TOKENS, TOKENS, recompute="full", optimizer="adamw_8bit", cpu=False)
    room = estimate.memory(counts, alone, kinds[0].step(1, "full")).total
    assert "data.seq_len / 2" in estimate.nearest(kinds, alone, room, rows=1)[0][0]
    lora = estimate.Kind(footprint.count(*built("llama", True, meta=True)),
                         lambda size, way: traced("llama", True, recompute_=way).times(size), "LORA")
    assert estimate.nearest([*kinds, lora], alone, room, rows=1)[0] == ["LORA"]
    assert nearest(1000) is None


def test_what_would_fit_is_offered_in_every_kind():
    """As it is trained now, with adapters, in 4 bits, and on more devices where only that is left."""
    counts, step = footprint.count(*built("llama", False, meta=True)), lambda size, way: traced("llama", recompute_=way).times(size)
    with_lora = footprint.count(*built("llama", True, meta=True))
    in_four_bits = replace(with_lora, quantized=with_lora.total - with_lora.trained - 2 * 300 * 64)
    light = lambda size, way: traced("llama", True, recompute_=way).times(size)     # noqa: E731
    kinds = [estimate.Kind(counts, step), estimate.Kind(with_lora, light, "LORA"), estimate.Kind(in_four_bits, light, "QLORA", "bf16-true")]
    setting = estimate.Setting(3, 4, TOKENS, TOKENS, cpu=False)
    room = estimate.memory(counts, replace(setting, recompute="full"), step(1, "full")).total
    now, lora, qlora = (option.changes for option in estimate.options(kinds, setting, room + 1, rows=1))
    assert now == ["--model.gradient_checkpointing true"] or now == ["--model.gradient_checkpointing selective"]
    assert lora[0] == "LORA"
    assert qlora[0] == "QLORA"
    assert "--trainer.strategy deepspeed_stage_2" in qlora      # stage 3 cannot cut weights in 4 bits
    big = estimate.Kind(replace(counts, total=8 * 10**9, trained=8 * 10**9), step)
    option, = estimate.options([big], replace(setting, stage=0, devices=1), 28 * 10**9, rows=1)
    assert option.changes[0] in ("--trainer.devices 4", "--trainer.devices 8")
    assert "--trainer.strategy deepspeed_stage_3" in option.changes[1]
    assert option.memory.total < 28 * 10**9


LLAMA3 = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False)


@pytest.mark.parametrize(("words", "least", "most"), [
    (("--trainer.devices", 8, "--trainer.strategy", "deepspeed_stage_3", "--device", "a100-80"), 16.8, 30),
    (("--model.lora", "{r: 16, alpha: 32}", "--model.quantize", "nf4", "--memory", 24), 6, 8)], ids=["zero-3", "qlora"])
def test_eight_billion_weights_on_devices_that_are_not_here(words, least, most, tmp_path, monkeypatch):
    """By hand: 18 bytes of each weight over 8 devices; 4 bits of linear layers, two bytes of embedding and head."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(LLAMA3))
    code, out, err = call("plan", "--model.base", "base", "--model.gradient_checkpointing", "true", "--data.tokenizer", "sample:base",
                          "--data.sources", "[{path: sample:conversations_val.jsonl}]", "--data.seq_len", 1024, "--data.batch_size", 1,
                          "--trainer.accelerator", "cpu", "--trainer.precision", "bf16-true", "--json", "plan.json", *words)
    assert code == 0, err
    seen = json.loads(Path("plan.json").read_text())
    d, ff, layers, vocabulary, kv = 4096, 14336, 32, 128256, 1024
    linear, tables = layers * (2 * d * d + 2 * d * kv + 3 * d * ff), 2 * vocabulary * d
    memory = seen["memory"][str(seen["setting"]["stage"])]
    assert (memory["holes"], memory["export"]) == (0, 0)
    assert "fits " in out
    assert "holes" not in out
    assert least < sum(memory.values()) / 2**30 < most
    if "a100-80" in words:
        total = linear + tables + (2 * layers + 1) * d
        assert seen["counts"]["total"] == total
        assert memory["weights"] + memory["gradients"] + memory["optimizer"] == pytest.approx(18 * total / 8, rel=1e-6)
        assert seen["pace"]["tokens_per_second"] == pytest.approx(8 * 0.4 * 312e12 / (8 * (linear + tables / 2)), rel=0.03)
        assert "from the data sheet, not measured here" in out
    else:
        trained = seen["counts"]["trained"]
        assert seen["counts"]["quantized"] == linear            # not the head, although rows of it are trained
        assert seen["counts"]["matrices"] == linear + tables // 2 + layers * 16 * (4 * (d + d) + 2 * (kv - d) + 3 * (d + ff))
        assert memory["weights"] == pytest.approx(linear * 0.516 + 2 * tables + 4 * trained, rel=0.001)


RUN = {"data": {"sources": [{"path": "sample:documents.jsonl"}], "tokenizer": "sample:base", "packing": "concat"},
       "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "default_root_dir": "run"}}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("init", "model", "data", "trainer"), [
    (dict(SHAPE, model_type="qwen3", head_dim=32, hidden_size=256, intermediate_size=1024, num_attention_heads=8), {},
     {"seq_len": 1024, "batch_size": 2}, {"devices": 1, "precision": "32-true"}),
    (dict(model_type="gpt2", n_embd=256, n_layer=6, n_head=8), {"gradient_checkpointing": True},
     {"seq_len": 1024, "batch_size": 1}, {"devices": 1, "precision": "bf16-mixed", "strategy": "deepspeed_stage_2"})],
    ids=["plain", "zero"])
def test_the_peak_of_a_real_run(tmp_path, init, model, data, trainer):
    """The process of `fit`, its export too, as Linux saw it."""
    init = {key: value for key, value in init.items() if key != "vocab_size"}
    config = {"model": {"init": init, **model}, "data": RUN["data"] | data, "trainer": RUN["trainer"] | trainer}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def peak(*words):
        child = subprocess.Popen([sys.executable, "-m", "lit_llm", *words, "--config", "run.yaml"], cwd=tmp_path,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        most, tunables = 0, b""
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            with suppress(ProcessLookupError):          # it has just ended
                tunables = Path(f"/proc/{child.pid}/environ").read_bytes() or tunables
            most = int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM" in status else most
            time.sleep(0.01)
        assert child.returncode == 0, child.communicate()[1]
        assert (b"tcache_count=0" in tunables) == ("fit" in words)      # splinters would take more memory than planned
        return 1024 * most

    measured = peak("fit")
    peak("plan", "--json", "plan.json")
    seen = json.loads((tmp_path / "plan.json").read_text())
    planned = sum(seen["memory"][str(seen["setting"]["stage"])].values())
    assert planned == pytest.approx(measured, rel=0.15)
    assert seen["memory"][str(seen["setting"]["stage"])]["process"] < 0.9 * measured


def test_the_verb_says_it_all_and_loads_no_weights(place, monkeypatch):  # noqa: F811
    base = Path(yaml.safe_load(Path("ok.yaml").read_text())["model"]["base"])
    total = sum(weight.numel() for weight in load_causal_lm(str(base)).parameters())
    monkeypatch.setattr("lit_llm.models.load.load_causal_lm", None)
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
    code, out, err = call("plan", "--config", "ok.yaml", "--device", "cpu", "--json", "plan.json")
    assert code == 0, err
    assert json.loads(Path("plan.json").read_text())["memory"]["0"]["holes"] > 0        # of the process itself
    assert max(map(len, out.splitlines())) <= 100
    code, _, err = call("plan", "--config", "ok.yaml", "--device", "h10")
    assert code == 2
    assert "Did you mean 'h100'?" in err
