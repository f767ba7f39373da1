"""If this breaks: an option that should only change how a run computes changes its result, or an option trains nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from lit_llm import CausalLMModule, InputError, LoRA, Source, TextDataModule, Trainer
from lit_llm.data.rows.loader import batch_of
from lit_llm.models import recompute
from lit_llm.training.planning import footprint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chats(tmp_path):
    """Twenty-four conversations of unequal lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {'very ' * (n % 5)}{n}."},
                {"role": "assistant", "content": "ok " * (n % 7) + str(n)},
            ]
        }
        for n in range(24)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def fit(
    model: str,
    chats,
    tmp_path,
    *,
    steps: int = 3,
    packing: str = "best_fit",
    name: str = "run",
    trainer: dict | None = None,
    **options,
) -> tuple[CausalLMModule, list[float]]:
    """Train in this process; the module and the logged losses."""
    data = TextDataModule(sources=[Source(str(chats))], tokenizer=model, seq_len=64, batch_size=4, packing=packing)
    module = CausalLMModule(base=model, **{"lr": 1e-3, **options})
    runner = Trainer(
        default_root_dir=str(tmp_path / name),
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        **(trainer or {}),
    )
    torch.manual_seed(0)
    runner.fit(module, datamodule=data)
    rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    return module, [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_gradient_checkpointing_changes_nothing(kind, tiny_model, chats, tmp_path):
    """Recomputed activations are the same activations, with adapters too (whose inputs carry no gradient)."""
    losses = [
        fit(tiny_model(kind), chats, tmp_path, name=str(flag), lora=LoRA(r=4), gradient_checkpointing=flag)[1]
        for flag in (False, True, "selective")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("way", recompute.WAYS)
def test_auto_computes_as_little_again_as_fits(way, tiny_model, chats, tmp_path, monkeypatch):
    sizes = {}

    def room(trainer):
        run = footprint.of(trainer, trainer.lightning_module, trainer.datamodule, 0)
        sizes.update({mode: run.memory(recompute=mode).total for mode in recompute.WAYS})
        return {"none": max(sizes.values()) + 1, "selective": sizes[way] + 1, "full": min(sizes.values())}[way]

    monkeypatch.setattr(footprint, "resident_bytes", lambda: 0)         # which grows from one look to the next
    monkeypatch.setattr(footprint, "room", room)
    module, losses = fit(tiny_model("llama"), chats, tmp_path, gradient_checkpointing="auto", lora=LoRA(r=2))
    assert sizes["selective"] < sizes["none"]
    assert module.recompute == way
    assert module.model.get_base_model().is_gradient_checkpointing == (way != "none")
    assert losses == fit(tiny_model("llama"), chats, tmp_path, name="plain", lora=LoRA(r=2))[1]


def test_all_ranks_compute_again_what_the_narrowest_must(tiny_model, chats, tmp_path):
    """Else some would gather layers for a second time and wait for the others forever."""
    config = {"model": {"base": tiny_model("llama"), "gradient_checkpointing": "auto"},
              "data": {"sources": [{"path": str(chats)}], "seq_len": 64},
              "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 1, "default_root_dir": "run"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "narrow.py").write_text("""
import os
from lit_llm.cli.main import main
from lit_llm.training.planning import footprint
if os.environ.get("LOCAL_RANK") == "1":
    footprint.room = lambda trainer: 1
if __name__ == "__main__":
    main()
""")
    done = subprocess.run([sys.executable, "narrow.py", "fit", "--config", "run.yaml"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "gradient checkpointing: full" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_learn_the_same(tiny_model, chats, tmp_path):
    """A few graphs for all layers and steps, independent of the documents in a sequence; weights keep their names."""
    import torch._dynamo

    _, eager = fit(tiny_model("llama"), chats, tmp_path, steps=5, name="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, compiled = fit(tiny_model("llama"), chats, tmp_path, steps=5, compile=True)
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    assert not any("_orig_mod" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("options", "strategy"), [({}, "deepspeed_stage_3"), ({"gradient_checkpointing": "selective"}, "auto")]
)
def test_uncompilable_settings_are_refused(options, strategy, tiny_model, chats, tmp_path):
    """Before anything is loaded."""
    with pytest.raises(InputError, match="layer") as caught:
        fit(tiny_model("llama"), chats, tmp_path, compile=True, trainer={"strategy": strategy}, **options)
    assert caught.value.fix


def test_neftune_adds_noise_only_in_training(tiny_model, chats, tmp_path):
    """Other losses, the same in a second run of the same seed; without noise there is no difference to a plain run."""
    runs = [
        fit(tiny_model("llama"), chats, tmp_path, name=str(at), neftune_alpha=alpha)
        for at, alpha in enumerate([None, 0.0, 10.0, 10.0])
    ]
    losses = [losses for _, losses in runs]
    assert losses[0] == losses[1] != losses[2] == losses[3]
    assert losses[2][0] == pytest.approx(losses[0][0], rel=0.1)
    shaken, ids = runs[3][0].eval(), np.array([5, 9, 31, 7])
    batch = batch_of([[(ids, ids > 0)]], seq_len=4, pad_id=0, token_bytes=np.ones((2, 320), np.int64))
    with torch.no_grad():
        first, second = (float(shaken.sums(batch).total) for _ in range(2))
    assert first == second > 0


def test_bf16_mixed_moves_weights_by_small_steps(tiny_model, chats, tmp_path):
    """With float32 masters a learning rate of 1e-5 changes every weight; in bf16 most updates would be rounded away."""
    module, losses = fit(tiny_model("llama"), chats, tmp_path, trainer={"precision": "bf16-mixed"})
    _, exact = fit(tiny_model("llama"), chats, tmp_path, name="exact")
    assert losses == pytest.approx(exact, rel=2e-2)
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}


def test_bf16_true_refuses_to_lose_updates(tiny_model, chats, tmp_path):
    """All weights in bf16 without masters is refused with the way out; adapters become float32 by themselves."""
    with pytest.raises(InputError, match="float32 copy"):
        fit(tiny_model("llama"), chats, tmp_path, trainer={"precision": "bf16-true"})
    module, losses = fit(
        tiny_model("llama"), chats, tmp_path, lora=LoRA(r=4), name="lora", trainer={"precision": "bf16-true"}
    )
    assert {weight.dtype for weight in module.parameters() if weight.requires_grad} == {torch.float32}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_adapters_make_no_float32_copies_of_their_inputs(precision, tiny_model, chats, tmp_path, monkeypatch):
    """What attention and the activation give in bfloat16 reaches LoRA as it is, and the losses are those of peft's copies."""
    from peft.tuners.lora.layer import Linear

    seen, cast = set(), Linear._cast_input_dtype

    def watched(layer, x, dtype):
        out = cast(layer, x, dtype)
        seen.add((x.dtype, out.dtype))
        return out

    monkeypatch.setattr(Linear, "_cast_input_dtype", watched)
    _, result = fit(tiny_model("llama"), chats, tmp_path, lora=LoRA(r=4), trainer={"precision": precision})
    assert (torch.bfloat16, torch.bfloat16) in seen
    assert all(came == left for came, left in seen)
    monkeypatch.setattr("lit_llm.models.adapters.adapter.skip_input_copies", lambda model: None)
    seen.clear()
    _, with_copies = fit(tiny_model("llama"), chats, tmp_path, lora=LoRA(r=4), trainer={"precision": precision}, name="copies")
    assert (torch.bfloat16, torch.float32) in seen
    assert result == with_copies


@pytest.mark.parametrize(
    "peft",
    [
        {"class_path": "peft.LoHaConfig", "init_args": {"r": 4}},
        {"class_path": "IA3Config"},
        {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 4}},
        {"class_path": "peft.PrefixTuningConfig", "init_args": {"num_virtual_tokens": 4}},
    ],
    ids=lambda spec: spec["class_path"],
)
def test_any_peft_method_learns(peft, tiny_model, chats, tmp_path):
    """Weights of the method move, the base's do not, and the loss falls."""
    from lit_llm.models.load import load_causal_lm

    module, losses = fit(tiny_model("llama"), chats, tmp_path, peft=peft, steps=12, lr=3e-2, schedule="constant")
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    base = load_causal_lm(tiny_model("llama")).get_input_embeddings().weight
    torch.testing.assert_close(module.model.get_base_model().get_input_embeddings().weight, base, rtol=0, atol=0)


def test_adapters_on_random_weights_are_refused():
    """Nothing could be merged, nor loaded again: the base would be other random weights."""
    with pytest.raises(InputError, match="random weights") as caught:
        CausalLMModule(init={"model_type": "llama"}, lora=LoRA())
    assert "--model.lora null" in str(caught.value)


def test_a_run_without_an_end_is_refused(tiny_model, chats, tmp_path):
    """Without max_epochs and max_steps the length of the schedule is unknown."""
    with pytest.raises(InputError, match="no end"):
        fit(tiny_model("llama"), chats, tmp_path, steps=-1, trainer={"max_epochs": -1})


def test_rows_longer_than_the_model_are_refused(tiny_model, chats, tmp_path):
    """Before the first step, with the number to set."""
    data = TextDataModule(sources=[Source(str(chats))], tokenizer=tiny_model("llama"), seq_len=512)
    runner = Trainer(default_root_dir=str(tmp_path / "run"), max_steps=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(InputError, match="256 positions"):
        runner.fit(CausalLMModule(base=tiny_model("llama")), datamodule=data)
    assert not (tmp_path / "run").exists()


def test_qlora_learns_on_four_bits_and_merges_into_the_exact_base(tiny_model, chats, tmp_path):
    """The loss is that of the base with its linear layers rounded to NF4; checkpoints contain only adapters."""
    functional = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes").functional
    from lit_llm.models.anatomy import count_parameters
    from lit_llm.models.load import load_causal_lm
    from lit_llm.models.quantize import quantization_drift

    base, rounded = tiny_model("llama"), tmp_path / "rounded"
    model = load_causal_lm(base)
    exact = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if type(layer) is torch.nn.Linear and name != "lm_head":
                packed, state = functional.quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
                layer.weight.copy_(functional.dequantize_4bit(packed, state))
    model.save_pretrained(rounded)
    AutoTokenizer.from_pretrained(base).save_pretrained(rounded)
    module, losses = fit(base, chats, tmp_path, lora=LoRA(r=4), quantize="nf4", name="four")
    _, wanted = fit(str(rounded), chats, tmp_path, lora=LoRA(r=4), name="oracle")
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert losses[-1] < losses[0]
    assert count_parameters(module.model).total == sum(map(torch.numel, exact.values())) + count_parameters(module.model).trainable
    saved = torch.load(next((tmp_path / "four").rglob("state")), weights_only=False)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved if name.startswith("model."))
    apart = sum((weight - exact[name]).square().sum() for name, weight in model.named_parameters())
    norm = sum(weight.square().sum() for name, weight in exact.items() if "_proj" in name)
    assert quantization_drift(load_causal_lm(base), "nf4") == pytest.approx((apart / norm).sqrt().item(), rel=0.05)


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]], ids=["adapters everywhere", "on some layers"])
def test_four_bits_leave_no_more_for_the_backward_pass_than_whole_weights(tiny_model, targets):
    """After a norm bitsandbytes returns float32, which would double the saved activations of all layers."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    from lit_llm.models.adapters.adapter import skip_input_copies, wrap_peft
    from lit_llm.models.load import load_causal_lm

    def saved_bytes(quantize):
        inner = load_causal_lm(tiny_model("llama"), quantize=quantize, half=True)
        spec = LoRA(r=4, target_modules=targets) if targets else LoRA(r=4)
        model, sizes = wrap_peft(inner, spec.as_peft()).train(), {}
        skip_input_copies(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            saved.append(tensor)
            return tensor

        saved = []
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.arange(128)[None]).logits.sum()
        return sum(sizes.values())

    assert saved_bytes("nf4") <= 1.02 * saved_bytes(None)


def test_an_evaluation_between_two_steps_leaves_qlora_its_gradient(tiny_model):
    """On CPUs with AVX512-BF16, bitsandbytes would convert the weights to a layout without a backward pass: 95 % off."""
    functional = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes").functional
    from lit_llm.models.adapters.adapter import wrap_peft
    from lit_llm.models.load import load_causal_lm

    def gradient(inner, *, evaluated):
        model, draw = wrap_peft(inner, LoRA(r=4).as_peft()), torch.Generator().manual_seed(3)
        learns = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in learns:
            weight.data.normal_(0.0, 0.1, generator=draw)
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in learns])

    ids, rounded = torch.arange(40)[None], load_causal_lm(tiny_model("llama"))
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if type(layer) is torch.nn.Linear and name != "lm_head":
                packed, state = functional.quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
                layer.weight.copy_(functional.dequantize_4bit(packed, state))
    wanted = gradient(rounded, evaluated=False)
    after_evaluation = gradient(load_causal_lm(tiny_model("llama"), quantize="nf4"), evaluated=True)
    assert (after_evaluation - wanted).norm() < 1e-4 * wanted.norm()


def test_four_bits_without_adapters_are_refused():
    with pytest.raises(InputError, match="4-bit") as caught:
        CausalLMModule(base="sample:base", quantize="nf4")
    assert "qlora" in caught.value.fix
