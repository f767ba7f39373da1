"""If this breaks, the report of a run shows other numbers than the run measured, calls a killed run a running one, prints a command
that does not work, publishes a secret, or ends the run that it describes.

Oracles: the run's own files read by Python's csv and json alone, `plan`, and the commands themselves.
"""

import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_llm.data.inspect.inspection import NOTES
from lit_llm.report import facts, settings, texts, writing
from lit_llm.report.drawing import picture
from lit_llm.system import lock
from tests.test_cli import ROWS, call, place, refused, write

assert place                                        # a fixture
RUNNING = {"state": "running", "host": "elsewhere", "pid": 1, "planned_steps": 100}


def report_of(run):
    return json.loads(Path(run, "report.json").read_text(encoding="utf-8"))


def rows_of(run):
    with open(Path(run, "metrics.csv"), newline="") as stream:
        return list(csv.DictReader(stream))


# ---- reading ---------------------------------------------------------------------------------------------------------

def test_curves_are_the_rows(make_run):
    """Each logged value, and of a long run the extremes, also where one value of thousands is an outlier."""
    draw = random.Random(0)
    rows = [{"step": step, "epoch": 0, "seconds": step, "train/loss": draw.random(), "val/nll": step / 7 if step % 2000 == 0 else ""}
            for step in range(1, 20_001)]
    rows[7777]["train/loss"], rows[13]["train/loss"], rows[14]["train/loss"] = 99.0, "nan", -5.0
    facts_of_run = {curve["name"]: curve for curve in facts.of(make_run(rows=rows))["curves"]}
    assert facts_of_run["val/nll"]["steps"] == list(range(2000, 20_001, 2000))
    assert facts_of_run["val/nll"]["values"] == [step / 7 for step in range(2000, 20_001, 2000)]
    loss = facts_of_run["train/loss"]
    assert len(loss["steps"]) <= facts.POINTS
    assert (loss["count"], loss["not_finite"]) == (19_999, 1)
    assert (loss["steps"][0], loss["steps"][-1]) == (1, 20_000)
    assert loss["steps"] == sorted(set(loss["steps"]))
    assert all(rows[step - 1]["train/loss"] == value for step, value in zip(loss["steps"], loss["values"], strict=True))
    assert {99.0, -5.0} <= set(loss["values"])


@pytest.mark.parametrize("record", [None, {}, {"state": ["running"]}, RUNNING, RUNNING | {"state": "finished"}])
def test_state_of_a_run_without_a_process(make_run, record):
    wanted = {None: "unknown", "running": "killed", "finished": "finished"}
    state = (record or {}).get("state")
    run = make_run(rows=[{"step": 7, "train/loss": 1.0}], record=record)
    facts_of_run = facts.of(run)["run"]
    assert facts_of_run["state"] == wanted.get(state if isinstance(state, str) else None)
    assert facts_of_run["step"] == 7


