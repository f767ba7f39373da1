"""Run `python -m lit_llm` in processes forked from one that has imported everything, and kill or signal them.

Started by `run_processes.py`; reads one JSON order per line and answers with one. An order: {"args": [...], "ranks": 1,
"cwd", "env", "environ": all variables instead, "stdin": a text, "logs": folder of the output if it is not "cwd",
"strike": {"ranks": [0], "signals": [9], and "point": "...", "turn": 1, or "after": seconds}}. Points are named
below; a process signals itself there, within the product's own code, which is not changed for it. After a kill -9 every rank
is killed, as when the machine fails, unless the order has "one": true. With "says" the process refuses its input there, with
"full" the write fails there as on a full disk. "agent": true ends the other ranks if one ended with an error, as torchrun
does.
"""

import errno
import functools
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

POINTS = {                                          # name -> module, attribute, whether before or after it
    "setup": ("lit_llm.training.module", "CausalLMModule.configure_model", "before"),
    "folder": ("lit_llm.training.run.run_folder", "_set_aside", "after"),
    "step": ("lit_llm.training.module", "CausalLMModule.training_step", "before"),
    "backward": ("lit_llm.training.module", "CausalLMModule.training_step", "after"),
    "data": ("lit_llm.data.rows.loader", "RowLoader.batch", "before"),
    "validation": ("lit_llm.training.module", "CausalLMModule.validation_step", "before"),
    "row": ("lit_llm.training.run.report", "MetricsCSV.log_metrics", "before"),
    "save": ("lit_llm.training.run.checkpoint", "StepCheckpoint.save", "before"),
    "state": ("lightning.pytorch", "Trainer.save_checkpoint", "after"),
    "weights": ("lit_llm.training.run.checkpoint", "StepCheckpoint._write_weights", "after"),
    "manifest": ("lit_llm.training.run.manifest", "write", "after"),
    "rename": ("lit_llm.disk", "replace_folder", "after"),
    "pointer": ("lit_llm.training.run.checkpoint", "StepCheckpoint._point_and_prune", "after"),
    "prune": ("pathlib", "Path.unlink", "after"),
    "set aside": ("pathlib", "Path.rename", "before"),
    "export": ("lit_llm.cli.runs", "finish", "before"),
    "engine folder": ("deepspeed.runtime.checkpoint_engine.checkpoint_engine", "CheckpointEngine.makedirs", "before"),
    "engine scripts": ("deepspeed.runtime.engine", "DeepSpeedEngine._copy_recovery_script", "before"),
    "zero written": ("lit_llm.training.parallel.zero", "ZeroStrategy.save_checkpoint", "after"),
    "shards written": ("lit_llm.training.parallel.fsdp", "Fsdp2Strategy.save_checkpoint", "after"),
}


def arm(strike):
    """Send the signals to this very process when it comes to the point for the nth time."""
    module, path, when = POINTS[strike["point"]]
    *owner, name = path.split(".")
    holder = functools.reduce(getattr, owner, importlib.import_module(module))
    raw = holder.__dict__[name] if isinstance(holder, type) else getattr(holder, name)
    inner, seen = getattr(raw, "__func__", raw), [0]

    def now():
        seen[0] += 1
        if seen[0] == strike.get("turn", 1):
            for number in strike.get("signals", ()):
                os.kill(os.getpid(), number)
            if "says" in strike:
                from lit_llm.errors import InputError

                raise InputError(strike["says"])
            if strike.get("full"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @functools.wraps(inner)
    def struck(*args, **kwargs):
        if when == "before":
            now()
        result = inner(*args, **kwargs)
        if when == "after":
            now()
        return result

    setattr(holder, name, staticmethod(struck) if isinstance(raw, staticmethod) else struck)


def live(order, rank, port):
    """One rank's life, in a fork; never returns."""
    os.setpgid(0, 0)
    os.chdir(order["cwd"])
    logs = Path(order.get("logs", order["cwd"]))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{name}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if "stdin" in order:
        (logs / "in.txt").write_text(order["stdin"])
        os.dup2(os.open(logs / "in.txt", os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8")      # noqa: SIM115
    if "environ" in order:
        os.environ.clear()
        os.environ.update(order["environ"])
    os.environ.update(order.get("env", {}))
    if order["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["ranks"]), GROUP_RANK="0",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="probe")
    code = 0
    try:
        strike = order.get("strike", {})
        if "point" in strike and rank in strike["ranks"]:
            arm(strike)
        sys.argv, sys.path[0] = ["lit_llm", *order["args"]], order["cwd"]
        from lit_llm.cli.main import main

        main(order["args"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def obey(order):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if pid == 0:
            live(order, rank, port)
        pids.append(pid)
    strike, codes, begun = order.get("strike", {}), {}, time.monotonic()
    signalled_at = None
    due = begun + strike["after"] if "after" in strike else None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        alive = [pid for pid in pids if pid not in codes]
        now = time.monotonic()
        if due is not None and now > due:
            due = None
            for rank in strike["ranks"]:
                for number in strike["signals"]:
                    if pids[rank] in alive:
                        os.kill(pids[rank], number)
        if (-signal.SIGKILL in codes.values() and not order.get("one")) or now - begun > order.get("limit", 90):
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        if order.get("agent") and alive and any(codes.values()):
            signalled_at = signalled_at or now
            if now - signalled_at > 0.1:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL if now - signalled_at > 30 else signal.SIGTERM)
                signalled_at += 5
        time.sleep(0.01)
    outputs = [{name: Path(order.get("logs", order["cwd"]), f"{name}{rank}.txt").read_text() for name in ("out", "err")}
            for rank in range(order["ranks"])]
    return {"codes": [codes[pid] for pid in pids], "seconds": time.monotonic() - begun, "outputs": outputs}


def main():
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    import lit_llm.cli.runs
    import lit_llm.exports.command
    import lit_llm.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    CPU_Accelerator.is_fp16_supported = lambda self: True       # it wants a CPU that is quick at it; all can do it
    for line in sys.stdin:
        print("answer " + json.dumps(obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
