"""If this breaks: NEFTune adds too little noise to short documents of a packed sequence, adds noise in evaluation, or shifts
the labels.
"""

from itertools import pairwise

import pytest
import torch

from lit_llm.training.forward import noisy


def test_each_document_is_shaken_by_its_own_length():
    """Uniform within alpha / sqrt(L * D): its bound, its mean and its variance, document by document."""
    torch.manual_seed(0)
    borders, width, alpha = [0, 4, 5, 400, 1000], 64, 10.0
    embedded = torch.randn(1, borders[-1], width)
    noise = (noisy(embedded, torch.tensor(borders, dtype=torch.int32), alpha) - embedded)[0]
    for start, stop in pairwise(borders):
        part, bound = noise[start:stop], alpha / ((stop - start) * width) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound * 1.0001
        assert part.mean().abs() < 4 * bound / (3 * part.numel()) ** 0.5
        assert part.norm().item() == pytest.approx(alpha / 3 ** 0.5, rel=0.15)
