"""Sums of micro-batches in; perplexity and its kin out, the same for any batch size, packing and number of ranks.

The home of torchmetrics. Its own `Perplexity` needs all logits and works in their precision (inf or 5 % off in
bf16): it is the oracle of our tests, on small float64 input.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_llm.system.private import others


class Perplexity(Metric):
    """Exact sums over supervised tokens: NLL in float64, counts in int64, added up over ranks.

    Reported by `report`:
        nll: nats per supervised token.
        perplexity: exp(nll), Jelinek et al. 1977.
        bits_per_byte: bits per UTF-8 byte of supervised text; comparable across tokenizers. Left out where the loader
            does not tell the bytes.
        token_accuracy: share of supervised tokens that were the likeliest prediction.
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
        """Add a micro-batch: its NLL sum in nats, its supervised tokens, their bytes, how many were predicted right."""
        # not in place: Lightning validates in inference mode, and a tensor made there cannot be changed in a later fit
        self.nll, self.correct = self.nll + nll.to(self.nll), self.correct + correct.to(self.correct)
        self.tokens, self.bytes = self.tokens + tokens, self.bytes + num_bytes

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> "Perplexity":
        """Follow the module to another device, but not to bf16: `bf16-true` converts every tensor of a module."""
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        super()._apply(move, exclude_state)
        return self

    def compute(self) -> Tensor:
        """Perplexity, () float64; nan where nothing was supervised."""
        return torch.exp(self.nll / self.tokens)

    def report(self) -> dict[str, float]:
        """All figures of this metric, synchronised over ranks; the collective call of every rank."""
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
