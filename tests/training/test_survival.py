"""If this breaks: a run that is killed, preempted or gets a bad record is lost: it hangs, cannot be resumed, continues
differently, needs manual repair, or trains on a NaN.

Real commands in real processes, killed with -9 or signalled at points of the product's own code, which is not changed for
it. Oracle: the same run without interruption. `survive.py` does the same with many more kills.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from run_processes import (
    ROOT,
    assert_same_end,
    config_of,
    content,
    differences,
    float16,
    metrics_rows,
    write_config,
    write_data,
)
from survive import STEPS, at_points, finish, strike

from lit_llm.system.command import python
from lit_llm.training.run.preemption import resume_command
from lit_llm.training.run.report import MetricsCSV

TWO = 2


@pytest.fixture
def run(run_processes, tiny_model):
    """`run(ranks, ...)`: a command whose run was finished once in `straight` and may be repeated in `killed`."""
    def prepare(ranks=1, **keys):
        for name in ("straight", "killed"):
            shutil.rmtree(run_processes.folder / name, ignore_errors=True)
        words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=ranks, **keys))
        done = run_processes.run(*words, "straight", ranks=ranks)
        assert done["codes"] == [0] * ranks, done["outputs"][0]["err"][-2000:]
        return words

    return prepare


def test_kill_9_at_any_moment_needs_no_repair(run_processes, run):
    """At each point of saving, then at five random moments: the same result and the same metrics."""
    words = run()
    points = [("state", 1), ("weights", 1), ("rename", 1), ("prune", 1), ("validation", 4)]
    assert at_points(run_processes, words, points=points) == [name for name, _ in points]
    assert_same_end(run_processes.folder / "killed", run_processes.folder / "straight", STEPS)
    shutil.rmtree(run_processes.folder / "killed")
    moments = [random.uniform(0.3, 1.5) for _ in range(5)]
    print("killed after", moments)
    for moment in moments:
        strike(run_processes, words, 1, {"after": moment})
    finish(run_processes, words, 1)
    assert_same_end(run_processes.folder / "killed", run_processes.folder / "straight", STEPS)


def test_signals_to_any_rank_end_all_alike(run_processes, run, tmp_path):
    """SIGTERM to one rank in a step, Ctrl-C to the other in a validation, SIGUSR1 to both while they save, under SLURM,
    which starts the job again."""
    words = run(TWO, strategy="ddp")
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\nls killed/checkpoints >> {calls}\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    slurm = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "1234"}
    blows = [({"point": "step", "turn": 3, "signals": [signal.SIGTERM], "ranks": [1]}, 143, [], {}),
             ({"point": "validation", "turn": 2, "signals": [signal.SIGINT], "ranks": [0]}, 130, ["auto"], {}),
             ({"point": "save", "turn": 1, "signals": [signal.SIGUSR1], "ranks": [0, 1]}, 143, ["auto"], slurm)]
    steps = []
    for blow, code, wanted, env in blows:
        result = run_processes.run(*words, "killed", *(["--ckpt_path", *wanted] if wanted else []), ranks=TWO, strike=blow,
                          one=True, env=env, limit=60)
        assert result["codes"] == [code] * TWO, [output["err"][-1500:] for output in result["outputs"]]
        step = int((run_processes.folder / "killed" / "checkpoints" / "LATEST").read_text().removeprefix("step_"))
        assert f"stopped after step {step}" in result["outputs"][0]["err"]
        assert "resume with" in result["outputs"][0]["err"]
        assert result["outputs"][1]["err"] == ""
        steps.append(step)
    assert steps[0] < steps[1] == STEPS // 2 < steps[2] < STEPS
    assert calls.read_text().split()[-2:] == ["requeue", "1234"]
    assert f"step_{steps[2]}" in calls.read_text()
    again = run_processes.run(*words, "killed", ranks=TWO, env=slurm | {"SLURM_RESTART_COUNT": "1"})     # without --ckpt_path
    assert again["codes"] == [0] * TWO
    assert_same_end(run_processes.folder / "killed", run_processes.folder / "straight", STEPS)


def test_a_signal_before_the_first_step_ends_at_once(run_processes, run):
    words = run()
    result = run_processes.run(*words, "killed", strike={"point": "setup", "signals": [signal.SIGTERM], "ranks": [0]})
    assert result["codes"] == [143]
    assert "stopped before the first step; nothing was saved" in result["outputs"][0]["err"]
    assert not (run_processes.folder / "killed").exists()
    result = run_processes.run(*words, "killed", strike={"point": "step", "signals": [signal.SIGINT] * 2, "ranks": [0]})
    assert result["codes"] == [130]                   # the second press does not wait for the step
    assert not list((run_processes.folder / "killed").glob("checkpoints/step_*"))


@contextmanager
def launched(run_processes, tiny_model, strategy="ddp"):
    """The real command after it started its second rank and saved once: (process, pid of that rank, command)."""
    words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=TWO,
                                                 strategy=strategy, max_epochs=400, save_every=50))
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LIT_LLM_CACHE": str(run_processes.folder / "cache")}
    shutil.rmtree(run_processes.folder / "two", ignore_errors=True)
    with subprocess.Popen([sys.executable, "-m", "lit_llm", *words, "two"], cwd=run_processes.folder, env=environ, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            while process.poll() is None and not list((run_processes.folder / "two").glob("checkpoints/step_*[0-9]/manifest.json")):     # not one that is still written
                time.sleep(0.05)
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield process, int(child), words
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def assert_ends(pid):
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(200):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":      # a zombie: ended, but not waited for
            return
        time.sleep(0.05)
    pytest.fail("a rank is still there")


def test_a_signal_to_a_rank_that_lightning_started(run_processes, tiny_model):
    """The first rank must not take the end for a crash."""
    with launched(run_processes, tiny_model) as (process, child, words):
        os.kill(child, signal.SIGTERM)
        result = process.communicate(timeout=60)[1]
        assert process.returncode == 143, result[-2000:]
        assert f"{python()} -m lit_llm {' '.join(words)} two --ckpt_path last" in result
        assert_ends(child)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_does_not_leave_the_other_waiting(rank, run_processes, tiny_model):
    """As when memory runs out: the other rank ends as well, and prints which one died and how to resume, nothing else."""
    with launched(run_processes, tiny_model) as (process, child, words):
        os.kill([process.pid, child][rank], signal.SIGKILL)
        result = process.communicate(timeout=30)[1]               # until no rank has the pipe open
        assert_ends(child)
    assert process.returncode == [-signal.SIGKILL, 1][rank]
    died = ["rank 0 has ended", "rank 1 was ended by SIGKILL"][rank]
    assert result[result.index("error: "):].splitlines() == [
        f"error: the process of {died}, which ended the run",
        f"  resume with: {python()} -m lit_llm {' '.join(words)} two --ckpt_path last"], result[-3000:]
    assert "Traceback" not in result


@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_an_error_of_any_rank_is_reported_once(ranks, run_processes, tiny_model):
    words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), ranks=TWO))
    ended = run_processes.run(*words, f"refused_{len(ranks)}", ranks=TWO, strike={
        "ranks": ranks, "point": "step", "turn": 2, "says": "a file that only some see"})
    assert [ended["codes"][rank] for rank in ranks] == [2] * len(ranks)
    counts = [output["err"].count("error: a file that only some see") for output in ended["outputs"]]
    assert counts == ([0, 1] if ranks == [1] else [1, 0])


def test_the_resume_command_is_the_same_command(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="lit_llm.__main__"))
    monkeypatch.setattr(sys, "argv", ["x", "fit", "--config", "my run.yaml", "--ckpt_path", "best", "--trainer.max_steps=9"])
    assert resume_command() == f"{python()} -m lit_llm fit --config 'my run.yaml' --trainer.max_steps=9 --ckpt_path last"
    monkeypatch.setattr(sys, "argv", ["x", "fit", "--ckpt_path=auto"])
    assert resume_command() == f"{python()} -m lit_llm fit --ckpt_path last"


def test_a_step_that_is_measured_again_has_one_row(tmp_path):
    """A run was stopped in its last validation and repeats all of it; its row is already in the file."""
    first = MetricsCSV(tmp_path)
    first.log_metrics({"train/loss": 1.5, "epoch": 0}, 3)
    first.log_metrics({"val/nll": 2.5, "epoch": 0}, 3)
    for nll in (2.5, 2.25):
        again = MetricsCSV(tmp_path)
        again.resume(4)
        again.log_metrics({"val/nll": nll, "epoch": 0}, 3)
        (row,) = metrics_rows(tmp_path)
        assert (float(row["train/loss"]), float(row["val/nll"])) == (1.5, nll)


# ---- not finite ------------------------------------------------------------------------------------------------------

@pytest.fixture
def poisoned(tiny_model, run_processes):
    """A base in which one token is NaN, and data in which one record, line 7, has that token."""
    from safetensors.torch import load_file, save_file

    from lit_llm.text.tokenizer import Tokenizer

    folder = run_processes.folder / "poisoned"
    if not folder.exists():
        shutil.copytree(tiny_model("llama"), folder)
        weights = load_file(folder / "model.safetensors")
        (token,) = Tokenizer.load(str(folder)).encode_text("Q")
        weights["model.embed_tokens.weight"][token] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    data = run_processes.folder / "train.jsonl"
    write_data(run_processes.folder)
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[6] = json.dumps({"prompt": "say Q", "completion": "Q"})
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder), str(data)


@pytest.mark.parametrize("ranks", [1, TWO])
def test_a_step_that_is_not_finite_is_left_out(ranks, run_processes, poisoned):
    """By both ranks, although only one had it; its record is named, and no trained weight has changed."""
    words = write_config(run_processes.folder, config_of(*poisoned, ranks=ranks, strategy="ddp" if ranks > 1 else "auto",
                                                 save_every=1, keep_last=99, limit_val_batches=0))
    shutil.rmtree(run_processes.folder / "killed", ignore_errors=True)
    result = run_processes.run(*words, "killed", ranks=ranks)
    assert result["codes"] == [0] * ranks, result["outputs"][0]["err"][-2000:]
    rows = metrics_rows(run_processes.folder / "killed")
    (first, second) = [int(row["step"]) for row in rows if row["train/loss"] == "nan"]
    counts = {int(row["step"]): float(row["train/skipped_steps"]) for row in rows if "train/skipped_steps" in row}
    assert counts == {step: 1.0 + (step >= second) for step in range(first, STEPS + 1)}
    assert [line for line in result["outputs"][0]["err"].splitlines() if "skipped" in line] == [
        *(f"step {step} was skipped: its loss is not finite, at {poisoned[1]}:7" for step in (first, second)),
        "2 of 10 steps were skipped because they were not finite"]
    folders = run_processes.folder / "killed" / "checkpoints"
    before, after = (content(folders / f"step_{step}") for step in (second - 1, second))
    assert before.keys() == after.keys() >= {"state", "adapter/adapter_model.safetensors"}
    assert before["adapter/adapter_model.safetensors"] == after["adapter/adapter_model.safetensors"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(before["state"][part], after["state"][part]) == []
    moved = content(folders / f"step_{second + 1}") if second < STEPS else content(folders / f"step_{second - 2}")
    assert differences(after["state"]["state_dict"], moved["state"]["state_dict"])


@pytest.mark.parametrize(("strategy", "power"), [("auto", 20), ("deepspeed_stage_2", 18)])
def test_float16_that_overflows(strategy, power, run_processes, tiny_model):
    """Each such step is logged with its loss scale and changes neither weights nor the schedule; no number of them stops a run;
    and a resumed run continues with the same scale."""
    keys = float16(strategy, power)
    config = config_of(tiny_model("llama"), write_data(run_processes.folder), save_every=1, keep_last=99, limit_val_batches=0,
                       max_skipped_steps=1, gradient_clip_val=1.0, lora=False, **keys)
    words = write_config(run_processes.folder, config)
    for name in ("straight", "killed"):
        shutil.rmtree(run_processes.folder / name, ignore_errors=True)
    result = run_processes.run(*words, "straight")
    assert result["codes"] == [0], result["outputs"][0]["err"][-3000:]
    lines = [line for line in result["outputs"][0]["err"].splitlines() if "float16" in line]
    steps = [int(line.split()[1]) for line in lines]
    assert lines[0] == f"step 1 was skipped: its gradient overflowed in float16; the loss scale is now {2 ** (power - 1):,}"
    assert len(steps) < steps[-1] < STEPS               # it was raised and overflowed again
    rows = metrics_rows(run_processes.folder / "straight")
    counted = {int(row["step"]): float(row["train/skipped_steps"]) for row in rows}
    assert counted == {step: float(sum(other <= step for other in steps)) for step in range(1, STEPS + 1)}
    folders = run_processes.folder / "straight" / "checkpoints"
    for step in range(2, STEPS + 1):
        before, after = (content(folders / f"step_{number}") for number in (step - 1, step))
        same = before["model/model.safetensors"] == after["model/model.safetensors"]
        assert same == (step in steps)
        schedule = after.get("state") or after["state/checkpoint/mp_rank_00_model_states.pt"]
        assert schedule["lr_schedulers"][0]["last_epoch"] == step - sum(other <= step for other in steps)
    middle = steps[-1] - 1                              # the next one overflows, if the scale is the same
    shutil.copytree(run_processes.folder / "straight", run_processes.folder / "killed")
    for step in range(middle + 1, STEPS + 1):
        shutil.rmtree(run_processes.folder / "killed" / "checkpoints" / f"step_{step}")
    finish(run_processes, words, 1)
    assert_same_end(run_processes.folder / "killed", run_processes.folder / "straight", STEPS)


def test_float16_without_a_loss_scale_is_refused(run_processes, tiny_model):
    words = write_config(run_processes.folder, config_of(tiny_model("llama"), write_data(run_processes.folder), precision="16-true"))
    result = run_processes.run(*words, "killed")
    assert result["codes"] == [2]
    assert result["outputs"][0]["err"].count("set it to 16-mixed") == 1


def test_many_in_a_row_stop_the_run(run_processes, poisoned, tiny_model):
    """Exit code 2 and the way on; the last checkpoint is the one before."""
    base, data = poisoned
    lines = [json.dumps({"prompt": "say", "completion": "red"})] * 2 + [json.dumps({"prompt": "Q", "completion": "Q"})] * 8
    with open(data, "w", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
    words = write_config(run_processes.folder, config_of(base, data, save_every=1, limit_val_batches=0, max_skipped_steps=2))
    shutil.rmtree(run_processes.folder / "killed", ignore_errors=True)
    result = run_processes.run(*words, "killed")
    assert result["codes"] == [2]
    assert "2 consecutive steps had a non-finite loss or gradient" in result["outputs"][0]["err"]
    assert "Traceback" not in result["outputs"][0]["err"]
