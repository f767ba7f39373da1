"""Compute bytes and FLOPs of a step from counts; nothing is built or measured.

Exact for weights, gradients and optimizer states; what comes and goes in a step is `trace.py`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_llm.models.recompute import Recompute
from lit_llm.training.planning.trace import Step

FLOAT, HALF = 4, 2
FOUR_BITS = 0.516                                   # bytes of a weight in 4 bits, its doubly quantized scales included
STATES = {"adamw": 8, "adamw_8bit": 2, "muon": 8}   # bytes of optimizer state per trained number
BUCKET = 200_000_000                                # numbers that ZeRO reduces at once, of those that are trained
GATHERED = 1_000_000_000                            # weights that ZeRO-3 leaves gathered until it needs room for others
KERNELS = 30 * 2**20                                # MKL's panels (4 MiB), code of kernels and of writing checkpoints
ENGINE = 50 * 2**20                                 # DeepSpeed's engine and gloo: threads, buffers, objects of weights
HOLES, HOLES_OF_GRADIENTS = 1.2, 0.45


@dataclass(frozen=True, slots=True)
class Counts:
    """What of a model takes memory and time.

    Args:
        total: Parameters, tied ones once.
        trained: Those that learn.
        matrices: Those of linear layers and the head, which every token is multiplied with; without the embedding; of
            experts, as many as a token sees.
        adapters: Those of `matrices` that learn beside a frozen base; 0 where all weights learn.
        quantized: Those that lie in 4 bits.
        muon: Those of which Muon keeps one number, not two.
        head: Of the output head.
        head_learns: Whether it does.
        vocabulary: Rows of the head.
        width: Of a layer.
        attention: Heads times their width, over all layers.
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
    """How a run trains.

    Args:
        stage: Of ZeRO; 0 is plain (one device, or DDP).
        devices: Processes.
        tokens: Of a micro-batch on one device.
        supervised: Of them, those that are learned.
        recompute: What is computed again in the backward pass.
        optimizer: Its name.
        precision: As `trainer.precision` says it.
        offload_optimizer: Optimizer states in CPU memory.
        offload_parameters: Weights too.
        accumulate: Micro-batches of an optimizer step.
        cpu: Whether the device is a CPU: then the process itself and what malloc cannot reuse lie there too.
        exports: Whether a finished run writes its model.
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
    """Bytes on one device at the height of a step.

    Args:
        weights: Of the model, as the device holds them.
        gradients: Of what learns.
        optimizer: Averages, and the float32 masters of ZeRO.
        activations: Of the layers, as far as they do not lie where gradients come later.
        logits: Of the loss.
        buckets: ZeRO's: gradients on their way, weights it leaves gathered.
        process: Interpreter and libraries, or CUDA's context.
        holes: Freed between blocks that live, and of no use for larger ones.
        export: To read the finished model again, on the first process.
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
        """All of it."""
        return (self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buckets
                + self.process + self.holes + self.export)


