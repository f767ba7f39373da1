"""Choose the next token ids from logits.

Stop strings are only stored here; `completion.Detokenizer` applies them to the text. Suffixes of names: B requests, V
vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llm.errors import InputError
from lit_llm.inference.constraint import Grammar
from lit_llm.system import ranges

if TYPE_CHECKING:
    from torch import Generator, Tensor

MAX_STOPS = 16
MAX_STOP_CHARS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one answer, validated on construction.

    Args:
        max_tokens: Maximum number of new tokens, including the stop token; null uses the remaining context.
        temperature: Divides the logits; 0 always picks the most likely token (greedy), 1 keeps the distribution.
        top_p: Keep the most likely tokens whose probabilities sum to this (arXiv:1904.09751); 1 keeps all.
        top_k: Keep this many most likely tokens; 0 keeps all.
        stop: The answer ends before the first of these strings, which is left out.
        seed: The same seed, prompt and settings give the same tokens, whatever else is running; null is random.
        grammar: A constraint on all tokens of the answer; the engine needs a factory for it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "temperature", "top_p"):
            _check(name, getattr(self, name))
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError("must be strings, none of them empty", where="stop")
        if len(self.stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in self.stop):
            raise InputError(f"give at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters", where="stop")

    @property
    def greedy(self) -> bool:
        """Whether sampling is deterministic; at lower temperatures the scaled logits would overflow."""
        return self.temperature < 1e-5


def next_ids(
    logits_BV: "Tensor", params: Sequence[SamplingParams], generators: Sequence["Generator | None"]
) -> "Tensor":
    """Sample one token id per request.

    Each row uses its own generator, so a seeded request gives the same tokens whatever else is running.

    Args:
        logits_BV: (B, V) float, the logits after each request's last token.
        params: B settings.
        generators: B random generators on the logits' device; None uses torch's global generator.

    Returns:
        (B,) int64.
    """
    import torch

    assert len(logits_BV) == len(params) == len(generators)
    ids = [
        logits_V.argmax() if setting.greedy
        else torch.multinomial(probabilities(logits_V, setting), 1, generator=generator).squeeze(0)
        for logits_V, setting, generator in zip(logits_BV, params, generators, strict=True)
    ]
    return torch.stack(ids)


def probabilities(logits_V: "Tensor", params: SamplingParams) -> "Tensor":
    """The distribution of a request: temperature, then top_k, then top_p, in transformers' order.

    Args:
        logits_V: (V,) float, any precision; computed in float32.
        params: Not greedy.

    Returns:
        (V,) float32, summing to 1; dropped tokens have exactly 0.

    >>> import torch
    >>> logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    >>> [round(value, 3) for value in probabilities(logits, SamplingParams(top_k=2)).tolist()]
    [0.625, 0.375, 0.0]
    >>> [round(value, 3) for value in probabilities(logits, SamplingParams(top_p=0.6)).tolist()]
    [0.625, 0.375, 0.0]
    """
    import torch

    assert not params.greedy, "a greedy request has no distribution"
    logits_V = logits_V.float() / params.temperature
    if 0 < params.top_k < logits_V.shape[-1]:
        least = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -math.inf)
    if params.top_p < 1:
        ordered, order = logits_V.sort(descending=False)
        # Drop the tail of unlikely tokens whose sum stays within 1 - top_p; the most likely token always stays.
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        tail[-1] = False
        logits_V = logits_V.masked_fill(torch.zeros_like(tail).scatter(0, order, tail), -math.inf)
    return logits_V.softmax(-1)


# ---- checks ----------------------------------------------------------------------------------------------------------

def _check(name: str, value: object) -> None:
    """Check that a number is within the range of its key; null is allowed where it is optional."""
    if value is None and name in ("max_tokens", "seed"):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"must be {ranges.of(f'chat.{name}')}, not {type(value).__name__}", where=name)
    ranges.check(f"chat.{name}", value, where=name)
