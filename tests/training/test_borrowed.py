"""If this breaks: cut-cross-entropy or Liger train another gradient than the model's, synchronise with the device at each
micro-batch, or unsupported settings cause a traceback.

Both run here in Triton's interpreter (interpreter.py), on CPU tensors, in processes of their own, because Triton reads the
setting at import. Oracle: torch's cross-entropy in float64. Refusals need neither library.
"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llm.errors import InputError
from lit_llm.kernels import borrowed
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.training.loss import as_matrices, nll_sum
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer

HERE = Path(__file__).parent
INTERPRETED = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}     # a cap is compiled otherwise, which takes a minute
LIBRARIES = {"cut_cross_entropy": "cut_cross_entropy", "liger": "liger_kernel"}
TOKENS, WIDTH, VOCABULARY = 60, 48, 384                 # vocabulary in blocks of 128: cut-cross-entropy also caps the padding of a block
KEYS = {"plain": {}, "odd": {"vocabulary": 301}, "scaled": {"factor": 0.3}, "capped": {"factor": 0.25, "cap": 2.0},
        "biased": {"bias": True}}
LIMITS = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-4, 2e-3), torch.bfloat16: (1e-3, 1e-2)}     # loss, gradients


def needs(name):
    missing = [package for package in ("triton", LIBRARIES[name]) if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"pip install 'lit_llm[kernels]': {' and '.join(missing)} not here")


def both(function):
    return pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in LIBRARIES])(function)


def assert_interpreted(call, tmp_path):
    """Run a function of this file in a process in which Triton's kernels are interpreted on the CPU."""
    env = os.environ | INTERPRETED | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", f"from tests.training import interpreter, test_borrowed as test; test.{call}"],
                          env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- value and gradients

def case(dtype, *, bias=False, vocabulary=VOCABULARY, **settings):
    """Hidden states, labels with holes, a head, keys of `nll_sum`; numbers are those of the dtype."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).bfloat16().to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (TOKENS,))
    labels[::4] = -100
    head = nn.Linear(WIDTH, vocabulary, bias=bias).bfloat16().to(dtype)
    with torch.no_grad():
        head.weight *= 4
    return hidden, labels, head, settings


def oracle(hidden, labels, head, factor=1.0, cap=None):
    logits = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double())[:-1] * factor
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), labels[1:], reduction="sum")


def check(name, dtype, keys, *, frozen=False, autocast=False):
    from tests.training.interpreter import Cap

    hidden, labels, head, settings = case(torch.float32 if autocast else dtype, **keys)
    head.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, *head.parameters()]
    arguments = settings | ({"cap": Cap(settings["cap"])} if "cap" in settings else {})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = nll_sum(hidden, labels, head, by=name, count=int((labels[1:] != -100).sum()), **arguments).total
    expected = oracle(hidden, labels, head, **settings)
    (0.37 * actual).backward()
    wanted = torch.autograd.grad(0.37 * expected, leaves)
    loss, limit = LIMITS[dtype]
    assert actual.dtype == torch.float32
    assert abs(actual.item() / expected.item() - 1) < loss, (actual, expected)
    for leaf, want in zip(leaves, wanted, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - want.double()).norm() / want.double().norm() < limit
    assert not frozen or all(weight.grad is None for weight in head.parameters())


def gradients(name):
    """Half precision, float32 where it is known, autocast; all of the head, or none of it."""
    module = borrowed._module(name)
    cut = name == "cut_cross_entropy"
    whole = not cut or borrowed._sums_in_float32(module)
    for label, keys in KEYS.items():
        if label == "biased" and cut and not borrowed._takes_bias(module):
            continue
        for dtype in (torch.bfloat16, torch.float16, *([torch.float32] if whole else [])):
            for frozen in (False, True):
                check(name, dtype, keys, frozen=frozen)
        check(name, torch.bfloat16, keys, autocast=True)


@both
def test_value_and_gradients_are_those_of_cross_entropy(name, tmp_path):
    assert_interpreted(f"gradients({name!r})", tmp_path)


def waits(name):
    """Check how often forward and backward synchronise with the device."""
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket._qualified_op_name)
            return function(*args, **(kwargs or {}))

    hidden, labels, head, _ = case(torch.bfloat16)
    names: list[str] = []
    with Names():
        (0.5 * nll_sum(hidden, labels, head, by=name, count=int((labels[1:] != -100).sum())).total).backward()
    start = names.index("aten::nonzero_static")
    synchronising = [operation for operation in names[start:] if operation in ("aten::nonzero", "aten::_local_scalar_dense", "aten::equal", "aten::item")]
    assert synchronising == {"liger": ["aten::_local_scalar_dense"], "cut_cross_entropy": []}[name], synchronising
    if name == "liger":
        chunks()


def chunks():
    """Liger's own would be of V / D: here 64 tokens in 32 chunks."""
    from liger_kernel.ops import fused_linear_cross_entropy as kernels

    rows = []
    kernel = kernels.liger_cross_entropy_kernel

    class Counted:
        def __getitem__(self, grid):
            rows.append(grid[0])
            return kernel[grid]

    kernels.liger_cross_entropy_kernel = Counted()
    hidden, head = torch.randn(64, 8).requires_grad_(), nn.Linear(8, 256, bias=False)
    nll_sum(hidden, torch.randint(256, (64,)), head, by="liger").total.backward()
    assert rows == [63], rows


