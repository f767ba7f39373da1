"""Prove with a run's own config that it resumes exactly and that its gradient is right.

Everything runs in temporary folders and separate processes (`trial.py`); the run's folder is not changed.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lit_llm.errors import InputError
from lit_llm.report.rows import MEASURED, rows_of
from lit_llm.training.parallel import safe_load
from lit_llm.training.planning import trial
from lit_llm.training.run import manifest

EXACT = 1e-5                                        # relative difference of float32 gradients: order of sums
ROUGH = 3e-2                                        # of 16-bit gradients: rounding


# ---- resume ----------------------------------------------------------------------------------------------------------

def verify_resume(config: dict[str, Any] | None, steps: int = 4) -> bool:
    """Whether a run that is killed in the middle and resumed ends like an uninterrupted run.

    The second run starts from the state of the first when its middle checkpoint was complete and nothing later existed,
    as after a kill -9.

    Args:
        config: Config of the run.
        steps: Optimizer steps, at least 2.

    Raises:
        InputError: The run itself fails.
    """
    if steps < 2:
        raise InputError(f"{steps} steps cannot be interrupted in the middle; use 2 or more", where="steps")
    middle = steps // 2
    saves = {"class_path": "lit_llm.training.run.checkpoint.StepCheckpoint",
             "init_args": {"every_n_steps": middle, "keep_last": steps + 1}}
    with tempfile.TemporaryDirectory(prefix="lit_llm-") as name:
        straight, resumed = Path(name) / "straight", Path(name) / "resumed"
        trial.fit(config, straight, trial.Quiet(), more=[saves], trainer__max_steps=steps)
        shutil.copytree(straight, resumed)
        for folder in manifest.folders(resumed):
            if manifest.step_of(folder.name) > middle:
                shutil.rmtree(folder)
        (resumed / "checkpoints" / "LATEST").write_text(f"step_{middle}\n", encoding="utf-8")
        trial.fit(config, resumed, trial.Quiet(), ["--ckpt_path", "last"], more=[saves], trainer__max_steps=steps)
        pairs: dict[str, Any] = {"logged losses": (_rows(straight), _rows(resumed))}
        ends = [_content(folder / "checkpoints" / f"step_{steps}") for folder in (straight, resumed)]
    pairs |= {part: (ends[0][part], ends[1].get(part)) for part in ends[0]}
    print(f"{steps} steps in one process, compared with {middle} steps and {steps - middle} more in a new process")
    return all([_same(part, *pair) for part, pair in pairs.items()])


def _rows(run: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if value and key not in MEASURED}
            for row in rows_of(run / "metrics.csv")]


def _content(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint by category; all files were written by our own child processes."""
    content: dict[str, Any] = {"weights": {}, "optimizer": {}, "schedule, generators, place in the data": {}}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            content["weights"][name] = file.read_bytes()
        elif file.name == ".metadata":              # FSDP2's: the shards of all processes
            shards = _joined(file.parent)
            content["weights"][name], content["optimizer"][name] = shards["model"], shards.get("optimizer", {})
        elif file.suffix == ".pt" or file.name == "state":
            with safe_load.data_only():
                state = torch.load(file, weights_only=False, map_location="cpu")    # DeepSpeed keeps objects there
            is_optimizer = "optim" in file.name
            part = {key: state.pop(key) for key in ("optimizer_states", "optimizer") if key in state}
            content["optimizer"][name] = state if is_optimizer else part
            if not is_optimizer:
                content["schedule, generators, place in the data"][name] = state
    return {part: entries for part, entries in content.items() if entries}


def _joined(folder: Path) -> dict[str, Any]:
    """The unsharded content of a distributed checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory(prefix="lit_llm-") as name, safe_load.data_only():
        dcp_to_torch_save(folder, file := Path(name) / "joined.pt")
        content: dict[str, Any] = torch.load(file)
    return content


def _same(part: str, one: object, other: object) -> bool:
    apart = _differences(one, other)
    print(f"{'FAIL' if apart or not one else 'PASS'}  {part}: " + (
        "bit-identical" if one and not apart else
        f"{len(apart)} differ, first {apart[0]}" if apart else "nothing to compare"))
    return bool(one) and not apart


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nested structures are not bit-identical."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        same = type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        alone = [f"{path}/{key}" for key in one.keys() ^ other.keys()]
        return alone + [line for key in one.keys() & other.keys()
                        for line in _differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [line for at, pair in enumerate(zip(one, other, strict=True))
                for line in _differences(*pair, f"{path}/{at}")]
    if type(one).__module__.startswith(("deepspeed", "torch")) and hasattr(one, "__dict__"):
        return _differences(vars(one), vars(other), path)
    return [] if one == other or type(one).__module__.startswith(("deepspeed", "torch")) else [path]


# ---- gradient --------------------------------------------------------------------------------------------------------

def selftest(config: dict[str, Any] | None, data: Any, *, devices: int, processes: int) -> bool:
    """Whether the gradient of a step is independent of micro-batches, packing and the number of processes.

    Args:
        config: Config of the run.
        data: Datamodule of the run, for the size of a micro-batch.
        devices: Number of processes of the run.
        processes: Number of processes to compare with one; 1 skips the comparison.

    Raises:
        InputError: The run itself fails.
    """
    size = max(2, data.batch_size)
    rows, many = size * devices, max(devices, processes)
    quiet: dict[str, Any] = {"trainer__max_steps": 1, "trainer__enable_checkpointing": False,
                             "model__neftune_alpha": None, "data__streaming": False}
    peft = ((config or {}).get("model") or {}).get("peft")
    if peft and "lora_dropout" in (peft.get("init_args") or {}):
        quiet["model__peft__init_args__lora_dropout"] = 0.0
    ways: list[tuple[str, int, int, bool]] = [
        (f"{rows} packed sequences, {size} at a time", size, devices, False),
        (f"{rows} packed sequences, 1 at a time", 1, devices, False)]
    if data.packing == "best_fit":
        ways.append(("their conversations and documents, without packing", size, devices, True))
    if many > 1:
        ways.append((f"{rows} packed sequences, in {1 if devices > 1 else many} process(es)", max(1, size // 2),
                     1 if devices > 1 else many, False))
    half = str(((config or {}).get("trainer") or {}).get("precision")).startswith(("bf16", "16"))
    limit, fine, first = ROUGH if half else EXACT, True, None
    with tempfile.TemporaryDirectory(prefix="lit_llm-") as folder:
        for number, (say, batch, ranks, apart) in enumerate(ways):
            file = Path(folder) / f"{number}.pt"
            trial.fit(config, Path(folder) / str(number), trial.Gradient(str(file), rows, apart),
                      data__batch_size=batch, trainer__devices=ranks, **quiet)
            gradient = torch.load(file, weights_only=True)
            if first is None:
                first = gradient
                print(f"      gradient of {sum(part.numel() for part in first.values()):,} weights: {say}")
                continue
            apart_by = distance(gradient, first)
            fine &= apart_by < limit
            print(f"{'PASS' if apart_by < limit else 'FAIL'}  differs by {apart_by:.1e} (below {limit:g}): {say}")
    if half:
        print("      computed in 16 bits; --trainer.precision 32-true shows it without rounding")
    return fine


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other| / |other| over all weights; infinite if the weights differ in name."""
    norm = sum(float(part.double().square().sum()) for part in other.values())
    if one.keys() != other.keys() or not norm:
        return float("inf")
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return float((apart / norm) ** 0.5)
