"""If this breaks: a gradient is too small by the accumulation or the number of processes under DeepSpeed (which AdamW hides and
clipping does not), adapters do not start at the base under ZeRO-3, a run cannot be resumed, counters diverge, or a CPU run
compiles C++ or prints noise on stdout.

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
TIED = LLAMA | dict(model_type="qwen3", head_dim=8, tie_word_embeddings=True)


def make_steps():
    """Whole steps of 4 sequences and a short last one of 2; unequal counts, and one without supervised tokens."""
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

def build(folder, lora, tokens=None, targets="all-linear"):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(7)
        rows = tokens and {"model.embed_tokens": tokens, "lm_head": tokens}
        config = LoraConfig(r=RANK, lora_alpha=4 * RANK, target_modules=targets, task_type="CAUSAL_LM",
                            trainable_token_indices=rows)
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
    """Train all cases in one start of `devices` processes; nothing may be compiled or printed on stdout."""
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
    strategy = stage if stage in ("auto", "ddp", "fsdp2") else f"deepspeed_stage_{stage}"
    return {"name": name, "strategy": strategy, "lora": lora, "accumulate": accumulate} | more


TOKENS = [7, 31]
ROWS = [case("ddp", True, 2, tokens=TOKENS), case(1, True, 2, tokens=TOKENS), case(2, True, 1, tokens=TOKENS)]
GRID = [case(stage, lora, accumulate) for stage in (1, 2, 3) for lora in (True, False) for accumulate in (1, 2)]
PAIR = [case("ddp", True, 2), case(3, True, 2, checkpointing=True), case(3, False, 1, validates=True),
        case(2, True, 2, precision="bf16-true"), case(3, False, 2, init=LLAMA),
        case(3, False, 2, init=TIED, checkpointing=True), case("3_offload", False, 2), case("2_offload", False, 2),
        case("fsdp2", False, 2, init=TIED, checkpointing=True), case("ddp", False, 2, optimizer="muon"),
        case("fsdp2", False, 2, optimizer="muon")]
HEAD = ["q_proj", "lm_head"]
SLICES = [case(3, False, 1, slices=True), case(3, True, 1, slices=True, targets=HEAD)]
CUTS = [(1, True), (3, False), ("fsdp2", True)]
ALONE = [run for run in GRID if run["accumulate"] == 2 or (run["strategy"][-1], run["lora"]) in (("2", False), ("3", True))]


LONE = [case(stage, False, 2, saves=True, max_steps=2) for stage in (2, "fsdp2")]


def cut_at(out, run):
    return out / run["name"] / "checkpoints" / "step_2"


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """`runs(devices)`: the folder of everything trained with that many processes."""
    made = {}

    def make(devices):
        if devices not in made:
            out = tmp_path_factory.mktemp(f"devices{devices}")
            more = [*PAIR, *ROWS, *SLICES]
            for stage, lora in CUTS:
                cut = case(stage, lora, 2, saves=True, max_steps=2)
                more += [cut, case(stage, lora, 2, resume=str(cut_at(out, cut)))]
            if devices == 2:
                more += [case(stage, False, 1, resume=str(cut_at(make(1), cut)), saves=True)
                         for stage, cut in zip((2, "fsdp2"), LONE, strict=True)]
            launch(folder, out, devices, GRID + more if devices == 2 else ALONE + LONE)
            made[devices] = out
        return made[devices]

    return make


def read(out, name, devices):
    ranks = [json.loads((out / name / f"rank{rank}.json").read_text()) for rank in range(devices)]
    assert all(rank["engine_steps"] == rank["global_step"] == ranks[0]["global_step"] for rank in ranks)
    return ranks[0]


def apart(actual, wanted):
    assert len(actual) == len(wanted)
    assert all(map(math.isfinite, actual))
    return max(abs(one - other) / abs(other) for one, other in zip(actual, wanted, strict=True))


def check(out, run, devices, wanted):
    """Losses, gradient norms before clipping, the validation inside fit and final weights; the largest loss error."""
    losses, norms, weights, last = wanted
    seen = read(out, run["name"], devices)
    differences = apart(seen["losses"], losses), apart([seen["val"]], [last])
    if None not in seen["norms"]:
        assert apart(seen["norms"], norms) < 2e-5, run["name"]
    print(f"{devices} processes, {run['name']}: loss {differences[0]:.1e}, validation {differences[1]:.1e}")
    assert max(differences) < 1e-5, run["name"]
    trained = torch.load(out / run["name"] / "end.pt")
    assert trained.keys() == {f"model.{name}" for name in weights}
    assert max((trained[f"model.{name}"] - weight).abs().max() for name, weight in weights.items()) < LR / 10
    return seen


@pytest.mark.parametrize("devices", [1, 2])
def test_every_stage_trains_like_a_plain_loop(devices, runs, oracle):
    """With accumulation, a short last window, unequal counts and a micro-batch without supervised tokens."""
    out = runs(devices)
    for run in GRID if devices == 2 else ALONE:
        assert check(out, run, devices, oracle[run["lora"]])["global_step"] == len(STEPS)


def test_ranks_whose_losses_take_more_slices(runs, folder, oracle):
    """22 and 16 supervised tokens are two slices of logits and one. Where ranks call a module that ZeRO-3 has cut a
    different number of times, gloo aborts on sizes that do not match, or all wait; so the head is called once."""
    for run, wanted in zip(SLICES, (oracle[False], train(build(folder, lora=True, targets=HEAD))), strict=True):
        check(runs(2), run, 2, wanted)


def test_ddp_checkpointing_and_validation_after_fit(runs, oracle):
    """The overlays: DDP in place of DeepSpeed, gradient checkpointing, `validate` on the shards of a fit."""
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


def test_rows_of_single_tokens_train_like_a_plain_loop(runs, folder):
    """Beside LoRA's adapters, in embedding and head, starting from the base's rows, like PEFT's own wrapper."""
    wanted = train(build(folder, lora=True, tokens=TOKENS))
    base = build(folder, lora=False)
    for run in ROWS:
        check(runs(2), run, 2, wanted)
        start = torch.load(runs(2) / run["name"] / "start.pt")
        start = {name: weight for name, weight in start.items() if "tokens_delta" in name}
        rows = [layer.weight[TOKENS] for layer in (base.model.embed_tokens, base.lm_head)]
        assert all(torch.equal(actual, row) for actual, row in zip(start.values(), rows, strict=True))
        assert all((wanted[2][name.removeprefix("model.")] - weight).abs().max() > LR for name, weight in start.items())