@both
def test_the_device_is_waited_for_once_by_liger_in_chunks_as_large_as_ours_and_never_by_cut_cross_entropy(name, tmp_path):
    assert_interpreted(f"waits({name!r})", tmp_path)


# ---- whole runs

@pytest.mark.slow
@both
def test_by_processes_that_share_the_head(name, tmp_path, tiny_llama):
    """ZeRO-3 and FSDP2 gather it for a while; losses of training and of validation against our own kernels' run."""
    from test_strategy import STEPS

    precision = "32-true" if name == "liger" else "bf16-mixed"
    cases = [{"name": f"{strategy}-{by}-{lora}", "strategy": strategy, "lora": lora, "accumulate": 1, "max_steps": 3,
              "precision": precision, "cross_entropy": by}
             for strategy in ("deepspeed_stage_3", "fsdp2") for lora in (False, True) for by in (name, "fused")]
    plan = {"model": tiny_llama, "steps": STEPS, "out": str(tmp_path), "devices": 2, "cases": cases}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    env = os.environ | INTERPRETED | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parents[1]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(HERE / "interpreter.py"), str(tmp_path / "plan.json")], env=env,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{name} made 12 losses") == 2, done.stdout        # 3 steps in each of 4 runs, by both processes
    for one, other in zip(cases[::2], cases[1::2], strict=True):
        expected, actual = (json.loads((tmp_path / run["name"] / "rank0.json").read_text()) for run in (one, other))
        limit = 1e-4 if name == "liger" else 3e-2
        assert [*expected["losses"], expected["val"]] == pytest.approx([*actual["losses"], actual["val"]], rel=limit), one


@pytest.fixture
def tiny_llama(tmp_path):
    from test_strategy import LLAMA
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    keys = dict(LLAMA)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# ---- unsupported settings are refused

def fit(base, tmp_path, monkeypatch=None, precision="32-true", deterministic=False, verb="fit", **options):
    """A run on this CPU, under the interpreter's flag where there is a monkeypatch."""
    from strategy_probe import Data
    from test_strategy import STEPS

    if monkeypatch is not None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    trainer = Trainer(accelerator="cpu", devices=1, precision=precision, max_steps=1, default_root_dir=str(tmp_path / "run"),
                      enable_checkpointing=False, enable_progress_bar=False, deterministic=deterministic)
    return getattr(trainer, verb)(CausalLMModule(base=base, **options), datamodule=Data(STEPS, 1))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_gpu_is_reported_before_the_model_is_built(name, tiny_llama, tmp_path):
    with pytest.raises(InputError, match="CUDA") as caught:
        fit(tiny_llama, tmp_path, cross_entropy=name)
    assert caught.value.where == "model.cross_entropy"
    assert "--model.cross_entropy fused" in caught.value.fix


