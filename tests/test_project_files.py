"""If this breaks: the changelog, a hook, a workflow or the citation of the repository does not work."""

import re
import shlex
import subprocess
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]      # of keepachangelog.com


def read_yaml(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_changelog_has_dates_and_sections():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(.+?)\] - (.+)$", text, re.MULTILINE)
    assert releases[0][0] == PROJECT["version"]
    assert [date.fromisoformat(day) for _, day in releases] == sorted((date.fromisoformat(day) for _, day in releases), reverse=True)
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        names = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert names
        assert names == [name for name in SECTIONS if name in names]
        entries = part.partition("###")[2].splitlines()[1:]
        assert all(re.match(r"- |  \S|### |$", line) for line in entries)


def test_the_hooks_are_ruff_mypy_and_codespell():
    """All are local, so that reading the file needs no network; the first two are those of the test extra."""
    hooks = {hook["id"]: hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert all(repo["repo"] == "local" for repo in read_yaml(".pre-commit-config.yaml")["repos"])
    assert set(hooks) == {"ruff", "mypy", "codespell"}
    tested = {re.split(r"\W", requirement)[0] for requirement in PROJECT["optional-dependencies"]["test"]}
    for name in ("ruff", "mypy"):
        assert hooks[name]["language"] == "system"
        assert name in tested
    assert hooks["codespell"]["additional_dependencies"][0].startswith("codespell")
    command = shlex.split(hooks["ruff"]["entry"])
    try:
        done = subprocess.run([*command, "setup.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout


def test_the_workflow_calls_what_is_called_here():
    workflow = read_yaml(".github/workflows/tests.yml")
    for job in workflow["jobs"].values():
        assert job["steps"][-1] == {"run": ".ci/run"}
        assert {f"Programming Language :: Python :: {version}" for version in job["strategy"]["matrix"]["python-version"]} <= set(
            PROJECT["classifiers"])
    assert workflow["permissions"] == {"contents": "read"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True, timeout=30)


def test_the_citation_is_of_this_version():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    released = re.search(r"^## \[.+?\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert citation["date-released"] == released


def test_the_modules_that_contributing_names_exist():
    """Its table of own code, and every path of a folder or file, also with a name inside the module."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| here, in `lit_llm` |")[2].partition("\n\n")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    assert len(cells) > 10
    named = [f"lit_llm/{name}" for cell in cells for name in re.findall(r"`([\w/.]+)`", cell)]
    named += [name for name in re.findall(r"`((?:lit_llm|serve|tests|training)/[\w/.]+)", text)]
    for name in named:
        path = ROOT / ("lit_llm" if name.startswith("training/") else "") / name.rstrip(".")
        if path.exists():
            continue
        module, _, inside = path.name.partition(".")
        file = path.with_name(f"{module}.py")
        assert file.is_file(), f"{name} of CONTRIBUTING.md does not exist"
        assert not inside or re.search(rf"^(class|def) {inside}\b|^{inside}\b", file.read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_public_file_is_there():
    for name in ("LICENSE", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "README.zh-CN.md", "CITATION.cff"):
        assert (ROOT / name).is_file(), name
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
