"""Counts of a model and of its batches in, bytes and FLOPs out: plain arithmetic, nothing is built or measured.

Exact for weights, gradients and optimizer states; activations are counted by what a layer keeps
(`model.activation_bytes`). Knows nothing of configs, files or devices.
"""

from dataclasses import dataclass, replace
from typing import Any

from lit_llm.model import activation_bytes
from lit_llm.training.fused import slice_rows
from lit_llm.training.recompute import Recompute

FLOAT, HALF = 4, 2
FOUR_BITS = 0.516                                   # bytes of a weight in 4 bits, its doubly quantized scales included
STATES = {"adamw": 8, "adamw_8bit": 2, "muon": 8}   # bytes of optimizer state per trained number
BUCKET = 200_000_000                                # numbers that ZeRO reduces at once, of those that are trained


@dataclass(frozen=True, slots=True)
class Counts:
    """What of a model takes memory and time.

    Args:
        total: Parameters, tied ones once.
        trained: Those that learn.
        matrices: Those of linear layers and the head, which every token is multiplied with; without the embedding.
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

    @property
    def half(self) -> bool:
        """Whether matrices are multiplied in two bytes."""
        return self.precision.startswith(("bf16", "16"))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the height of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buckets


def memory(counts: Counts, setting: Setting, config: Any) -> Memory:
    """What a device holds when the backward pass begins: Lightning keeps the last step's gradients until then.

        bytes per trained weight    weights   gradient   optimizer        under ZeRO, over n devices
        float32, plain                 4         4          8
        float32, ZeRO                  4         4        4 + 8           optimizer / n from 1, gradient from 2,
        bf16, ZeRO                     2         4        4 + 8           weights from 3

    Args:
        counts: Of the model.
        setting: Of the run.
        config: The model's.
    """
    zero, share = setting.stage > 0, setting.devices
    small = HALF if setting.half and (zero or setting.precision.endswith("true")) else FLOAT
    learns = small if zero else FLOAT               # plain runs train float32 alone
    frozen = counts.total - counts.trained - counts.quantized
    weights = counts.quantized * FOUR_BITS + frozen * small + counts.trained * learns
    gradients: float = counts.trained * FLOAT
    states: float = counts.trained * (STATES[setting.optimizer] + (FLOAT if zero else 0))
    states -= counts.muon * FLOAT if setting.optimizer == "muon" else 0
    buckets = min(BUCKET, counts.trained) * FLOAT if zero and setting.devices > 1 else 0
    if zero:
        states /= share
    if setting.stage >= 2:
        gradients /= share
    if setting.stage == 3:
        weights /= share
    states *= not setting.offload_optimizer
    weights *= not setting.offload_parameters
    return Memory(int(weights), int(gradients), int(states), activations(counts, setting, config),
                  logits(counts, setting), int(buckets))


def activations(counts: Counts, setting: Setting, config: Any) -> int:
    """Of the layers, and of the last norm, where its weight learns."""
    size = HALF if setting.half else FLOAT
    around = 0 if counts.adapters else setting.tokens * counts.width * (2 * FLOAT + size)
    return around + activation_bytes(config, setting.tokens, half=setting.half, recompute=setting.recompute)


def logits(counts: Counts, setting: Setting) -> int:
    """A slice of logits; hidden states and their gradient; of a head that learns, its gradient twice."""
    size = HALF if setting.half else FLOAT
    rows, few = slice_rows(counts.vocabulary, size, "cpu")
    hidden = 2 * setting.supervised * counts.width * size
    slices = (min(setting.supervised, rows) * size + few * FLOAT * setting.half) * counts.vocabulary
    return hidden + slices + (2 * counts.head * FLOAT if counts.head_learns else 0)


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


def checkpoint_bytes(counts: Counts, *, zero: bool, half: bool) -> int:
    """On disk: the trained weights twice, two averages of AdamW, ZeRO's float32 masters."""
    return counts.trained * ((HALF if half else FLOAT) + 16 if zero else 4 * FLOAT)


# ---- what would fit --------------------------------------------------------------------------------------------------

def nearest(counts: Counts, setting: Setting, config: Any, room: int, *, rows: int, quantizable: int
            ) -> tuple[list[str], Memory] | None:
    """The smallest change that fits: first what costs time, then what costs a rebuild; null if nothing does.

    Args:
        counts: Of the model.
        setting: Of the run, which does not fit.
        config: The model's.
        room: Bytes of a device.
        rows: Of a micro-batch.
        quantizable: Frozen weights that could lie in 4 bits.
    """
    ways: list[Recompute] = ["none", "selective", "full"]
    stages = [setting.stage, *range(max(2, setting.stage + 1), 4)] if setting.devices > 1 else [setting.stage]
    offloads = [False] if setting.optimizer != "adamw" or counts.trained < counts.total // 4 else [False, True]
    for offload in offloads:
        for four_bits in (0, quantizable) if quantizable else (0,):
            for stage in stages:
                for size in [rows >> halved for halved in range(rows.bit_length())]:
                    for way in ways[ways.index(setting.recompute):]:
                        tried = replace(setting, stage=max(stage, 2) if offload else stage, recompute=way,
                                        tokens=setting.tokens * size // rows, offload_optimizer=offload,
                                        supervised=max(1, setting.supervised * size // rows))
                        found = memory(replace(counts, quantized=counts.quantized + four_bits), tried, config)
                        if found.total < room and not (four_bits and stage == 3):
                            return _changes(setting, tried, rows // size, bool(four_bits)), found
    return None


def _changes(before: Setting, after: Setting, fewer: int, four_bits: bool) -> list[str]:
    said = []
    if after.recompute != before.recompute:
        said.append("model.gradient_checkpointing: " + ("true" if after.recompute == "full" else after.recompute))
    if fewer > 1:
        said.append(f"data.batch_size / {fewer} and trainer.accumulate_grad_batches * {fewer} (the same step)")
    if after.offload_optimizer:
        said.append(f"trainer.strategy: deepspeed_stage_{after.stage}_offload")
    elif after.stage != before.stage:
        said.append(f"trainer.strategy: deepspeed_stage_{after.stage}")
    return said + (["--config configs/with/qlora.yaml"] if four_bits else [])