@pytest.mark.parametrize("name", LIBRARIES)
def test_evaluation_is_ours_anywhere(name, tiny_llama, tmp_path):
    """The config of a run on a GPU is evaluated on a laptop."""
    there, here = (fit(tiny_llama, tmp_path, verb="validate", cross_entropy=kernels)[0]["val/nll"] for kernels in (name, "fused"))
    assert there == here
    assert math.isfinite(here)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_not_installed_is_named_with_the_command(name, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, borrowed.MODULES[name], None)
    with pytest.raises(InputError, match=name) as caught:
        fit(tiny_llama, tmp_path, monkeypatch, cross_entropy=name)
    assert f"pip install {borrowed.PACKAGES[name]}" in caught.value.fix


def test_heads_that_are_more_than_a_matrix():
    from peft.utils.other import TrainableTokensWrapper

    class Adapted(nn.Linear):
        pass

    rows = TrainableTokensWrapper(nn.Linear(4, 9, bias=False).requires_grad_(False), "default", token_indices=[7, 3])
    rows.set_adapter("default")
    for name in LIBRARIES:
        with pytest.raises(InputError, match="adapter"):
            nll_sum(torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3]), Adapted(4, 9), by=name)
        with pytest.raises(InputError, match="single rows") as caught:
            nll_sum(torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3]), rows, by=name)
        assert "model.lora.train_tokens null" in caught.value.fix


def refused(name, tiny_llama, tmp_path, monkeypatch, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        fit(tiny_llama, tmp_path, monkeypatch, cross_entropy=name, **options)
    return caught.value


@both
def test_runs_that_cannot_be(name, tiny_llama, tmp_path, monkeypatch):
    """Refused before the first step: the keys are those that a user would change."""
    fixtures = tiny_llama, tmp_path, monkeypatch
    wide = refused(name, *fixtures, "float32 at most", precision="64-true")
    assert wide.where == "trainer.precision"
    refused(name, *fixtures, "prompt", peft={"class_path": "PromptTuningConfig", "init_args": {"num_virtual_tokens": 4}})
    refused(name, *fixtures, "adapter is on it", precision="bf16-mixed", peft={
        "class_path": "LoraConfig", "init_args": {"target_modules": ["q_proj", "lm_head"]}})
    refused(name, *fixtures, "single rows", precision="bf16-mixed", peft={
        "class_path": "LoraConfig", "init_args": {"target_modules": "all-linear", "trainable_token_indices": {
            "embed_tokens": [5], "lm_head": [5]}}})
    if name == "cut_cross_entropy" and not borrowed._sums_in_float32(borrowed._module(name)):
        assert refused(name, *fixtures, "half precision only").where == "trainer.precision"


@needs("cut_cross_entropy")
def test_cut_cross_entropy_is_not_deterministic_and_has_no_bias(tiny_llama, tmp_path, monkeypatch):
    try:
        error = refused("cut_cross_entropy", tiny_llama, tmp_path, monkeypatch, "varying order", precision="bf16-mixed",
                        deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert error.where == "trainer.deterministic"
    if not borrowed._takes_bias(borrowed._module("cut_cross_entropy")):
        with pytest.raises(InputError, match="bias") as caught:
            borrowed.check_head("cut_cross_entropy", as_matrices(nn.Linear(4, 9)))
        assert "liger" in caught.value.fix
    borrowed.check_head("cut_cross_entropy", as_matrices(nn.Linear(4, 9, bias=False)))


def test_the_plan_is_made_with_the_option(tmp_path):
    """Evaluation uses this project's kernels and needs no other package."""
    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source
    from lit_llm.training.planning import plan

    data = TextDataModule([Source("sample:documents.jsonl")], tokenizer="sample:base", seq_len=64, packing="concat")
    data.prepare_data()
    data.setup("fit")
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=2, default_root_dir=str(tmp_path))
    made = [plan.make(trainer, CausalLMModule(base="sample:base", lora=LoRA(r=2), cross_entropy=name), data).now.logits
            for name in ("liger", "fused")]
    assert made[0] == made[1] > 0
