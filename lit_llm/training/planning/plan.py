"""Plan a run before it begins: parameters, tokens, steps, FLOPs, memory, disk, and what would fit.

`footprint.py` estimates memory, `estimate.py` has the formulas, and `trial.py` measures a probe.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_llm.training.planning import devices, estimate, footprint, trial
from lit_llm.training.planning.devices import Device
from lit_llm.training.planning.estimate import Counts, Memory, Option, Setting

if TYPE_CHECKING:
    from lightning import Trainer


GIB, MIB = 2**30, 2**20
NAMES = {0: "plain", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}        # DDP is plain, FSDP2 is as ZeRO-3


@dataclass(frozen=True, slots=True)
class Probe:
    """Measurements of two steps.

    Args:
        seconds_per_step: Seconds per optimizer step.
        tokens_per_second: Tokens per second of all devices.
        seconds: Duration of the whole run at that speed, without validation; null if its end is unknown.
        peak_bytes: Peak bytes that torch allocated on the first device.
        resident_bytes: Peak resident bytes of the first process, including libraries.
    """

    seconds_per_step: float
    tokens_per_second: float
    seconds: float | None
    peak_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Pace:
    """Estimated speed of a run, from its FLOPs and an assumed utilisation of its devices.

    Args:
        tokens_per_second: Tokens per second of all devices, without communication.
        hours: Duration of the whole run; null if its end is unknown.
    """

    tokens_per_second: float
    hours: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The cost of a run.

    Args:
        counts: Counts of the model.
        setting: Settings of the run.
        tokens: Tokens per epoch.
        supervised: Supervised tokens per epoch.
        steps: Steps per epoch; null for a stream.
        steps_in_run: Steps of the run; null if no number of steps or epochs ends it.
        tokens_in_run: Tokens of the run; null likewise.
        flops_per_token: See `estimate.flops_per_token`.
        flops_in_run: FLOPs of the run; null if its tokens are unknown.
        memory: Memory for each ZeRO stage that the number of devices allows; 0 is plain.
        room: Usable bytes of a device.
        device: The planned device.
        pace: Speed on that device; null if its rate is unknown.
        options: Changes that make the run fit, the smallest first; empty if it fits or nothing helps.
        paces: Speed of each option.
        checkpoint_bytes: Bytes of a checkpoint on disk.
        export_bytes: Bytes of the export.
        free_bytes: Free bytes on the run folder's disk.
        probe: Measurements; null unless requested.
    """

    counts: Counts
    setting: Setting
    tokens: int
    supervised: int
    steps: int | None
    steps_in_run: int | None
    tokens_in_run: int | None
    flops_per_token: float
    flops_in_run: float | None
    memory: dict[int, Memory]
    room: int
    device: Device
    pace: Pace | None
    options: list[Option]
    paces: list[Pace | None]
    checkpoint_bytes: int
    export_bytes: int
    free_bytes: int
    probe: Probe | None = None

    @property
    def now(self) -> Memory:
        """Memory of the run as configured."""
        return self.memory[self.setting.stage]

    @property
    def fits(self) -> bool:
        """Whether the run as configured fits on a device."""
        return self.now.total < self.room


