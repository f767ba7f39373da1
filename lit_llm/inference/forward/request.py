"""A request as an engine keeps it, and what computing it gave."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lit_llm.inference.constraint import Constraint
from lit_llm.inference.logprobs import TokenLogprob, logprobs
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
        prompt_logprobs: Of the prompt's tokens from the second on, as far as they are read, if the request asks for it.
        adapter: The adapter that is applied to it; null is the base.
        state: Keys and values of the tokens that were read: a slot, or a cache of transformers.
    """

    name: str
    ids: list[int]
    prompt_tokens: int
    left: int
    params: SamplingParams
    generator: Any
    constraint: Constraint | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    adapter: str | None = None
    state: Any = None

    @property
    def needs_all_logits(self) -> bool:
        """Whether the logits after each token of the prompt are still needed, and not only after the last."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_tokens - 1

    def take(self, begin: int, logits_TV: Tensor) -> None:
        """Take the logits after the tokens of the prompt from `begin` on."""
        if begin == 0:
            self.prompt_logprobs.clear()            # it is read again
        ids = self.ids[begin + 1:min(begin + 1 + len(logits_TV), self.prompt_tokens)]
        if ids:
            self.prompt_logprobs += logprobs(logits_TV[:len(ids)], ids, [self.params.prompt_logprobs or 0] * len(ids))


class Answer(NamedTuple):
    """What a pass gave for one request: the (V,) logits after its last token, or the error that ends it."""

    request: Request
    logits: Tensor | None
    error: Exception | None = None
