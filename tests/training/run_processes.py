"""Real runs in forked processes that can be ended at will, and the comparison of two runs."""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lit_llm.report.rows import MEASURED

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("survival_probe.py")


class ForkServer:
    """Commands in processes that are forked from one that has imported everything; it starts at the first command."""

    def __init__(self):
        self.process = None

    def answer(self, order):
        """The answer of `survival_probe.py` to an order."""
        if self.process is None:
            environ = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "SLURM_", "MASTER_"))}
            environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1",
                        "DS_ACCELERATOR": "cpu"}
            self.process = subprocess.Popen([sys.executable, str(PROBE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            text=True, env=environ)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError("the probe ended")

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(30)


class RunProcesses:
    """Commands in a folder, with a token cache of its own."""

    def __init__(self, folder, fork_server):
        self.folder, self.fork_server = Path(folder), fork_server

    def run(self, *args, ranks=1, env=None, **order):
        """Run a command to its end: {"codes", "outputs", "seconds"}."""
        env = {"LIT_LLM_CACHE": str(self.folder / "cache")} | (env or {})
        order = {"args": [str(arg) for arg in args], "ranks": ranks, "cwd": str(self.folder), "env": env} | order
        return self.fork_server.answer(order)


def write_data(folder):
    """10 conversations of different lengths, each a sequence of its own."""
    words = ["red", "blue", "green", "kite", "hill", "one two three", "风筝", "Tom"]
    records = [{"prompt": f"say {words[at % 8]} {at}", "completion": f"{words[(at + 3) % 8]} {at}" * (1 + at % 3)}
               for at in range(10)]
    file = Path(folder) / "train.jsonl"
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(file)


def config_of(base, data, *, ranks=1, strategy="auto", lora=True, save_every=2, keep_last=1, **trainer):
    """A run of 2 epochs of 5 steps of 2 micro-batches, with dropout; validated after each epoch."""
    return {
        "model": {"base": base, "lora": {"r": 4, "dropout": 0.1} if lora else None, "lr": 1e-2},
        "data": {"sources": [{"path": data}], "val_sources": [{"path": data}], "seq_len": 128, "batch_size": 1,
                 "packing": "none"},
        "trainer": {"strategy": strategy, "accelerator": "cpu", "devices": ranks, "max_epochs": 2,
                    "accumulate_grad_batches": 2 // ranks, "log_every_n_steps": 1, "num_sanity_val_steps": 0,
                    "callbacks": [{"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint",
                                   "init_args": {"every_n_steps": save_every, "keep_last": keep_last}}]} | trainer}


def float16(strategy, power=18):
    """Keys of a run in float16 with an initial loss scale of 2**power, which is too large for some steps and is raised again
    after two good ones. On a CPU Lightning would use bfloat16, with the same scaler."""
    if strategy.startswith("deepspeed"):
        settings = {"stage": int(strategy[-1]), "initial_scale_power": power, "loss_scale_window": 2, "hysteresis": 1}
        return {"precision": "16-mixed",
                "strategy": {"class_path": "lit_llm.training.parallel.zero.ZeroStrategy", "init_args": settings}}
    scaler = {"device": "cpu", "init_scale": 2.0**power, "growth_interval": 2}
    return {"strategy": strategy, "plugins": [{"class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": {
        "precision": "16-mixed", "device": "cpu",
        "scaler": {"class_path": "torch.amp.GradScaler", "init_args": scaler}}}]}


def write_config(folder, config):
    (Path(folder) / "run.yaml").write_text(yaml.safe_dump(config))
    return ("fit", "--config", "run.yaml", "--trainer.default_root_dir")


def metrics_rows(run):
    with open(Path(run) / "metrics.csv", newline="") as handle:
        return [{key: value for key, value in row.items() if value != "" and key not in MEASURED}
                for row in csv.DictReader(handle)]


def content(folder):
    """The content of a checkpoint folder, with FSDP2's shards joined; without the wall clock and values measured by it."""
    entries = {}
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "manifest.json"):
        name = str(file.relative_to(folder))
        if file.suffix == ".pt" or file.name == "state":
            entries[name] = torch.load(file, weights_only=False, map_location="cpu")
        elif file.name == ".metadata":
            entries[name] = joined(file.parent)
            assert {"model", "optimizer"} <= entries[name].keys()
        elif file.suffix != ".distcp":                  # whose tensors `.metadata` leads to
            entries[name] = file.read_bytes()
    return entries


def joined(folder):
    """Weights and optimizer from all of torch's shards in a folder."""
    with tempfile.TemporaryDirectory() as place:
        dcp_to_torch_save(folder, Path(place, "joined.pt"))
        return torch.load(Path(place, "joined.pt"), weights_only=False)


def bits(tensor):
    """(bytes,) of a tensor: -0.0 is not 0.0, and a NaN is itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differences(one, other, path=""):
    """Paths at which two nested structures are not bit-identical."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        same = type(one) is type(other) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return [] if same and torch.equal(bits(one), bits(other)) else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        paths = [f"{path}/{key} is in one only" for key in one.keys() ^ other.keys()]
        return paths + [line for key in one.keys() & other.keys() for line in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [line for at, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{path}/{at}")]
    if type(one) is type(other) and type(one).__module__.startswith(("deepspeed", "torch")) and hasattr(one, "__dict__"):
        return differences(vars(one), vars(other), path)
    return [] if one == other else [f"{path}: {str(one)[:60]} and {str(other)[:60]}"]


def assert_same_end(run, straight, step, but=()):
    """Metrics, weights, optimizer, schedule, generators, place in the data: all of the last checkpoint.

    Only where a signal fell into the very last validation, what is kept of that one may differ.
    """
    assert metrics_rows(run) == metrics_rows(straight)
    actual, expected = (content(Path(folder) / "checkpoints" / f"step_{step}") for folder in (run, straight))
    assert actual
    assert [line for line in differences(actual, expected) if not any(word in line for word in but)] == []
