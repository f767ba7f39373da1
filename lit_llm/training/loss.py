"""Compute the summed negative log-likelihood of labels from hidden states. Labels are shifted only here.

Logits are computed for a chunk of supervised tokens at a time, never for a whole batch.

    B rows, T tokens, V vocabulary, N supervised tokens, D hidden
"""

import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_llm.kernels import cross_entropy as fused
from lit_llm.kernels import switch, tiles
from lit_llm.models.adapters.trained_rows import TrainedRows, trained_rows
from lit_llm.text.tokenizer import IGNORE_INDEX
from lit_llm.training.parallel.shards import is_partitioned

CHUNK_BYTES = 64 * 2**20                            # of float32 logits at a time
CrossEntropy = Literal["fused", "cut_cross_entropy", "liger"]


class Nll(NamedTuple):
    """Sums over the supervised tokens of a micro-batch.

    Args:
        total: () float32 with a gradient in training, float64 without: nats.
        correct: () int64: tokens whose most likely prediction was right; zero in training, where it is not computed.
    """

    total: Tensor
    correct: Tensor


def shift(labels_T: Tensor) -> Tensor:
    """Targets for next-token prediction.

    labels   [-100  -100   11   12   13]      position i holds the token AT i
    targets  [-100    11   12   13 -100]      position i holds the token AFTER i

    >>> shift(torch.tensor([-100, -100, 11, 12, 13])).tolist()
    [-100, 11, 12, 13, -100]
    """
    return F.pad(labels_T[1:], (0, 1), value=IGNORE_INDEX)


def nll_sum(hidden_TD: Tensor, labels_T: Tensor, head: nn.Module, *, factor: float = 1.0, cap: float | None = None,
            per_token: bool = False, count: int | None = None, by: CrossEntropy = "fused") -> Nll:
    """Sum of -log p(token) over the supervised tokens.

    Args:
        hidden_TD: (T, D) output of the backbone for a flattened batch.
        labels_T: (T,) int64, unshifted; the first token of each packed document must be ignored, because it would be
            predicted from the previous document.
        head: The output embedding, (D) -> (V).
        factor: Multiplies the logits (see `anatomy.logit_adjustment`).
        cap: Soft cap of the logits.
        per_token: Return (N,) losses and, without gradients, (N,) whether each prediction was right, not their sums.
        count: N if known on the host; otherwise CUDA must synchronise.
        by: Kernels of the training loss (see `borrowed.py`); evaluation always uses this project's.
    """
    index_N, targets_N = supervised(labels_T, count)
    hidden_ND = hidden_TD.index_select(0, index_N)
    settings = (factor, cap, per_token, by)
    if any(map(is_partitioned, head.parameters())):
        return _in_one_call(hidden_ND, targets_N, head, *settings)
    rows = trained_rows(head)
    caller: Any = _WithRows(rows) if rows else head
    if not torch.is_grad_enabled():
        return _evaluate(hidden_ND, targets_N, caller, *settings)
    if not len(index_N):                            # only padding: no loss, but a graph on every rank
        return Nll(caller(hidden_TD[:1]).float().sum() * 0.0, torch.zeros_like(index_N.sum()))
    return _train(hidden_ND, targets_N, caller, *settings)


