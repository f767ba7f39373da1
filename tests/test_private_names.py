"""If this breaks: a new version of a library has moved a private name, and the test names it.

Private names of libraries are used only in `lit_llm/system/private/` and `serve/private.py`, one function per name. Each
function is called with the installed version, and its result is compared with that of public names.
"""

import ast
import importlib
import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lit_llm import CausalLMModule, LoRA, Source, TextDataModule, Trainer
from lit_llm.models.load import load_causal_lm
from lit_llm.system.private import lightning, others, transformers
from lit_llm.system.private import torch as private_torch

ROOT = Path(__file__).resolve().parents[1]
HOMES = ["lit_llm.system.private.lightning", "lit_llm.system.private.torch", "lit_llm.system.private.transformers",
         "lit_llm.system.private.deepspeed", "lit_llm.system.private.others", "serve.private"]
OF_PYTHON = {"_exit", "_getframe", "_asdict", "_replace", "_name"}     # os, sys, named tuples, typing


class Watch(L.Callback):
    """Asks Lightning's doors during a run of three steps of two micro-batches, with a validation after the second."""

    def __init__(self):
        self.seen = {name: [] for name in ("accumulates", "logs_this_step", "validates_now", "logged_step", "logged_values")}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name in ("accumulates", "logs_this_step", "validates_now", "logged_step"):
            self.seen[name].append(getattr(lightning, name)(trainer))
        if not self.seen["accumulates"][-1]:
            self.seen["logged_values"].append(lightning.logged_values(trainer))

    def on_train_end(self, trainer, module):
        mode = [layer.training for layer in module.modules()]
        with lightning.modes_restored(trainer.model):
            module.train(not module.training)
        assert [layer.training for layer in module.modules()] == mode
        self.trainer_seen = lightning.trainer_of(module) is trainer


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"{n} {n}"}) + "\n" for n in range(6)))
    source = [Source(str(folder / "chats.jsonl"))]
    watch, module = Watch(), CausalLMModule(base=tiny_model("llama"), lora=LoRA(r=2))
    data = TextDataModule(source, val_sources=source, tokenizer=tiny_model("llama"), seq_len=64, batch_size=1, packing="none")
    trainer = Trainer(accelerator="cpu", max_steps=3, accumulate_grad_batches=2, val_check_interval=4, log_every_n_steps=2,
                      callbacks=[watch], enable_progress_bar=False, enable_checkpointing=False, default_root_dir=str(folder / "run"))
    trainer.fit(module, datamodule=data)
    return watch, trainer, module


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_causal_lm(tiny_model("llama"))


# ---- one function for each private name: it fails if the name has moved -------------------------------

def lightning_call_as_step(run, model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args):
            self.calls += 1
            return self.inner(*args)

    strategy = L.pytorch.strategies.SingleDeviceStrategy()
    inner = BoringModel()
    inner.twice = lambda number: 2 * number
    strategy._lightning_module, strategy.model = inner, Wrapper(inner)
    inner.forward = lambda *args: None
    assert lightning.call_as_step(SimpleNamespace(_forward_redirection=strategy._forward_redirection, model=strategy.model),
                                  inner, "twice", 4) == 8
    assert strategy.model.calls == 1


def lightning_restart_validation(run, model):
    loop = run[1].fit_loop.epoch_loop.val_loop
    lightning.restart_validation(run[1])
    assert loop.restarted_mid_evaluation
    assert not loop.restarting


def lightning_looks_at_epoch_end(run, model):
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    for at_epoch_end in (True, False):
        stopping = EarlyStopping("val/nll", check_on_train_epoch_end=at_epoch_end)
        saving = ModelCheckpoint(save_on_train_epoch_end=at_epoch_end)
        assert lightning.looks_at_epoch_end(stopping, run[1]) == lightning.looks_at_epoch_end(saving, run[1]) == at_epoch_end


def lightning_move_logged_step(run, model):
    before = lightning.logged_step(run[1])
    lightning.move_logged_step(run[1], 2)
    assert lightning.logged_step(run[1]) == before + 2
    lightning.move_logged_step(run[1], -2)


def lightning_load_loader_state(run, model):
    from lightning.pytorch.loops import fit_loop

    loop = run[1].fit_loop
    loop._combined_loader_states_to_load = [{}] if hasattr(loop, "_combined_loader_states_to_load") else None
    assert inspect.signature(fit_loop._FitLoop._load_combined_loader_states).parameters.keys() == {"self"}
    loop._combined_loader_states_to_load = []
    lightning.load_loader_state(run[1])                 # nothing to load


