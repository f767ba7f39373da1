"""Find the rows of an embedding matrix that training has never separated.

Tokens that a corpus never contains are pushed away from every hidden state alike, so their rows become almost equal,
and no hidden state can distinguish such near-duplicates. With frozen rows such a token shares its probability with
hundreds of others (0.01 was measured for a stop token), whatever adapters learn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TWIN = 0.1  # share of the usual distance: duplicates are below 0.02, words above 0.16
USUAL = 0.99                                        # quantile, because a small corpus uses a small part of a vocabulary
SKETCH = 32                                         # dimensions of the random projection
NEAREST = 4                                         # projected neighbours whose exact distance is computed
SAMPLE = 2048                                       # rows that estimate the usual distance
BLOCK = 2**25                                       # distances in memory at a time


def untrained(matrix: Tensor, ids: Sequence[int]) -> list[int]:
    """The ids whose row was never trained: it nearly equals another row, the mean of all rows, or zero.

    Near-duplicates are closer than a tenth of the usual distance between rows. The mean is where transformers puts rows
    that are added later; such a token is never the most likely one. Untrained rows at random positions are not found,
    and need not be: they have no near-duplicate, so adapters can make them likely and distinguish them as inputs.

    Candidates are found in 32 random directions, which preserve distances within about a fifth, and then measured
    exactly: 20,000 ids among 150,000 rows take 15 seconds on one core.

    Args:
        matrix: (V, D) weight of an embedding or of an output head.
        ids: Token ids to check.
    """
    if not ids:
        return []
    matrix = matrix.detach()
    count, width = matrix.shape
    mean, low = _mean_and_sketch(matrix)
    sample = matrix[:: max(1, count // SAMPLE)].float()
    wanted = torch.tensor(list(ids), device=matrix.device)
    untrained_ids: list[Tensor] = []
    for part in wanted.split(max(1, BLOCK // max(count, NEAREST * width))):
        rows = matrix[part].float()
        away = torch.cdist(low[part], low)
        away[torch.arange(len(part)), part] = torch.inf          # itself
        near = away.topk(min(NEAREST, count), largest=False).indices
        exact = (matrix[near.flatten()].float().view(*near.shape, width) - rows[:, None]).norm(dim=2)
        exact = exact.masked_fill(near == part[:, None], torch.inf)
        usual = torch.cdist(rows, sample).kthvalue(max(1, int(USUAL * len(sample))), 1).values
        nearest = torch.stack([exact.amin(1), (rows - mean).norm(dim=1), rows.norm(dim=1)]).amin(0)
        untrained_ids.append(part[nearest < TWIN * usual])
    return [int(id_) for id_ in torch.cat(untrained_ids)]


def _mean_and_sketch(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(D) mean of the rows, and all rows projected to few random directions, without a float32 copy of the matrix.

    It uses float32 whatever torch's default dtype is: Lightning builds models under another one (`bf16-true`).
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