def memory(counts: Counts, setting: Setting, step: Step, process: int = 0) -> Memory:
    """What a device holds at the height of a step.

        bytes per trained weight    weights   gradient   optimizer        under ZeRO, over n devices
        float32, plain                 4         4          8
        float32, ZeRO                  4         4        4 + 8           optimizer / n from 1, gradient from 2,
        bf16, ZeRO                     2         4        4 + 8           weights from 3

    The height is where the forward pass ends, or in the backward pass, or where ZeRO has a second, flat copy of its
    gradients. Lightning keeps the last step's gradients until a forward pass is over, ZeRO only within a step.

    Args:
        counts: Of the model.
        setting: Of the run.
        step: Of a micro-batch.
        process: Bytes of the process before it has a model.
    """
    zero, share, full = setting.stage > 0, setting.devices, setting.stage == 3
    small = HALF if setting.half and (zero or setting.precision.endswith("true")) else FLOAT
    learns = small if zero else FLOAT               # plain runs train float32 alone
    frozen = counts.total - counts.trained - counts.quantized
    weights = counts.quantized * FOUR_BITS + frozen * small + counts.trained * learns
    gradients: float = counts.trained * FLOAT
    states: float = counts.trained * (STATES[setting.optimizer] + (FLOAT if zero else 0))
    states -= counts.muon * FLOAT if setting.optimizer == "muon" else 0
    # a bucket of gradients as they come, and where that is half as much, as they are summed
    reduced = min(BUCKET, counts.trained) * (learns + (FLOAT if setting.half and share > 1 else 0)) if zero else 0
    gathered = min(GATHERED, counts.total) * small if full else 0
    states /= share if zero else 1
    gradients /= share if setting.stage >= 2 else 1
    weights /= share if full else 1
    states *= not setting.offload_optimizer
    weights *= not setting.offload_parameters
    kept = gradients if not zero or full or setting.accumulate > 1 else 0
    forward = step.layers + step.head + kept + gathered + (reduced if full else 0)
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
    """What malloc holds and cannot use: freed blocks between others that live, too small for what comes next.

    An allowance, not a law. Blocks below 32 MiB lie in one heap, whose end only moves up; in real runs (glibc 2.36 as
    `__main__.py` sets it, 26 of 0.3 to 100 million weights) it lay above the bytes that lived by about a layer's work
    and a part of the gradients, which come and go among it. The numbers here were fitted to those runs. Beside it stand
    what kernels keep to themselves, and their code, which was not in memory before the first step.
    """
    work = HOLES * step.layer + HOLES_OF_GRADIENTS * FLOAT * counts.trained
    return KERNELS + work + (ENGINE if setting.stage > 0 else 0)


def flops_per_token(counts: Counts, reach: float) -> float:
    """Of forward and backward; a multiply-add is two, attention is causal, recomputing is not counted.

    All weights: 6 N + 6 d T. Adapters: 4 N + 6 d T + 2 N_adapters, since frozen weights need no gradient.

    Args:
        counts: N = `matrices`, adapters included; d = `attention`, over all layers.
        reach: T, the mean of what a token can look back on, twice: sum(length^2) / sum(length) of documents.
    """
    if not counts.adapters:
        return 6 * counts.matrices + 6 * counts.attention * reach
    return 4 * counts.matrices + 2 * counts.adapters + 6 * counts.attention * reach


def work_per_token(counts: Counts, reach: float, recompute: Recompute) -> float:
    """FLOPs that a device really makes for a token: `flops_per_token`, and the forward pass again where it recomputes.

    `selective` computes again what costs next to nothing.
    """
    again = 2 * counts.matrices + 2 * counts.attention * reach if recompute == "full" else 0
    return flops_per_token(counts, reach) + again


def checkpoint_bytes(counts: Counts, *, zero: bool, half: bool) -> int:
    """On disk: the trained weights twice, two averages of AdamW, ZeRO's float32 masters."""
    return counts.trained * ((HALF if half else FLOAT) + 16 if zero else 4 * FLOAT)


# ---- what would fit --------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Kind:
    """A way to train the model: as configured, with adapters, or with adapters on a base in 4 bits.

    Args:
        counts: Of the model trained so.
        step: Of a micro-batch of so many rows, recomputed so.
        said: What to type for it; empty where it is as configured.
        precision: That comes with it; null leaves the run's.
    """

    counts: Counts
    step: Callable[[float, Recompute], Step]
    said: str = ""
    precision: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """A way to make a run fit.

    Args:
        changes: What to type, or to change.
        memory: Of a device after that.
        setting: The same.
        counts: Of the model trained so.
    """

    changes: list[str]
    memory: Memory
    setting: Setting
    counts: Counts


