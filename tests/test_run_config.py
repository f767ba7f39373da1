"""If this breaks: the commands printed at the end of a fit, or the stored config, use other data, another base or another run of
the same name; or they work in one directory only.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from test_cli import call, place, refused, write  # noqa: F401

from lit_llm.cli import configs
from lit_llm.system import command

ROOT = Path(__file__).resolve().parents[1]
MINE = [{"prompt": f"count to {number}", "completion": f"it is {number} and {number}"} for number in range(12)]


@pytest.fixture
def run(place, tiny_model, monkeypatch):  # noqa: F811
    """A finished fit with typed keys and relative paths; the test then changes to another directory."""
    (place / "work").mkdir()
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "work")
    Path("models").symlink_to(Path(tiny_model("qwen3")).parent)
    write("mine.jsonl", *MINE)
    code, out, err = call(
        "fit", "--config", "../ok.yaml", "--model.base", f"models/{Path(tiny_model('qwen3')).name}", "--model.lora.r", 3,
        "--data.sources", "[{path: mine.jsonl}]", "--data.val_sources", "null", "--data.val_fraction", 0.3,
        "--data.seq_len", 48, "--trainer.precision", "bf16-mixed", "--trainer.default_root_dir", "runs/my run")
    assert code == 0, err
    monkeypatch.chdir(place / "elsewhere")
    return place / "work" / "runs" / "my run", out


def pasted(line, **more):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(["bash", "-c", f"exec {line}"], env=env, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **more)


@pytest.mark.timeout(400)
def test_every_command_that_fit_prints_can_be_pasted_anywhere(run):
    folder, out = run
    chat, validate, serve = [line.strip() for line in out[out.index("\nnext:\n") + 7:].splitlines()]
    # The one command that is only read here: vLLM is not a dependency.
    assert f"where vLLM is installed: vllm serve '{folder / 'export'}'\n" in out
    with socket.socket() as probe:                          # another test may serve on the default port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chatted, measured, served = pasted(chat), pasted(validate), pasted(f"{serve} --port {port}")
    try:
        answer, err = chatted.communicate("count to 3\n", timeout=200)
        assert chatted.returncode == 0, err
        assert answer.endswith("\n")
        figures, err = measured.communicate(timeout=200)
        assert measured.returncode == 0, err
        best = (folder / "checkpoints" / "BEST").read_text().strip()
        score = json.loads((folder / "checkpoints" / best / "manifest.json").read_text())["score"]
        assert float(dict(line.split() for line in figures.splitlines())["val/nll"]) == pytest.approx(score, rel=1e-6)
        assert ask(f"http://127.0.0.1:{port}/chat", {"message": "count to 3", "max_length": 8, "temperature": 0}, served)
    finally:
        for process in (chatted, measured, served):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=30)


def ask(url, body, process, seconds=120):
    end = time.monotonic() + seconds
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return "response" in json.load(reply)
        except OSError:
            assert time.monotonic() < end, "it never answered"
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)


def test_the_config_of_a_run_loads_with_every_verb(run):
    """From another directory; what was typed is what is measured, planned and shown."""
    folder, _ = run
    config = folder / "config.yaml"
    stored = yaml.safe_load(config.read_text())
    assert set(stored) == {"seed_everything", "model", "data", "trainer"}
    for verb, says in (("validate", "val/nll"), ("test", "test/nll"), ("prepare", ""), ("inspect", "mine.jsonl\n  12 records"),
                       ("plan", "3,136 trained")):
        code, out, err = call(verb, "--config", config)
        assert code == 0, f"{verb}: {err}"
        assert says in out
    assert not list(Path(".").iterdir()), "a verb wrote into the current directory"
    code, out, err = call("fit", "--config", config, "--trainer.default_root_dir", "again")
    assert code == 0, err
    assert stored["data"]["tokenizer"] is None            # the base's; another base brings its own
    once, again = (next(where.glob("checkpoints/step_2/adapter/*.safetensors")).read_bytes() for where in (folder, Path("again")))
    assert once == again


def test_a_run_that_was_moved_is_the_run_of_its_config(run):
    """Its config names the folder where it once lay, and there may be another run by now."""
    folder, _ = run
    moved = folder.with_name("first")
    folder.rename(moved)
    folder.mkdir()
    code, _, err = call("validate", "--config", moved / "config.yaml", "--ckpt_path", "best")
    assert code == 0, err
    assert not list(folder.iterdir())
    words = configs.with_run_folder(["validate", f"--config={moved / 'config.yaml'}", "--trainer.default_root_dir", "mine"])
    assert words[2:] == ["--trainer.default_root_dir", str(moved), "--trainer.default_root_dir", "mine"]


def test_no_command_is_printed_that_would_be_refused(place):  # noqa: F811
    """Without validation data there is no best checkpoint and no data to validate on."""
    code, out, err = call("fit", "--config", "ok.yaml", "--data.val_sources", "null", "--trainer.max_steps", 1)
    assert code == 0, err
    assert [line.split(" -m ")[1].split(" --")[0] for line in out[out.index("\nnext:\n") + 7:].splitlines()] == [
        "lit_llm chat", "serve"]


def test_keys_of_other_verbs(place):  # noqa: F811
    """The message must not propose the very word that was refused."""
    Path("other.yaml").write_text("ckpt_path: last\n")
    message = refused("plan", "--config", "ok.yaml", "--config", "other.yaml", says="ckpt_path")
    assert "Did you mean 'ckpt_path'" not in message


def test_what_is_made_absolute(tmp_path, monkeypatch):
    """Local files that are there; never a hub id, a sample, or the name of one of a tokenizer's templates."""
    monkeypatch.chdir(tmp_path)
    Path("own.jinja").write_text("x")
    Path("base").mkdir()
    config = {"config": ["x"], "ckpt_path": "last", "seed_everything": 1, "model": {"base": "base", "lr": 1.0},
              "data": {"sources": [{"path": "owner/name", "weight": 2.0}, {"path": "part-*.jsonl"}, {"path": "sample:a.jsonl"}],
                       "val_sources": None, "tokenizer": "Qwen/Qwen3-0.6B", "chat_template": "own.jinja", "cache_dir": "c"},
              "trainer": {"default_root_dir": "runs/x", "logger": [{"class_path": "L", "init_args": {"save_dir": "logs"}}]}}
    at = str(tmp_path)
    assert configs.run_settings(config) == {
        "seed_everything": 1, "model": {"base": f"{at}/base", "lr": 1.0},
        "data": {"sources": [{"path": "owner/name", "weight": 2.0}, {"path": f"{at}/part-*.jsonl"}, {"path": "sample:a.jsonl"}],
                 "val_sources": None, "tokenizer": "Qwen/Qwen3-0.6B", "chat_template": f"{at}/own.jinja",
                 "cache_dir": f"{at}/c"},
        "trainer": {"default_root_dir": f"{at}/runs/x",
                    "logger": [{"class_path": "L", "init_args": {"save_dir": f"{at}/logs"}}]}}


def test_a_printed_command_starts_this_python(monkeypatch, tmp_path):
    """Also where the shell's `python` is another one, and where a path has a space."""
    line = command.line("lit_llm", "chat", "--model", "my run")
    assert re.search(r"python\S* -m lit_llm chat --model 'my run'$", line)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.python() == sys.executable
