"""If this breaks: temperature, top_p or top_k mean something else here than in every other library, a seed repeats nothing,
or a mistyped setting is taken as if it were right. Oracle: transformers' own warpers.
"""

import math

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lit_llm.errors import InputError
from lit_llm.inference.sampling import SamplingParams, adjust, next_ids, probabilities

SETTINGS = [(1.0, 1.0, 0), (0.7, 1.0, 0), (2.0, 0.9, 0), (1.0, 0.5, 0), (1.0, 1.0, 5), (0.8, 0.9, 20), (1.0, 1e-6, 0),
            (1.0, 1.0, 1), (1.0, 1.0, 10_000), (1e-3, 0.95, 7)]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SETTINGS)
def test_distribution_is_transformers(temperature, top_p, top_k):
    torch.manual_seed(0)
    for logits in (torch.randn(100) * 3, torch.zeros(100), torch.tensor([5.0, 5.0, 1.0] + [-math.inf] * 97)):
        scores = logits[None]
        scores = TemperatureLogitsWarper(temperature)(None, scores) if temperature != 1 else scores
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        drawn_from = probabilities(logits, SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k))
        assert torch.equal(drawn_from, scores.softmax(-1)[0])


def test_low_precision_logits_are_drawn_in_float32():
    logits = torch.randn(50).bfloat16()
    drawn_from = probabilities(logits, SamplingParams(top_p=0.9))
    assert drawn_from.dtype == torch.float32
    assert torch.equal(drawn_from, probabilities(logits.float(), SamplingParams(top_p=0.9)))


def test_a_seed_gives_the_same_token_in_any_company():
    torch.manual_seed(1)
    logits = torch.randn(4, 200)
    params = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=9), SamplingParams(temperature=1.7)]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]

    together = next_ids(logits, params, generators())
    alone = [next_ids(logits[row : row + 1], [params[row]], [generators()[row]])[0] for row in range(4)]
    assert together.tolist() == [int(id_) for id_ in alone]
    assert together[1] == logits[1].argmax()
    assert together.dtype == torch.int64


def test_draws_follow_the_distribution():
    """10,000 draws against the probabilities: a chi-square far below its 1e-6 bound."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    params, generator = SamplingParams(temperature=0.9), torch.Generator().manual_seed(0)
    drawn = torch.stack([next_ids(logits[None], [params], [generator])[0] for _ in range(10_000)])
    expected = torch.softmax(logits.double() / 0.9, -1) * 10_000
    counts = torch.bincount(drawn, minlength=5)
    assert float(((counts - expected) ** 2 / expected).sum()) < 33.4        # chi-square, 4 degrees, p = 1e-6


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 5e-324])
def test_next_to_no_temperature_is_none(temperature):
    """Logits divided by it would be infinite, and no distribution."""
    logits = torch.tensor([[1.0, 3.0, 2.0]]) * 50
    assert next_ids(logits, [SamplingParams(temperature=temperature)], [None]).tolist() == [1]


@pytest.mark.parametrize("penalty", [1e-6, 1e-38, 5e-324])
def test_the_smallest_repetition_penalty_leaves_a_distribution(penalty):
    """Divided by it, a logit would be infinite, and the request would end with an error."""
    logits, params = torch.tensor([50.0, 30.0, 0.0, -30.0]), SamplingParams(repetition_penalty=penalty, temperature=0.01)
    adjust(logits, params, [0, 2, 3], [], ())
    assert logits.isfinite().all()
    assert next_ids(logits[None], [params], [None]).tolist() == [0]


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": math.nan}, {"temperature": math.inf},
    {"temperature": "hot"}, {"temperature": True}, {"top_p": 0}, {"top_p": 1.01}, {"top_k": -1}, {"top_k": 1.5},
    {"max_tokens": 0}, {"max_tokens": 2**31}, {"max_tokens": 10**4299}, {"max_tokens": 2.0}, {"seed": 2**63}, {"seed": "x"}, {"stop": ("",)}, {"stop": ["a"]},
    {"stop": ("x",) * 17}, {"stop": ("x" * 257,)},
])
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(InputError) as caught:
        SamplingParams(**wrong)
    assert caught.value.where == next(iter(wrong))