def options(kinds: Sequence[Kind], setting: Setting, room: int, *, rows: int, process: int = 0) -> list[Option]:
    """What would make a run fit that does not: as it is trained now, with adapters, with 4 bits, with more devices.

    Of each the change of least harm. Shorter rows come in only where nothing else fits.

    Args:
        kinds: As in `nearest`, as are the others.
        setting: Of the run.
        room: Bytes of a device.
        rows: Of a micro-batch.
        process: Bytes of the process before it has a model.
    """
    for shorts in ((1,), (2, 4, 8)):
        found = [_nearest([kind], setting, room, rows, process, shorts) for kind in kinds]
        more = (replace(setting, devices=setting.devices * times) for times in (2, 4, 8, 16, 32, 64))
        if not setting.cpu and shorts == (1,) and not kinds[0].counts.quantized and found[0] is None:
            found.append(next((option for wider in more
                               if (option := _nearest(kinds[:1], wider, room, rows, process, shorts))), None))
            if last := found[-1]:
                found[-1] = replace(last, changes=[f"--trainer.devices {last.setting.devices}", *last.changes])
        if any(found):
            break
    return [option for option in found if option is not None]


def nearest(kinds: Sequence[Kind], setting: Setting, room: int, *, rows: int, process: int = 0
            ) -> tuple[list[str], Memory] | None:
    """The change of least harm that fits, or the fewest together; null if nothing does.

    In this order: what costs time alone (computing again, smaller micro-batches), what changes how processes share
    (a stage of ZeRO, offload), what trains less (adapters, 4 bits), what shortens rows.

    Args:
        kinds: Ways to train it, as configured first.
        setting: Of the run, which does not fit.
        room: Bytes of a device.
        rows: Of a micro-batch.
        process: Bytes of the process before it has a model.
    """
    found = _nearest(kinds, setting, room, rows, process, (1, 2, 4, 8))
    return None if found is None else (found.changes, found.memory)


def _nearest(kinds: Sequence[Kind], setting: Setting, room: int, rows: int, process: int, shorts: Sequence[int]
             ) -> Option | None:
    ways: list[Recompute] = ["none", "selective", "full"]
    ways = ways[ways.index(setting.recompute):]
    for short in shorts:
        for kind in kinds:
            for stage, offload in _shares(setting, kind.counts):
                # one row is the least before rows are shortened, so shorter ones come one by one
                for size in [rows >> halved for halved in range(rows.bit_length())] if short == 1 else [1]:
                    for way in ways:
                        part = size / short / rows
                        tried = replace(setting, stage=stage, recompute=way, offload_optimizer=offload,
                                        precision=kind.precision or setting.precision,
                                        tokens=int(setting.tokens * part),
                                        supervised=max(1, int(setting.supervised * part)))
                        found = memory(kind.counts, tried, kind.step(size / short, way), process)
                        if found.total < room:
                            said = _changes(setting, tried, rows // size, kind.said, short)
                            return Option(said, found, tried, kind.counts)
    return None


def _shares(setting: Setting, counts: Counts) -> list[tuple[int, bool]]:
    """Stages of ZeRO, then with the optimizer in CPU memory, which is no help where the device is the CPU.

    Weights in 4 bits cannot be cut into pieces, so stage 3 is not for them.
    """
    stages = [setting.stage, *range(max(2, setting.stage + 1), 4)] if setting.devices > 1 else [setting.stage]
    if counts.quantized:
        stages = [stage for stage in stages if stage < 3] or [2]
    ways = [(stage, setting.offload_optimizer) for stage in stages]
    if not setting.cpu and setting.optimizer == "adamw" and counts.trained >= counts.total // 4:
        ways += [(max(stage, 2), True) for stage in stages]
    return list(dict.fromkeys(ways))


def _changes(before: Setting, after: Setting, fewer: int, kind: str, short: int) -> list[str]:
    said = [kind] if kind else []
    if after.recompute != before.recompute:
        said.append("--model.gradient_checkpointing " + ("true" if after.recompute == "full" else after.recompute))
    if fewer > 1:
        said.append(f"data.batch_size / {fewer} and trainer.accumulate_grad_batches * {fewer} (the same step)")
    if after.offload_optimizer and not before.offload_optimizer:
        said.append(f"--trainer.strategy deepspeed_stage_{after.stage}_offload")
    elif after.stage != before.stage:
        said.append(f"--trainer.strategy deepspeed_stage_{after.stage}")
    return said + ([f"data.seq_len / {short} (longer records are cut)"] if short > 1 else [])
