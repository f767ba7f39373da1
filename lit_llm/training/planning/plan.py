"""Plan a run before it begins: parameters, tokens, steps, FLOPs, memory, disk, and what would fit.

What a device must hold is `footprint.py`'s, arithmetic `estimate.py`'s, a probe's measuring `trial.py`'s.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.training.planning import devices, estimate, footprint, trial
from lit_llm.training.planning.devices import Device
from lit_llm.training.planning.estimate import Counts, Memory, Option, Setting

GIB, MIB = 2**30, 2**20
NAMES = {0: "plain", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}        # DDP is plain, FSDP2 is as ZeRO-3


@dataclass(frozen=True, slots=True)
class Probe:
    """Two steps, measured.

    Args:
        seconds_per_step: Of an optimizer step.
        tokens_per_second: Of all devices.
        seconds: Of the whole run at that pace; null where its end is unknown. Validation is not in it.
        peak_bytes: What torch allocated on the first device.
        resident_bytes: All that the first process held in CPU memory, libraries too.
    """

    seconds_per_step: float
    tokens_per_second: float
    seconds: float | None
    peak_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run would be, from the work of its tokens and an assumed share of what its devices can do.

    Args:
        tokens_per_second: Of all devices together; communication is not counted.
        hours: Of the whole run; null where its end is unknown.
    """

    tokens_per_second: float
    hours: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run costs.

    Args:
        counts: Of the model.
        setting: Of the run.
        tokens: Of an epoch.
        supervised: Of them.
        steps: Of an epoch; null for a stream.
        steps_in_run: Null where the run is not ended by a count.
        tokens_in_run: The same.
        flops_per_token: See `estimate.flops_per_token`.
        flops_in_run: Null where the run's tokens are unknown.
        memory: Of each stage of ZeRO that the number of devices allows; 0 is plain.
        room: Bytes of a device that a run may fill.
        device: What it is planned for.
        pace: On that device; null where its rate is unknown.
        options: What would make the run fit, the least change first; empty where it fits, or where nothing helps.
        paces: Of each option.
        checkpoint_bytes: Of each checkpoint on disk.
        export_bytes: Of the export after a finished fit.
        free_bytes: Of the disk that the run folder lies on.
        probe: What was measured; null where nobody asked.
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
        """Of the run as configured."""
        return self.memory[self.setting.stage]

    @property
    def fits(self) -> bool:
        """Whether a device holds the run as configured."""
        return self.now.total < self.room


