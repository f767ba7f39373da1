"""Choose the tokens whose embedding and head rows must be trained beside adapters, from the base and the data.

A base model has never seen the chat template, and possibly some words of the answers; the rows of such tokens are still
untrained (`untrained.py`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lit_llm.errors import InputError, did_you_mean
from lit_llm.models.untrained import untrained
from lit_llm.text.conversation import Conversation, Message

if TYPE_CHECKING:
    from lit_llm.data.rows.corpus import Occurrences
    from lit_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MOST = 4096                                         # trained rows: 268 MB in training at width 4,096
NAMED = 3                                           # tokens named in a message
PROBE = Conversation((Message("user", "x"), Message("assistant", "y"), Message("user", "z")))


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens whose rows are trained.

    Args:
        ids: Token ids in order.
        left: Number of untrained tokens beyond the limit, whose rows stay frozen.
        share: Share of the supervised tokens that they make up.
        whole: Whether all training data were counted.
    """

    ids: list[int]
    left: int = 0
    share: float = 0.0
    whole: bool = True


def choose(tokenizer: "Tokenizer", embedding: Tensor, head: Tensor, seen: "Occurrences | None", *,
           every_token: bool = False, chats: bool = True, new: int = 0) -> Choice:
    """Choose tokens of the training data and of chats that the base was never trained on.

    A token must be distinguishable as an input, so the embedding rows of all tokens of the data are checked; and it
    must be distinguishable as an output, so the head rows of supervised tokens are checked.

    Args:
        tokenizer: The tokenizer with its chat template.
        embedding: (V, D) embedding of the base.
        head: (V, D) head of the base, the same if tied.
        seen: Token counts of the training data; null without data.
        every_token: Whether all tokens are supervised, not only answers.
        new: Number of new rows at the end, all of which are trained.
        chats: Whether there are conversations, whose control tokens are needed even if no record contains them.
    """
    control = candidates(tokenizer) if chats else []
    size = min(len(embedding), len(head))
    read, supervised = (np.zeros(size, np.int64) for _ in range(2)) if seen is None else (seen.read, seen.supervised)
    read_ids = [int(id_) for id_ in sorted({*control, *np.flatnonzero(read[:size]).tolist()})]
    supervised_ids = {*np.flatnonzero(supervised[:size]).tolist(),
                *(id_ for id_ in control if every_token or id_ in tokenizer.stop_ids)}
    added = range(len(embedding) - new, len(embedding))
    lost = {*untrained(embedding, read_ids), *added}
    if head is not embedding:
        lost |= set(untrained(head, sorted(supervised_ids)))
    ranked = sorted(lost, key=lambda id_: (
        id_ not in control, -int(supervised[id_]), -int(read[id_]), id_ not in added, id_))
    ids = sorted(ranked[:MOST])
    total = max(1, int(supervised.sum()))
    return Choice(ids, len(ranked) - len(ids), float(supervised[ids].sum()) / total if ids else 0.0,
                  seen is None or seen.whole)


def candidates(tokenizer: "Tokenizer") -> list[int]:
    """Control tokens of the chat template."""
    try:
        written = tokenizer.encode_prompt(PROBE)
    except InputError:                              # a template that refuses this conversation
        written = list(tokenizer.stop_ids[:1])
    return sorted(set(written) & set(tokenizer.special_ids))


def named(tokenizer: "Tokenizer", spellings: str | Sequence[str]) -> list[int]:
    """Ids of tokens by their spelling.

    Raises:
        InputError: The tokenizer has no such token.
    """
    vocabulary = tokenizer.hf.get_vocab()
    spellings = [spellings] if isinstance(spellings, str) else spellings
    for spelling in spellings:
        if spelling not in vocabulary:
            spellings_of_control = [tokenizer.hf.convert_ids_to_tokens(id_) for id_ in sorted(tokenizer.special_ids)]
            raise InputError(f"the tokenizer has no token '{spelling}'.{did_you_mean(spelling, spellings_of_control)}",
                             where="model.lora.train_tokens", fix="auto chooses them, null trains none")
    return sorted({vocabulary[spelling] for spelling in spellings})


def report(tokenizer: "Tokenizer", choice: Choice, obstacle: str | None = None) -> None:
    """Log whether the rows of tokens that the base was never trained on are trained now, or why not."""
    ids = choice.ids
    names = _names(tokenizer, ids)
    were, are = ("were", "their rows are") if len(ids) > 1 else ("was", "its row is")
    share = f" ({choice.share:.1%} of the supervised tokens)" if choice.share else ""
    if not choice.whole:
        share = f" ({choice.share:.1%} of the supervised tokens in a part of the data)"
    if obstacle is None:
        left = (f"; {choice.left:,} rarer ones stay frozen, because at most {MOST:,} rows are trained"
                if choice.left else "")
        log.info("%s%s %s never trained in this base: %s trained with the adapters%s", names, share, were, are, left)
    else:
        log.warning("%s%s %s never trained in this base, and %s frozen, because %s: answers may not end, and these "
                    "tokens can hardly be learned", names, share, were, are, obstacle)


def _names(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    """Names of some of them, control tokens first, and the number of the others."""
    control = [id_ for id_ in ids if id_ in tokenizer.special_ids]
    ordered = control + [id_ for id_ in ids if id_ not in tokenizer.special_ids]
    shown = ordered if len(ordered) <= NAMED + 1 else ordered[:NAMED]
    names = [_spelled(tokenizer, id_) for id_ in shown]
    if rest := len(ordered) - len(shown):
        return f"{', '.join(names)} and {rest:,} other tokens"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _spelled(tokenizer: "Tokenizer", id_: int) -> str:
    """A control token as it is, text in quotes, a partial character as its token."""
    token = str(tokenizer.hf.convert_ids_to_tokens(id_))
    if id_ in tokenizer.special_ids:
        return token
    text = tokenizer.decode([id_])
    return repr(text) if text.strip() and text.isprintable() and "\ufffd" not in text else token
