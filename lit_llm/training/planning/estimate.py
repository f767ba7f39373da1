"""Compute the bytes and FLOPs of a step from counts; nothing is built or measured.

Exact for weights, gradients and optimizer states; temporary memory of a step comes from `trace.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_llm.models.recompute import Recompute
from lit_llm.training.planning.trace import Step

FLOAT, HALF = 4, 2
FOUR_BITS = 0.516                                   # bytes of a 4-bit weight with its doubly quantized scales
STATES = {"adamw": 8, "adamw_8bit": 2, "muon": 8}   # bytes of optimizer state per trained number
BUCKET = 200_000_000                                # trained numbers that ZeRO reduces at once
GATHERED = 1_000_000_000                            # weights that ZeRO-3 may keep gathered
KERNELS = 30 * 2**20                                # MKL's panels (4 MiB), code of kernels and of writing checkpoints
ENGINE = 50 * 2**20                                 # DeepSpeed's engine and gloo: threads, buffers, objects of weights
HOLES, HOLES_OF_GRADIENTS = 1.2, 0.45


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of a model that determine memory and time.

    Args:
        total: Number of parameters, tied ones once.
        trained: Trained parameters.
        matrices: Parameters of linear layers and the head, which multiply every token; without the embedding; of
            experts, as many as a token uses.
        adapters: Part of `matrices` that is trained beside a frozen base; 0 if all weights are trained.
        quantized: Parameters stored in 4 bits.
        muon: Parameters for which Muon stores one number instead of two.
        head: Parameters of the output head.
        head_learns: Whether the head is trained.
        vocabulary: Vocabulary size.
        width: Width of a layer.
        attention: Heads times head width, over all layers.
    """

    total: int
    trained: int
    matrices: int
    adapters: int
    quantized: int
    muon: int
    head: int
    head_learns: bool
    vocabulary: int
    width: int
    attention: int


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a run that determine memory and time.

    Args:
        stage: ZeRO stage; 0 is plain (one device, or DDP).
        devices: Number of processes.
        tokens: Tokens of a micro-batch on one device.
        supervised: Supervised tokens among them.
        recompute: Gradient checkpointing.
        optimizer: Name of the optimizer.
        precision: Value of `trainer.precision`.
        offload_optimizer: Whether optimizer states are in CPU memory.
        offload_parameters: Whether weights are as well.
        accumulate: Micro-batches per optimizer step.
        cpu: Whether the device is a CPU, whose memory also contains the process and malloc's unusable blocks.
        exports: Whether a finished run exports its model.
    """

    stage: int
    devices: int
    tokens: int
    supervised: int
    recompute: Recompute = "none"
    optimizer: str = "adamw"
    precision: str = "32-true"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    accumulate: int = 1
    cpu: bool = True
    exports: bool = False

    @property
    def half(self) -> bool:
        """Whether matrices are multiplied in two bytes."""
        return self.precision.startswith(("bf16", "16"))


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak bytes on one device during a step.

    Args:
        weights: Weights of the model on the device.
        gradients: Gradients of trained weights.
        optimizer: Optimizer moments, and ZeRO's float32 master weights.
        activations: Activations of the layers, beyond memory that gradients reuse later.
        logits: Logits of the loss.
        buckets: ZeRO's buffers: gradients being reduced, weights kept gathered.
        process: Interpreter and libraries, or CUDA's context.
        holes: Freed heap blocks between live ones that are too small to be reused (CPU).
        export: Reloading the finished model for the export, on the first process.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int
    process: int
    holes: int
    export: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return (self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buckets
                + self.process + self.holes + self.export)


def memory(counts: Counts, setting: Setting, step: Step, process: int = 0) -> Memory:
    """Estimate the peak memory of a device during a step.

        bytes per trained weight    weights   gradient   optimizer        under ZeRO, over n devices
        float32, plain                 4         4          8
        float32, ZeRO                  4         4        4 + 8           optimizer / n from 1, gradient from 2,
        bf16, ZeRO                     2         4        4 + 8           weights from 3

    The peak is at the end of the forward pass, or in the backward pass, or where ZeRO has a second, flat copy of its
    gradients. Lightning keeps the last step's gradients until the next forward pass is over, ZeRO only within a step.

    Args:
        counts: Counts of the model.
        setting: Settings of the run.
        step: Memory trace of a micro-batch.
        process: Bytes of the process without a model.
    """
    zero, share, full = setting.stage > 0, setting.devices, setting.stage == 3
    small = HALF if setting.half and (zero or setting.precision.endswith("true")) else FLOAT
    trained_size = small if zero else FLOAT         # bytes; plain runs train float32 weights only
    frozen = counts.total - counts.trained - counts.quantized
    weights = counts.quantized * FOUR_BITS + frozen * small + counts.trained * trained_size
    gradients: float = counts.trained * FLOAT
    states: float = counts.trained * (STATES[setting.optimizer] + (FLOAT if zero else 0))
    states -= counts.muon * FLOAT if setting.optimizer == "muon" else 0
    # a bucket of gradients as they come, and where that is half as much, as they are summed
    reduced = min(BUCKET, counts.trained) * (trained_size + (FLOAT if setting.half and share > 1 else 0)) if zero else 0
    gathered = min(GATHERED, counts.total) * small if full else 0
    states /= share if zero else 1
    gradients /= share if setting.stage >= 2 else 1
    weights /= share if full else 1
    states *= not setting.offload_optimizer
    weights *= not setting.offload_parameters
    persistent = gradients if not zero or full or setting.accumulate > 1 else 0
    forward = step.layers + step.head + persistent + gathered + (reduced if full else 0)
    coming = step.bare + gradients if setting.accumulate > 1 or full else step.backward
    backward = coming + reduced + gathered
    top = max(forward, backward, gradients * (2 if zero else 1) + gathered)
    logits = step.head if top == forward else 0
    buckets = (reduced if top == backward or full else 0) + gathered
    activations = max(0.0, top - gradients - logits - buckets)
    # the finished model is read again, beside the trained one and in large blocks, which logits gave back
    export = max(0.0, counts.total * FLOAT - logits) if setting.cpu and setting.exports else 0
    return Memory(*map(int, (weights, gradients, states, activations, logits, buckets, process,
                             holes(counts, setting, step) if setting.cpu else 0, export)))


def holes(counts: Counts, setting: Setting, step: Step) -> float:
    """Heap memory that malloc cannot reuse: freed blocks between live ones that are too small for later requests.

    This is an empirical allowance. Blocks below 32 MiB are in one heap whose end only grows; in real runs (glibc 2.36
    as `__main__.py` sets it, 26 runs of 0.3 to 100 million weights) the heap exceeded live bytes by about one layer's
    activations and a part of the gradients. The constants were fitted to those runs. Added to it are buffers that
    kernels keep, and their code, which is loaded at the first step.
    """
    work = HOLES * step.layer + HOLES_OF_GRADIENTS * FLOAT * counts.trained
    return KERNELS + work + (ENGINE if setting.stage > 0 else 0)


def flops_per_token(counts: Counts, reach: float) -> float:
    """FLOPs of forward and backward; a multiply-add counts as two, attention is causal, without recomputation.

    All weights: 6 N + 6 d T. Adapters: 4 N + 6 d T + 2 N_adapters, since frozen weights need no gradient.

    Args:
        counts: N = `matrices`, adapters included; d = `attention`, over all layers.
        reach: T, twice the mean attended length: sum(length^2) / sum(length) of documents.
    """
    if not counts.adapters:
        return 6 * counts.matrices + 6 * counts.attention * reach
    return 4 * counts.matrices + 2 * counts.adapters + 6 * counts.attention * reach


def work_per_token(counts: Counts, reach: float, recompute: Recompute) -> float:
    """FLOPs that a device performs per token: `flops_per_token`, plus the forward pass if it is recomputed.

    The recomputation of `selective` costs almost nothing.
    """
    again = 2 * counts.matrices + 2 * counts.attention * reach if recompute == "full" else 0
    return flops_per_token(counts, reach) + again


def checkpoint_bytes(counts: Counts, *, zero: bool, half: bool) -> int:
    """Bytes on disk: the trained weights twice, two moments of AdamW, ZeRO's float32 master weights."""
    return counts.trained * ((HALF if half else FLOAT) + 16 if zero else 4 * FLOAT)


