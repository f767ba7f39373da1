"""If this breaks: `dir(lit_llm)` is incomplete, a documented name cannot be imported, or a config with
`class_path: lit_llm.NAME` is refused.
"""

import ast
import inspect
import json
import subprocess
import sys
from importlib import import_module, resources

import pytest
import yaml

import lit_llm
from lit_llm.system import class_paths
from tests.test_cli import call, place

assert place                                        # a fixture
IN_A_CONFIG = {                                     # short class_path -> where a config names it
    "FiniteGuard": ("callbacks", {"max_skipped_steps": 3}), "Progress": ("callbacks", {"every_seconds": 5}),
    "StepCheckpoint": ("callbacks", {"every_n_steps": 1}), "ZeroStrategy": ("strategy", {"stage": 1}),
    "Fsdp2Strategy": ("strategy", {}),
}


@pytest.mark.parametrize("name", lit_llm.__all__)
def test_each_public_name_can_be_imported_and_is_documented(name):
    value = getattr(lit_llm, name)
    assert name in dir(lit_llm)
    assert value.__name__ == name
    assert len((inspect.getdoc(value) or "").split()) >= 4
    assert sys.modules[value.__module__].__file__.endswith(".py")


def test_dir_shows_only_public_names_and_loads_nothing():
    code = ("import sys, json, lit_llm; shown = [name for name in dir(lit_llm) if name[0] != '_'];"
            "print(json.dumps([shown, sorted({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules))]))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [sorted(lit_llm.__all__), []]


def test_type_checkers_see_the_public_names():
    """They read the imports below `if TYPE_CHECKING`, which must be those that `__getattr__` makes."""
    assert resources.files("lit_llm").joinpath("py.typed").is_file()
    (block,) = [node for node in ast.parse(inspect.getsource(lit_llm)).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(lit_llm.__all__)
    for name, module in seen.items():
        assert getattr(import_module(module), name) is getattr(lit_llm, name)


@pytest.mark.parametrize("name", IN_A_CONFIG)
def test_short_class_paths_work_in_a_config(name, place, monkeypatch):
    from lit_llm.training.trainer import Trainer

    built = []
    monkeypatch.setattr(Trainer, "prepare", lambda self, model, datamodule: built.append(self))
    config = yaml.safe_load((place / "ok.yaml").read_text())
    key, arguments = IN_A_CONFIG[name]
    spec = {"class_path": f"lit_llm.{name}", "init_args": arguments}
    config["trainer"][key] = [spec] if key == "callbacks" else spec
    (place / "short.yaml").write_text(yaml.safe_dump(config))
    code, _, err = call("prepare", "--config", "short.yaml")
    assert code == 0, err
    (trainer,) = built
    parts = trainer.callbacks if key == "callbacks" else [trainer.strategy]
    made = [part for part in parts if type(part) is getattr(lit_llm, name)
            and all(getattr(part, key, value) == value for key, value in arguments.items())]
    assert made


def test_every_class_that_a_config_may_name_by_a_short_path_is_tried():
    for name in class_paths.EXPORTS["lit_llm"]:
        assert name in IN_A_CONFIG or name in ("LoRA", "Source"), name      # two that have a key of their own
