"""If this breaks: a config, or the `config.yaml` of a downloaded run, runs its author's code when it is read.

Every key, and every place inside keys that take mappings, is given a class that would write a file when it is constructed.
"""

import json
from pathlib import Path

import jsonargparse
import pytest
import yaml

from lit_llm.errors import InputError
from lit_llm.system import class_paths
from tests.test_cli import call, place, refused

assert place                                        # a fixture


def payload(trace):
    """A class of torch whose constructor starts a program."""
    return {"class_path": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
            "init_args": {"entrypoint": "touch", "args": [str(trace)], "env": {}, "stdout": "out.txt",
                          "stderr": "err.txt", "local_rank_id": 0, "numa_options": None}}


def fit_parser():
    """The parser of `fit`, with all its keys."""
    from lit_llm.cli import runs

    class_paths.restrict(jsonargparse, class_paths.allowed())
    parser = jsonargparse.capture_parser(lambda: runs.LitLLMCLI(
        runs.CausalLMModule, runs.TextDataModule, trainer_class=runs.Trainer, parser_class=runs.RunParser,
        save_config_callback=None, seed_everything_default=42, auto_configure_optimizers=False,
        load_from_checkpoint_support=False, args=["fit"], parser_kwargs={"allow_abbrev": False}))
    (verbs,) = [action for action in parser._actions if isinstance(action.choices, dict)]
    return verbs.choices["fit"]


def test_no_key_builds_a_foreign_class(place):
    parser, trace = fit_parser(), place / "TRACE"
    keys = [key for key in parser.all_keys() if key.startswith(("model.", "data.", "trainer.")) and ".help" not in key]
    assert len(keys) > 80
    spec, base = payload(trace), ["--config", "ok.yaml"]
    followed = 0
    for key in keys:
        for value in (spec, [spec], {"class_path": "LoraConfig", "init_args": {"r": spec}}, {"a": {"b": [spec]}}):
            try:
                config = parser.parse_args([*base, f"--{key}", json.dumps(value)])
                parser.instantiate_classes(config)
                followed += 1
            except (InputError, ValueError, TypeError, KeyError, AttributeError):
                pass
            assert not trace.exists(), f"{key} ran a program"
    assert followed, "no value reached a constructor, so nothing was tested"


@pytest.mark.parametrize("verb", ["fit", "validate", "plan", "inspect", "prepare"])
def test_a_run_config_with_a_program_in_it_is_refused(verb, place):
    trace = place / "TRACE"
    config = yaml.safe_load(Path("ok.yaml").read_text())
    config["model"]["lora"] = None
    config["model"]["peft"] = {"class_path": "LoraConfig", "init_args": {"init_lora_weights": payload(trace)}}
    Path("evil.yaml").write_text(yaml.safe_dump(config))
    message = refused(verb, "--config", "evil.yaml", says="SubprocessHandler")
    assert "no class_path is followed" in message
    assert not trace.exists()


@pytest.mark.parametrize("value", [
    {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.system"}},
    {"class_path": "lightning.pytorch.loggers.wandb.os.system", "init_args": {"command": "touch TRACE"}},
    {"class_path": "lit_llm.training.planning.trial.subprocess.Popen", "init_args": {"args": ["touch", "TRACE"]}},
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "x"}},
    {"class_path": "lightning.pytorch.profilers.AdvancedProfiler"},     # allowed, but no callback
])
def test_only_listed_callbacks_are_built(value, place):
    refused("fit", "--config", "ok.yaml", "--trainer.callbacks", json.dumps([value]), says="trainer.callbacks")
    assert not Path("TRACE").exists()


def test_classes_that_people_use_are_built(place):
    callbacks = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/nll"}},
                 {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
                 {"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint", "init_args": {"every_n_steps": 1}}]
    code, _, err = call("fit", "--config", "ok.yaml", "--trainer.callbacks", json.dumps(callbacks),
                        "--trainer.profiler", json.dumps({"class_path": "lightning.pytorch.profilers.SimpleProfiler",
                                                          "init_args": {"dirpath": "run", "filename": "profile"}}),
                        "--trainer.strategy", json.dumps({"class_path": "lit_llm.training.parallel.zero.ZeroStrategy",
                                                          "init_args": {"stage": 1}}))
    assert code == 0, err
    assert Path("run/checkpoints/step_2").is_dir()
    assert list(Path("run").glob("*profile*"))
