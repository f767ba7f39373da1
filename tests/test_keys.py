"""If this breaks: a config key has no effect although users rely on it.

Every leaf of `fit`'s config, according to the real parser, has an entry in `key_effects.py`. The command runs in this
process with the key's default and with another value, and the part of the run that the entry names must differ; or the
value is refused by a message that names the key.
"""

import contextlib
import csv
import hashlib
import inspect
import json
import multiprocessing.process
import re
import shutil
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_llm.cli.runs import LitLLMCLI
from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.models.anatomy import decoder_layers
from lit_llm.report.rows import MEASURED
from lit_llm.training.module import CausalLMModule
from lit_llm.training.parallel.fsdp import Fsdp2Strategy
from lit_llm.training.parallel.zero import ZeroStrategy
from lit_llm.training.run.checkpoint import StepCheckpoint
from lit_llm.training.run.progress import Progress
from lit_llm.training.trainer import Trainer
from tests import key_effects
from tests.test_class_paths import fit_parser
from tests.test_cli import call, write

COMMON = {
    "model.lora": {"r": 2, "train_tokens": None}, "model.lr": 1e-3, "data.sources": [{"path": "talks.jsonl"}],
    "data.seq_len": 64, "data.batch_size": 2, "trainer.max_steps": 3, "trainer.accelerator": "cpu",
    "trainer.devices": 1, "trainer.default_root_dir": "run", "trainer.log_every_n_steps": 1, "trainer.threads": 1}
OWN_CALLBACKS = {"StepCheckpoint": StepCheckpoint, "Progress": Progress}
TYPED = ("ckpt_path", "weights_only")               # no file may set these


class Stopped(BaseException):
    """The run has come as far as it is looked at."""


def leaves() -> set[str]:
    """Every key of `fit` with a value, including keys of classes that a key accepts."""
    keys = {key for key in fit_parser().all_keys() if not key.endswith(".help")}
    keys -= {"config", "model", "data", "trainer"}
    keys |= {f"model.lora.{field_of_class.name}" for field_of_class in fields(LoRA)}
    keys |= {f"data.sources.{field_of_class.name}" for field_of_class in fields(Source)}
    return keys | {f"trainer.callbacks.{name}.{key}" for name, kind in OWN_CALLBACKS.items()
                   for key in inspect.signature(kind).parameters}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """Files for all runs: data, templates, an adapter; a run with a checkpoint. Names in capitals are replaced by paths."""
    home = tmp_path_factory.mktemp("files")
    (home / "splits").mkdir()
    (home / "plain").mkdir()
    talk = [{"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"one {n} " * (n + 1)},
                          {"role": "user", "content": "more"}, {"role": "assistant", "content": "two"}]}
            for n in range(8)]
    with contextlib.chdir(home):
        write("talks.jsonl", *talk)
        write("twice.jsonl", *talk, *talk)
        write("bad.jsonl", *talk, *(["{"] * 4))
        write("one_bad.jsonl", *talk, *talk, "{")
        write("columns.jsonl", *({"question": f"say {n}", "answer": f"one {n}"} for n in range(8)))
        write("splits/train.jsonl", *talk[:4])
        write("splits/validation.jsonl", *talk[4:])
        write("plain/some.jsonl", *talk)
        Path("text.txt").write_text("Tom has  a red kite.\nThe kite flies high.\n\nIt is over\nthe hill now.\n" * 4)
    base = tiny_model("llama")
    template = yaml.safe_load((Path(base) / "tokenizer_config.json").read_text()).get("chat_template") or (
        Path(base) / "chat_template.jinja").read_text()
    (home / "greets.jinja").write_text("Hello. " + template)
    (home / "style.jinja").write_text("{% if style is defined %}{{ style }}{% endif %}" + template)
    broken = home.parent / "broken"                  # a weight that is none
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    names = {"BASE": base, "OTHER": tiny_model("qwen3"), "BROKEN": str(broken)}
    return Place(home, names, tmp_path_factory)