def lightning_leave_signals_alone(run, model):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert inspect.ismethod(trainer._signal_connector.register_signal_handlers)        # what it replaces is there
    assert inspect.ismethod(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    lightning.leave_signals_alone(trainer)
    assert trainer._signal_connector.register_signal_handlers() is None
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def lightning_starts_processes(run, model):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    assert lightning.starts_processes(trainer.strategy.launcher)
    assert not lightning.starts_processes(run[1].strategy.launcher)


def lightning_spawns(run, model):
    for method, spawned in (("popen", False), ("fork", False), ("spawn", True), ("forkserver", True)):
        trainer = L.Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False,
                            strategy=L.pytorch.strategies.DDPStrategy(start_method=method))
        assert lightning.spawns(trainer.strategy.launcher) == spawned
    assert not lightning.spawns(run[1].strategy.launcher)


def lightning_dismiss_watcher(run, model):
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    watcher = _ChildProcessObserver(main_pid=0, child_processes=[child], sleep_period=0.1)
    watcher.start()
    assert watcher.name in {thread.name for thread in threading.enumerate()}
    lightning.dismiss_watcher()
    child.kill()                                        # by a signal: it would end this process
    child.wait()
    watcher.join(10)
    assert not watcher.is_alive()


def lightning_change_wandb_arguments(run, model):
    logger = L.pytorch.loggers.WandbLogger(project="one", offline=True)
    lightning.change_wandb_arguments(logger, lambda arguments: arguments | {"project": arguments["project"] + " two"})
    assert logger._wandb_init["project"] == "one two"


def torch_default_store(run, model):
    code = ("import torch.distributed as dist\nfrom lit_llm.system.private import torch as private\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
            "private.default_store().set('a', 'b')\nprint(private.default_store().get('a'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "b'b'\n", done.stderr


def torch_incompatible_keys(run, model):
    keys = private_torch.incompatible_keys(["a"], ["b"])
    assert type(keys) is type(nn.Linear(1, 1).load_state_dict({}, strict=False))
    assert (keys.missing_keys, keys.unexpected_keys) == (["a"], ["b"])


def torch_persistent_buffers(run, model):
    layer = nn.Module()
    layer.register_buffer("kept", torch.ones(2))
    layer.register_buffer("left", torch.ones(2), persistent=False)
    assert [name for name, _ in private_torch.persistent_buffers(layer)] == ["kept"] == list(layer.state_dict())


def torch_own_tensors(run, model):
    layer = nn.BatchNorm1d(2)
    parameters, buffers = private_torch.own_tensors(layer)
    assert (parameters, buffers) == (dict(layer.named_parameters()), dict(layer.named_buffers()))
    parameters["weight"] = nn.Parameter(torch.zeros(2))
    assert layer.weight.sum() == 0


def torch_has_hooks(run, model):
    layers = [nn.Linear(2, 2) for _ in range(3)]
    layers[0].register_forward_hook(lambda *_: None)
    layers[1].register_forward_pre_hook(lambda *_: None)
    assert [private_torch.has_hooks(layer) for layer in layers] == [True, True, False]


def torch_has_fused_linear(run, model):
    assert private_torch.has_fused_linear() == torch.backends.mkldnn.is_available()


def torch_fused_linear(run, model):
    if private_torch.has_fused_linear():
        inputs, weight = torch.randn(5, 8), torch.randn(3, 8)
        assert torch.allclose(private_torch.fused_linear(inputs, weight), inputs @ weight.T, atol=1e-5)
        bias = torch.randn(3)
        assert torch.allclose(private_torch.fused_linear(inputs, weight, bias), inputs @ weight.T + bias, atol=1e-5)


def torch_packed_weight(run, model):
    if private_torch.has_fused_linear():
        inputs, weight = torch.randn(5, 8), torch.randn(3, 8)
        packed = private_torch.packed_weight(weight, 32)
        assert torch.equal(packed.to_dense(), weight)
        assert torch.allclose(private_torch.fused_linear(inputs, packed), inputs @ weight.T, atol=1e-5)


def torch_softmax_backward(run, model):
    scores = torch.randn(4, 7, requires_grad=True)
    shares, gradient, out = scores.softmax(-1), torch.randn(4, 7), torch.empty(4, 7)
    shares.backward(gradient)
    private_torch.softmax_backward(gradient, shares.detach(), torch.float32, out)
    assert torch.allclose(out, scores.grad, atol=1e-6)


def torch_attention_operations(run, model):
    class Seen(private_torch.dispatch_mode()):
        operations: set = set()         # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations.add(func)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        queries = torch.randn(1, 2, 8, 16)
        nn.functional.scaled_dot_product_attention(queries, queries, queries, is_causal=True)
    assert seen.operations & private_torch.attention_operations()


def torch_grouped_product(run, model):
    assert private_torch.grouped_product() is torch.ops.aten._grouped_mm.default


def torch_leave_scaling_to_trainer(run, model):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    assert optimizer._step_supports_amp_scaling is True             # torch.amp.GradScaler asks for it under this name
    private_torch.leave_scaling_to_trainer([optimizer])
    assert optimizer._step_supports_amp_scaling is False
    assert "_step_supports_amp_scaling" in inspect.getsource(torch.amp.GradScaler)


def torch_set_last_rates(run, model):
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), lambda step: 1.0)
    private_torch.set_last_rates(schedule, [0.5])
    assert schedule.get_last_lr() == [0.5]


