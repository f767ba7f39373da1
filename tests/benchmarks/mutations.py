"""Run the command with invalid values for every leaf of every shipped config and for every key.

    python -m tests.benchmarks.mutations --out /tmp/mutations

Real commands run in processes forked from one that has imported everything: `fit` of one step on a tiny model, with
validation and export. Required of each: exit code 0 or 2, no traceback, at most `--limit` seconds. Accepted values are
printed for review.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing.process
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from tests import mutations

PROCESSES = 40                                      # a command that starts more of them is ended
ROWS = [{"prompt": f"say {number}", "completion": f"one two {number}"} for number in range(12)]
INIT = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
SMALL: dict[str, Any] = {
    "model": {"base": "BASE", "lora": {"r": 2, "alpha": 2}},
    "data": {"sources": [{"path": "good.jsonl"}], "val_sources": [{"path": "good.jsonl"}], "seq_len": 64,
             "batch_size": 2},
    "trainer": {"strategy": "auto", "accelerator": "cpu", "devices": 1, "precision": "32-true", "max_steps": 1,
                "max_epochs": None, "default_root_dir": "run", "log_every_n_steps": 1, "threads": 1}}
RANDOM: dict[str, Any] = {"model": {"base": None, "init": INIT, "lora": None}, "data": {"tokenizer": "sample:base",
                                                                                       "packing": "best_fit"}}
SLOW = {"selftest", "verify-resume", "model.compile", "data.streaming"}   # several runs, a compiler, a filled buffer
EXECUTABLE = str(mutations.ROOT / "lit_llm" / "__main__.py")


def configs(base: str) -> list[tuple[str, dict[str, Any]]]:
    """Each shipped config, made small, in files that are there."""
    out = []
    for path in mutations.CONFIGS:
        whole = yaml.safe_load(path.read_text())
        small = mutations.merged(SMALL, {})
        small["model"] = small["model"] | {"base": base}
        if (whole.get("model") or {}).get("init"):
            small = mutations.merged(small, RANDOM)
        out.append((path.name, mutations.merged(whole, small)))
    return out


def cases(base: str) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(config, key, value, the config with it): each pair of key and value once for each kind of run."""
    seen, out = set(), []
    small = mutations.merged(SMALL, {"model": {"base": base}})
    for name, config in configs(base):
        whole = yaml.safe_load(next(path for path in mutations.CONFIGS if path.name == name).read_text())
        family = "random" if (config.get("model") or {}).get("init") else "base"
        for place in mutations.leaves(whole):
            for value in mutations.VALUES:
                key = ".".join(str(part) for part in place)
                if (family, key, value) not in seen:
                    seen.add((family, key, value))
                    out.append((name, key, value, mutations.with_value(config, place, mutations.value_of(value))))
    for key, (beside, place) in mutations.schema().items():
        for value in mutations.VALUES:
            if ("base", ".".join(str(part) for part in place), value) not in seen or beside:
                config = mutations.merged(small, beside)
                out.append(("schema", key, value, mutations.with_value(config, place, mutations.value_of(value))))
    return out


def other_verbs(base: str, run: str) -> list[tuple[str, str, str, list[str]]]:
    """(verb, option, value, words) of the verbs that have options of their own."""
    options = {
        "validate": ("ckpt_path", "weights_only", "verbose"), "test": ("ckpt_path",), "fit": ("ckpt_path", "weights_only"),
        "inspect": ("rows", "characters", "html"), "plan": ("memory", "device", "probe", "json"),
        "verify-resume": ("steps",), "selftest": ("processes",), "export": ("run", "checkpoint", "out", "dtype", "base"),
        "chat": ("model", "prompt", "system", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "adapter",
                 "device", "dtype", "template_args", "threads")}
    must = {"export": ["--run", run], "chat": ["--model", base, "--prompt", "hi", "--max_tokens", "4"]}
    out = []
    for verb, names in options.items():
        for name in names:
            for value, text in mutations.VALUES.items():
                if value == "nul" or (value == "long" and name in ("prompt", "system", "stop")):
                    continue                            # a command line cannot contain NUL
                arguments = [word for word in must.get(verb, ["--config", "run.yaml"])]
                if f"--{name}" in arguments:
                    at = arguments.index(f"--{name}")
                    del arguments[at:at + 2]
                text = str(yaml.safe_load(text)) if text.startswith('"') else text
                out.append((verb, name, value, [verb, *arguments, f"--{name}={text}"]))
    flags = {"name", "host", "port", "api-key", "device", "dtype", "threads", "adapter", "max-running", "max-waiting",
             "max-body-bytes", "drain-seconds", "log-level", "model"}
    for name in sorted(flags):
        for value, text in mutations.VALUES.items():
            if value != "nul":
                text = str(yaml.safe_load(text)) if text.startswith('"') else text
                arguments = [] if name == "model" else ["--model", base]
                out.append(("serve", name, value, ["serve", *arguments, f"--{name}={text}"]))
    return out


# ---- one command in a fork -------------------------------------------------------------------------------------------