class Place:
    """Runs commands in folders of their own, each once."""

    def __init__(self, home, names, folders):
        self.home, self.names, self.folders, self.results = home, names, folders, {}

    def filled(self, value):
        """A value with paths for the names in capitals."""
        if isinstance(value, dict):
            return {key: self.filled(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.filled(part) for part in value]
        if value == "ADAPTER" or value == "RUN":
            run = self.trained()
            return str(run / "adapter") if value == "ADAPTER" else str(run)
        return self.names.get(value, value) if isinstance(value, str) else value

    def trained(self):
        """The checkpoint of a run of two steps."""
        if "RUN" not in self.names:
            seen = self.run({"trainer.max_steps": 2}, "save")
            assert seen["code"] == 0, seen["output"]
            self.names["RUN"] = next((seen["folder"] / "run" / "checkpoints").glob("step_*"))
        return Path(self.names["RUN"])

    def run(self, settings, how, fresh=False):
        """The observed behaviour of `fit` with these settings in addition to the common ones."""
        settings = self.filled({"model.base": "BASE"} | COMMON | {"trainer.enable_checkpointing": how == "save"} | settings)
        key = json.dumps([settings, how], sort_keys=True)
        if key not in self.results or fresh:
            folder = self.folders.mktemp("run") / "here"
            shutil.copytree(self.home, folder)
            with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
                if not ("data.num_proc" in settings or "bad" in key):       # these are about what is not in the cache
                    patch.setenv("LIT_LLM_CACHE", str(self.home.parent / "cache"))
                self.results[key] = watched(nested(settings), how, patch) | {"folder": folder}
        return self.results[key]


def nested(settings):
    """A config of dotted keys; those of classes go into the first item."""
    config: dict = {}
    for key, value in settings.items():
        *above, name = key.split(".")
        at = config
        for part in above:
            if part in OWN_CALLBACKS:
                at.append({"class_path": f"{OWN_CALLBACKS[part].__module__}.{part}", "init_args": {}})
                at = at[-1]["init_args"]
                continue
            if isinstance(at.get(part), list):
                at[part] = [dict(at[part][0])]
                at = at[part][0]
                continue
            if part == "callbacks":
                at[part] = []
            elif part == "lora":
                at[part] = dict(at[part])
            at = at.setdefault(part, {})
        at[name] = value
    return config


def digest(*parts):
    """Of tensors and values."""
    sums = hashlib.sha256()
    for part in parts:
        sums.update(part.detach().cpu().numpy().tobytes() if torch.is_tensor(part) else repr(part).encode())
    return sums.hexdigest()[:12]


def watched(config, how, patch):
    """Run `fit` and write down what it does."""
    seen = {"saved": [], "ids": [], "rates": [], "settings": set(), "validations": [], "calls": 0, "children": 0}
    fit, step, validation = Trainer.fit, CausalLMModule.training_step, CausalLMModule.validation_step
    instantiated = LitLLMCLI.after_instantiate_classes
    start, save = multiprocessing.process.BaseProcess.start, StepCheckpoint.save

    def of_batch(batch):
        return digest(batch["input_ids"], batch["labels"])

    def watch_fit(trainer, model, **more):
        data: TextDataModule = more["datamodule"]
        trainer.exports, seen["strategy"] = False, trainer.strategy
        seen["objects"] = (type(trainer.strategy).__name__, getattr(trainer.strategy, "config", None), trainer.num_nodes,
                           trainer.num_devices, trainer.limit_test_batches,
                           sorted(type(callback).__name__ for callback in trainer.callbacks))
        if how == "look":
            data.trainer = trainer if trainer.world_size == 1 else None
            data.prepare_data()
            data.setup(None)
            seen["batches"] = [[of_batch(batch) for batch in loader] for loader in (
                data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
            raise Stopped
        fit(trainer, model, **more)
        seen["weights"] = digest(*(part for weight in model.parameters() if weight.requires_grad
                                   for part in (weight, weight.dtype)))
        seen["trained"] = [(name, tuple(weight.shape)) for name, weight in model.named_parameters() if weight.requires_grad]
        seen["model"] = sorted({type(layer).__name__ for layer in model.modules()})
        optimizer = trainer.optimizers[0]
        seen["optimizer"] = (type(optimizer).__name__, [{name: value for name, value in group.items() if name != "params"}
                                                        for group in optimizer.param_groups])

    def watch_step(module, batch, batch_idx):
        layer = decoder_layers(module.model)[-1]
        if how == "build":
            seen["compiled"] = layer._compiled_call_impl is not None
            raise Stopped
        seen["ids"].append(of_batch(batch))
        seen["rates"].append(module.trainer.optimizers[0].param_groups[0]["lr"])
        seen["settings"].add((torch.is_anomaly_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads(),
                              torch.are_deterministic_algorithms_enabled()))
        if not layer.mlp._forward_pre_hooks:
            layer.mlp.register_forward_pre_hook(lambda *_: seen.update(calls=seen["calls"] + 1))
        return step(module, batch, batch_idx)

    def watch_validation(module, batch, batch_idx):
        seen["validations"].append((module.trainer.sanity_checking, module.global_step, of_batch(batch),
                                    torch.is_inference_mode_enabled()))
        return validation(module, batch, batch_idx)

    def watch_start(process):
        seen["children"] += 1
        start(process)

    def watch_save(checkpoint, trainer, *args, **more):
        save(checkpoint, trainer, *args, **more)
        seen["saved"].append((trainer.global_step, dict(checkpoint.scores), sorted(
            (path.name, path.read_text() if path.is_file() else "") for path in Path("run/checkpoints").iterdir())))

    patch.setattr(StepCheckpoint, "save", watch_save)
    def watch_cli(cli):
        instantiated(cli)
        cli.trainer.fit = lambda *args, **more: watch_fit(cli.trainer, *args, **more)   # the class keeps its signature

    patch.setattr(LitLLMCLI, "after_instantiate_classes", watch_cli)
    patch.setattr(CausalLMModule, "training_step", watch_step)
    patch.setattr(CausalLMModule, "validation_step", watch_validation)
    patch.setattr(multiprocessing.process.BaseProcess, "start", watch_start)
    before = {path for path in Path(".").rglob("*")}
    typed = [word for key in TYPED if key in config for word in (f"--{key}", str(config.pop(key)))]
    Path("run.yaml").write_text(yaml.safe_dump(config))
    threads, out, err = torch.get_num_threads(), "", ""
    try:
        code, out, err = call("validate" if how == "validate" else "fit", "--config", "run.yaml", *typed)
    except Stopped:
        code = 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.set_num_threads(threads)
    table = Path("run/metrics.csv")
    files = sorted(set(Path(".").rglob("*")) - before - {Path("run.yaml")})
    return seen | {"code": code, "error": err, "output": re.sub(r"\d[\d.,]*", "#", out + err),
                   "rows": [{name: value for name, value in row.items() if name not in MEASURED}
                            for row in csv.DictReader(table.read_text().splitlines())] if table.is_file() else [],
                   "files": [(str(path), path.read_text() if path.name in ("BEST", "LATEST") else "") for path in files]}


def test_every_key_has_an_entry():
    assert set(key_effects.KEYS) == leaves()


@pytest.mark.parametrize("key", key_effects.KEYS)
def test_each_key_changes_the_run_or_is_refused(key, place, monkeypatch, tmp_path):
    entry = key_effects.KEYS[key]
    if key == "trainer.inference_mode" and torch.distributed.is_initialized():
        pytest.skip("Lightning leaves inference mode off beside a process group, which an earlier test has made")
    changed = place.run({**entry.base, key: entry.value}, entry.how)
    if entry.refused:
        assert changed["code"] == 2, f"{key} was taken"
        assert entry.refused in changed["error"]
        return
    plain = place.run(entry.base, entry.how)
    if entry.sees == "code":
        assert {plain["code"], changed["code"]} == {0, 2}, plain["error"] + changed["error"]
        return
    assert (plain["code"], changed["code"]) == (0, 0) or entry.sees == "error" or key == "trainer.max_skipped_steps", (
        plain["error"] + changed["error"])
    assert plain[entry.sees] != changed[entry.sees], f"{key} does not change {entry.sees}"


@pytest.mark.parametrize("how", ["look", "train", "save"])
def test_what_is_seen_of_a_run_does_not_change_by_itself(how, place):
    first, again = (place.run(key_effects.VALIDATES, how, fresh=True) for _ in range(2))
    for name in first.keys() - {"folder", "error", "strategy"}:
        assert first[name] == again[name], name


@pytest.mark.parametrize(("key", "value", "base", "words"), key_effects.IDLE)
def test_a_key_without_effect_beside_others_is_refused_or_reported(key, value, base, words, place, caplog):
    seen = place.run({**base, key: value}, "train", fresh=True)
    if words.startswith("warning "):
        assert seen["code"] == 0, seen["error"]
        assert words.removeprefix("warning ") in caplog.text
    else:
        assert seen["code"] == 2, "it was taken"
        assert words in seen["error"]


# ---- arguments of strategies -----------------------------------------------------------------------------------------

def zero_arguments():
    """All that a config may give to ZeroStrategy."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return set(inspect.signature(DeepSpeedStrategy).parameters)


def test_every_argument_of_zero_has_an_entry():
    assert zero_arguments() == {*key_effects.ZERO, *key_effects.ZERO_REFUSED, *key_effects.ZERO_KEPT, *key_effects.OF_THE_MACHINE}


@pytest.mark.parametrize("name", key_effects.ZERO)
def test_each_argument_of_zero_changes_what_deepspeed_is_given(name):
    value, others = key_effects.ZERO[name]
    others = {key: value_of_key for key, value_of_key in others.items() if key != name}
    assert ZeroStrategy(**others, **{name: value}).config != ZeroStrategy(**others).config


@pytest.mark.parametrize("name", [*key_effects.ZERO_REFUSED, *(name for name in key_effects.ZERO if name != "config")])
def test_an_argument_of_zero_that_changes_nothing_is_refused(name):
    if name in key_effects.ZERO_REFUSED:
        arguments = {name: key_effects.ZERO_REFUSED[name]}
    else:
        arguments = {name: key_effects.ZERO[name][0], "config": {"zero_optimization": {"stage": 2}}}
        arguments |= {"stage": 3} if name == "offload_parameters" else {}
    with pytest.raises(InputError, match="has no effect"):
        ZeroStrategy(**arguments).check_arguments()


def test_each_argument_of_fsdp2_reaches_torch(place):
    assert set(inspect.signature(Fsdp2Strategy).parameters) == {"process_group_backend", "timeout"}
    seen = place.run({"trainer.strategy": {"class_path": "lit_llm.training.parallel.fsdp.Fsdp2Strategy", "init_args": {
        "process_group_backend": "gloo", "timeout": "0:00:10"}}}, "look")
    assert seen["code"] == 0, seen["error"]
    assert seen["strategy"].process_group_backend == "gloo"
    assert seen["strategy"]._timeout == timedelta(seconds=10)


@pytest.mark.parametrize("name", key_effects.ZERO_KEPT)
def test_numbers_of_the_loss_scale_are_kept_for_float16(name):
    assert getattr(ZeroStrategy(**{name: key_effects.ZERO_KEPT[name]}), name) == key_effects.ZERO_KEPT[name]