def test_from_scratch_where_weights_are_split(runs):
    """Every rank has the same random weights, initialised as the architecture defines; tied weights stay tied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    out = runs(2)
    for run in (run for run in PAIR if "init" in run):
        start = {name.removeprefix("model."): weight for name, weight in torch.load(out / run["name"] / "start.pt").items()}
        keys = dict(run["init"])
        config = AutoConfig.for_model(keys.pop("model_type"), **keys)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        absent = model.load_state_dict(start, strict=False).missing_keys
        assert absent == (["lm_head.weight"] if config.tie_word_embeddings else [])
        assert model.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
        check(out, run, 2, train(model))


def test_offload_trains_the_same(runs, oracle):
    """Optimizer states, and under stage 3 the weights too, in CPU memory: another place, the same numbers."""
    for run in PAIR[6:8]:
        check(runs(2), run, 2, oracle[False])


def test_bfloat16_keeps_float32_masters(runs, oracle):
    """Weights are bfloat16, rotary frequencies are not, and trained weights are saved and exported in float32."""
    out, run = runs(2), PAIR[3]
    seen = read(out, run["name"], 2)
    assert seen["dtypes"] == ["torch.bfloat16"]
    assert seen["buffers"] == ["torch.float32"]
    assert apart(seen["losses"], oracle[True][0]) < 0.05
    state = torch.load(out / run["name"] / "end.pt")
    assert all(weight.dtype == torch.float32 for weight in state.values())
    assert any((weight != weight.bfloat16().float()).any() for weight in state.values())


def test_bfloat16_weights_do_not_change_positions(folder, oracle, tmp_path):
    """Lightning's bf16-true casts rotary frequencies, which gives wrong positions after some hundred tokens."""
    import strategy_probe

    run = case("auto", True, 2, precision="bf16-true")
    strategy_probe.run(run, {"model": folder, "steps": STEPS, "devices": 1}, tmp_path)
    seen = json.loads((tmp_path / "rank0.json").read_text())
    assert seen["buffers"] == ["torch.float32"]
    assert seen["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert apart(seen["losses"], oracle[True][0]) < 0.05


def test_resume_continues_optimizer_and_schedule(runs, oracle):
    """Two steps, a checkpoint, a new trainer, the rest: the losses of an uninterrupted run."""
    for stage, lora in CUTS:
        losses, norms, weights, last = oracle[lora]
        cut, rest = case(stage, lora, 2, saves=True, max_steps=2), case(stage, lora, 2, resume="")
        assert apart(read(runs(2), cut["name"], 2)["losses"], losses[:2]) < 1e-5
        check(runs(2), rest, 2, (losses[2:], norms[2:], weights, last))


def test_another_number_of_processes_resumes(runs, folder, oracle, tmp_path):
    """From one process to two and from two to one, the step divided anew: the losses of an uninterrupted run."""
    import strategy_probe
    from transformers import AutoModelForCausalLM

    losses, norms, weights, last = oracle[True]
    run = case(1, True, 4, resume=str(cut_at(runs(2), case(1, True, 2, saves=True, max_steps=2))))
    (tmp_path / run["name"]).mkdir()
    strategy_probe.run(run, {"model": folder, "steps": STEPS, "devices": 1}, tmp_path / run["name"])
    assert check(tmp_path, run, 1, (losses[2:], norms[2:], weights, last))["global_step"] == len(STEPS)
    losses, norms, weights, last = oracle[False]
    for stage in (2, "fsdp2"):
        run = case(stage, False, 1, resume="", saves=True)
        check(runs(2), run, 2, (losses[2:], norms[2:], weights, last))
        model = AutoModelForCausalLM.from_pretrained(runs(2) / run["name"] / "checkpoints" / "step_4" / "model")
        with torch.no_grad():
            assert apart([mean_nll(model, STEPS[0]).item()], [last]) < 1e-5
    assert not list(runs(1).rglob("universal_*")) + list(runs(2).rglob("universal_*"))


def test_frozen_weights_are_not_saved_with_adapters(runs):
    """A checkpoint of adapters contains only adapters: the base would fill the disk."""
    from torch.distributed.checkpoint import FileSystemReader

    name = case(1, True, 2, saves=True, max_steps=2)["name"]
    shards = runs(2) / name / "checkpoints" / "step_2" / "state" / "checkpoint"
    keys = {key for file in shards.glob("*model_states.pt") for key in torch.load(file, weights_only=False)["module"]}
    assert keys
    assert all("lora_" in key for key in keys)
    saved = FileSystemReader(cut_at(runs(2), case("fsdp2", True, 2, saves=True, max_steps=2)) / "state").read_metadata()
    keys = [key for key in saved.state_dict_metadata if key.startswith("model.")]
    assert len(keys) == 28
    assert all("lora_" in key for key in keys)


# ---- unsupported settings are refused

def trainer(strategy, out, **more):
    from lit_llm.training.trainer import Trainer

    return Trainer(accelerator="cpu", devices=1, strategy=strategy, default_root_dir=str(out), enable_progress_bar=False,
                   max_steps=1, **more)


@pytest.mark.parametrize(("stage", "lora", "words"), [
    (1, True, "written by ZeRO stage 1 or 2 and cannot be read by stage 3"),
    (3, False, "written by ZeRO stage 3 with 2 processes and cannot be read by 1"),
])
def test_shards_of_another_split_are_named(stage, lora, words, runs, folder, tmp_path):
    from strategy_probe import Data, LoRA

    from lit_llm.training.module import CausalLMModule

    there = cut_at(runs(2), case(stage, lora, 2, saves=True, max_steps=2))
    module = CausalLMModule(base=folder, lora=LoRA(r=RANK, alpha=4 * RANK) if lora else None)
    with pytest.raises(InputError, match=words):
        trainer("deepspeed_stage_3", tmp_path).fit(module, datamodule=Data(STEPS, 1), ckpt_path=str(there))


@pytest.mark.parametrize(("optimizer", "strategy"), [("muon", "deepspeed_stage_1"), ("adamw_8bit", "fsdp2")])
def test_optimizers_that_need_whole_weights_say_so(optimizer, strategy, folder, tmp_path):
    from strategy_probe import Data

    from lit_llm.training.module import CausalLMModule

    with pytest.raises(InputError, match="shard") as caught:
        trainer(strategy, tmp_path).fit(CausalLMModule(base=folder, optimizer=optimizer), datamodule=Data(STEPS, 1))
    assert "ddp" in caught.value.fix


def test_muon_by_several_processes_is_muon(runs, folder, tmp_path):
    """DDP has whole matrices; FSDP2's are put together for a step. Its matrix products are in bfloat16."""
    import strategy_probe

    strategy_probe.run(case("auto", False, 2, optimizer="muon"), {"model": folder, "steps": STEPS, "devices": 1}, tmp_path)
    alone = json.loads((tmp_path / "rank0.json").read_text())["losses"]
    for stage in ("ddp", "fsdp2"):
        assert apart(read(runs(2), case(stage, False, 2, optimizer="muon")["name"], 2)["losses"], alone) < 2e-4


def test_rows_of_tokens_under_stage_3_are_refused(folder, tmp_path):
    from strategy_probe import Data, LoRA

    from lit_llm.training.module import CausalLMModule

    with pytest.raises(InputError, match="stage 3 shards the embedding"):
        trainer("deepspeed_stage_3", tmp_path).fit(
            CausalLMModule(base=folder, lora=LoRA(r=RANK, train_tokens=["</s>"])), datamodule=Data(STEPS, 1))


def test_clipping_by_value_is_refused(tmp_path):
    with pytest.raises(InputError, match="not one of norm"):
        trainer("deepspeed", tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm="value")


@pytest.mark.parametrize(("config", "says"), [
    ({"zero_optimizaton": {"stage": 1}}, "stage None, which must be 1, 2 or 3"),
    ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, "model.optimizer")])
def test_a_deepspeed_config_that_does_something_else(config, says, folder, tmp_path):
    """Without a stage its checkpoints could not be resumed; an own optimizer would have no schedule."""
    from strategy_probe import Data

    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.parallel.zero import ZeroStrategy

    with pytest.raises(InputError, match=says):
        trainer(ZeroStrategy(config=config), tmp_path).fit(CausalLMModule(base=folder), datamodule=Data(STEPS, 1))


def test_names_and_stages():
    """Names are Lightning's; a typo is met with the name that was meant."""
    from lit_llm.training.parallel.zero import ZeroStrategy

    strategy = ZeroStrategy.from_name("deepspeed_stage_3_offload")
    assert strategy.config["zero_optimization"]["stage"] == 3
    assert {"offload_optimizer", "offload_param"} <= strategy.config["zero_optimization"].keys()
    assert ZeroStrategy.from_name("deepspeed").config["zero_optimization"]["stage"] == 2
    with pytest.raises(InputError, match="Did you mean 'deepspeed_stage_2'"):
        ZeroStrategy.from_name("deepspeed_stag_2")
    with pytest.raises(InputError, match="stage must be 1, 2 or 3, not 4"):
        ZeroStrategy(stage=4)
