"""If this breaks: an interval excludes the truth more often than it says, or changes from one run to the next.

Oracles: simulated evaluations whose truth is computed from millions of documents, a plain resampling loop, and Student's t.
"""

import math

import numpy as np
import pytest

from lit_llm.statistics import intervals


def documents(kind, count, generator):
    """(nats, tokens) of documents with a heavy tail of lengths, on which the loss of a token depends."""
    noise, size = generator.normal(size=(2, count))
    tokens = np.maximum(1, np.round(np.exp(4.5 + 0.5 * size)))
    if kind == "longer is harder":
        return tokens * np.exp(0.8 + 0.1 * size + 0.3 * noise), tokens
    if kind == "longer is easier":
        return tokens * np.exp(0.8 - 0.2 * size + 0.3 * noise), tokens
    if kind == "some are far harder":
        return tokens * np.exp(0.1 * size) * (0.5 + generator.gamma(1.0, 1.0, size=count)), tokens
    share = 1 / (1 + np.exp(-(0.3 * size + 0.8 * noise)))       # correct tokens
    return generator.binomial(tokens.astype(int), share).astype(float), tokens


KINDS = ["longer is harder", "longer is easier", "some are far harder", "correct tokens"]


@pytest.fixture(scope="module", params=KINDS)
def truth(request):
    """A kind of documents, and its ratio in two million of them."""
    everything = documents(request.param, 2_000_000, np.random.default_rng(9))
    return request.param, everything[0].sum() / everything[1].sum()


@pytest.mark.parametrize("count", [30, 100, 300])
def test_coverage(truth, count):
    """93 to 97 % of 1,000 evaluations, give or take half of a standard error of that measurement."""
    kind, generator, hits = truth[0], np.random.default_rng(count), 0
    for _ in range(1000):
        interval = intervals.ratio(*documents(kind, count, generator), samples=600)
        hits += bool(interval.low <= truth[1] <= interval.high)
        assert interval.is_reliable or count == 30
    assert 927 <= hits <= 973


def resampled(top, bottom, samples, seed=1):
    """Ratios and standard errors of resamples, one document at a time."""
    generator, pairs = np.random.default_rng(seed), []
    for _ in range(samples):
        drawn = [int(generator.integers(len(top))) for _ in top]
        a, b = [top[place] for place in drawn], [bottom[place] for place in drawn]
        value = sum(a) / sum(b)
        pairs.append((value, math.sqrt(len(a) / (len(a) - 1) * sum((x - value * y) ** 2
                                                                   for x, y in zip(a, b, strict=True))) / sum(b)))
    return np.array(pairs).T


def test_against_a_plain_loop():
    top, bottom = documents("longer is harder", 40, np.random.default_rng(3))
    value = top.sum() / bottom.sum()
    error = math.sqrt(40 / 39 * ((top - value * bottom) ** 2).sum()) / bottom.sum()
    values, errors = resampled(top.tolist(), bottom.tolist(), 4000)
    scores = (values - value) / errors
    both = np.quantile(abs(scores), 0.95)
    want = (value - max(np.quantile(scores, 0.975), both) * error, value + max(-np.quantile(scores, 0.025), both) * error)
    interval = intervals.ratio(top, bottom, samples=20000)
    width = want[1] - want[0]
    assert (interval.low, interval.high) == pytest.approx(want, abs=0.05 * width)
    assert interval.documents == 40
    assert interval.effective == pytest.approx(bottom.sum() ** 2 / (bottom**2).sum())


def test_documents_of_one_size_and_normal_losses_are_the_textbooks_case():
    """Without a tail it is as wide as Student's interval."""
    losses = np.random.default_rng(5).normal(3.0, 0.5, size=60)
    interval = intervals.ratio(100 * losses, np.full(60, 100), samples=20000)
    half = 2.000995 * losses.std(ddof=1) / math.sqrt(60)        # Student's 97.5 % point of 59 degrees of freedom
    low, high = losses.mean() - half, losses.mean() + half
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_many_documents_are_summed_into_groups():
    """100,000 documents: the interval is that of the linearized standard error, in bounded memory."""
    top, bottom = documents("longer is easier", 100_000, np.random.default_rng(4))
    value = top.sum() / bottom.sum()
    error = math.sqrt(((top - value * bottom) ** 2).sum()) / bottom.sum()
    interval = intervals.ratio(top, bottom)
    assert interval.documents == 100_000
    assert interval.is_reliable
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.12)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_few_documents_have_no_interval(count):
    top, bottom = documents("longer is harder", count, np.random.default_rng(count))
    assert intervals.ratio(top, bottom) is None
    assert intervals.paired(top, top + 1.0, bottom) is None


def test_no_interval_is_better_than_a_wrong_one():
    tokens = np.arange(10, 60)
    assert intervals.ratio(np.zeros(50), tokens) is None                    # 0 correct: not "exactly 0 %"
    assert intervals.ratio(2.0 * tokens, tokens) is None
    assert intervals.ratio(np.where(tokens == 20, np.inf, 2.0), tokens) is None
    assert intervals.ratio(np.where(tokens == 20, np.nan, 2.0), tokens) is None
    assert intervals.ratio(np.ones(50), np.zeros(50)) is None
    one_book = np.r_[1_000_000, np.full(40, 10)]
    interval = intervals.ratio(one_book * np.linspace(1, 2, 41), one_book)
    assert interval is None or not interval.is_reliable


def test_documents_without_tokens_change_nothing():
    top, bottom = documents("longer is harder", 30, np.random.default_rng(0))
    more = intervals.ratio(np.r_[top, 0, 0], np.r_[bottom, 0, 0])
    assert more == intervals.ratio(top, bottom)
    assert more.documents == 30


def test_a_seed_gives_the_same_interval_and_level_its_width():
    top, bottom = documents("some are far harder", 80, np.random.default_rng(8))
    one = intervals.ratio(top, bottom)
    assert one == intervals.ratio(top, bottom)
    assert one != intervals.ratio(top, bottom, seed=1)
    narrow = intervals.ratio(top, bottom, level=0.5)
    assert one.low < narrow.low < top.sum() / bottom.sum() < narrow.high < one.high
    assert intervals.ratio(0.01 * top, bottom).low >= 0


def test_two_models_on_the_same_documents():
    """The documents vary by 1.5 nats a token, their difference by 0.02: only the paired interval shows it."""
    generator = np.random.default_rng(6)
    top, bottom = documents("some are far harder", 100, generator)
    other = top + bottom * (0.03 + 0.02 * generator.normal(size=100))
    interval = intervals.paired(other, top, bottom)
    assert 0.02 < interval.low < 0.03 < interval.high < 0.04
    assert interval == intervals.ratio(other - top, bottom)
    alone = intervals.ratio(top, bottom)
    assert interval.high - interval.low < 0.1 * (alone.high - alone.low)
    same = intervals.paired(top, top, bottom)
    assert (same.low, same.high) == (0, 0)
    with pytest.raises(ValueError, match="100 documents of one model and 99"):
        intervals.paired(top, top[1:], bottom)
