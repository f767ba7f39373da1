"""Perplexity and related metrics from sums over micro-batches, independent of batch size, packing and number of ranks.

They use torchmetrics. Its own `Perplexity` needs all logits and computes in their precision (inf or 5 % off in bf16);
the tests use it as a reference on small float64 input.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_llm.system.private import others


class Perplexity(Metric):
    """Exact sums over supervised tokens: NLL in float64, counts in int64, summed over ranks.

    Reported by `report`:
        nll: nats per supervised token.
        perplexity: exp(nll), Jelinek et al. 1977.
        bits_per_byte: bits per UTF-8 byte of supervised text; comparable across tokenizers. Left out where the loader
            does not count bytes.
        token_accuracy: share of supervised tokens that were the most likely prediction.
        tokens: supervised tokens.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    bytes: Tensor
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "bytes", "correct"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: int, num_bytes: int, correct: Tensor) -> None:
        """Add a micro-batch: NLL sum in nats, supervised tokens, their bytes, and correct predictions."""
        # not in place: Lightning validates in inference mode, and a tensor made there cannot be changed in a later fit
        self.nll, self.correct = self.nll + nll.to(self.nll), self.correct + correct.to(self.correct)
        self.tokens, self.bytes = self.tokens + tokens, self.bytes + num_bytes

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "Perplexity":
        """Move to another device but keep the dtype: `bf16-true` would convert every tensor of a module."""
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        super()._apply(move, exclude_state)
        return self

    def compute(self) -> Tensor:
        """Perplexity, () float64; nan without supervised tokens."""
        return torch.exp(self.nll / self.tokens)

    def report(self) -> dict[str, float]:
        """All values of this metric, synchronised over ranks. Collective."""
        with self.sync_context(should_sync=others.is_synchronized(self)):
            states = (self.nll, self.tokens, self.bytes, self.correct)
            nll, tokens, num_bytes, correct = (state.item() for state in states)
        mean = nll / tokens if tokens else math.nan
        figures = {
            "nll": mean,
            "perplexity": math.inf if mean >= 700 else math.exp(mean),
            "bits_per_byte": nll / math.log(2) / num_bytes if num_bytes else math.nan,
            "token_accuracy": correct / tokens if tokens else math.nan,
            "tokens": float(tokens),
        }
        return {name: value for name, value in figures.items() if num_bytes or not tokens or name != "bits_per_byte"}
