"""What the rest of training asks a strategy: what it splits over processes, and which parts of a step it does itself.

`of(trainer.strategy)` answers for every strategy. A strategy of this project inherits from `Distribution` beside
Lightning's class and overrides what differs from the answers given here, which are those of a strategy that keeps every
weight whole (one device, DDP). Strategies of Lightning's that split weights are answered for by `_Lightnings`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from lit_llm.errors import InputError

T = TypeVar("T")


class Distribution:
    """How a strategy distributes a model; also the answers of one that does not split it.

    Attributes:
        partitions_on_load: Weights are split while they are loaded, and gathered around the call of the module that
            they belong to (ZeRO-3). FSDP2 splits a model that was built whole.
        keeps_masters: Trained weights have float32 copies that the strategy keeps, and float16 has a loss scale.
        casts_weights: Weights are cast to the type of the forward pass; otherwise autocast does it.
        flattens_weights: The optimizer is given flat pieces of many weights rather than matrices.
        owns_gradients: The strategy measures the gradient, skips a step where it is not finite, and clips it; it sets
            `gradient_norm` and `step_skipped` of the module.
        writes_folders: The state of a checkpoint is a folder of one part for each process rather than a file.
    """

    partitions_on_load: bool = False
    keeps_masters: bool = False
    casts_weights: bool = False
    flattens_weights: bool = False
    owns_gradients: bool = False
    writes_folders: bool = False
    checkpoint_io: Any
    precision_plugin: Any

    @property
    def split_stage(self) -> int:
        """What is split over processes: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
        return 0

    @property
    def gathers_layers(self) -> bool:
        """Whether each layer's weights are gathered from all ranks when it is called, so that all must call it."""
        return self.split_stage == 3

    @property
    def offloads(self) -> tuple[bool, bool]:
        """Whether optimizer states, and whether weights, are kept in CPU memory."""
        return False, False

    @property
    def float16_scale(self) -> float | None:
        """What float16 multiplies the loss by and lowers when a gradient overflows; None where nothing is lowered."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The strategy that a name such as `fsdp2` means.

        Raises:
            InputError: The name says more, which nothing here reads.
        """
        known, _, more = name.partition("_")
        if more:
            raise InputError(f"no strategy is named '{name}'. Did you mean '{known}'?", where="trainer.strategy")
        return cls()

    def check_arguments(self) -> None:
        """Refuse arguments of the strategy that change nothing."""

    def shard(self, model: nn.Module, layers: Iterable[nn.Module], *, dtype: torch.dtype | None = None) -> None:
        """Split a model that all processes have built alike.

        Args:
            model: All of it.
            layers: Its decoder layers.
            dtype: Type of the forward pass where it differs from that of the weights; null is their own.
        """

    def gathered(self, model: nn.Module, compute: Callable[[], T]) -> T:
        """What `compute` gives while the weights outside the layers (embedding, last norm, head) are gathered."""
        return compute()

    def checkpoint_bytes(self, elements: int, itemsize: int) -> int:
        """Bytes of a trained weight in a checkpoint: its copy in safetensors, and in the state with AdamW's averages.

        Args:
            elements: Of the whole weight.
            itemsize: Bytes of an element.
        """
        return 4 * elements * itemsize

    def writers(self) -> list[tuple[Any, str]]:
        """(object, name of its method) that write files of a checkpoint between two barriers."""
        return [(self.checkpoint_io, "save_checkpoint"), (self, "save_checkpoint")]


class _Lightnings(Distribution):
    """The answers of a strategy of Lightning's own."""

    def __init__(self, strategy: Strategy) -> None:
        if isinstance(strategy, DeepSpeedStrategy):
            raise InputError("Lightning's DeepSpeedStrategy divides gradients by the accumulation twice and writes "
                             "checkpoints that cannot be resumed exactly", where="trainer.strategy",
                             fix="set it to deepspeed_stage_2, or to class_path: lit_llm.ZeroStrategy")
        self.checkpoint_io, self.precision_plugin = strategy.checkpoint_io, strategy.precision_plugin
        plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        self.writes_folders = not plain
        self._strategy, self._stage = strategy, 0 if plain else 3       # FSDP and tensor parallelism split weights

    @property
    def split_stage(self) -> int:
        return self._stage

    def writers(self) -> list[tuple[Any, str]]:
        return [(self.checkpoint_io, "save_checkpoint"), (self._strategy, "save_checkpoint")]


def of(strategy: Strategy) -> Distribution:
    """The answers of any strategy.

    Raises:
        InputError: It is Lightning's own DeepSpeedStrategy.
    """
    return strategy if isinstance(strategy, Distribution) else _Lightnings(strategy)
