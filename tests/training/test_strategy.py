"""What breaks without these: a gradient that is A or W times too small under DeepSpeed (which AdamW hides and clipping
does not), adapters that do not start at the base under ZeRO-3, a run that cannot be resumed, counters that drift apart,
C++ compiled or noise on stdout in the middle of a CPU run.

Real processes train; the oracle is a plain loop of transformers, peft and torch on each step's whole batch, in float32.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_llm.errors import InputError

PROBE = Path(__file__).with_name("strategy_probe.py")
ROWS, LENGTH, VOCABULARY = 4, 12, 128
CLIP, LR, DECAY, RANK = 0.5, 1e-2, 0.1, 4
LLAMA = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)


def make_steps():
    """Whole steps of 4 rows and a short last one of 2; unequal counts, and one row without anything to learn."""
    generator = torch.Generator().manual_seed(3)
    steps = []
    for rows in (ROWS, ROWS, ROWS, ROWS // 2):
        inputs = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
        labels = inputs.clone()
        for row, prompt in enumerate(torch.randint(1, LENGTH - 2, (rows,), generator=generator)):
            labels[row, :prompt] = -100
        steps.append({"input_ids": inputs.tolist(), "labels": labels.tolist()})
    steps[1]["labels"][2] = [-100] * LENGTH
    return steps


STEPS = make_steps()


# ---- the oracle

def build(folder, lora):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(7)
        config = LoraConfig(r=RANK, lora_alpha=4 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model


def mean_nll(model, step):
    inputs, labels = torch.tensor(step["input_ids"]), torch.tensor(step["labels"])
    logits = model(input_ids=inputs).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def train(model):
    """(losses, gradient norms, final trained weights, final loss on the first step)."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [weight for weight in trained.values() if weight.ndim > 1]
    rest = [weight for weight in trained.values() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.95))
    losses, norms = [], []
    model.train()
    for step in STEPS:
        loss = mean_nll(model, step)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, norms, {name: weight.detach() for name, weight in trained.items()}, mean_nll(model, STEPS[0]).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    keys = dict(LLAMA)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys), dtype=torch.float32)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def oracle(folder):
    return {lora: train(build(folder, lora)) for lora in (True, False)}


# ---- the runs