def test_a_run_that_holds_its_lock_is_running(make_run):
    """Its process is another one; looking does not take the lock away from it."""
    run = make_run(record=RUNNING)
    code = f"""
import sys
from pathlib import Path
from lit_llm.system.lock import Lock
lock = Lock()
assert lock.take(Path({str(run / lock.NAME)!r}), "here") is None
print("locked", flush=True)
sys.stdin.readline()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        assert [facts.of(run)["run"]["state"] for _ in range(2)] == ["running", "running"]
        assert lock.Lock().take(run / lock.NAME, "here") is not None
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        assert facts.of(run)["run"]["state"] == "killed"
    finally:
        holder.kill()
        holder.wait(30)


def test_secrets_are_in_no_file_of_the_report(make_run, monkeypatch):
    secrets = ["hf_abcdefghijklmnop", "sk-abcdefghijklmnop1234", "correcthorsebattery"]
    monkeypatch.setenv("MY_API_KEY", secrets[2])
    run = make_run(rows=[{"step": 1, "train/loss": 1.0}], record=RUNNING | {"state": "failed", "reason": f"login {secrets[0]}"},
                   answers=[{"step": 1, "kind": "trained", "prompt": f"my key is {secrets[1]}", "tuned": secrets[2]}],
                   samples=[{"step": 1, "prompt": f"my key is {secrets[1]}", "answer": secrets[2]}],
                   config={"model": {"base": f"https://me:{secrets[2]}@hub.example/x"}})
    writing.write(run)
    texts_of_files = [(run / name).read_text(encoding="utf-8") for name in (writing.REPORT, writing.PAGE)]
    assert all("(removed)" in text for text in texts_of_files)
    assert not [secret for secret in secrets for text in texts_of_files if secret in text]


def test_settings_are_the_ones_that_were_changed(make_run):
    config = {"seed_everything": 42, "model": {"lr": 0.5, "init": None, "lora": {"r": 3, "dropout": 0.0}},
              "data": {"seq_len": settings.defaults()["data.seq_len"], "val_sources": [{"path": "a", "weight": 1.0, "split": "x"}]},
              "trainer": {"my_own": 1}}
    changed = {entry["key"]: entry["value"] for entry in facts.of(make_run(config=config))["config"]}
    assert changed == {"model.lr": 0.5, "model.lora": {"r": 3}, "data.val_sources": [{"path": "a", "split": "x"}],
                       "trainer.my_own": 1}


def test_samples_are_grouped_by_prompt_with_the_first_and_the_last_step(make_run):
    """Of a hundred validations; a line that a killed run left incomplete is no sample."""
    run = make_run(samples=[{"step": step, "prompt": prompt, "expected": "x", "answer": f"{prompt} at {step}", "finish_reason": "stop"}
                            for step in range(0, 1000, 10) for prompt in ("one", "two")])
    with open(run / "samples.jsonl", "a") as stream:
        stream.write('{"step": 1000, "prompt": "one", "ans')
    samples = facts.of(run)["samples"]
    assert [sample["prompt"] for sample in samples] == ["one", "two"]
    for sample in samples:
        steps = [answer["step"] for answer in sample["answers"]]
        assert (len(steps), steps[0], steps[-1]) == (8, 0, 990)
        assert steps == sorted(steps)
        assert all(answer["answer"] == f"{sample['prompt']} at {answer['step']}" for answer in sample["answers"])


@pytest.mark.parametrize(("file", "content"), [
    ("data.json", {"sources": [3]}), ("data.json", {"sources": [{"speakers": {"user": 3}}]}), ("data.json", {"ledger": {"a": 3}}),
    ("run.json", {"state": "failed", "tokens": "many", "training_seconds": 1}), ("run.json", {"parameters": 3}),
    ("metrics.json", {"before/val/nll": "x", "before/val/perplexity": "x"}), ("run.json", {"hardware": [1]}),
    ("answers.jsonl", {"kind": 3, "prompt": ["x"]}), ("samples.jsonl", {"step": 3, "prompt": "x", "answer": ["x"], "expected": 1}), ("run.json", {"planned_steps": {}})])
def test_files_of_another_form_are_refused_in_a_line(make_run, file, content, tmp_path, monkeypatch):
    """Or shown, where the page can; never a traceback."""
    run = make_run(rows=[{"step": step, "train/loss": 1.0, "val/nll": 2.0} for step in (1, 2)], record=RUNNING)
    (run / file).write_text(json.dumps(content))
    code, _, err = call("report", run)
    assert code in (0, 2)
    assert "Traceback" not in err
    assert code == 0 or "do not have the form" in err


def test_what_is_typed_wrong_is_refused(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    refused("report", says="no run was given")
    refused("report", "nowhere", says="there is no folder nowhere")
    refused("report", "empty", says="empty is not the folder of a run")
    refused("report", make_run(), "--outt", "x", says="Did you mean 'out'?")


def test_the_verb_is_quick():
    """It reads text files: no library that takes seconds is imported."""
    code = "import sys, lit_llm.cli.main as main\ntry:\n main.main(['report', 'nowhere'])\nexcept SystemExit:\n print('torch' in sys.modules," \
           " 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout == "False False\n"


def test_every_text_is_in_both_languages():
    assert set(NOTES) <= texts.TEXTS.keys()
    assert {*facts.STATES, "killed", "unknown", *(f"say_{state}" for state in (*facts.STATES, "killed", "unknown"))} <= texts.TEXTS.keys()
    for key, (english, chinese) in texts.TEXTS.items():
        assert english.isascii() or key in ("switch", "hint"), key
        assert any("\u4e00" <= char <= "\u9fff" for char in chinese + english), key


# ---- real runs -------------------------------------------------------------------------------------------------------

def test_the_report_of_a_real_run(place, monkeypatch):
    """Its numbers are those of the run's files and of `plan`; each of its commands runs, and says what it should."""
    config = ["--config", "ok.yaml", "--model.lora", "null", "--model.lr", "1e-3", "--trainer.val_check_interval", 2]
    code, out, err = call("fit", *config)
    assert code == 0, err
    facts_of_run, rows = report_of("run"), rows_of("run")
    assert facts_of_run["run"]["state"] == "finished"
    assert (facts_of_run["run"]["step"], facts_of_run["run"]["planned_steps"], facts_of_run["run"]["saved_step"]) == (2, 2, 2)
    for curve in facts_of_run["curves"]:
        assert list(zip(curve["steps"], curve["values"], strict=True)) == [
            (int(row["step"]), float(row[curve["name"]])) for row in rows if row[curve["name"]]]
    measured = json.loads(Path("run/metrics.json").read_text())
    assert facts_of_run["metrics"]["best"] == {name: value for name, value in measured.items() if name.startswith("val/")}
    assert {f"before/{name}": value for name, value in facts_of_run["metrics"]["before"].items()}.items() <= measured.items()
    (source,), (drawn,) = facts_of_run["data"]["sources"][:1], facts_of_run["data"]["drawn"]
    assert (source["read"], source["kept"], source["supervised"]) == (len(ROWS), len(ROWS), source["speakers"]["assistant"]["supervised"])
    cost = facts_of_run["cost"]
    assert cost["tokens"] == drawn["tokens"]
    assert 0 < cost["training_seconds"] < cost["seconds"]
    assert cost["report_seconds"] < cost["seconds"]
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["training_seconds"])
    assert (cost["utilisation"], cost["peak_flops"]) == (None, None)            # a CPU
    assert call("plan", *config, "--json", "plan.json")[0] == 0
    plan = json.loads(Path("plan.json").read_text())
    assert cost["flops_per_token"] == pytest.approx(plan["flops_per_token"], rel=1e-9)
    assert facts_of_run["run"]["parameters"] == {"total": plan["counts"]["total"], "trained": plan["counts"]["trained"]}
    answers = [json.loads(line) for line in Path("run/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert facts_of_run["answers"] == answers
    assert len(answers) == out.count("\n  prompt ")
    assert all({"step", "kind", "prompt", "expected", "base", "tuned"} == set(answer) for answer in answers)
    assert [[answer["step"] for answer in sample["answers"]] for sample in facts_of_run["samples"]] == [[0, 2]] * 3
    changed = {entry["key"]: entry["value"] for entry in facts_of_run["config"]}
    assert (changed["model.lr"], changed["data.seq_len"], changed["trainer.max_steps"]) == (1e-3, 64, 2)
    assert "model.lora" not in changed
    assert Path("run/export/curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "(curves.png)" in Path("run/export/README.md").read_text()
    assert writing.picture_of(Path("run")) == writing.picture_of(Path("run"))   # the same bytes each time
    with monkeypatch.context() as patch:
        patch.setattr(picture, "is_available", lambda: False)       # without matplotlib
        name, drawn = writing.picture_of(Path("run"))
    assert (name, drawn[:11]) == ("curves.svg", b"<svg xmlns=")
    commands = {entry["what"]: entry["command"] for entry in facts_of_run["commands"]}
    assert list(commands) == ["chat", "validate", "serve", "export", "further", "report"]
    assert all(commands[what] in out for what in ("chat", "validate", "serve"))    # which test_run_config.py runs
    for what in ("validate", "export", "report", "further"):
        code, _, err = call(*shlex.split(commands[what])[3:])
        assert code == 0, (what, err)
    after = report_of("run")
    assert (after["run"]["state"], after["run"]["step"], after["run"]["planned_steps"]) == ("finished", 4, 4)
    (evaluation,) = after["evaluations"]
    assert evaluation["val/perplexity"] == pytest.approx(measured["val/perplexity"], rel=1e-6)
    assert after["cost"]["tokens"] == after["data"]["drawn"][0]["tokens"]       # of both lives
    assert after["run"]["started"] == facts_of_run["run"]["started"]


def test_an_error_in_a_run_is_in_its_report_with_how_to_resume(place, monkeypatch):
    """Also of a run that was killed by kill -9, whose last report is that of its last validation."""
    write("plugin.py", """
import os, signal
import lightning as L
class End(L.Callback):
    def __init__(self, how: str, step: int):
        self.how, self.step = how, step
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and os.path.exists("armed"):
            if self.how == "error":
                raise RuntimeError("no <b>luck</b>")
            os.kill(os.getpid(), getattr(signal, self.how))
""")
    code = "import sys\nsys.path.insert(0, '.')\nfrom lit_llm.cli.main import main\n" \
           "import os\nfor how in ('error', 'SIGTERM', 'SIGKILL'):\n" \
           "    pid = os.fork()\n" \
           "    if not pid:\n" \
           "        code = 1\n" \
           "        try:\n" \
           "            main(['fit', '--allow', 'plugin', '--config', 'ok.yaml', '--trainer.max_steps', '6', '--trainer.val_check_interval'," \
           " '2', '--trainer.default_root_dir', how, '--trainer.callbacks', '[{class_path: plugin.End, init_args: {how: ' + how + ', step: 3}}]'])\n" \
           "        except SystemExit as stop:\n            code = int(stop.code or 0)\n" \
           "        finally:\n            os._exit(code)\n" \
           "    os.waitpid(pid, 0)\n"
    Path("armed").touch()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", "import lit_llm.cli.runs\n" + code], env=env, capture_output=True, text=True, timeout=200,
                          check=False)
    assert Path("SIGKILL", "report.json").is_file(), done.stderr[-3000:]
    assert report_of("SIGKILL")["run"]["state"] == "running"                    # the process could not write another one
    states = {"error": "failed", "SIGTERM": "stopped", "SIGKILL": "killed"}
    for how, state in states.items():
        if how == "SIGKILL":
            assert call("report", how)[0] == 0
        facts_of_run = report_of(how)
        assert facts_of_run["run"]["state"] == state
        assert facts_of_run["run"]["step"] == int(rows_of(how)[-1]["step"]) == (3 if how == "SIGTERM" else 2)  # the others end before
        assert facts_of_run["run"]["planned_steps"] == 6
        assert facts_of_run["run"]["saved_step"] == (3 if how == "SIGTERM" else 2)
        assert not [words for words in facts_of_run["warnings"] if "too few" in words or "still" in words]     # it is not over
        page = Path(how, "report.html").read_text(encoding="utf-8")
        resume = next(entry["command"] for entry in facts_of_run["commands"] if entry["what"] == "resume")
        assert f"{Path(how).absolute()}/config.yaml --ckpt_path last --allow=plugin" in resume
        assert page.count("--ckpt_path last") >= 2          # at the top, and among the commands
        assert "<b>luck" not in page
    assert "no <b>luck</b>" in report_of("error")["run"]["reason"]
    Path("armed").unlink()
    monkeypatch.syspath_prepend(place)
    code, _, err = call(*shlex.split(resume)[3:])               # as it is printed
    assert code == 0, err
    assert report_of("SIGKILL")["run"]["state"] == "finished"


def test_a_report_that_cannot_be_written_ends_no_run(place, caplog):
    """In place of the page is a folder; the run is as without a report."""
    assert call("fit", "--config", "ok.yaml")[0] == 0
    weights = next(Path("run/checkpoints/step_2").rglob("*.safetensors")).read_bytes()
    words = ["fit", "--config", "ok.yaml", "--trainer.default_root_dir", "other"]
    Path("other/report.html/x").mkdir(parents=True)
    code, _, err = call(*words)
    assert code == 0, err
    assert "the report of other could not be written: " in caplog.text
    assert next(Path("other/checkpoints/step_2").rglob("*.safetensors")).read_bytes() == weights
    assert not list(Path("other").glob("*.partial"))


def test_runs_are_compared(make_run, tmp_path):
    """The page has both runs' curves in one chart, and the setting that differs."""
    for name, rate in (("slow", 0.25), ("fast", 0.75)):
        make_run(f"{name}", rows=[{"step": step, "train/loss": rate / step, "val/nll": rate} for step in (1, 2, 3)],
                 config={"model": {"lr": rate, "init": None}, "trainer": {"max_steps": 3}})
    out = tmp_path / "both.html"
    code, stdout, err = call("report", tmp_path / "slow", tmp_path / "fast", "--out", out)
    assert code == 0, err
    assert "compares slow, fast" in stdout
    page = out.read_text(encoding="utf-8")
    points = json.loads(page.partition('id="points">')[2].partition("</script>")[0])
    assert [[series["name"] for series in chart["series"]] for chart in points] == [["slow", "fast"]] * 2
    assert points[0]["series"][1]["values"] == [0.75, 0.375, 0.25]
    table = page.partition("Settings that differ between the runs")[2]
    assert "<td>model.lr</td>" in table
    assert "max_steps" not in table


