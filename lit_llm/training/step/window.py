"""Divide the loss of an optimizer step by the supervised tokens of all its micro-batches and ranks.

This project's loader knows their number when a step begins. A user's own DataLoader does not, so each micro-batch is
divided by the number of the first one of its accumulation window, and the accumulated gradient is multiplied by
`first / all` before the optimizer uses it, which gives the same gradient.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor, nn

from lit_llm.errors import InputError
from lit_llm.system.private import lightning as private
from lit_llm.training.forward import Sums
from lit_llm.training.loss import Nll
from lit_llm.training.parallel import distribution

if TYPE_CHECKING:
    from lit_llm.data.rows.loader import Batch


class Window:
    """A rank's current accumulation window: the loss so far, and token counts if the loader does not know them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)        # mean NLL, load-balancing loss of the routers
        self._first: int | None = None              # supervised tokens of the first micro-batch, over all ranks
        self._all = 0                               # those of all micro-batches so far
        self._last = False                          # whether the current micro-batch is the last one

    def counted(self, batch: "Batch", trainer: L.Trainer, *, balance: bool) -> "Batch":
        """Add token counts to a batch whose loader does not know those of the step. Collective for such a batch.

        Args:
            batch: The micro-batch of this rank.
            trainer: The trainer within a training step.
            balance: Whether a load-balancing loss is trained, which is divided by all tokens of the step.

        Raises:
            InputError: The accumulated gradient cannot be rescaled at the end of the window.
        """
        if not batch.get("step_is_unknown"):
            return batch
        if trainer.accumulate_grad_batches > 1:
            _check(trainer, balance)
        count = torch.tensor([batch["num_supervised"], batch["num_tokens"]], device=batch["input_ids"].device)
        supervised, tokens = trainer.strategy.reduce(count, reduce_op="sum").tolist()
        self._first = max(1, supervised) if self._first is None else self._first
        self._all += supervised
        self._last = not private.accumulates(trainer)
        return {**batch, "num_supervised_in_step": self._first, "num_tokens_in_step": tokens,
                "last_in_step": self._last}

    def add(self, sums: Sums | Nll, batch: "Batch", trainer: L.Trainer, coefficient: float) -> Tensor:
        """Add a micro-batch to the window, and return its share of the step's loss for the backward pass.

        Lightning divides the loss by the number of micro-batches and data parallelism averages gradients over ranks, so
        the share is multiplied by both numbers.

        Args:
            sums: Result of `CausalLMModule.sums`; an override may return an `Nll`, which has no load balance.
            batch: Result of `counted`.
            trainer: The trainer within a training step.
            coefficient: Coefficient of the load-balancing loss.
        """
        nll, balance = sums.total, sums.balance if isinstance(sums, Sums) else None
        count = max(1, batch["num_supervised_in_step"])
        scale = trainer.accumulate_grad_batches * trainer.world_size
        parts, loss = [nll.detach().double() / count, torch.zeros_like(nll).double()], nll * (scale / count)
        if balance is not None:
            tokens = max(1, batch["num_tokens_in_step"])
            parts[1] = balance.detach().double() / tokens
            loss = loss + balance * (scale * coefficient / tokens)
        self._sums = self._sums.to(nll.device) + torch.stack(parts)
        return loss

    def taken(self) -> Tensor:
        """(2,) mean NLL and load-balancing loss of the step on this rank; resets both to zero."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums * self._correction

    def correct(self, weights: Iterable[nn.Parameter]) -> None:
        """Multiply the gradients of a complete window by `first / all` if they were divided by `first`."""
        if not self._last:
            return
        factor = self._correction
        for weight in weights if factor != 1.0 else ():
            if weight.grad is not None:
                weight.grad.mul_(factor)
        self._first, self._all, self._last = None, 0, False

    @property
    def _correction(self) -> float:
        return 1.0 if self._first is None else self._first / max(1, self._all)


def _check(trainer: L.Trainer, balance: bool) -> None:
    """Refuse settings with which the gradient of a window cannot be rescaled at its end."""
    strategy = distribution.of(trainer.strategy)
    if strategy.owns_gradients or strategy.split_stage:
        raise InputError("the DataLoader does not give the number of supervised tokens of a step, and gradients that "
                         "this strategy accumulates cannot be divided by it afterwards",
                         where="trainer.accumulate_grad_batches",
                         fix="set it to 1, set trainer.strategy to auto or ddp, or use lit_llm.TextDataModule")
    if balance:
        raise InputError("the load-balancing loss is divided by the number of tokens of a step, which the DataLoader "
                         "does not give", where="trainer.accumulate_grad_batches",
                         fix="set it to 1, set model.router_aux_loss to 0, or use lit_llm.TextDataModule")