def launch(folder, out, devices, cases):
    """Train all cases in one start of `devices` processes; nothing may be compiled or said on stdout."""
    plan = out / "plan.json"
    plan.write_text(json.dumps({"model": folder, "steps": STEPS, "out": str(out), "devices": devices, "cases": cases}))
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environ = {key: value for key, value in os.environ.items() if key not in unset}
    environ |= {"PYTHONPATH": str(PROBE.parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                "TORCH_EXTENSIONS_DIR": str(out / "extensions")}
    process = subprocess.Popen([sys.executable, str(PROBE), str(plan)], env=environ, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)          # a rank that waits for a lost one waits for minutes
        stderr = process.communicate()[1]
        pytest.fail(f"hung:\n{stderr[-3000:]}")
    assert process.returncode == 0, stderr[-4000:]
    assert not (out / "extensions").exists(), "C++ was compiled"
    assert stdout == ""


def case(stage, lora, accumulate, **more):
    name = f"{stage}-{'lora' if lora else 'full'}-{accumulate}" + "".join(f"-{key}" for key in more)
    strategy = f"deepspeed_stage_{stage}" if isinstance(stage, int) else stage
    return {"name": name, "strategy": strategy, "lora": lora, "accumulate": accumulate} | more


GRID = [case(stage, lora, accumulate) for stage in (1, 2, 3) for lora in (True, False) for accumulate in (1, 2)]
PAIR = [case("ddp", True, 2), case(3, True, 2, checkpointing=True), case(3, False, 1, validates=True),
        case(2, True, 2, precision="bf16-true"), case(3, False, 2, init=LLAMA)]
CUTS = [(1, True), (3, False)]
ALONE = [run for run in GRID if run["accumulate"] == 2 or (run["strategy"][-1], run["lora"]) in (("2", False), ("3", True))]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """`runs(devices)`: the folder of everything trained with that many processes."""
    made = {}

    def make(devices):
        if devices not in made:
            out = tmp_path_factory.mktemp(f"devices{devices}")
            more = list(PAIR)
            for stage, lora in CUTS:
                cut = case(stage, lora, 2, saves=True, max_steps=2)
                more += [cut, case(stage, lora, 2, resume=str(out / cut["name"] / "checkpoints" / "step_2"))]
            launch(folder, out, devices, GRID + more if devices == 2 else ALONE)
            made[devices] = out
        return made[devices]

    return make


def read(out, name, devices):
    ranks = [json.loads((out / name / f"rank{rank}.json").read_text()) for rank in range(devices)]
    assert all(rank["engine_steps"] == rank["global_step"] == ranks[0]["global_step"] for rank in ranks)
    return ranks[0]


def apart(ours, wanted):
    assert len(ours) == len(wanted)
    assert all(map(math.isfinite, ours))
    return max(abs(one - other) / abs(other) for one, other in zip(ours, wanted, strict=True))


def check(out, run, devices, wanted):
    """Losses, gradient norms before clipping, the validation inside fit and final weights; the largest loss error."""
    losses, norms, weights, last = wanted
    seen = read(out, run["name"], devices)
    found = apart(seen["losses"], losses), apart([seen["val"]], [last])
    if None not in seen["norms"]:
        assert apart(seen["norms"], norms) < 2e-5, run["name"]
    print(f"{devices} processes, {run['name']}: loss {found[0]:.1e}, validation {found[1]:.1e}")
    assert max(found) < 1e-5, run["name"]
    ours = torch.load(out / run["name"] / "end.pt")
    assert ours.keys() == {f"model.{name}" for name in weights}
    assert max((ours[f"model.{name}"] - weight).abs().max() for name, weight in weights.items()) < LR / 10
    return seen


@pytest.mark.parametrize("devices", [1, 2])
def test_every_stage_trains_like_a_plain_loop(devices, runs, oracle):
    """With accumulation, a short last window, unequal counts and a micro-batch that teaches nothing."""
    out = runs(devices)
    for run in GRID if devices == 2 else ALONE:
        assert check(out, run, devices, oracle[run["lora"]])["global_step"] == len(STEPS)


def test_ddp_checkpointing_and_validation_after_fit(runs, oracle):
    """The overlays: DDP in place of DeepSpeed, recomputed activations, `validate` on shards that fit left behind."""
    for run in PAIR[:3]:
        seen = check(runs(2), run, 2, oracle[run["lora"]])
        if "validates" in run:
            assert apart([seen["val_after"]], [seen["val"]]) < 1e-6


@pytest.mark.parametrize("devices", [1, 2])
def test_adapters_start_at_the_base(devices, runs, folder):
    """No noise from weights that were empty while they were set: B is zero, the first loss is the base's."""
    with torch.no_grad():
        base = mean_nll(build(folder, lora=False), STEPS[0]).item()
    for run in GRID if devices == 2 else ALONE:
        if run["lora"]:
            start = torch.load(runs(devices) / run["name"] / "start.pt")
            zeros = [weight for name, weight in start.items() if "lora_B" in name]
            assert len(zeros) == 14
            assert all(weight.abs().max() == 0 for weight in zeros)
            assert apart(read(runs(devices), run["name"], devices)["losses"][:1], [base]) < 1e-6


def test_from_scratch_under_stage_3(runs):
    """Every rank has the same random weights, drawn as the architecture wants them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    out, run = runs(2), PAIR[-1]
    start = {name.removeprefix("model."): weight for name, weight in torch.load(out / run["name"] / "start.pt").items()}
    keys = dict(LLAMA)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys), dtype=torch.float32)
    model.load_state_dict(start)
    assert model.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
    check(out, run, 2, train(model))


def test_bfloat16_keeps_float32_masters(runs, oracle):
    """Weights are bfloat16, rotary frequencies are not, and what is learned is kept and exported in float32."""
    out, run = runs(2), PAIR[3]
    seen = read(out, run["name"], 2)
    assert seen["dtypes"] == ["torch.bfloat16"]
    assert seen["buffers"] == ["torch.float32"]
    assert apart(seen["losses"], oracle[True][0]) < 0.05
    state = torch.load(out / run["name"] / "end.pt")
    assert all(weight.dtype == torch.float32 for weight in state.values())
    assert any((weight != weight.bfloat16().float()).any() for weight in state.values())


def test_resume_goes_on_with_optimizer_and_schedule(runs, oracle):
    """Two steps, a checkpoint, a new trainer, the rest: the losses of an uninterrupted run."""
    for stage, lora in CUTS:
        losses, norms, weights, last = oracle[lora]
        cut, rest = case(stage, lora, 2, saves=True, max_steps=2), case(stage, lora, 2, resume="")
        assert apart(read(runs(2), cut["name"], 2)["losses"], losses[:2]) < 1e-5
        check(runs(2), rest, 2, (losses[2:], norms[2:], weights, last))


def test_frozen_weights_are_not_saved_with_adapters(runs):
    """A checkpoint of adapters holds adapters: the base would fill the disk."""
    name = case(1, True, 2, saves=True, max_steps=2)["name"]
    shards = runs(2) / name / "checkpoints" / "step_2" / "state" / "checkpoint"
    keys = {key for file in shards.glob("*model_states.pt") for key in torch.load(file, weights_only=False)["module"]}
    assert keys
    assert all("lora_" in key for key in keys)


# ---- what cannot be done is said

def trainer(strategy, out, **more):
    from lit_llm.training.trainer import Trainer

    return Trainer(accelerator="cpu", devices=1, strategy=strategy, default_root_dir=str(out), enable_progress_bar=False,
                   max_steps=1, **more)


@pytest.mark.parametrize(("strategy", "words"), [
    ("deepspeed_stage_3", "written by stage 1 or 2, cannot be read by stage 3"),
    ("deepspeed_stage_1", "written by 2 processes, cannot be read by 1"),
])
def test_shards_of_another_split_are_named(strategy, words, runs, folder, tmp_path):
    from strategy_probe import Data, LoRA

    from lit_llm.training.module import CausalLMModule

    there = runs(2) / case(1, True, 2, saves=True, max_steps=2)["name"] / "checkpoints" / "step_2"
    with pytest.raises(InputError, match=words):
        trainer(strategy, tmp_path).fit(CausalLMModule(base=folder, lora=LoRA(r=RANK, alpha=4 * RANK)), datamodule=Data(STEPS, 1),
                                        ckpt_path=str(there))


def test_clipping_by_value_is_refused(folder, tmp_path):
    from strategy_probe import Data

    from lit_llm.training.module import CausalLMModule

    runner = trainer("deepspeed", tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    with pytest.raises(InputError, match="by norm only"):
        runner.fit(CausalLMModule(base=folder), datamodule=Data(STEPS, 1))


def test_names_and_stages():
    """Names are Lightning's; a typo is met with the name that was meant."""
    from lit_llm.training.strategy import ZeroStrategy

    strategy = ZeroStrategy.from_name("deepspeed_stage_3_offload")
    assert strategy.config["zero_optimization"]["stage"] == 3
    assert {"offload_optimizer", "offload_param"} <= strategy.config["zero_optimization"].keys()
    assert ZeroStrategy.from_name("deepspeed").config["zero_optimization"]["stage"] == 2
    with pytest.raises(InputError, match="Did you mean 'deepspeed_stage_2'"):
        ZeroStrategy.from_name("deepspeed_stag_2")
    for wrong in ({"stage": 4}, {"stage": 2, "offload_parameters": True}):
        with pytest.raises(InputError):
            ZeroStrategy(**wrong)
