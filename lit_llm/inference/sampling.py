"""Choose the next token ids from logits.

Stop strings are only stored here; `completion.Detokenizer` applies them to the text. Suffixes of names: B requests, V
vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llm.errors import InputError
from lit_llm.inference.constraint import Grammar
from lit_llm.system import ranges

if TYPE_CHECKING:
    from torch import Generator, Tensor

# Of the chat page, the terminal and all routes. With OpenAI's 1, small models ramble; with 0, they repeat themselves.
DEFAULT_TEMPERATURE = 0.7
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_IDS = 1024                                      # of stop_token_ids, and of logit_bias
LEAST_PENALTY = 1e-30                               # of repetition: logits divided by less would be infinite in float32
OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
NUMBERS = (*OPTIONAL, "top_k", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "min_tokens")


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
        min_p: Keep tokens whose probability is at least this share of the most likely token's (arXiv:2407.01082).
        repetition_penalty: Divides the positive logits of tokens that are in the prompt or the answer, and multiplies
            the negative ones, as in transformers (arXiv:1909.05858); 1 changes nothing.
        presence_penalty: Subtracted from the logits of tokens that are in the answer, as in OpenAI's API.
        frequency_penalty: The same, times the number of times that the token is in the answer.
        logit_bias: (token id, number added to its logit).
        stop_token_ids: Tokens that end the answer, besides the model's own; their text is left out.
        min_tokens: The answer does not end within this many tokens: tokens that end it are not drawn (unless the
            grammar allows no other), and stop strings have no effect there.
        ignore_eos: The model's own stop tokens do not end the answer.
        logprobs: With each token, its log-probability and those of this many most likely tokens. They are the model's,
            from the log-softmax of its logits before all of the above, as OpenAI and vLLM give them.
        prompt_logprobs: The same for the tokens of the prompt, which is read as a whole then.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    grammar: Grammar | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            _check(name, getattr(self, name))
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError("must be strings, none of them empty", where="stop")
        if len(self.stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in self.stop):
            raise InputError(f"give at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters", where="stop")
        for name in ("stop_token_ids", "logit_bias"):
            if len(getattr(self, name)) > MAX_IDS:
                raise InputError(f"give at most {MAX_IDS} tokens", where=name)
        for _, bias in self.logit_bias:
            _check("logit_bias", bias)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"{self.min_tokens} is more than max_tokens, {self.max_tokens}", where="min_tokens")

    @property
    def greedy(self) -> bool:
        """Whether sampling is deterministic; at lower temperatures the scaled logits would overflow."""
        return self.temperature < 1e-5

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes any logits."""
        return bool(self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty
                    or self.frequency_penalty or self.min_tokens)

    def check_ids(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            InputError: Located at the setting.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", [id_ for id_, _ in self.logit_bias])):
            if any(not isinstance(id_, int) or not 0 <= id_ < vocab_size for id_ in ids):
                raise InputError(f"token ids must be from 0 to {vocab_size - 1}", where=name)


def adjust(logits_V: "Tensor", params: SamplingParams, prompt: Sequence[int], answer: Sequence[int],
           stop_ids: Iterable[int]) -> None:
    """Change the logits of a request in place, in transformers' order: bias, penalties, stop tokens.

    Args:
        logits_V: (V,) float32.
        params: The settings.
        prompt: Tokens of the prompt.
        answer: Tokens generated so far.
        stop_ids: Tokens that end this answer.

    >>> import torch
    >>> logits = torch.tensor([4.0, 3.0, -2.0])
    >>> adjust(logits, SamplingParams(repetition_penalty=2, frequency_penalty=0.5), [0], [2, 2], ())
    >>> logits.tolist()
    [2.0, 3.0, -5.0]
    """
    import torch

    def indices(ids: Iterable[int]) -> "Tensor":
        return torch.tensor(list(ids), dtype=torch.int64, device=logits_V.device)

    if params.logit_bias:
        at = indices(id_ for id_, _ in params.logit_bias)
        logits_V.index_add_(0, at, logits_V.new_tensor([bias for _, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        at = indices({*prompt, *answer})
        old, penalty = logits_V[at], max(params.repetition_penalty, LEAST_PENALTY)
        logits_V[at] = torch.where(old < 0, old * penalty, old / penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        at, counts = indices(answer).unique(return_counts=True)
        logits_V[at] -= params.presence_penalty + params.frequency_penalty * counts
    if len(answer) < params.min_tokens:
        others = logits_V.index_fill(0, indices(stop_ids), -math.inf)
        if others.amax() > -math.inf:
            logits_V.copy_(others)


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
    """The distribution of a request: temperature, top_k, top_p and min_p, in transformers' order.

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
    if params.min_p > 0:
        shares = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(shares < params.min_p * shares.amax(), -math.inf)
    return logits_V.softmax(-1)


# ---- checks ----------------------------------------------------------------------------------------------------------

def _check(name: str, value: object) -> None:
    """Check that a number is within the range of its key; null is allowed where it is optional."""
    if value is None and name in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"must be {ranges.of(f'chat.{name}')}, not {type(value).__name__}", where=name)
    ranges.check(f"chat.{name}", value, where=name)