# ---- what would fit --------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Kind:
    """A way to train the model: as configured, with adapters, or with adapters on a 4-bit base.

    Args:
        counts: Counts of the model trained this way.
        step: Memory trace for a number of packed sequences and a checkpointing mode.
        options: Options that select it; empty if it is configured.
        precision: Precision that it implies; null keeps the run's.
    """

    counts: Counts
    step: Callable[[float, Recompute], Step]
    options: str = ""
    precision: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """A set of changes that makes a run fit.

    Args:
        changes: Options to type or values to change.
        memory: Memory of a device with these changes.
        setting: Settings with these changes.
        counts: Counts of the model trained this way.
    """

    changes: list[str]
    memory: Memory
    setting: Setting
    counts: Counts


def options(kinds: Sequence[Kind], setting: Setting, room: int, *, rows: int, process: int = 0) -> list[Option]:
    """Changes that would make a run fit: as it is trained now, with adapters, with 4 bits, with more devices.

    For each, the least intrusive change. Shorter sequences are suggested only if nothing else fits.

    Args:
        kinds: As in `nearest`, like the other arguments.
        setting: Settings of the run.
        room: Usable bytes of a device.
        rows: Packed sequences of a micro-batch.
        process: Bytes of the process without a model.
    """
    for shorts in ((1,), (2, 4, 8)):
        candidates = [_nearest([kind], setting, room, rows, process, shorts) for kind in kinds]
        more = (replace(setting, devices=setting.devices * times) for times in (2, 4, 8, 16, 32, 64))
        if not setting.cpu and shorts == (1,) and not kinds[0].counts.quantized and candidates[0] is None:
            candidates.append(next((option for wider in more
                                    if (option := _nearest(kinds[:1], wider, room, rows, process, shorts))), None))
            if last := candidates[-1]:
                candidates[-1] = replace(last, changes=[f"--trainer.devices {last.setting.devices}", *last.changes])
        if any(candidates):
            break
    return [option for option in candidates if option is not None]


