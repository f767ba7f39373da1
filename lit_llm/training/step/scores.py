"""Score documents in `predict`, also if processes share each layer's weights.

Such processes must make the same number of forward passes, but their batches may have different numbers of documents,
and Lightning gives some of them one batch more. Before each batch they exchange the largest number of documents; a rank
with fewer, or without a batch, computes padding instead.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lit_llm.data.rows import padded
from lit_llm.system.private import lightning as private
from lit_llm.training.parallel import distribution

if TYPE_CHECKING:
    from lightning import Trainer

    from lit_llm.data.rows.loader import Batch
    from lit_llm.training.forward import Sums


class Module(Protocol):
    """The required interface of a module with a trainer."""

    @property
    def trainer(self) -> "Trainer":
        """The trainer."""

    @property
    def device(self) -> torch.device:
        """The device of this rank."""

    def plain_sums(self, batch: "Batch") -> "Sums":
        """Sums over the supervised tokens of a batch."""


def of_documents(module: Module, batch: object | None) -> dict[str, Tensor]:
    """Score each document of a batch. Collective where layers are gathered.

    Args:
        module: The module, in a predict step.
        batch: Packed or padded; null on a rank that has no batch left.

    Returns:
        (documents,) float64 `nll` in nats, and (documents,) `tokens`, the number of supervised tokens; empty if no rank
        has a document. `exp(nll / tokens)` is a document's perplexity.
    """
    parts = [] if batch is None else list(padded.documents(padded.packed(batch)))
    most = _most(module, len(parts))
    nll = [module.plain_sums(part).total.double() for part in parts]
    nothing = torch.zeros((1, 2), dtype=torch.int64, device=module.device)
    for _ in range(most - len(parts)):
        module.plain_sums(padded.as_batch({"input_ids": nothing, "attention_mask": nothing}))
    tokens = torch.tensor([part["num_supervised"] for part in parts])
    return {"nll": torch.stack(nll) if nll else torch.zeros(0), "tokens": tokens} if most else {}


def finish(module: Module) -> None:
    """Take part in the predict steps of the ranks that have batches left. Collective where layers are gathered."""
    while _gathers(module) and private.call_as_step(module.trainer.strategy, module, "predict_step", None, 0):
        pass


def _most(module: Module, count: int) -> int:
    """The largest of all ranks' numbers of documents; the own one where no layers are gathered."""
    if not _gathers(module):
        return count
    return int(module.trainer.strategy.reduce(torch.tensor(count, device=module.device), reduce_op="max"))


def _gathers(module: Module) -> bool:
    trainer = private.trainer_of(module)
    return (trainer is not None and trainer.world_size > 1
            and distribution.of(trainer.strategy).gathers_layers)