def _guard() -> None:
    """End a command that would take the machine: memory, or processes without end."""
    most = 24 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    count, popen, start = [0], subprocess.Popen.__init__, multiprocessing.process.BaseProcess.start

    def counted(inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > PROCESSES:
                print("Traceback: starts more and more processes", file=sys.stderr, flush=True)
                os._exit(99)
            return inner(*args, **kwargs)
        return call

    subprocess.Popen.__init__ = counted(popen)  # type: ignore[method-assign]
    multiprocessing.process.BaseProcess.start = counted(start)  # type: ignore[method-assign]


def child(folder: Path, words: list[str]) -> None:
    """The command; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        _guard()
        sys.argv, sys.modules["__main__"].__spec__ = [EXECUTABLE, *words], None
        if words[0] == "serve":
            from serve.__main__ import _build, parse

            code = _served(_build, parse(words[1:]))
        else:
            from lit_llm.cli.main import main

            main(words)
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _served(build: Any, options: Any) -> int:
    """What `serve` does before it listens."""
    from lit_llm.errors import InputError

    try:
        build(options)
    except (InputError, OSError) as error:          # as `serve` itself tells them
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Sweep:
    """Runs commands in forks, some at a time."""

    def __init__(self, home: Path, limit: float, at_once: int) -> None:
        self.home, self.limit, self.at_once = home, limit, at_once
        self.results: list[dict[str, Any]] = []
        self.living: dict[int, tuple[float, Path, dict[str, Any]]] = {}
        self.number = 0

    def go(self, about: dict[str, Any], words: list[str], config: dict[str, Any] | None) -> None:
        """Start one; waits until there is room."""
        while len(self.living) >= self.at_once:
            self.reap()
        folder = self.home / f"case{self.number}"
        self.number += 1
        folder.mkdir(parents=True)
        (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        if config is not None:
            (folder / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=False))
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            child(folder, words)
        self.living[pid] = time.monotonic(), folder, about

    def reap(self) -> None:
        """Look for one that has ended, and end those that take too long."""
        for pid, (begun, folder, about) in list(self.living.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - begun > self.limit * (4 if {about["config"], about.get("key")} & SLOW else 1)
            if not done and late:
                try:
                    os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0)
            if done:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)          # its own children
                err, out = ((folder / name).read_text(errors="replace") if (folder / name).exists() else ""
                            for name in ("err.txt", "out.txt"))
                code = os.waitstatus_to_exitcode(status)
                kind = ("late" if late else "traceback" if code not in (0, 2) or "Traceback" in err
                        else "refused" if code else "accepted")
                lines = [line for line in err.splitlines() if line.strip()]
                self.results.append(about | {"kind": kind, "code": code, "seconds": round(time.monotonic() - begun, 2),
                                             "said": "\n".join(lines[-3:])[-600:],
                                             "nan": "nan" in out.lower().split() or " nan " in out})
                shutil.rmtree(folder, ignore_errors=True)
                del self.living[pid]
                return
        time.sleep(0.01)

    def finish(self) -> None:
        """Wait for all."""
        while self.living:
            self.reap()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="/tmp/mutations")
    parser.add_argument("--limit", type=float, default=30)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--only", default="", help="keys that contain this")
    parser.add_argument("--verbs", default="fit,others")
    parser.add_argument("--every", type=int, default=1, help="take one case of so many")
    parser.add_argument("--first", type=int, default=0, help="begin with this one")
    options = parser.parse_args()
    home = Path(options.out)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    os.environ |= {"LIT_LLM_CACHE": str(home / "cache"), "DS_ACCELERATOR": "cpu", "NO_COLOR": "1",
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lit_llm.cli.runs
    import lit_llm.exports.command
    import lit_llm.training.trainer  # noqa: F401
    import serve.server  # noqa: F401

    torch.set_num_threads(1)
    sweep = Sweep(home, options.limit, options.at_once)
    first = mutations.merged(mutations.merged(SMALL, RANDOM), {"trainer": {"default_root_dir": str(home / "made")}})
    sweep.go({"config": "first"}, ["fit", "--config", "run.yaml"], first)
    sweep.finish()
    assert sweep.results.pop()["kind"] == "accepted"
    run = str(home / "made")
    base = f"{run}/export"
    config = mutations.merged(SMALL, {"model": {"base": base}})
    begun = time.monotonic()
    every = cases(base) if "fit" in options.verbs else []
    others = other_verbs(base, run) if "others" in options.verbs else []
    for number, (name, key, value, made) in enumerate(every):
        if options.only in key and number % options.every == options.first:
            sweep.go({"config": name, "key": key, "value": value}, ["fit", "--config", "run.yaml"], made)
    for number, (verb, key, value, words) in enumerate(others):
        if options.only in key and number % options.every == options.first:
            sweep.go({"config": verb, "key": key, "value": value}, words, config)
    sweep.finish()
    with open(home / "results.jsonl", "w") as file:
        file.writelines(json.dumps(result) + "\n" for result in sweep.results)
    report(sweep.results, time.monotonic() - begun)


def report(results: list[dict[str, Any]], seconds: float) -> None:
    """The counts, and each case that is not as wanted."""
    kinds = collections.Counter(result["kind"] for result in results)
    print(f"{len({(r['config'], r['key']) for r in results})} keys, {len(results)} commands in {seconds:,.0f} s: "
          + ", ".join(f"{kinds[kind]} {kind}" for kind in ("accepted", "refused", "traceback", "late")))
    for result in results:
        if result["kind"] in ("traceback", "late") or result["nan"]:
            print(f"{result['kind']} {result['config']} {result['key']}: {result['value']} (code {result['code']}, "
                  f"{result['seconds']} s): {result['said'].splitlines()[-1][:200] if result['said'] else ''}")
    accepted: dict[str, list[str]] = {}
    for result in results:
        if result["kind"] == "accepted":
            accepted.setdefault(result["key"], []).append(result["value"])
    for key, values in accepted.items():
        print(f"accepted {key}: {', '.join(dict.fromkeys(values))}")


if __name__ == "__main__":
    main()