def torch_storage_key(run, model):
    one, other = torch.ones(4), torch.ones(4)
    assert private_torch.storage_key(one.untyped_storage()) == private_torch.storage_key(one[1:].untyped_storage())
    assert private_torch.storage_key(one.untyped_storage()) != private_torch.storage_key(other.untyped_storage())


def torch_fake_mode(run, model):
    with private_torch.fake_mode():
        product = torch.ones(1_000_000, 1_000_000) @ torch.ones(1_000_000, 3)
    assert product.shape == (1_000_000, 3)


def torch_dispatch_mode(run, model):
    torch_attention_operations(run, model)


def torch_leaves(run, model):
    assert private_torch.leaves((1, [2, {"a": 3}])) == [1, 2, 3]


def transformers_attention_of(run, model):
    assert transformers.attention_of(model.config) in ("sdpa", "eager")


def transformers_set_attention(run, model):
    before = transformers.attention_of(model.config)
    transformers.set_attention(model.config, "eager")
    assert transformers.attention_of(model.config) == "eager"
    transformers.set_attention(model.config, before)


def transformers_eager_attention(run, model):
    ids = torch.tensor([[3, 4, 5]])
    assert not (before := model(ids, output_attentions=False)).attentions
    with transformers.eager_attention(model):
        seen = model(ids, output_attentions=True)
    assert len(seen.attentions) == model.config.num_hidden_layers       # which only eager attention returns
    assert torch.allclose(seen.logits, before.logits, atol=1e-4)


def transformers_without_attention(run, model):
    assert transformers.without_attention({"_attn_implementation": "eager", "a": 1}) == {"a": 1}


def transformers_takes_other_attention(run, model):
    assert transformers.takes_other_attention(model)


def transformers_layer_classes(run, model):
    assert transformers.layer_classes(model) == {type(model.model.layers[0]).__name__}


def transformers_recorded_outputs(run, model):
    kind = transformers.recorded_outputs(model.model)["hidden_states"]
    kind = kind[0] if isinstance(kind, list) else kind
    assert getattr(kind, "target_class", kind) is type(model.model.layers[0])


def transformers_of_config(run, model):
    made = transformers.of_config(type(model), model.config, dtype=torch.float64, attn_implementation="eager")
    assert made.dtype == torch.float64
    assert transformers.attention_of(made.config) == "eager"


def transformers_chat_template_environment(run, model):
    from jinja2.sandbox import SandboxedEnvironment

    environment = transformers.chat_template_environment()
    assert isinstance(environment, SandboxedEnvironment)
    assert "raise_exception" in environment.globals


ZERO = """
import sys, torch, lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from lit_llm.system.private import deepspeed as private
from lit_llm.training.parallel.zero import ZeroStrategy
class Look(L.Callback):
    def on_train_start(self, trainer, module):
        weight, engine = next(module.parameters()), trainer.strategy.deepspeed_engine
        owner, name = private.recovery_script(engine)
        with private.loads_universal(engine):
            universal = engine.load_universal_checkpoint()
        print("seen", private.has_master(weight), private.is_stepped(weight), universal, engine.load_universal_checkpoint(),
              callable(getattr(owner, name)))
for stage in (2, 3):
    L.Trainer(accelerator="cpu", devices=1, strategy=ZeroStrategy(stage=stage), fast_dev_run=1, callbacks=[Look()], logger=False,
              enable_checkpointing=False, enable_progress_bar=False).fit(BoringModel())
"""


@pytest.fixture(scope="module")
def zero():
    """Results for DeepSpeed's names from a run under stage 2 and one under stage 3."""
    done = subprocess.run([sys.executable, "-c", ZERO], cwd=ROOT, capture_output=True, text=True, timeout=200)
    seen = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("seen")]
    assert len(seen) == 2, done.stderr[-3000:]
    return seen


def others_options(run, model):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    assert [option.dest for option in others.options(parser)] == ["help", "one"]


def others_has_type(run, model):
    others_type_of(run, model)


def others_type_of(run, model):
    import jsonargparse

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--one", type=int | None)
    (option,) = (option for option in others.options(parser) if option.dest == "one")
    assert others.has_type(option)
    assert others.type_of(option) == (int | None)
    assert not any(others.has_type(option) for option in others.options(parser) if option.dest == "help")


