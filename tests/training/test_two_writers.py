"""If this breaks: two runs write into one folder: the second moves the first one's folder away, or their checkpoints mix, and
both end without an error; or a folder stays locked by a killed run.

Real processes; the first of them is killed with -9 at the end.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_processes import ROOT, config_of, write_config, write_data

from lit_llm.system import lock
from lit_llm.system.lock import NAME, Lock
from lit_llm.training.run import manifest


@contextmanager
def running(folder, *words):
    """A command in a process group of its own, which is killed in the end."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LIT_LLM_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, "-m", "lit_llm", *map(str, words)], cwd=folder, env=environ, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def saved(run, beyond=0):
    """Wait for a checkpoint after a step; returns its step."""
    for _ in range(1200):
        steps = [manifest.step_of(path.parent.name) for path in run.glob("checkpoints/step_*/manifest.json")]
        if steps and max(steps) > beyond:
            return max(steps)
        time.sleep(0.05)
    raise AssertionError("nothing was saved")


def test_a_second_run_is_refused_with_the_name_of_the_first(run_processes, tiny_model):
    """A new run and a resumed one; the first is not affected. When it is killed, the next one can resume at once."""
    run = run_processes.folder / "run"
    words = write_config(run_processes.folder, config_of(
        tiny_model("llama"), write_data(run_processes.folder), ranks=2, strategy="ddp",
        max_epochs=4000, save_every=10, limit_val_batches=0))
    with running(run_processes.folder, *words, run) as first:
        step = saved(run)
        for more in ([], ["--ckpt_path", "last"]):
            result = run_processes.run(*words, run, *more, ranks=2, limit=100)
            stderr = "".join(output["err"] for output in result["outputs"])
            assert result["codes"] == [2] * 2, stderr[-2000:]
            assert "Traceback" not in stderr
            (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert f"{run} is being written by process {first.pid} on {socket.gethostname()}, since 20" in error
        assert first.poll() is None
        assert not list(run_processes.folder.glob("run-*"))
        saved(run, step)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    step = saved(run)
    result = run_processes.run(*words, run, "--ckpt_path", "last", "--trainer.max_epochs", "null", "--trainer.max_steps", step + 3,
                      ranks=2, limit=100)
    assert result["codes"] == [0] * 2, result["outputs"][0]["err"][-2000:]
    assert not (run / NAME).exists()


@pytest.mark.parametrize("how", ["new", "last", "over an earlier one"])
def test_of_two_simultaneous_starts_one_continues(how, run_processes, tiny_model):
    config = config_of(tiny_model("llama"), write_data(run_processes.folder), save_every=10, limit_val_batches=0, max_epochs=4000)
    words, run = write_config(run_processes.folder, config), run_processes.folder / how.replace(" ", "_")
    if how != "new":
        result = run_processes.run(*words, run, "--trainer.max_epochs", "null", "--trainer.max_steps", 4)
        assert result["codes"] == [0], result["outputs"][0]["err"][-2000:]
    more = ["--ckpt_path", "last"] if how == "last" else []
    with running(run_processes.folder, *words, run, *more) as one, running(run_processes.folder, *words, run, *more) as other:
        while one.poll() is None and other.poll() is None:
            time.sleep(0.05)
        lost, goes_on = (one, other) if one.poll() is not None else (other, one)
        stderr = lost.stderr.read()
        assert lost.returncode == 2, stderr[-2000:]
        assert f"is being written by process {goes_on.pid} on" in stderr
        assert "Traceback" not in stderr
        saved(run, 4)
        assert goes_on.poll() is None


# ---- Windows: its code, with a locked byte of this system in place of msvcrt's

MSVCRT = """
import fcntl, os
LK_NBLCK = 2
def locking(number, mode, size):
    assert mode == LK_NBLCK
    reads = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY        # Windows also locks such a file
    kind = fcntl.LOCK_SH if reads else fcntl.LOCK_EX
    fcntl.lockf(number, kind | fcntl.LOCK_NB, size, os.lseek(number, 0, os.SEEK_CUR))
"""


def test_the_code_for_windows_locks_a_byte_behind_the_text(tmp_path, monkeypatch):
    """It refuses a second process with the name of the first, leaves the text readable, and ends with its process."""
    (tmp_path / "msvcrt.py").write_text(MSVCRT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lock, "lock_file", lock.lock_on_windows)
    monkeypatch.setattr(lock, "WINDOWS", True)
    file = tmp_path / NAME
    code = ("import sys, time\nfrom pathlib import Path\nfrom lit_llm.system import lock\n"
            "lock.lock_file, lock.WINDOWS, mine = lock.lock_on_windows, True, lock.Lock()\n"
            "assert mine.take(Path(sys.argv[1]), 'x') is None\nprint('taken', flush=True)\ntime.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}) as other:
        assert other.stdout.readline() == "taken\n"
        assert json.loads(file.read_text())["pid"] == other.pid
        assert file.stat().st_size < 1000
        assert lock.is_held(file)
        assert f"is being written by process {other.pid} on {socket.gethostname()}" in str(Lock().take(file, "x"))
        with file.open("r+") as handle:             # the text itself is not locked
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, lock.BEYOND)
        other.kill()
        other.wait()
    assert not lock.is_held(file)
    mine = Lock()
    assert mine.take(file, "x") is None
    assert json.loads(file.read_text())["pid"] == os.getpid()
    mine.release()
    assert not file.exists()


def test_on_windows_no_process_is_asked_with_a_signal(no_locks, tmp_path, monkeypatch):
    """`os.kill(pid, 0)` would end it there; a process of this machine is assumed to be alive instead."""
    left(tmp_path / NAME, pid=4194303)
    monkeypatch.setattr(lock, "WINDOWS", True)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    assert "process 4194303 on" in str(Lock().take(tmp_path / NAME, "x"))


# ---- file systems without locks --------------------------------------------------------------------------------------

@pytest.fixture
def no_locks(monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def left(file, **keys):
    """What another process left in the lock's file."""
    mine = Lock()
    assert mine.take(file, "x") is None
    holder = json.loads(file.read_text()) | keys
    file.write_text(json.dumps(holder))


@pytest.mark.parametrize(("keys", "env", "is_held"), [
    ({"pid": 1, "began": None}, {}, False),         # another process has the number by now
    ({"pid": 4194303}, {}, False), ({"host": "elsewhere"}, {}, True),
    ({"host": "elsewhere", "job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
    ({"host": "elsewhere", "job": "7"}, {"SLURM_JOB_ID": "7"}, True),
    ({"host": "elsewhere", "job": "6"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True)])
def test_without_locks_the_file_says_who_is_alive(keys, env, is_held, no_locks, monkeypatch, tmp_path):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    left(tmp_path / NAME, **keys)
    refusal = Lock().take(tmp_path / NAME, "x")
    assert (refusal is not None) == is_held
    if refusal is not None:
        assert f"delete {tmp_path / NAME}" in str(refusal)


def test_without_locks_a_living_process_of_this_machine_holds_it(no_locks, tmp_path):
    stat = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    left(tmp_path / NAME, pid=os.getppid(), began=stat)
    assert f"process {os.getppid()} on" in str(Lock().take(tmp_path / NAME, "x"))


@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 100])
def test_a_damaged_file_without_a_lock_holds_nothing(text, tmp_path):
    (tmp_path / NAME).write_text(text)
    mine = Lock()
    assert mine.take(tmp_path / NAME, "x") is None
    assert mine.take(tmp_path / NAME, "x") is None  # twice is once
    mine.release()
    assert not (tmp_path / NAME).exists()


def test_an_export_that_another_process_writes_is_refused(tmp_path):
    """Until that process has ended in any way; the lock leaves no files behind."""
    import short_runs

    from lit_llm import InputError, LoRA
    from lit_llm.exports.command import export

    (tmp_path / "chats.jsonl").write_text('{"prompt": "say one", "completion": "one"}\n' * 4)
    short_runs.fit(tmp_path, tokenizer="sample:base", passes=1, steps=1, lora=LoRA(r=2))
    code = ("import sys, time\nfrom pathlib import Path\nfrom lit_llm.system.lock import Lock\nlock = Lock()\n"
            "assert lock.take(Path(sys.argv[1]), 'out') is None\nprint('taken', flush=True)\ntime.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run/.export.lock")], stdout=subprocess.PIPE,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(InputError, match=f"run/export is being written by process {other.pid} on "):
            export(str(tmp_path / "run"))
        assert not (tmp_path / "run/export").exists()
        other.kill()
    assert export(str(tmp_path / "run")) == tmp_path / "run/export"
    assert not list((tmp_path / "run").glob(".*lock*"))
