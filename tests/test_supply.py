"""If this breaks: packages installed with hashes differ from those that were tested, or a library whose private names are used
has no upper bound.
"""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = ("deepspeed", "torch", "peft", "wandb", "transformers", "lightning", "litserve", "jsonargparse")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)", re.MULTILINE)


def pins(name):
    return {match[1].lower().replace("_", "-"): match[2] for match in PIN.finditer((ROOT / name).read_text())}


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [(re.split(r"[\[<>=;]", line)[0].strip().lower(), line) for line in lines]


def test_the_lock_holds_the_tested_versions_with_hashes():
    tested, locked = pins("constraints.txt"), pins("requirements.lock")
    assert {name: locked.get(name) for name in tested} == tested
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / "requirements.lock").read_text().strip())
    assert {PIN.match(entry)[1].lower() for entry in entries} == locked.keys()
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert "://" not in (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize(("name", "line"), requirements())
def test_each_requirement_is_locked_within_its_range(name, line):
    from packaging.requirements import Requirement

    wanted = Requirement(line)
    assert wanted.specifier.contains(pins("requirements.lock")[name], prereleases=True)
    if name in PRIVATE:
        assert any(bound.operator == "<" for bound in wanted.specifier), f"{name} has no upper bound"


def test_pre_releases_are_named():
    from packaging.version import Version

    text = (ROOT / "CONTRIBUTING.md").read_text()
    unstable = [name for name, version in pins("constraints.txt").items() if Version(version).is_prerelease]
    assert all(name in text or name.split("-")[0] in text for name in unstable)