def others_try_whole_numbers_first(run, model):
    import typing

    import jsonargparse

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--one", type=typing.Union[float, int, None])      # noqa: UP007
    assert type(parser.parse_args(["--one", "1"]).one) is float
    for option in others.options(parser):
        others.try_whole_numbers_first(option)
    assert [type(parser.parse_args(["--one", text]).one) for text in ("1", "1.0", "null")] == [int, float, type(None)]


def others_fingerprint(run, model):
    from datasets import Dataset

    one, same, other = (Dataset.from_dict({"a": [number]}) for number in (1, 1, 2))
    assert others.fingerprint(one) == others.fingerprint(same) != others.fingerprint(other)


def others_first_argument(run, model):
    from jinja2 import pass_context, pass_environment, pass_eval_context

    arguments = [others.first_argument(wrap(lambda *_: "")) for wrap in (pass_context, pass_eval_context, pass_environment, lambda plain: plain)]
    assert arguments == ["context", "eval_context", "environment", ""]


def others_is_synchronized(run, model):
    from torchmetrics import MeanMetric

    assert others.is_synchronized(MeanMetric())
    assert not others.is_synchronized(MeanMetric(sync_on_compute=False))


def serve_response_transport(run, model):
    from litserve import LitAPI, LitServer

    class Api(LitAPI):
        def setup(self, device):
            pass

        def predict(self, x):
            return x

    server = LitServer(Api(), accelerator="cpu", workers_per_device=1)
    from serve import private

    manager = server._init_manager(1)
    try:
        assert private.queues_pid(manager) > 0
        assert hasattr(private.response_transport(server), "send")
        assert hasattr(private.request_queue(server, "/predict"), "put")
        assert not private.shutdown_event(server).is_set()
    finally:
        manager.shutdown()


serve_request_queue = serve_queues_pid = serve_shutdown_event = serve_response_transport
SEEN = {                                                # names that `run` has used in a real fit
    "lightning.accumulates": ("accumulates", [True, False] * 3), "lightning.logs_this_step": ("logs_this_step", [False, False, True, True, False, False]),
    "lightning.validates_now": ("validates_now", [False, False, False, True, False, False]),
    "lightning.logged_step": ("logged_step", [0, 0, 1, 1, 2, 2])}
DEEPSPEED = {"deepspeed.has_master": (0, ["True", "False"]), "deepspeed.is_stepped": (1, ["False", "True"]),
             "deepspeed.loads_universal": (2, ["True", "True"]), "deepspeed.recovery_script": (4, ["True", "True"])}


def doors():
    for home in HOMES:
        module = importlib.import_module(home)
        for name, value in vars(module).items():
            if inspect.isfunction(value) and inspect.getmodule(inspect.unwrap(value)) is module:
                yield f"{'serve' if home == 'serve.private' else home.rpartition('.')[2]}.{name}"


@pytest.mark.parametrize("door", doors())
def test_a_door_is_where_it_was(door, run, model, request):
    watch = run[0]
    if door in SEEN:
        name, wanted = SEEN[door]
        assert watch.seen[name] == wanted, door
    elif door == "lightning.logged_values":
        assert all("train/loss" in values for values in watch.seen["logged_values"][1:2])
    elif door == "lightning.trainer_of":
        assert watch.trainer_seen
        assert lightning.trainer_of(CausalLMModule(base="sample:base")) is None
    elif door == "lightning.modes_restored":
        assert watch.trainer_seen                       # asserted at the run's end
    elif door in DEEPSPEED:
        place, wanted = DEEPSPEED[door]
        assert [line[place] for line in request.getfixturevalue("zero")] == wanted, door
    else:
        globals()[door.replace(".", "_")](run, model)


def test_methods_that_subclasses_replace_are_there():
    for home in HOMES:
        for path, names in getattr(importlib.import_module(home), "OF_BASE_CLASSES", {}).items():
            module, _, kind = path.rpartition(".")
            base = getattr(importlib.import_module(module), kind)
            for name in names:
                assert hasattr(base, name) or any(f"self.{name}" in inspect.getsource(ancestor) for ancestor in base.__mro__[:-1]), f"{path}.{name} moved"


def test_no_other_module_uses_private_names():
    """Names with one leading underscore that neither this project nor a subclass in it defines."""
    files = [path for folder in ("lit_llm", "serve") for path in (ROOT / folder).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    own = OF_PYTHON | {name for home in HOMES for names in getattr(importlib.import_module(home), "OF_BASE_CLASSES", {}).values()
                       for name in names}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in ("self", "cls"):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    for path, tree in trees.items():
        if path.is_relative_to(ROOT / "lit_llm/system/private") or path == ROOT / "serve/private.py":
            continue
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("lit_llm", "serve")):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
                names = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
            foreign = [name for name in names if name.startswith("_") and not name.startswith("__") and name not in own]
            assert not foreign, f"{path.relative_to(ROOT)}:{node.lineno} uses {foreign}; write a function in system/private"