def make(trainer: "Trainer", module: Any, data: Any, memory: float | None = None, device: str | None = None) -> Plan:
    """Plan a run whose data are set up.

    Args:
        trainer: The trainer before the run.
        module: The module before its model is built.
        data: The datamodule after setup.
        memory: Memory of a device in GiB, instead of its actual memory.
        device: Name of a device (see `devices.py`); null is this machine's device, or with `memory` a GPU.

    Raises:
        InputError: No such device.
    """
    from lit_llm.data.inspect.inspection import examine

    seen = examine(data)
    train = next(stage for stage in seen.stages if stage.name == "train")
    other_device = devices.named(device, memory)
    target = other_device or devices.here(trainer.strategy.root_device)
    room = footprint.room(trainer, other_device)
    now = footprint.of(trainer, module, data, room, other_device)
    counts, setting = now.kind.counts, now.setting
    target = devices.measured(target) if target.cpu else target
    stages = [0, 1, 2, 3] if module.quantize is None else [0, 1, 2]
    memories = {stage: now.memory(stage=stage) for stage in {*stages, setting.stage}}
    options = [] if memories[setting.stage].total < room else estimate.options(
        footprint.kinds(now, module, data), setting, room, rows=now.rows, process=now.process)
    lengths = data.plans["train"].rows.segments.lengths
    reach = float(np.square(lengths).sum() / lengths.sum())
    flops = estimate.flops_per_token(counts, reach)
    steps, run = (seen.pace.epoch, seen.pace.run or None) if seen.pace else (None, max(0, trainer.max_steps) or None)
    step_tokens = train.tokens / steps if steps else setting.tokens * trainer.accumulate_grad_batches * setting.devices
    tokens = int(run * step_tokens) if run else None
    folder = Path(trainer.default_root_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    paces = [_pace(target, counts_of_option, how, reach, tokens) for counts_of_option, how in [
        (counts, setting), *((option.counts, option.setting) for option in options)]]
    return Plan(counts, setting, train.tokens, train.supervised, steps, run, tokens, flops,
                flops * tokens if tokens else None, memories, room, target, paces[0], options, paces[1:],
                estimate.checkpoint_bytes(counts, zero=setting.stage > 0, half=setting.half),
                (counts.total - counts.adapters) * 4, shutil.disk_usage(folder).free)


def _pace(device: Device, counts: Counts, setting: Setting, reach: float, tokens: int | None) -> Pace | None:
    rate = device.rate(setting.half) * (1 if device.cpu else setting.devices)      # processes share one processor
    if not rate:
        return None
    seconds_per_token = estimate.work_per_token(counts, reach, setting.recompute) / rate
    return Pace(1 / seconds_per_token, tokens * seconds_per_token / 3600 if tokens else None)


def probed(plan: Plan, config: dict[str, Any] | None) -> Plan:
    """Add measurements of two steps, made in a separate process and a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lit_llm-") as folder:
        file = Path(folder) / "seen.json"
        trial.fit(config, Path(folder) / "probe", trial.Clock(str(file)), trainer__max_steps=trial.Clock.STEPS,
                  trainer__enable_checkpointing=False)
        seen = json.loads(file.read_text(encoding="utf-8"))
    run = plan.steps_in_run * seen["seconds"] if plan.steps_in_run else None
    return replace(plan, probe=Probe(seen["seconds"], seen["tokens_per_second"], run, seen["peak_bytes"],
                                     seen["resident_bytes"]))


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    return asdict(plan)


# ---- terminal output -------------------------------------------------------------------------------------------------

def as_text(plan: Plan) -> str:
    """The plan as about thirty lines of at most 100 columns."""
    counts, setting = plan.counts, plan.setting
    share = 100 * counts.trained / counts.total
    formula = f"{'4 N + 2 N_adapters' if counts.adapters else '6 N'} + 6 d T, causal"
    lines = [f"model    {counts.total:,} parameters, {counts.trained:,} trained ({share:.2f} %)",
             f"data     {plan.tokens:,} tokens per epoch, {plan.supervised:,} of them supervised"
             + (f", {plan.steps:,} steps" if plan.steps else " (of the stream's beginning)")]
    if plan.steps_in_run:
        lines.append(f"run      {plan.steps_in_run:,} steps, about {plan.tokens_in_run:,} tokens")
    lines.append(f"work     {_flops(plan.flops_per_token)} per token"
                 + (f", {_flops(plan.flops_in_run)} in total" if plan.flops_in_run else "")
                 + f"  ({formula})")
    lines.append(f"disk     {_size(plan.checkpoint_bytes)} per checkpoint, {_size(plan.export_bytes)} for the export; "
                 f"{_size(plan.free_bytes)} are free")
    parts = [("weights", 8), ("gradients", 10), ("optimizer", 10), ("activations", 12), ("logits", 8), ("buckets", 9),
             ("process", 9), *([("holes", 7), ("export", 8)] if setting.cpu else [])]   # CPU only
    named = {"process": "process" if setting.cpu else "context"}
    lines += ["", f"memory in MiB of {'a' if setting.devices == 1 else f'each of {setting.devices}'} device"
                  f"{'s' * (setting.devices > 1)}, {setting.tokens:,} tokens at once, {setting.precision}, "
                  f"gradient checkpointing {setting.recompute}",
              f"  {'':<7}" + "".join(f"{named.get(name, name):>{wide}}" for name, wide in parts) + f"{'total':>8}"]
    for stage, need in sorted(plan.memory.items()):
        mark = "> " if stage == setting.stage else "  "
        lines.append(f"{mark}{NAMES[stage]:<7}"
                     + "".join(f"{getattr(need, name) / MIB:>{wide},.0f}" for name, wide in parts)
                     + f"{need.total / MIB:>8,.0f}" + ("" if need.total < plan.room else " !"))
    lines += ["", *_verdict(plan), *_speed(plan)]
    if plan.probe is not None:
        took = f", the run about {_time(plan.probe.seconds)} without validation" if plan.probe.seconds else ""
        seen = plan.probe
        lines += [f"measured {seen.tokens_per_second:,.0f} tokens/s, {seen.seconds_per_step:.3g} s per step{took}",
                  f"         at most {_size(seen.resident_bytes)} were used; {_size(plan.now.total)} were planned"
                  if setting.cpu else f"         at most {_size(seen.peak_bytes)} were allocated; "
                  f"{_size(plan.now.total - plan.now.process)} were planned"]
    return "\n".join(lines)


def _verdict(plan: Plan) -> list[str]:
    room = f"{_size(plan.room)} of {plan.device.name}"
    if plan.fits:
        return [f"fits     {_size(plan.now.total)} into {room}"]
    lines = [f"does not fit: {_size(plan.now.total)} into {room}"]
    if not plan.options:
        return [*lines, "         no setting makes it fit; use a smaller model, or larger or more devices"]
    for option, pace in zip(plan.options, plan.paces, strict=True):
        took = f", about {_time(3600 * pace.hours)}" if pace and pace.hours else ""
        lines += [f"         it fits ({_size(option.memory.total)}{took}) with"]
        lines += [f"           {line}" for line in option.changes]
    return lines


def _speed(plan: Plan) -> list[str]:
    """The estimated speed and its assumption."""
    device, half = plan.device, plan.setting.half
    notes = [] if device.bfloat16 or not plan.setting.precision.startswith("bf16") else [
        f"note     {device.name} has no bfloat16: set --trainer.precision 16-mixed"]
    if plan.pace is None:
        return [*notes, "speed    unknown for a GPU without a name; give one, for example --device h100"]
    took = f", the run about {_time(3600 * plan.pace.hours)}" if plan.pace.hours else ""
    rate = device.half if half else device.single
    where = "of this processor" if device.cpu else "of each device" if plan.setting.devices > 1 else "of the device"
    source = "just measured here" if device.cpu else "from the data sheet, not measured here"
    return [*notes,
            f"speed    about {plan.pace.tokens_per_second:,.0f} tokens/s{took}, without validation, if a step reaches",
            f"         {device.utilisation:.0%} of the {rate:.3g} TFLOP/s {where} ({source})"]


def _size(count: float) -> str:
    """Format bytes.

    >>> _size(3 * 2**20), _size(5.26 * 2**30)
    ('3.0 MiB', '5.3 GiB')
    """
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _flops(count: float) -> str:
    """Format FLOPs.

    >>> _flops(33.2e9)
    '33.2 GFLOP'
    """
    for size, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= size:
            return f"{count / size:,.1f} {name}FLOP"
    return f"{count / 1e6:,.1f} MFLOP"


def _time(seconds: float) -> str:
    """Format seconds.

    >>> _time(42.0), _time(5400.0)
    ('42 s', '1.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