def supervised(labels_T: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """(N,) positions whose next token is supervised, and (N,) these tokens.

    Args:
        labels_T: (T,) int64, unshifted.
        count: N, if known on the host.
    """
    targets_T = shift(labels_T)
    which_T = targets_T != IGNORE_INDEX
    index_N = which_T.nonzero_static(size=count)[:, 0] if count is not None else which_T.nonzero()[:, 0]
    return index_N, targets_T.index_select(0, index_N)


def of_logits(logits_NV: Tensor, targets_N: Tensor, *, per_token: bool = False) -> Nll:
    """Sum of -log p(token) from the model's own logits; `per_token` as in `nll_sum`."""
    run = _train if torch.is_grad_enabled() else _evaluate
    return run(logits_NV, targets_N, nn.Identity(), 1.0, None, per_token, "fused")


def _in_one_call(hidden_ND: Tensor, targets_N: Tensor, head: nn.Module, *settings: Any) -> Nll:
    """Compute all chunks in a single call of a head that ZeRO-3 has sharded.

    ZeRO-3 gathers weights around each call of a module, also in backward, so all ranks must make the same calls in the
    same order; but they have different numbers of tokens and so of chunks. A rank with more calls would wait forever,
    or receive data of another collective, and gloo would abort with a size mismatch.
    """
    run = _train if torch.is_grad_enabled() else _evaluate
    whole = _Whole(head)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
        total, correct = run(hidden, targets_N, whole, *settings)
        return total, correct

    head.forward = forward
    try:
        return Nll(*head(hidden_ND))
    finally:
        del head.forward                            # restores the class's method


class _Whole:
    """A head whose weights are already gathered, called without the hooks that gather them."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.rows = head, _rows(head) if type(head) is nn.Linear else sys.maxsize

    def __call__(self, hidden: Tensor) -> Tensor:
        return type(self.head).forward(self.head, hidden)


class _WithRows:
    """A frozen linear head with some trained rows (`trained_rows.trained_rows`), without a copy of the matrix."""

    def __init__(self, trained: TrainedRows) -> None:
        self.head, self.index_K, self.rows_KD = trained.layer, trained.index, trained.rows
        self.out_features = self.head.out_features

    def __call__(self, hidden: Tensor) -> Tensor:
        bias = self.head.bias if self.head.bias is None else self.head.bias[self.index_K]
        return self.head(hidden).index_copy(-1, self.index_K, F.linear(hidden, self.rows_KD.to(hidden.dtype), bias))


def _train(hidden_ND: Tensor, targets_N: Tensor, head: Any, factor: float, cap: float | None, per_token: bool,
           by: CrossEntropy) -> Nll:
    zero = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    linear = _linear(head, factor, cap)
    if by != "fused" and not per_token:
        from lit_llm.kernels import borrowed

        return Nll(borrowed.nll(by, hidden_ND, targets_N, linear), zero)
    if linear is not None and not per_token and not switch.is_plain():
        return Nll(fused.nll(hidden_ND, targets_N, linear), zero)
    most = _rows(head)
    losses = [_chunk_nll(hidden, targets, head, factor, cap) if isinstance(head, _Whole) else
              checkpoint(_chunk_nll, hidden, targets, head, factor, cap, use_reentrant=False)
              for hidden, targets in zip(hidden_ND.split(most), targets_N.split(most), strict=True)]
    losses_N = torch.cat(losses)
    return Nll(losses_N if per_token else losses_N.sum(), zero)


def head_logits(hidden_ND: Tensor, head: nn.Module, *, factor: float = 1.0, cap: float | None = None) -> Tensor:
    """(N, V) float32 or wider logits of some hidden states, in one call of the head; see `nll_sum`."""
    rows = trained_rows(head)
    return _chunk_logits(hidden_ND, _WithRows(rows) if rows else head, factor, cap)


def as_matrices(head: nn.Module) -> fused.Head | None:
    """A head as plain matrices; null if it has an adapter."""
    rows = trained_rows(head)
    return _linear(_WithRows(rows) if rows else head, 1.0, None)


def _linear(head: Any, factor: float, cap: float | None) -> fused.Head | None:
    inner = getattr(head, "head", head)
    if type(inner) is not nn.Linear:
        return None
    rows = (head.index_K, head.rows_KD) if isinstance(head, _WithRows) else (None, None)
    return fused.Head(inner.weight, inner.bias, factor, cap, *rows)


def _chunk_logits(hidden: Tensor, head: Any, factor: float, cap: float | None) -> Tensor:
    logits = head(hidden).float() if hidden.dtype != torch.float64 else head(hidden)
    logits = logits * factor if factor != 1.0 else logits
    return torch.tanh(logits / cap) * cap if cap is not None else logits


def _chunk_nll(hidden: Tensor, targets: Tensor, head: Any, factor: float, cap: float | None) -> Tensor:
    return F.cross_entropy(_chunk_logits(hidden, head, factor, cap), targets, reduction="none")


def _evaluate(hidden_ND: Tensor, targets_N: Tensor, head: Any, factor: float, cap: float | None,
              per_token: bool, by: CrossEntropy) -> Nll:
    linear = _linear(head, factor, cap)
    if linear is not None and not switch.is_plain():
        losses_N, right_N = tiles.measure(hidden_ND, targets_N, linear)
        return Nll(losses_N, right_N) if per_token else Nll(losses_N.sum(), right_N.sum())
    losses, right = [hidden_ND.new_zeros(0, dtype=torch.float64)], [targets_N[:0] > 0]
    rows = _rows(head)
    for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        logits = _chunk_logits(hidden, head, factor, cap)
        losses.append(F.cross_entropy(logits, targets, reduction="none").double())
        right.append(logits.argmax(-1) == targets)
    losses_N, right_N = torch.cat(losses), torch.cat(right)
    return Nll(losses_N, right_N) if per_token else Nll(losses_N.sum(), right_N.sum())


def _rows(head: Any) -> int:
    """Tokens whose float32 logits fit into CHUNK_BYTES."""
    if isinstance(head, _Whole):
        return head.rows
    vocabulary = int(getattr(head, "out_features", 0) or getattr(head, "num_embeddings", 0) or 131072)
    return max(16, CHUNK_BYTES // (4 * vocabulary))
