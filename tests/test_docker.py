"""If this breaks: the image cannot be built from this checkout, or its container does not serve. No image is built here.

The Dockerfile is read as Docker reads it: what it copies lies in the build context, what it installs is the README's first
command, and what it starts runs on a copy of those files alone.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}


def instructions():
    """(instruction, its words) in order, with continued lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(name, words) for name, _, words in (line.partition(" ") for line in lines)]


def of(name):
    return [words for instruction, words in instructions() if instruction == name]


@pytest.fixture
def image(tmp_path):
    """A folder with what the image holds."""
    for words in of("COPY"):
        *sources, target = words.split()
        for source in sources:
            place = tmp_path / target / (source if target == "./" else "")
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    return tmp_path


def test_the_form():
    names = [name for name, _ in instructions()]
    assert set(names) <= KNOWN
    assert names[:2] == ["ARG", "FROM"]
    assert of("FROM") == ["${BASE}"]
    assert ":" in of("ARG")[0].split("=", 1)[1]     # a version, not latest
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")      # nothing runs as root
    assert of("USER") == ["server"]
    for words in of("RUN"):
        assert subprocess.run(["bash", "-n", "-c", words]).returncode == 0, words


def test_what_is_copied_lies_in_the_context():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert rules[0] == "**"
    included = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {source for words in of("COPY") for source in words.split()[:-1]}
    assert copied == included
    assert all((ROOT / source).exists() for source in copied)
    out = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert any(fnmatch.fnmatch("lit_llm/cli/__pycache__", rule) for rule in out)


def test_it_is_installed_as_the_readme_says():
    command = re.search(r"```bash\n(pip install .*?) &&", (ROOT / "README.md").read_text())[1]
    assert [words for words in of("RUN") if words.startswith("pip")] == [command]


def test_pip_installs_the_copied_files(image):
    """The same command without its dependencies, which are here, into a fresh virtual environment."""
    made = subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", image / "venv"])
    assert made.returncode == 0
    (install,) = [shlex.split(words) for words in of("RUN") if words.startswith("pip")]
    done = subprocess.run([sys.executable, "-m", "pip", "--python", image / "venv/bin/python", *install[1:], "--no-deps",
                           "--no-build-isolation", "-q"], cwd=image, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:])})
    assert done.returncode == 0, done.stderr
    assert list((image / "venv/lib").rglob("*lit_llm*"))


def test_the_entry_point_serves_the_copied_files(image):
    """It listens to other machines, so it asks for a key; with one, the next thing it misses is the model."""
    (entry,) = (json.loads(words) for words in of("ENTRYPOINT"))
    port = ["--port", "18999"]
    for key, missing in ({}, "--api-key"), ({"LIT_LLM_API_KEY": "sesame"}, "/model"):
        done = subprocess.run([sys.executable, *entry[1:], *port], cwd=image, capture_output=True, text=True,
                              env={name: value for name, value in os.environ.items() if name != "LIT_LLM_API_KEY"} | key)
        assert done.returncode == 2, done.stderr
        assert missing in done.stderr
        assert "Traceback" not in done.stderr
    (check,) = of("HEALTHCHECK")
    code = json.loads(check[check.index("["):])[2]
    assert "8000/health/ready" in code
    compile(code, "HEALTHCHECK", "exec")
    assert of("EXPOSE") == ["8000"]