def make(trainer: Any, module: Any, data: Any, memory: float | None = None, device: str | None = None) -> Plan:
    """Plan a run whose data are set up.

    Args:
        trainer: Not begun.
        module: Not built.
        data: Its plans are made.
        memory: GiB of a device, in place of what it has.
        device: Its name (see `devices.py`); null is what this machine has, and with `memory` a GPU.

    Raises:
        InputError: No such device.
    """
    from lit_llm.data.inspect.inspection import examine

    seen = examine(data)
    train = next(stage for stage in seen.stages if stage.name == "train")
    given = devices.named(device, memory)
    target = given or devices.here(trainer.strategy.root_device)
    room = footprint.room(trainer, given)
    now = footprint.of(trainer, module, data, room, given)
    counts, setting = now.kind.counts, now.setting
    target = devices.measured(target) if target.cpu else target
    stages = [0, 1, 2, 3] if module.quantize is None else [0, 1, 2]
    memories = {stage: now.memory(stage=stage) for stage in {*stages, setting.stage}}
    found = [] if memories[setting.stage].total < room else estimate.options(
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
    paces = [_pace(target, each, how, reach, tokens) for each, how in [
        (counts, setting), *((option.counts, option.setting) for option in found)]]
    return Plan(counts, setting, train.tokens, train.supervised, steps, run, tokens, flops,
                flops * tokens if tokens else None, memories, room, target, paces[0], found, paces[1:],
                estimate.checkpoint_bytes(counts, zero=setting.stage > 0, half=setting.half),
                (counts.total - counts.adapters) * 4, shutil.disk_usage(folder).free)


def _pace(device: Device, counts: Counts, setting: Setting, reach: float, tokens: int | None) -> Pace | None:
    rate = device.rate(setting.half) * (1 if device.cpu else setting.devices)      # processes share a processor
    if not rate:
        return None
    each = estimate.work_per_token(counts, reach, setting.recompute) / rate
    return Pace(1 / each, tokens * each / 3600 if tokens else None)


def probed(plan: Plan, config: dict[str, Any] | None) -> Plan:
    """The plan with two steps measured, in a process of its own and in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lit_llm-") as folder:
        file = Path(folder) / "seen.json"
        trial.fit(config, Path(folder) / "probe", trial.Clock(str(file)), trainer__max_steps=trial.Clock.STEPS,
                  trainer__enable_checkpointing=False)
        seen = json.loads(file.read_text(encoding="utf-8"))
    run = plan.steps_in_run * seen["seconds"] if plan.steps_in_run else None
    return replace(plan, probe=Probe(seen["seconds"], seen["tokens_per_second"], run, seen["peak_bytes"],
                                     seen["resident_bytes"]))


def as_values(plan: Plan) -> dict[str, Any]:
    """All of it, as JSON takes it."""
    return asdict(plan)


# ---- for a terminal --------------------------------------------------------------------------------------------------

def as_text(plan: Plan) -> str:
    """Some thirty lines of at most 100 columns."""
    counts, setting = plan.counts, plan.setting
    share = 100 * counts.trained / counts.total
    formula = f"{'4 N + 2 N_adapters' if counts.adapters else '6 N'} + 6 d T, causal"
    lines = [f"model    {counts.total:,} parameters, {counts.trained:,} of them learn ({share:.2f} %)",
             f"data     {plan.tokens:,} tokens an epoch, {plan.supervised:,} of them supervised"
             + (f", {plan.steps:,} steps" if plan.steps else " (of the stream's beginning)")]
    if plan.steps_in_run:
        lines.append(f"run      {plan.steps_in_run:,} steps, about {plan.tokens_in_run:,} tokens")
    lines.append(f"work     {_flops(plan.flops_per_token)} a token"
                 + (f", {_flops(plan.flops_in_run)} in all" if plan.flops_in_run else "")
                 + f"  ({formula})")
    lines.append(f"disk     {_size(plan.checkpoint_bytes)} a checkpoint, {_size(plan.export_bytes)} the export; "
                 f"{_size(plan.free_bytes)} are free")
    parts = [("weights", 8), ("gradients", 10), ("optimizer", 10), ("activations", 12), ("logits", 8), ("buckets", 9),
             ("process", 9), *([("holes", 7), ("export", 8)] if setting.cpu else [])]   # which only a CPU's process has
    named = {"process": "process" if setting.cpu else "context"}
    lines += ["", f"memory in MiB of {'a' if setting.devices == 1 else f'each of {setting.devices}'} device"
                  f"{'s' * (setting.devices > 1)}, {setting.tokens:,} tokens at once, {setting.precision}, "
                  f"gradient checkpointing {setting.recompute}",
              f"  {'':<7}" + "".join(f"{named.get(name, name):>{wide}}" for name, wide in parts) + f"{'in all':>8}"]
    for stage, need in sorted(plan.memory.items()):
        mark = "> " if stage == setting.stage else "  "
        lines.append(f"{mark}{NAMES[stage]:<7}"
                     + "".join(f"{getattr(need, name) / MIB:>{wide},.0f}" for name, wide in parts)
                     + f"{need.total / MIB:>8,.0f}" + ("" if need.total < plan.room else " !"))
    lines += ["", *_verdict(plan), *_speed(plan)]
    if plan.probe is not None:
        took = f", the run about {_time(plan.probe.seconds)} without validation" if plan.probe.seconds else ""
        seen = plan.probe
        lines += [f"measured {seen.tokens_per_second:,.0f} tokens/s, {seen.seconds_per_step:.3g} s a step{took}",
                  f"         the process held {_size(seen.resident_bytes)} at most, {_size(plan.now.total)} are planned"
                  if setting.cpu else f"         {_size(seen.peak_bytes)} were allocated at most, "
                  f"{_size(plan.now.total - plan.now.process)} are planned"]
    return "\n".join(lines)


def _verdict(plan: Plan) -> list[str]:
    room = f"{_size(plan.room)} of {plan.device.name}"
    if plan.fits:
        return [f"fits     {_size(plan.now.total)} into {room}"]
    lines = [f"does not fit: {_size(plan.now.total)} into {room}"]
    if not plan.options:
        return [*lines, "         no setting here would; take a smaller model, or larger or more devices"]
    for option, pace in zip(plan.options, plan.paces, strict=True):
        took = f", about {_time(3600 * pace.hours)}" if pace and pace.hours else ""
        lines += [f"         it would ({_size(option.memory.total)}{took}) with"]
        lines += [f"           {line}" for line in option.changes]
    return lines


def _speed(plan: Plan) -> list[str]:
    """How long, by which assumption."""
    device, half = plan.device, plan.setting.half
    notes = [] if device.bfloat16 or not plan.setting.precision.startswith("bf16") else [
        f"note     {device.name} has no bfloat16: set --trainer.precision 16-mixed"]
    if plan.pace is None:
        return [*notes, "speed    not known for a GPU without a name: --device h100, for instance, says hours"]
    took = f", the run about {_time(3600 * plan.pace.hours)}" if plan.pace.hours else ""
    rate = device.half if half else device.single
    each = "of this processor" if device.cpu else "of each device" if plan.setting.devices > 1 else "of the device"
    said = "measured here just now" if device.cpu else "data sheet; no GPU's speed was measured here"
    return [*notes,
            f"speed    about {plan.pace.tokens_per_second:,.0f} tokens/s{took}, without validation, if a step reaches",
            f"         {device.utilisation:.0%} of the {rate:.3g} TFLOP/s {each} ({said})"]


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(3 * 2**20), _size(5.26 * 2**30)
    ('3.0 MiB', '5.3 GiB')
    """
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _flops(count: float) -> str:
    """Work for people.

    >>> _flops(33.2e9)
    '33.2 GFLOP'
    """
    for size, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= size:
            return f"{count / size:,.1f} {name}FLOP"
    return f"{count / 1e6:,.1f} MFLOP"


def _time(seconds: float) -> str:
    """Seconds for people.

    >>> _time(42.0), _time(5400.0)
    ('42 s', '1.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