def nearest(kinds: Sequence[Kind], setting: Setting, room: int, *, rows: int, process: int = 0
            ) -> tuple[list[str], Memory] | None:
    """The least intrusive change that fits, or the smallest combination; null if none does.

    In this order: changes that only cost time (recomputation, smaller micro-batches), changes of how processes share
    memory (ZeRO stage, offload), changes that train less (adapters, 4 bits), shorter sequences.

    Args:
        kinds: Ways to train it, as configured first.
        setting: Settings of the run, which does not fit.
        room: Usable bytes of a device.
        rows: Packed sequences of a micro-batch.
        process: Bytes of the process without a model.
    """
    option = _nearest(kinds, setting, room, rows, process, (1, 2, 4, 8))
    return None if option is None else (option.changes, option.memory)


def _nearest(kinds: Sequence[Kind], setting: Setting, room: int, rows: int, process: int, shorts: Sequence[int]
             ) -> Option | None:
    ways: list[Recompute] = ["none", "selective", "full"]
    ways = ways[ways.index(setting.recompute):]
    for short in shorts:
        for kind in kinds:
            for stage, offload in _shares(setting, kind.counts):
                # shorter sequences are tried only with one per micro-batch
                for size in [rows >> halved for halved in range(rows.bit_length())] if short == 1 else [1]:
                    for way in ways:
                        part = size / short / rows
                        tried = replace(setting, stage=stage, recompute=way, offload_optimizer=offload,
                                        precision=kind.precision or setting.precision,
                                        tokens=int(setting.tokens * part),
                                        supervised=max(1, int(setting.supervised * part)))
                        need = memory(kind.counts, tried, kind.step(size / short, way), process)
                        if need.total < room:
                            changes = _changes(setting, tried, rows // size, kind.options, short)
                            return Option(changes, need, tried, kind.counts)
    return None


def _shares(setting: Setting, counts: Counts) -> list[tuple[int, bool]]:
    """ZeRO stages, then with the optimizer in CPU memory, which does not help if the device is the CPU.

    4-bit weights cannot be sharded, so stage 3 is left out for them.
    """
    stages = [setting.stage, *range(max(2, setting.stage + 1), 4)] if setting.devices > 1 else [setting.stage]
    if counts.quantized:
        stages = [stage for stage in stages if stage < 3] or [2]
    ways = [(stage, setting.offload_optimizer) for stage in stages]
    if not setting.cpu and setting.optimizer == "adamw" and counts.trained >= counts.total // 4:
        ways += [(max(stage, 2), True) for stage in stages]
    return list(dict.fromkeys(ways))


def _changes(before: Setting, after: Setting, fewer: int, kind: str, short: int) -> list[str]:
    changes = [kind] if kind else []
    if after.recompute != before.recompute:
        changes.append("--model.gradient_checkpointing " + ("true" if after.recompute == "full" else after.recompute))
    if fewer > 1:
        changes.append(f"data.batch_size / {fewer} and trainer.accumulate_grad_batches * {fewer} (the same step)")
    if after.offload_optimizer and not before.offload_optimizer:
        changes.append(f"--trainer.strategy deepspeed_stage_{after.stage}_offload")
    elif after.stage != before.stage:
        changes.append(f"--trainer.strategy deepspeed_stage_{after.stage}")
    return changes + ([f"data.seq_len / {short} (longer records are cut)"] if short > 1 else [])
