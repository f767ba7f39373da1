"""Log-probabilities of tokens, from the log-softmax of the model's logits in float32.

Suffixes of names: T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TokenLogprob(NamedTuple):
    """A token with its log-probability.

    Args:
        token_id: The token.
        logprob: Its natural logarithm of the probability; null for the first token of a prompt, which has none.
        top: The most likely tokens at its place, as (token id, log-probability), the most likely first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits_TV: "Tensor", ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of tokens.

    Args:
        logits_TV: (T, V) float32, before each token.
        ids: T tokens.
        counts: T numbers of most likely tokens.

    >>> import torch
    >>> (token,) = logprobs(torch.tensor([[0.5, 0.25, 0.25]]).log(), [1], [1])
    >>> token.token_id, round(token.logprob, 3), [(id_, round(value, 3)) for id_, value in token.top]
    (1, -1.386, [(0, -0.693)])
    """
    import torch

    assert len(logits_TV) == len(ids) == len(counts)
    all_TV = logits_TV.log_softmax(-1)
    own = all_TV.gather(1, torch.tensor(ids, device=all_TV.device)[:, None])[:, 0].tolist()
    top = all_TV.topk(min(max(counts), all_TV.shape[1]), dim=-1)
    likely = [tuple(zip(ids, values, strict=True)) for ids, values in
              zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return [TokenLogprob(id_, logprob, alternatives[:count])
            for id_, logprob, alternatives, count in zip(ids, own, likely, counts, strict=True)]
