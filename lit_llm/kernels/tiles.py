"""Losses of a linear head without gradients, computed in tiles of tokens and vocabulary.

No token's logits are ever together, so memory grows neither with tokens nor with the vocabulary. What it gains is in
`cross_entropy.py`.

    N tokens, V vocabulary, D hidden, K trained rows of the head, M tiles of the vocabulary
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lit_llm.kernels import cross_entropy as fused
from lit_llm.kernels.cross_entropy import Head
from lit_llm.system.private import torch as torch_private

TILE = {"cpu": (512, 2048), "cuda": (4096, 16384)}          # tokens and vocabulary entries at a time


@torch.no_grad()
def measure(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(N,) losses in float64, and (N,) whether the target is argmax's choice.

    Without a gradient a token's logits are not needed together: tiles of some tokens and some vocabulary entries are
    each about as fast as a matrix product can be, and their maxima and sums are combined.
    """
    dtype, device = fused.computed_in(hidden_ND), hidden_ND.device
    hidden_ND = hidden_ND.to(dtype)                 # once, not for each tile
    wide = torch.promote_types(dtype, torch.float32)
    rows, words = TILE.get(device.type, TILE["cuda"])
    if head.index_K is not None and head.rows_KD is not None:
        head = head._replace(index_K=head.index_K.cpu(), rows_KD=head.rows_KD.to(dtype))
    room = min(rows, len(targets_N)) * min(words, len(head.weight_VD))
    work = torch.empty(room, dtype=wide, device=device)     # shared by all tiles: allocating is slow on a CPU
    product = work if wide == dtype or fused.keeps_sums(hidden_ND) else torch.empty_like(work, dtype=dtype)
    losses, hits = [], []
    with torch.autocast(device.type, enabled=False):
        for hidden, targets in zip(hidden_ND.split(8 * rows), targets_N.split(8 * rows), strict=True):
            summary = _Summary(targets, len(head.weight_VD), words, wide)
            for number, start in enumerate(range(0, len(head.weight_VD), words)):
                tile = _columns(head, start, start + words, dtype)
                for at in range(0, len(hidden), rows):
                    summary.add(_tile(hidden[at:at + rows], tile, work, product), number, at)
            losses.append(summary.losses())
            hits.append(summary.hits())
    return torch.cat(losses), torch.cat(hits)


def _tile(hidden: Tensor, head: Head, work: Tensor, product: Tensor) -> Tensor:
    """(n, m) logits, in `work` or not."""
    shape = len(hidden), len(head.weight_VD)
    made = _tile_product(hidden, head.weight_VD, product[:shape[0] * shape[1]].view(shape))
    logits = made if made.dtype == work.dtype else work[:made.numel()].view(shape).copy_(made)
    fused.adjust(logits, head)
    return logits


def _tile_product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`hidden @ weight.T`, in `out` or not.

    In float32 it uses oneDNN on a CPU: for tiles it is faster than MKL, which torch.mm uses (on Zen 4 205 against 135
    to 200 GFLOP/s), and as exact.
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and _has_onednn():
        return torch_private.fused_linear(hidden, weight)
    return fused.multiply(hidden, weight.T, out)


@cache
def _has_onednn() -> bool:
    """Whether this torch was built with oneDNN; the operator is what torch.compile makes of a linear layer.

    It allocates its own result. So that glibc keeps a tile's memory for the next one, a block of the largest size that
    it keeps is freed once; otherwise glibc may return memory after each tile, and the system zeroes the next one, which
    takes a fifth of the total time.
    """
    np.empty(2**25 - 2**16, np.uint8)
    return torch_private.has_fused_linear()


def _columns(head: Head, start: int, stop: int, dtype: torch.dtype) -> Head:
    """The part of a head for some vocabulary entries; `index_K` is on the host, if there is one."""
    weight = head.weight_VD[start:stop].to(dtype)
    if head.index_K is not None and head.rows_KD is not None:
        here = (head.index_K >= start) & (head.index_K < stop)
        if here.any():
            index, rows = (tensor.to(weight.device) for tensor in (head.index_K[here] - start, here.nonzero()[:, 0]))
            weight = weight.index_copy(0, index, head.rows_KD.index_select(0, rows))
    return Head(weight, None if head.bias_V is None else head.bias_V[start:stop], head.factor, head.cap)


class _Summary:
    """Combined results of the tiles for each token; there are M tiles of the vocabulary.

    Args:
        targets: (N,).
    """

    def __init__(self, targets: Tensor, vocabulary: int, words: int, dtype: torch.dtype) -> None:
        starts = torch.arange(0, vocabulary, words, device=targets.device)[:, None]
        self.of_target = targets // words
        self.at = (targets - starts).clamp_(min=0).minimum((vocabulary - starts).clamp_(max=words) - 1)     # (M, N)
        self.largest = torch.empty(self.at.shape, dtype=dtype, device=targets.device)
        self.likeliest, self.wanted = torch.empty_like(self.largest), torch.empty_like(self.largest)
        self.first = torch.zeros_like(self.at, dtype=torch.bool)

    def add(self, logits: Tensor, tile: int, start: int) -> None:
        """Add the logits of a tile for some tokens; they become probabilities within the tile."""
        tokens = slice(start, start + len(logits))
        at, largest, wanted = (tensor[tile, tokens] for tensor in (self.at, self.largest, self.wanted))
        torch.amax(logits, 1, out=largest)
        torch.gather(logits, 1, at[:, None], out=wanted[:, None])
        self.first[tile, tokens] = _is_first(logits, at, wanted == largest)
        # the largest probability is 1 / sum of exponentials: see fused._log_sum
        torch.amax(torch.softmax(logits, 1, out=logits), 1, out=self.likeliest[tile, tokens])

    def losses(self) -> Tensor:
        """(N,) float64 -log p of the targets."""
        return torch.logsumexp(self.largest.double() - self.likeliest.double().log(), 0) - self._of_target(self.wanted)

    def hits(self) -> Tensor:
        """(N,) whether the target is the argmax, which is the first of equal logits."""
        wanted, tiles = self._of_target(self.wanted), torch.arange(len(self.at), device=self.at.device)[:, None]
        better = (self.largest > wanted) | (self.largest == wanted) & (tiles < self.of_target)
        return self._of_target(self.first) & ~better.any(0)

    def _of_target(self, of_all: Tensor) -> Tensor:
        """(N,) the values of (M, N) in the target's tile."""
        return of_all.gather(0, self.of_target[None])[0]


def _is_first(logits: Tensor, at: Tensor, maybe: Tensor) -> Tensor:
    """(n,) whether argmax is `at`; computed only where possible, because argmax is slow on a CPU."""
    if logits.device.type != "cpu":
        return maybe & (logits.argmax(1) == at)
    among = maybe.nonzero()[:, 0]
    if len(among):
        maybe[among] = logits[among].argmax(1) == at[among]
    return maybe
