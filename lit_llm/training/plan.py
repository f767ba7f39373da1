"""A run that has not begun in, its cost out: parameters, tokens, steps, FLOPs, memory, disk, and what would fit.

The model is built without weights. Arithmetic is `estimate.py`'s, a probe's measuring `trial.py`'s. Knows nothing of
how data become rows.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_llm import adapter, attention, model
from lit_llm.training import control_tokens, estimate, recompute, trace, trial
from lit_llm.training.estimate import Counts, Kind, Memory, Setting
from lit_llm.training.fsdp import Fsdp2Strategy
from lit_llm.training.module import tokenizer_facts
from lit_llm.training.trace import Step

GIB, MIB = 2**30, 2**20
CONTEXT = 512 * MIB                                 # of CUDA in a process; what others report, not measured here
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
        device: What it is.
        change: What to change so that the run fits; empty where it fits, null where nothing helps.
        after: Memory after that change.
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
    device: str
    change: list[str] | None
    after: Memory | None
    checkpoint_bytes: int
    export_bytes: int
    free_bytes: int
    probe: Probe | None = None

    @property
    def now(self) -> Memory:
        """Of the run as configured."""
        return self.memory[self.setting.stage]


def make(trainer: Any, module: Any, data: Any, memory: float | None = None) -> Plan:
    """Plan a run whose data are set up.

    Args:
        trainer: Not begun.
        module: Not built.
        data: Its plans are made.
        memory: GiB of a device, in place of this machine's.
    """
    from lit_llm.data.inspection import examine

    seen = examine(data)
    train = next(stage for stage in seen.stages if stage.name == "train")
    root = trainer.strategy.root_device
    build = _builder(module, data)
    whole, inner = build(module.peft_spec)
    counts = count(whole, inner, quantized=module.quantize is not None, muon=module.optimizer == "muon")
    room = recompute.room(root) // (1 if root.type == "cuda" else trainer.num_devices)
    room = int(recompute.MARGIN * memory * GIB) if memory else room
    borders, supervised = heaviest(data)
    setting = _setting(trainer, module, whole, tokens=borders[-1], supervised=supervised, room=room)
    kind = Kind(counts, _steps(lambda: build(module.peft_spec)[0], borders, setting, data, counts))
    step = kind.step(data.batch_size, setting.recompute)
    process = resident_bytes() if setting.cpu else CONTEXT
    stages = [0, 1, 2, 3] if module.quantize is None else [0, 1, 2]
    memories = {stage: estimate.memory(counts, replace(setting, stage=stage), step, process)
                for stage in {*stages, setting.stage}}
    fits = memories[setting.stage].total < room
    better = None if fits else estimate.nearest(_kinds(kind, module, build, borders, setting, data), setting, room,
                                                rows=data.batch_size, process=process)
    lengths = data.plans["train"].rows.segments.lengths
    flops = estimate.flops_per_token(counts, float(np.square(lengths).sum() / lengths.sum()))
    steps, run = (seen.pace.epoch, seen.pace.run or None) if seen.pace else (None, max(0, trainer.max_steps) or None)
    step_tokens = train.tokens / steps if steps else setting.tokens * trainer.accumulate_grad_batches * setting.devices
    tokens = int(run * step_tokens) if run else None
    folder = Path(trainer.default_root_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    name = torch.cuda.get_device_name(root) if root.type == "cuda" else "memory of this machine"
    return Plan(counts, setting, train.tokens, train.supervised, steps, run, tokens, flops,
                flops * tokens if tokens else None, memories, room, f"{memory:g} GiB" if memory else name,
                [] if fits else better[0] if better else None, better[1] if better else None,
                estimate.checkpoint_bytes(counts, zero=setting.stage > 0, half=setting.half),
                (counts.total - counts.adapters) * 4, shutil.disk_usage(folder).free)


def count(whole: Any, inner: Any, *, quantized: bool = False, muon: bool = False) -> Counts:
    """What of a model takes memory and time.

    Args:
        whole: With its adapters.
        inner: The transformers model in it.
        quantized: Whether its frozen linear layers lie in 4 bits.
        muon: Whether Muon moves its matrices.
    """
    sizes = model.count_parameters(whole)
    head, config = inner.get_output_embeddings(), inner.config
    linears = [layer for layer in whole.modules() if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]
    head_weight = getattr(head, "weight", None)
    head_weight = head.base_layer.weight if head_weight is None else head_weight
    weights = {id(layer.weight): layer.weight for layer in linears} | {id(head_weight): head_weight}
    tables = {id(weight) for weight in model.embeddings(whole)}
    frozen = [weight for key, weight in weights.items() if not weight.requires_grad and key != id(head_weight)]
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or
                                          config.hidden_size // config.num_attention_heads)
    learns = [weight for weight in whole.parameters() if weight.requires_grad]
    return Counts(sizes.total, sizes.trainable, sum(weight.numel() for weight in weights.values()),
                  sizes.trainable if whole is not inner else 0,
                  sum(weight.numel() for weight in frozen) if quantized else 0,
                  sum(weight.numel() for weight in learns if weight.ndim == 2 and id(weight) not in tables) if muon
                  else 0, head_weight.numel(), head_weight.requires_grad, head_weight.shape[0], config.hidden_size,
                  heads * config.num_hidden_layers)


def heaviest(data: Any) -> tuple[list[int], int]:
    """Borders of documents in the heaviest micro-batch that the data can make, and its supervised tokens.

    That of the longest documents: attention on CPU keeps a matrix of tokens by tokens of each where it drops weights.
    """
    rows = data.plans["train"].rows
    squares = np.add.reduceat(np.square(rows.segments.lengths), rows.offsets[:-1])
    chosen = np.argsort(-squares, kind="stable")[:data.batch_size]
    width = int(rows.lengths[chosen].max()) if data.packing == "none" else data.seq_len
    borders = [0]
    for place in range(data.batch_size):
        lengths = [stop - start for _, start, stop in rows.row(chosen[place % len(chosen)])]
        ends = [place * width + end for end in accumulate(lengths)]
        borders += [*ends, (place + 1) * width] if ends[-1] < (place + 1) * width else ends
    return borders, max(1, int(rows.supervised[chosen].sum()))


def _builder(module: Any, data: Any) -> Callable[[dict[str, Any] | None], tuple[Any, Any]]:
    """What makes the model anew without weights, with adapters of a spec and without, for who changes its layers."""
    def build(spec: dict[str, Any] | None) -> tuple[Any, Any]:
        packed = None if adapter.learns_prompt_by(spec) else attention.NAME
        inner = model.skeleton(module.base, module.init, attention=packed, **tokenizer_facts(data.tokenizer))
        with torch.device("meta"):
            whole = adapter.wrap_peft(inner, spec, tokens=_trained_tokens(module, data, inner)) if spec else inner
        return whole, inner

    return build


def _trained_tokens(module: Any, data: Any, inner: Any) -> list[int]:
    """Those whose rows learn beside adapters; of `auto`, which asks the weights, all that it may choose."""
    if module.peft_spec is None or module.train_tokens is None or adapter.row_obstacle(inner, module.peft_spec):
        return []
    if module.train_tokens != "auto":
        return control_tokens.named(data.tokenizer, module.train_tokens)
    chats = any(not plan.corpus.is_document.all() for plan in data.plans.values())
    if not chats or adapter.chooses_rows(inner, module.peft_spec):
        return []
    return control_tokens.candidates(data.tokenizer)


def _steps(build: Callable[[], Any], borders: list[int], setting: Setting, data: Any, counts: Counts
           ) -> Callable[[float, recompute.Recompute], Step]:
    """What a step of so many rows holds. Traced for all rows and for one, a straight line between."""
    whole, one = data.batch_size, borders[-1] // data.batch_size
    autocast = setting.half and setting.stage == 0

    @cache
    def traced(rows: int, way: recompute.Recompute) -> Step:
        part = [border for border in borders if border <= rows * one]
        return trace.step(build, part, supervised=max(1, setting.supervised * rows // whole), recompute_=way,
                          half=setting.half and (not autocast or setting.precision.endswith("true") or
                                                 counts.quantized > 0), autocast=autocast, cuda=not setting.cpu)

    def step(rows: float, way: recompute.Recompute) -> Step:
        if rows == whole:
            return traced(whole, way)
        few = traced(1, way)
        if rows <= 1:
            return few.times(rows)
        return few.towards(traced(whole, way), (rows - 1) / (whole - 1))

    return step


def _kinds(now: Kind, module: Any, build: Callable[..., tuple[Any, Any]], borders: list[int], setting: Setting,
           data: Any) -> list[Kind]:
    """As configured, with adapters, with adapters on 4 bits."""
    kinds, spec = [now], module.peft_spec
    if module.base is None or module.quantize is not None:
        return kinds                                # adapters on random weights would learn nothing
    if spec is None:
        spec = adapter.LoRA().as_peft()
        counts = count(*build(spec), muon=module.optimizer == "muon")
        kinds.append(Kind(counts, _steps(lambda: build(spec)[0], borders, setting, data, counts),
                          "--config configs/with/lora.yaml"))
    counts = count(*build(spec), quantized=True, muon=module.optimizer == "muon")
    return [*kinds, Kind(counts, _steps(lambda: build(spec)[0], borders, setting, data, counts),
                         "--config configs/with/qlora.yaml")]


def resident_bytes() -> int:
    """Of this process, which has imported all that a run imports and walked through a step: what libraries take."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:                                 # macOS tells the most it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _setting(trainer: Any, module: Any, whole: Any, *, tokens: int, supervised: int, room: int) -> Setting:
    config = getattr(trainer.strategy, "config", None)
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    precision = str(trainer.precision)
    ways: dict[Any, recompute.Recompute] = {False: "none", True: "full", "selective": "selective"}
    way = ways[module.gradient_checkpointing] if module.gradient_checkpointing != "auto" else recompute.cheapest(
        whole, tokens, room=room, half=precision.startswith("bf16"))
    stage = 3 if isinstance(trainer.strategy, Fsdp2Strategy) else int(zero.get("stage", 0))
    return Setting(stage, trainer.world_size, tokens, supervised, way, module.optimizer, precision,
                   bool(zero.get("offload_optimizer")), bool(zero.get("offload_param")),
                   trainer.accumulate_grad_batches, trainer.strategy.root_device.type == "cpu",
                   trainer.exports and bool(trainer.checkpoint_callbacks))


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
             f"data     {plan.tokens:,} tokens an epoch, {plan.supervised:,} of them learned"
             + (f", {plan.steps:,} steps" if plan.steps else " (of the stream's beginning)")]
    if plan.steps_in_run:
        lines.append(f"run      {plan.steps_in_run:,} steps, about {plan.tokens_in_run:,} tokens")
    lines.append(f"work     {_flops(plan.flops_per_token)} a token"
                 + (f", {_flops(plan.flops_in_run)} in all" if plan.flops_in_run else "")
                 + f"  ({formula})")
    lines.append(f"disk     {_size(plan.checkpoint_bytes)} a checkpoint, {_size(plan.export_bytes)} the export; "
                 f"{_size(plan.free_bytes)} are free")
    parts = [("weights", 8), ("gradients", 10), ("optimizer", 10), ("activations", 12), ("logits", 8), ("buckets", 9),
             ("process", 9), ("holes", 7), ("export", 8)]
    lines += ["", f"memory in MiB of {'a' if setting.devices == 1 else f'each of {setting.devices}'} device"
                  f"{'s' * (setting.devices > 1)}, {setting.tokens:,} tokens at once, {setting.precision}, "
                  f"gradient checkpointing {setting.recompute}",
              f"  {'':<7}" + "".join(f"{name:>{wide}}" for name, wide in parts) + f"{'in all':>8}"]
    for stage, need in sorted(plan.memory.items()):
        mark = "> " if stage == setting.stage else "  "
        lines.append(f"{mark}{NAMES[stage]:<7}"
                     + "".join(f"{getattr(need, name) / MIB:>{wide},.0f}" for name, wide in parts)
                     + f"{need.total / MIB:>8,.0f}" + ("" if need.total < plan.room else " !"))
    lines += ["", *_verdict(plan)]
    if plan.probe is not None:
        took = f", the run about {_time(plan.probe.seconds)} without validation" if plan.probe.seconds else ""
        seen = plan.probe
        lines += [f"measured {seen.tokens_per_second:,.0f} tokens/s, {seen.seconds_per_step:.3g} s a step{took}",
                  f"         the process held {_size(seen.resident_bytes)} at most, {_size(plan.now.total)} are planned"
                  if setting.cpu else f"         {_size(seen.peak_bytes)} were allocated at most, "
                  f"{_size(plan.now.total - plan.now.process)} are planned"]
    return "\n".join(lines)


def _verdict(plan: Plan) -> list[str]:
    room = f"{_size(plan.room)} of {plan.device}"
    if plan.change == []:
        return [f"fits     {_size(plan.now.total)} into {room}"]
    lines = [f"does not fit: {_size(plan.now.total)} into {room}"]
    if plan.change is None or plan.after is None:
        return [*lines, "         no setting here would; take a smaller model, or more devices (trainer.devices)"]
    changes = [f"           {line}" for line in plan.change]
    return [*lines, f"         it would ({_size(plan.after.total)}) with", *changes]


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
