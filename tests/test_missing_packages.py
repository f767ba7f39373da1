"""If this breaks: users without an optional package get a traceback or a message about unions instead of the package's name.

The commands run without the package, with a folder that links to all other libraries of this environment.
"""

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def without(package: str, folder: Path) -> dict[str, str]:
    """The environment of a process that finds every library but a package, whose name a distribution may spell otherwise."""
    for place in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in place.iterdir():
            own = entry.name.split("-")[0].split(".")[0].replace("-", "_").lower() == package
            if not own and not (folder / entry.name).exists() and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def run(package: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "libraries").mkdir()
    env = without(package, folder / "libraries")
    return subprocess.run([sys.executable, "-S", "-m", *words], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=120, check=False)


FIT = ("lit_llm", "fit", "--config", "configs/sft.yaml", "--config", "configs/with/cpu.yaml")


@pytest.mark.parametrize(("package", "words", "says"), [
    ("tensorboard", [*FIT, "--trainer.logger", "TensorBoardLogger"],
     "trainer.logger: TensorBoardLogger needs the package 'tensorboard', which is not installed\n  pip install tensorboard"),
    ("tensorboard", [*FIT, "--config", "configs/with/tensorboard.yaml"], "TensorBoardLogger needs the package 'tensorboard'"),
    ("mlflow", [*FIT, "--trainer.logger", "[{class_path: lightning.pytorch.loggers.MLFlowLogger}]"],
     "MLFlowLogger needs the package 'mlflow', which is not installed\n  pip install mlflow"),
    ("comet_ml", [*FIT, "--trainer.logger", "lightning.pytorch.loggers.CometLogger"], "  pip install comet-ml"),
    ("wandb", [*FIT, "--config", "configs/with/wandb.yaml"], "WandbLogger needs the package 'wandb'"),
    ("rich", [*FIT, "--trainer.callbacks", "RichProgressBar"], "RichProgressBar needs the package 'rich'"),
    ("deepspeed", ["lit_llm", "fit", "--config", "configs/sft.yaml", "--trainer.strategy", "deepspeed_stage_2"],
     "trainer.strategy: deepspeed_stage_2 needs the package 'deepspeed', which is not installed\n  pip install deepspeed"),
    ("litserve", ["serve", "--model", str(ROOT / "lit_llm/samples/base")],
     "the package 'litserve' is not installed\n  pip install litserve"),
    ("bitsandbytes", [*FIT, "--model.optimizer", "adamw_8bit"],
     "model.optimizer: adamw_8bit needs the package 'bitsandbytes', which is not installed\n  pip install bitsandbytes"),
    ("gguf", ["lit_llm", "export", "sample:base", "--format", "gguf", "--out", "out"],
     "the package 'gguf' is not installed\n  pip install gguf"),
    ("bitsandbytes", [*FIT, "--model.quantize", "nf4"], "model.quantize: nf4 needs the package 'bitsandbytes'"),
])
def test_a_package_that_is_missing_is_named(package, words, says, tmp_path):
    done = run(package, tmp_path, *words)
    assert done.returncode == 2, done.stderr[-2000:]
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "ubtype" not in done.stderr


def test_a_package_that_is_there_is_not_missed(tmp_path):
    """The folder of links is whole but for the one that was left out."""
    names = {distribution.metadata["Name"].lower() for distribution in distributions()}
    assert {"torch", "lightning", "wandb"} <= names
    done = run("none", tmp_path, "lit_llm", "fit", "--config", "configs/with/wandb.yaml", "--config", "configs/sft.yaml",
               "--data.seq_len", "1")
    assert "data.seq_len: 1 is not a whole number from 2" in done.stderr
