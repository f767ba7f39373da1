"""The interface of a module for the checks and the builder of its model; see `CausalLMModule`."""

from pathlib import Path
from typing import Any, Literal, Protocol

from lit_llm.models.quantize import Quantize
from lit_llm.models.recompute import Recompute
from lit_llm.training import optim
from lit_llm.training.forward import Way
from lit_llm.training.loss import CrossEntropy


class Module(Protocol):
    """A module's options, its trainer, and the model once it is built."""

    base: str | None
    init: dict[str, Any] | None
    peft_spec: Any
    start: str | None
    merge_start: bool
    train_tokens: Any
    trained_ids: list[int]
    saved_ids: list[int] | None
    vocabulary: int | None
    built_without_trainer: bool
    _trainer: Any
    quantize: Quantize | None
    lr: float
    warmup: float
    betas: tuple[float, float]
    schedule: optim.Schedule
    cooldown: float
    min_lr_share: float
    weight_decay: float
    optimizer: optim.Name
    gradient_checkpointing: bool | Literal["selective", "auto"]
    recompute: Recompute
    compile_layers: bool
    cross_entropy: CrossEntropy
    router_aux_loss: float | None
    neftune_alpha: float | None
    checkpoint: Path | None
    model: Any
    way: Way | None
    half_adapters: bool
    balance_coefficient: float

    @property
    def trainer(self) -> Any:
        """Lightning's trainer, or this project's."""

    @trainer.setter
    def trainer(self, trainer: Any) -> None: ...

    @property
    def why_unpacked(self) -> str:
        """Why documents are not packed; empty if they are."""

    def choose_attention(self, facts: dict[str, Any]) -> str | None:
        """Attention implementation of the layers; null is the model's default."""

    def keep_masters(self) -> None:
        """Keep trained weights in float32."""

    def _tokenizer_facts(self) -> dict[str, Any]: ...

    def _adapted(self, inner: Any) -> Any: ...

    def _choose_tokens(self, inner: Any) -> list[int]: ...
