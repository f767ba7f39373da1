"""If this breaks: an installed wheel lacks configs, samples, help pages or the server.

The wheel is built from a source distribution, as `python -m build` does it, and installed into a fresh virtual environment
that shares only the libraries of this one.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("lit_llm", "serve", "configs", "tests", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
           "CHANGELOG.md", "SECURITY.md", "constraints.txt")


def build(what: str, source: Path, target: Path) -> Path:
    """A distribution made by the project's build backend, in a process of its own."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(target.glob("*.tar.gz" if what == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, source)
    with tarfile.open(build("sdist", source, out)) as archive:
        archive.extractall(out, filter="data")
    return build("wheel", next(out.glob("lit_llm-*/")), out)


def test_what_is_inside(wheel):
    """Every file of the two packages, the configs, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    code = {file.relative_to(ROOT).as_posix(): file.read_bytes()
            for package in ("lit_llm", "serve") for file in (ROOT / package).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts}
    configs = {f"lit_llm/{file.relative_to(ROOT).as_posix()}": file.read_bytes()
               for file in (ROOT / "configs").rglob("*") if file.is_file()}
    assert len(configs) >= 13
    assert "lit_llm/py.typed" in inside
    assert {name for name in code.keys() | configs.keys() if not name.endswith(".md")} <= inside.keys() <= {*code, *configs}
    assert all(content == (code | configs)[name] for name, content in inside.items())


def test_what_it_says_of_itself(wheel):
    """Licence, one command, extras, and no invalid address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA")).rpartition("/")[0]
        metadata = email.message_from_string(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert archive.read(f"{info}/entry_points.txt").decode().split() == [
            "[console_scripts]", "lit-llm", "=", "lit_llm.__main__:run"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == project["version"]
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Project-URL"] is metadata["Home-page"] is None


@pytest.fixture(scope="module")
def lit_llm(wheel, tmp_path_factory):
    """`lit_llm("fit", ...)`: the installed command, in an empty folder."""
    place = tmp_path_factory.mktemp("fresh")
    python = place / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True, timeout=60)
    packages = next((place / "venv").glob("lib/python*/site-packages"))
    shared = [path for path in sys.path if path.endswith("site-packages")]      # libraries, but no editable installation
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index",
                    "--disable-pip-version-check", str(wheel)], check=True, timeout=120)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (place / "empty").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(python.parent / "lit-llm"), *words], cwd=place / "empty", capture_output=True, text=True,
                              env=env | {"LIT_LLM_CACHE": str(place / "cache")}, timeout=300, check=False)

    run.folder = place / "empty"
    run.packages = packages
    return run


def test_the_installed_command_knows_its_configs_and_the_server(lit_llm):
    done = lit_llm("validate")
    assert done.returncode == 2
    assert re.search(r"^    configs/sft\.yaml +Fine-tune a base model on conversations with LoRA", done.stderr, re.MULTILINE)
    assert " configs/with/zero3.yaml " in done.stderr
    assert "--model.lora" in lit_llm("fit", "--help").stdout
    assert "--drain-seconds" in lit_llm("serve", "--help").stdout


@pytest.mark.slow
def test_the_toy_trains_from_the_wheel(lit_llm):
    """With a shipped config found by name, outside the repository; the export answers."""
    done = lit_llm("fit", "--config", "sft.yaml", "--config", "configs/with/cpu.yaml", "--trainer.max_steps", "2",
                   "--data.sources", "[{path: sample:conversations_val.jsonl}]", "--trainer.num_sanity_val_steps", "1",
                   "--trainer.limit_val_batches", "1", "--trainer.threads", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    shipped = lit_llm.packages / "lit_llm" / "configs"
    assert f"--config sft.yaml: {shipped / 'sft.yaml'}, which ships with the package" in done.stderr
    assert f"--config configs/with/cpu.yaml: {shipped / 'with/cpu.yaml'}" in done.stderr
    run = lit_llm.folder / "runs" / "sft"
    assert (run / "export" / "model.safetensors").is_file()
    assert (run / "metrics.csv").read_text().count("\n") >= 3
