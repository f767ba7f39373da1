"""If this breaks: users cannot use their own callback, logger, module or data module on the command line, or a config from
somebody else imports a package that was not allowed.

The package is real: files in the folder where the command is started.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from lit_llm.system import class_paths
from tests.test_cli import call, place, refused

assert place                                        # a fixture
PACKAGE = '''
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lit_llm import CausalLMModule, TextDataModule

Path("IMPORTED").touch()


class Marker(Callback):
    """Leaves a file behind."""

    def __init__(self, name: str = "mark"):
        self.name = name

    def on_train_start(self, trainer, module):
        Path(f"{self.name}-{type(module).__name__}").touch()


class Logger(CSVLogger):
    """Lightning's own."""


class ZLoss(CausalLMModule):
    """Adds a term.

    Args:
        z: Its weight.
        kwargs: Those of the base.
    """

    def __init__(self, z: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.z = z

    def sums(self, batch):
        given = super().sums(batch)
        return given._replace(total=given.total * (1 + self.z)) if self.training else given


class Shouting(TextDataModule):
    """Fewer tokens.

    Args:
        share: Of `seq_len`.
        kwargs: Those of the base.
    """

    def __init__(self, share: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.seq_len = int(self.seq_len * share)
        Path(f"share-{share}").touch()


def function(**kwargs):
    Path("CALLED").touch()


class Spy:
    """No subclass of anything that a key takes."""

    def __init__(self, **kwargs):
        Path("CALLED").touch()
'''
CALLBACK = {"class_path": "mine.parts.Marker", "init_args": {"name": "typed"}}
LOGGER = {"class_path": "mine.parts.Logger", "init_args": {"save_dir": "logs"}}


@pytest.fixture
def package(place):
    """`mine.parts` in the folder where commands are started, not imported yet."""
    (place / "mine").mkdir()
    (place / "mine/__init__.py").write_text("")
    (place / "mine/parts.py").write_text(PACKAGE)
    yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(place)]
    class_paths.opened.clear()


def config(name, **sections):
    """ok.yaml with other keys, under another name."""
    content = yaml.safe_load(Path("ok.yaml").read_text())
    for part, keys in sections.items():
        content[part] = content[part] | keys if isinstance(keys, dict) and isinstance(content.get(part), dict) else keys
    Path(name).write_text(yaml.safe_dump(content))
    return name


def losses(folder="run"):
    lines = [line.split(",") for line in Path(folder, "metrics.csv").read_text().splitlines()]
    return [float(line[lines[0].index("train/loss")]) for line in lines[1:] if line[lines[0].index("train/loss")]]


def test_own_parts_are_built_from_the_command_line(package):
    """All four at once, with arguments of their own; the run's config names them, and resumes with them."""
    code, _, err = call("fit", "--config", "ok.yaml", "--trainer.default_root_dir", "plain")
    assert code == 0, err
    words = ["--allow", "mine", "--model.class_path", "mine.parts.ZLoss", "--model.z", "2",
             "--data.class_path=mine.parts.Shouting", "--data.share", "1",
             "--trainer.callbacks", json.dumps([CALLBACK]), "--trainer.logger", json.dumps(LOGGER)]
    code, printed, err = call("fit", "--config", "ok.yaml", *words)
    assert code == 0, err
    assert Path("typed-ZLoss").exists()
    assert Path("share-1.0").exists()
    assert list(Path("logs").rglob("metrics.csv"))
    (command,) = [line.split() for line in printed.splitlines() if " validate " in line]
    code, _, err = call(*command[command.index("lit_llm") + 1:])        # as it is printed
    assert code == 0, err
    config_of_run = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config_of_run["model"]["class_path"], config_of_run["model"]["z"]) == ("mine.parts.ZLoss", 2.0)
    assert (config_of_run["data"]["class_path"], config_of_run["data"]["share"]) == ("mine.parts.Shouting", 1.0)
    assert "class_path" not in yaml.safe_load(Path("plain/config.yaml").read_text())["model"]
    assert losses()[0] == pytest.approx(3 * losses("plain")[0], rel=1e-3)
    code, _, err = call("fit", "--config", "run/config.yaml", "--allow", "mine", "--ckpt_path", "last",
                        "--trainer.max_steps", "3")
    assert code == 0, err
    assert Path("run/checkpoints/step_3").is_dir()


def test_own_parts_of_a_config_are_built_after_a_typed_allow(package):
    name = config("own.yaml", model={"class_path": "mine.parts.ZLoss", "z": 1.0}, trainer={"callbacks": [CALLBACK]})
    code, _, err = call("prepare", "--config", name, "--allow=mine.parts")
    assert code == 0, err
    code, out, err = call("plan", "--config", name, "--allow", "mine", "--probe", "true")      # trains in another process
    assert code == 0, out + err


@pytest.mark.parametrize(("sections", "key"), [
    ({"model": {"class_path": "mine.parts.ZLoss"}}, "model.class_path"),
    ({"data": {"class_path": "mine.parts.Shouting"}}, "data.class_path"),
    ({"trainer": {"callbacks": [CALLBACK]}}, "trainer.callbacks"),
    ({"trainer": {"logger": LOGGER}}, "trainer.logger"),
])
def test_without_allow_nothing_is_imported_and_the_option_is_named(sections, key, package):
    message = refused("fit", "--config", config("own.yaml", **sections), says=[key, "mine.parts", "type: --allow mine"])
    assert "is not allowed" in message
    assert not Path("IMPORTED").exists()


def test_allow_ends_with_its_command(package):
    """A later command of the same process, as in a notebook, opens for itself."""
    words = ["prepare", "--config", config("own.yaml", trainer={"callbacks": [CALLBACK]})]
    assert call(*words, "--allow", "mine")[0] == 0
    refused(*words, says="type: --allow mine")


def test_a_file_or_the_environment_opens_nothing(package, monkeypatch):
    for value in ("mine", ["mine"]):
        refused("fit", "--config", config("own.yaml", allow=value), says=["allow: a config file cannot allow a package", "--allow"])
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("ALLOW", "LIT_LLM_ALLOW", "LIT_LLM_FIT__ALLOW"):
        monkeypatch.setenv(name, "mine")
    refused("fit", "--config", config("own.yaml", trainer={"callbacks": [CALLBACK]}), says="type: --allow mine")
    assert not Path("IMPORTED").exists()


@pytest.mark.parametrize(("words", "says"), [
    (["--allow"], "no name of a package"), (["--allow", "*"], "no name of a package"),
    (["--allow", "../mine"], "no name of a package"), (["--allow=nowhere_to_be"], "no package 'nowhere_to_be'"),
    (["--allow", "os"], "os stays closed"), (["--allow", "torch.hub"], "torch stays closed"),
    (["--allow", "jsonargparse"], "jsonargparse stays closed"), (["--allow", "lightning"], "lightning stays closed"),
])
def test_a_package_that_cannot_be_opened(words, says, package):
    refused("fit", "--config", "ok.yaml", *words, says=["--allow", says])


@pytest.mark.parametrize(("words", "says"), [
    (["--model.class_path", "mine.parts.Spy"], "no subclass of lit_llm.CausalLMModule"),
    (["--model.class_path", "mine.parts.function"], "no subclass of lit_llm.CausalLMModule"),
    (["--model.class_path", "mine.parts.Shouting"], "no subclass of lit_llm.CausalLMModule"),
    (["--data.class_path", "mine.parts.ZLoss"], "no subclass of lit_llm.TextDataModule"),
    (["--model.class_path", "mine.parts.Missing"], "mine.parts.Missing"),
    (["--model.class_path", "os.system"], "model.class_path: 'os.system' is not allowed"),
    (["--model.class_path", "mine.parts.ZLoss", "--model.zz", "1"], "zz"),
    (["--model.class_path", "mine.parts.ZLoss", "--model.z", "much"], "model.z: 'much' is not a number"),
    (["--trainer.callbacks", json.dumps([{"class_path": "mine.parts.Spy"}])], "trainer.callbacks"),
    (["--trainer.callbacks", json.dumps([{"class_path": "mine.parts.Path"}])], "trainer.callbacks"),
    (["--model.lora", "null", "--model.peft", json.dumps({"class_path": "mine.parts.Spy"})], "Spy"),
    (["--model.lora", "null", "--model.peft", json.dumps({"class_path": "LoraConfig", "init_args": {
        "init_lora_weights": {"class_path": "mine.parts.Spy"}}})], "no class_path is followed within this key"),
    (["--model.base", "null", "--model.lora", "null", "--data.tokenizer", "sample:base", "--model.init", json.dumps(
        {"model_type": "llama", "rope_parameters": {"class_path": "mine.parts.Spy"}})],
     "no class_path is followed within this key"),
])
def test_allow_opens_no_other_place(words, says, package):
    """Keys accept only classes of their type, and below model.init and model.peft no class is built."""
    code, out, err = call("fit", "--config", "ok.yaml", "--allow", "mine", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not Path("CALLED").exists()
    assert not Path("run").exists()


def test_the_installed_command_finds_a_package_beside_it(package, monkeypatch):
    """`lit-llm` does not have the current folder among those that Python imports from."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    code, _, err = call("prepare", "--config", "ok.yaml", "--allow", "mine", "--trainer.callbacks", json.dumps([CALLBACK]))
    assert code == 0, err


def test_verbs_of_a_folder_open_nothing(package):
    refused("chat", "run", "--allow", "mine", says="chat builds no class")
