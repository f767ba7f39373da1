"""Properties of strategies: what they shard over processes, and which parts of a step they do themselves.

`of(trainer.strategy)` returns them for any strategy. A strategy of this project inherits from `Distribution` and from
Lightning's class, and overrides the defaults, which describe a strategy that replicates all weights (one device, DDP).
`_Lightnings` describes Lightning's own strategies.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from lit_llm.errors import InputError

T = TypeVar("T")


class Distribution:
    """How a strategy distributes a model; the defaults are those of a strategy that does not shard it.

    Attributes:
        partitions_on_load: Weights are sharded while they are loaded, and each module's weights are gathered when it is
            called (ZeRO-3). FSDP2 shards a model that was built whole.
        keeps_masters: The strategy keeps float32 copies of trained weights, and scales the loss in float16.
        casts_weights: Weights are cast to the dtype of the forward pass; otherwise autocast does it.
        flattens_weights: The optimizer gets flat shards of concatenated weights instead of matrices.
        owns_gradients: The strategy measures and clips the gradient and skips a step if it is not finite; it sets
            `gradient_norm` and `step_skipped` of the module.
        writes_folders: The state in a checkpoint is a folder with a part for each process, not a file.
        library_config: The config of the strategy's own library (DeepSpeed), as it is before Lightning adds keys.
        loss_scale_arguments: Arguments of the strategy for the loss scale of float16, by name.
    """

    partitions_on_load: bool = False
    keeps_masters: bool = False
    casts_weights: bool = False
    flattens_weights: bool = False
    owns_gradients: bool = False
    writes_folders: bool = False
    library_config: Mapping[str, Any] | None = None
    loss_scale_arguments: Mapping[str, object] = MappingProxyType({})
    checkpoint_io: Any
    precision_plugin: Any

    @property
    def split_stage(self) -> int:
        """What is sharded: 0 nothing, 1 optimizer states, 2 gradients as well, 3 weights as well."""
        return 0

    @property
    def gathers_layers(self) -> bool:
        """Whether each layer's weights are gathered from all ranks at its call, so that all ranks must call it."""
        return self.split_stage == 3

    @property
    def offloads(self) -> tuple[bool, bool]:
        """Whether optimizer states, and whether weights, are kept in CPU memory."""
        return False, False

    @property
    def configured_stage(self) -> object:
        """The ZeRO stage in the config of the strategy's library, which may be wrong; null if there is none."""
        return ((self.library_config or {}).get("zero_optimization") or {}).get("stage")

    @property
    def float16_scale(self) -> float | None:
        """The loss scale of float16, which is lowered when a gradient overflows; None without one."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The strategy for a name such as `fsdp2`.

        Raises:
            InputError: The name has a suffix, which this strategy does not support.
        """
        base_name, _, suffix = name.partition("_")
        if suffix:
            raise InputError(f"no strategy is named '{name}'. Did you mean '{base_name}'?", where="trainer.strategy")
        return cls()

    def check_arguments(self) -> None:
        """Refuse arguments of the strategy that have no effect."""

    def shard(self, model: nn.Module, layers: Iterable[nn.Module], *, dtype: torch.dtype | None = None) -> None:
        """Shard a model that every process has built.

        Args:
            model: The whole model.
            layers: Its decoder layers.
            dtype: Dtype of the forward pass, if it differs from that of the weights.
        """

    def gathered(self, model: nn.Module, compute: Callable[[], T]) -> T:
        """Call `compute` while the weights outside the layers (embedding, last norm, head) are gathered."""
        return compute()

    def checkpoint_bytes(self, elements: int, itemsize: int) -> int:
        """Bytes of a trained weight in a checkpoint: in safetensors, and in the state with AdamW's two averages.

        Args:
            elements: Number of elements of the whole weight.
            itemsize: Bytes per element.
        """
        return 4 * elements * itemsize

    def writers(self) -> list[tuple[Any, str]]:
        """Methods that write files of a checkpoint between two barriers, as (object, name of the method)."""
        return [(self.checkpoint_io, "save_checkpoint"), (self, "save_checkpoint")]


class _Lightnings(Distribution):
    """The properties of a strategy of Lightning's own."""

    def __init__(self, strategy: Strategy) -> None:
        if isinstance(strategy, DeepSpeedStrategy):
            raise InputError("Lightning's DeepSpeedStrategy divides gradients by the accumulation twice and writes "
                             "checkpoints that cannot be resumed exactly", where="trainer.strategy",
                             fix="set it to deepspeed_stage_2, or to class_path: lit_llm.ZeroStrategy")
        self.checkpoint_io, self.precision_plugin = strategy.checkpoint_io, strategy.precision_plugin
        plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        self.writes_folders = not plain
        self._strategy, self._stage = strategy, 0 if plain else 3       # FSDP and tensor parallelism shard weights

    @property
    def split_stage(self) -> int:
        return self._stage

    def writers(self) -> list[tuple[Any, str]]:
        return [(self.checkpoint_io, "save_checkpoint"), (self._strategy, "save_checkpoint")]


def of(strategy: Strategy) -> Distribution:
    """The properties of any strategy.

    Raises:
        InputError: It is Lightning's own DeepSpeedStrategy.
    """
    return strategy if isinstance(strategy, Distribution) else _Lightnings(strategy)
