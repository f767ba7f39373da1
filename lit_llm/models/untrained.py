"""Find the rows of an embedding matrix that training has never moved apart.

Tokens that a corpus never holds are pushed away from every hidden state alike, so their rows end in one heap: almost
the same row, again and again. No hidden state tells such twins apart. With frozen rows such a token shares its
probability with hundreds of others (0.01 was measured for a stop token), whatever adapters learn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TWIN = 0.1                                          # share of the usual distance: heaps lie below 0.02, words from 0.16
USUAL = 0.99                                        # quantile, since a small corpus uses a small part of a vocabulary
SKETCH = 32                                         # dimensions in which twins are looked for
NEAREST = 4                                         # neighbours there whose exact distance is measured
SAMPLE = 2048                                       # rows that tell the usual distance
BLOCK = 2**25                                       # distances in memory at a time


def untrained(matrix: Tensor, ids: Sequence[int]) -> list[int]:
    """Those of the ids whose row was never trained: it has a twin in another row, in the mean of all rows, or in zero.

    A twin is nearer than a tenth of the usual distance from that row to others. The mean is where transformers puts
    rows that are added later; what lies there is never the likeliest. Rows at random places are not found and need not
    be: they have no twin, so adapters can make them likely, and tell them apart where they are read.

    Twins are looked for in 32 random directions, which keep distances within a fifth or so, and then measured exactly:
    20,000 ids among 150,000 rows take a quarter of a minute on one core.

    Args:
        matrix: (V, D) weight of an embedding or of an output head.
        ids: Tokens in question.
    """
    if not ids:
        return []
    matrix = matrix.detach()
    count, width = matrix.shape
    mean, low = _mean_and_sketch(matrix)
    sample = matrix[:: max(1, count // SAMPLE)].float()
    wanted = torch.tensor(list(ids), device=matrix.device)
    found: list[Tensor] = []
    for part in wanted.split(max(1, BLOCK // max(count, NEAREST * width))):
        rows = matrix[part].float()
        away = torch.cdist(low[part], low)
        away[torch.arange(len(part)), part] = torch.inf          # itself
        near = away.topk(min(NEAREST, count), largest=False).indices
        exact = (matrix[near.flatten()].float().view(*near.shape, width) - rows[:, None]).norm(dim=2)
        exact = exact.masked_fill(near == part[:, None], torch.inf)
        usual = torch.cdist(rows, sample).kthvalue(max(1, int(USUAL * len(sample))), 1).values
        nearest = torch.stack([exact.amin(1), (rows - mean).norm(dim=1), rows.norm(dim=1)]).amin(0)
        found.append(part[nearest < TWIN * usual])
    return [int(id_) for id_ in torch.cat(found)]


def _mean_and_sketch(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(D) mean of the rows, and all rows in few random directions; half precision is never widened as a whole.

    In float32 whatever torch's default is: Lightning builds models under another one (`bf16-true`).
    """
    count, width = matrix.shape
    generator = torch.Generator().manual_seed(0)
    narrow = width <= SKETCH
    directions = torch.randn(width, SKETCH, generator=generator, dtype=torch.float32).to(matrix.device)
    mean, parts = torch.zeros(width, dtype=torch.float32, device=matrix.device), []
    for chunk in matrix.split(16384):
        rows = chunk.float()
        mean += rows.sum(0) / count
        parts.append(rows if narrow else rows @ directions)
    return mean, torch.cat(parts)
