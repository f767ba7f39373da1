"""Perplexity and related metrics from sums over micro-batches, independent of batch size, packing and number of ranks.

They use torchmetrics. Its own `Perplexity` needs all logits and computes in their precision (inf or 5 % off in bf16);
the tests use it as a reference on small float64 input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_llm.statistics.documents import figures
from lit_llm.system.private import others
from lit_llm.training.forward import Tokens
from lit_llm.training.step.breakdown import COLUMNS, Breakdown


class Perplexity(Metric):
    """Exact sums over supervised tokens: NLL in float64, counts in int64, summed over ranks.

    Reported by `report`:
        nll: nats per supervised token; `nll_low` and `nll_high` are its 95 % interval over documents
            (`statistics/intervals.py`), left out where there are too few.
        perplexity: exp(nll), Jelinek et al. 1977.
        bits_per_byte: bits per UTF-8 byte of supervised text; comparable across tokenizers. Left out where the loader
            does not count bytes.
        bits_per_character: bits per character, likewise.
        token_accuracy: share of supervised tokens that were the most likely prediction.
        tokens: supervised tokens.
        documents: documents and conversations; left out where the loader does not name them.
        nll/SOURCE: nats per supervised token of each source, if there are several.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    bytes: Tensor
    correct: Tensor
    cells: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "bytes", "correct"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("cells", [], dist_reduce_fx="cat")
        self.sources: list[str] = []                # names that the cells give by index
        self.breakdown: Breakdown | None = None     # of the last report; null if not every token is in a cell

    def update(self, nll: Tensor, tokens: int, num_bytes: int, correct: Tensor, cells: Tensor | None = None) -> None:
        """Add a micro-batch: NLL sum in nats, supervised tokens, their bytes, correct predictions, and `cells_of`."""
        # not in place: Lightning validates in inference mode, and a tensor made there cannot be changed in a later fit
        self.nll, self.correct = self.nll + nll.to(self.nll), self.correct + correct.to(self.correct)
        self.tokens, self.bytes = self.tokens + tokens, self.bytes + num_bytes
        if cells is not None:
            self.cells.append(cells)

    def cells_of(self, batch: Mapping[str, Any], tokens: Tokens | None) -> Tensor | None:
        """(C, 9) float64 sums of each cell of a batch (`breakdown.COLUMNS`); null if its loader describes no cells."""
        if tokens is None or "cells" not in batch:
            return None
        for name in batch["sources"]:
            if name not in self.sources:
                self.sources.append(name)           # on all ranks in the same order
        table, of_token = batch["cells"].to(tokens.nll.device), batch["cell_of_token"].to(tokens.nll.device)
        number = torch.tensor([self.sources.index(name) for name in batch["sources"]], device=table.device)
        sums = torch.zeros(2, len(table), dtype=torch.float64, device=table.device)
        sums[0].index_add_(0, of_token, tokens.nll.double())
        sums[1].index_add_(0, of_token, tokens.correct.double())
        return torch.cat([table[:, :1].double(), number[table[:, 1:2]].double(), table[:, 2:].double(), sums.T], 1)

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
        self.cells.append(self.nll.new_zeros(0, len(COLUMNS)))      # each rank has one to exchange
        with self.sync_context(should_sync=others.is_synchronized(self)):
            nll = float(self.nll)
            tokens, num_bytes, correct = (int(state) for state in (self.tokens, self.bytes, self.correct))
            cells: Any = self.cells
            table = torch.cat(list(cells)) if isinstance(cells, list) else cells
        values = figures(nll, tokens=tokens, bytes=num_bytes, characters=0, correct=correct)
        values.pop("bits_per_character", None)
        self.breakdown = Breakdown.of_cells(table.cpu().numpy(), self.sources, nll=nll, tokens=tokens)
        return values | (self.breakdown.headline() if self.breakdown else {})
