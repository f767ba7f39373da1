"""A request as an engine keeps it, and what computing it gave."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lit_llm.inference.constraint import Constraint
from lit_llm.inference.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """The whole state of a request.

    Args:
        name: The caller's name for it.
        ids: The prompt and the tokens generated so far.
        prompt_tokens: Tokens of the prompt.
        left: Tokens that it may still generate.
        params: How a token is drawn.
        generator: Draws them, if the request has a seed.
        constraint: Which tokens may come next, if the request has a grammar.
        state: Keys and values of the tokens that were read: a slot, or a cache of transformers.
    """

    name: str
    ids: list[int]
    prompt_tokens: int
    left: int
    params: SamplingParams
    generator: Any
    constraint: Constraint | None = None
    state: Any = None


class Answer(NamedTuple):
    """What a pass gave for one request: the (V,) logits after its last token, or the error that ends it."""

    request: Request
    logits: Tensor | None
    error: Exception | None = None
