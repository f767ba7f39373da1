"""Divide the loss of an optimizer step by the supervised tokens of all its micro-batches and ranks.

`RowLoader` knows their number when a step begins. A user's own DataLoader does not: there each micro-batch is divided
by the number of the window's first one, and the summed gradient is multiplied by `first / all` before the optimizer
reads it, which gives the same gradient exactly.
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
    """The accumulation window that a rank is in: its loss so far, and the counts of an own DataLoader."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)        # mean NLL, load balance of the routers
        self._first: int | None = None              # supervised tokens of the first micro-batch, over all ranks
        self._all = 0
        self._last = False

    def counted(self, batch: "Batch", trainer: L.Trainer, *, balance: bool) -> "Batch":
        """The batch with the numbers of its step, where its loader did not know them; a collective there.

        Args:
            batch: Of this rank.
            trainer: In a training step.
            balance: Whether the routers' load balance is trained, which is divided by another number.

        Raises:
            InputError: Micro-batches cannot be weighed afterwards.
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
        """Add a micro-batch to the step; its share of the loss, to go backward from.

        Lightning divides it by the micro-batches, and data parallelism averages it over ranks: both are undone here.

        Args:
            sums: What `CausalLMModule.sums` gives; an override may give an `Nll`, without a balance.
            batch: As `counted` gives it.
            trainer: In a training step.
            coefficient: Of the balance.
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
        """(2,) mean NLL and load balance of the step on this rank; the next step begins with zeros."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums * self._correction

    def correct(self, weights: Iterable[nn.Parameter]) -> None:
        """Multiply the gradients of a window that is complete by `first / all`, where they were divided by `first`."""
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
    """Refuse where the gradient of a window cannot be multiplied at its end."""
    answers = distribution.of(trainer.strategy)
    if answers.owns_gradients or answers.split_stage:
        raise InputError("this DataLoader does not tell how many supervised tokens a step has, and the gradient that "
                         "the strategy adds up cannot be divided by them afterwards",
                         where="trainer.accumulate_grad_batches",
                         fix="set it to 1, set trainer.strategy to auto or ddp, or use lit_llm.TextDataModule")
    if balance:
        raise InputError("the routers' load balance is divided by the tokens of a step, which this DataLoader does not "
                         "tell", where="trainer.accumulate_grad_batches",
                         fix="set it to 1, set model.router_aux_loss to 0, or use lit_llm.TextDataModule")
