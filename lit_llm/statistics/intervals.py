"""Confidence intervals of ratios of sums over documents, such as nats per token, by a bootstrap over documents.

Tokens of one document are not independent, so documents (or conversations) are resampled, not tokens (Efron and
Tibshirani 1993, chapter 12). Percentile and BCa intervals of a ratio cover too rarely when lengths have a heavy tail:
of 600 evaluations on 30 documents with lognormal lengths (sigma 1) on which the loss depends, they covered 84 and 86 %,
not 95 %. So each resample is studentized by its own standard error (bootstrap-t). With 20 effective documents or more
it covers 93 to 97 %; below that less, and `Interval.is_reliable` is false. The tests simulate it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

ENOUGH = 20                                         # effective documents from which the coverage holds
FEWEST = 5                                          # documents without which there is no interval
GROUPS = 512                                        # more documents are first summed into this many random groups


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Args:
        low: Lower end.
        high: Upper end.
        documents: Number of documents.
        effective: Number of documents of equal size that would weigh as evenly: (sum b)^2 / sum b^2 of the
            denominators b (Kish). A few long documents among many short ones make it small.
    """

    low: float
    high: float
    documents: int = 0
    effective: float = 0.0

    @property
    def is_reliable(self) -> bool:
        """Whether there are enough documents for the stated level."""
        return self.effective >= ENOUGH


def ratio(numerators: ArrayLike, denominators: ArrayLike, *, seed: int = 0, samples: int = 2000,
          level: float = 0.95) -> Interval | None:
    """An interval of sum(numerators) / sum(denominators) over documents.

    Args:
        numerators: (N,) finite sums of each document, such as nats. If none is negative, the interval is not either.
        denominators: (N,) sums, not negative, such as tokens; documents where it is 0 are left out.
        seed: Seed of the resamples. The result is a function of the arguments, including the order of documents.
        samples: Resamples. The ends of a 95 % interval of 2,000 vary by about 2 % of its width between seeds.
        level: Probability that the interval contains the ratio of the population.

    Returns:
        The interval; null where none can be given: with fewer than five documents, if all have the same ratio (such
        as 0 correct tokens), or if a sum is not finite. Memory is bounded: at most 512 groups of documents are
        resampled, which takes some hundredths of a second for any number of documents.
    """
    top, bottom = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (numerators, denominators))
    if top.shape != bottom.shape:
        raise ValueError(f"{len(top)} numerators and {len(bottom)} denominators")
    top, bottom = top[bottom != 0], bottom[bottom != 0]
    documents = len(top)
    if documents < FEWEST or not (np.isfinite(top).all() and np.isfinite(bottom).all()) or (bottom < 0).any():
        return None
    effective = float(bottom.sum() ** 2 / np.square(bottom).sum())
    top, bottom = _grouped(top, bottom, seed)
    value = float(top.sum() / bottom.sum())
    _, (error,) = _ratios(np.ones((1, len(top))), top, bottom)
    if error <= 1e-12 * abs(value):
        return None
    values, errors = _ratios(_resamples(len(top), samples, seed), top, bottom)
    low, high = _studentized(values - value, errors, error, level) + value
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    return Interval(max(0.0, float(low)) if (top >= 0).all() else float(low), float(high), documents, effective)


def paired(numerators_a: ArrayLike, numerators_b: ArrayLike, denominators: ArrayLike, *, seed: int = 0,
           samples: int = 2000, level: float = 0.95) -> Interval | None:
    """An interval of (sum(a) - sum(b)) / sum(denominators): how much two models differ on the same documents.

    Far narrower than the intervals of both models, because most of their variation is that of the documents.

    Args:
        numerators_a: (N,) sums of each document by one model.
        numerators_b: (N,) those by the other one, in the same order.
        denominators: (N,) sums that both share, such as tokens.
        seed: As in `ratio`.
        samples: As in `ratio`.
        level: As in `ratio`.

    Returns:
        As `ratio`; from 0 to 0 if the models agree on each of five or more documents.
    """
    first, second, bottom = (np.asarray(values, dtype=np.float64).reshape(-1)
                             for values in (numerators_a, numerators_b, denominators))
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} documents of one model and {len(second)} of the other")
    same = len(first) == len(bottom) and np.isfinite(first).all() and (first == second).all()
    if same and (count := int((bottom > 0).sum())) >= FEWEST:
        return Interval(0.0, 0.0, count, float(bottom.sum() ** 2 / np.square(bottom).sum()))
    return ratio(first - second, bottom, seed=seed, samples=samples, level=level)


def _grouped(top: np.ndarray, bottom: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of at most GROUPS random groups; resampling groups estimates the same variance as resampling documents."""
    if len(top) <= GROUPS:
        return top, bottom
    group = np.random.default_rng([seed, len(top)]).permutation(len(top)) % GROUPS
    return np.bincount(group, top, GROUPS), np.bincount(group, bottom, GROUPS)


@lru_cache(maxsize=4)
def _resamples(documents: int, samples: int, seed: int) -> np.ndarray:
    """(samples, documents) float64: how often each document is drawn in each resample; at most 8 MB for 2,000."""
    drawn = np.random.default_rng([seed, documents, samples]).integers(documents, size=(samples, documents))
    drawn += np.arange(samples)[:, None] * documents
    counts = np.bincount(drawn.reshape(-1), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
    counts.flags.writeable = False                      # it is shared by all callers
    return counts


def _ratios(counts: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) the ratio of each resample, and (samples,) its linearized standard error (Cochran 1977, 6.4)."""
    documents = len(top)
    tops, bottoms, top2, both, bottom2 = (counts @ np.stack(
        [top, bottom, top * top, top * bottom, bottom * bottom], axis=1)).T
    values = tops / bottoms
    squares = np.maximum(top2 - 2 * values * both + values**2 * bottom2, 0.0)
    return values, np.sqrt(squares * documents / (documents - 1)) / bottoms


def _studentized(shifts: np.ndarray, errors: np.ndarray, error: float, level: float) -> np.ndarray:
    """(2,) the ends relative to the estimate: the wider of the equal-tailed and the symmetric bootstrap-t interval.

    The equal-tailed one covers too rarely where the distribution is skewed to the left, the symmetric one where it is
    skewed to the right. A resample without variation, such as one document drawn N times, has no standard error and
    counts as infinitely far.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(errors > 0, shifts / errors, np.copysign(np.inf, shifts))
    tail = (1 - level) / 2
    low, high = np.quantile(scores, [tail, 1 - tail], method="inverted_cdf")
    both = np.quantile(np.abs(scores), level, method="inverted_cdf")
    return np.array([-max(high, both), max(-low, both)]) * error
