"""A base and the tokenizer of its chats in, the control tokens whose rows of the embedding must learn out.

A base never saw the chat template, so the rows of its control tokens may lie where training left all that it never
used: in one heap. No hidden state tells such twins apart: with frozen rows a stop token shares its probability with
hundreds of them (0.01 was measured, at 98 % token accuracy), and answers do not end. Knows nothing of PEFT.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_llm.conversation import Conversation, Message
from lit_llm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from lit_llm.tokenizer import Tokenizer

log = logging.getLogger(__name__)
TWIN = 0.1                                          # share of the usual distance: heaps lie below 0.02, words above 0.3
USUAL = 0.99                                        # quantile, since a small corpus uses a small part of a vocabulary
PROBE = Conversation((Message("user", "x"), Message("assistant", "y"), Message("user", "z")))


def untrained(matrix: Tensor, ids: Sequence[int]) -> list[int]:
    """Those of the ids whose row was never trained: it has a twin in another row, in the mean of all rows, or in zero.

    A twin is nearer than a tenth of the usual distance from that row to others. The mean is where transformers puts
    rows that are added later; what lies there is never the likeliest. Rows at random places are not found and need not
    be: they have no twin, so adapters can make them likely.

    Args:
        matrix: (V, D) weight of an embedding or of an output head.
        ids: Tokens in question.
    """
    if not ids:
        return []
    matrix, place = matrix.detach(), torch.arange(len(ids))
    rows = matrix[list(ids)].float()
    parts, mean = [], torch.zeros_like(rows[0])
    for chunk in matrix.split(16384):               # half precision is never widened as a whole
        mean += chunk.float().sum(0) / len(matrix)
        parts.append(torch.cdist(rows, chunk.float()))
    away = torch.cat(parts, 1)
    usual = away.kthvalue(max(1, int(USUAL * len(matrix))), 1).values
    away[place, list(ids)] = torch.inf           # itself
    nearest = torch.stack([away.amin(1), (rows - mean).norm(dim=1), rows.norm(dim=1)]).amin(0)
    return [id_ for id_, twin in zip(ids, (nearest < TWIN * usual).tolist(), strict=True) if twin]


def to_train(tokenizer: "Tokenizer", embedding: Tensor, head: Tensor, *, every_token: bool = False) -> list[int]:
    """Control tokens of turns that must learn: not known where they are read, or lost among twins where they are said.

    Args:
        tokenizer: With the chat template in use.
        embedding: (V, D) of the base.
        head: (V, D), the same where they are tied.
        every_token: Whether all tokens are targets of training, and not only answers with their stop token.
    """
    ids = candidates(tokenizer)
    said = [id_ for id_ in ids if every_token or id_ in tokenizer.stop_ids]
    read = untrained(embedding, ids)
    return read if head is embedding else sorted({*read, *untrained(head, said)})


def candidates(tokenizer: "Tokenizer") -> list[int]:
    """Control tokens that the chat template writes around turns."""
    try:
        written = tokenizer.encode_prompt(PROBE)
    except InputError:                              # a template that wants another conversation
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
            known = [tokenizer.hf.convert_ids_to_tokens(id_) for id_ in sorted(tokenizer.special_ids)]
            raise InputError(f"the tokenizer has no token '{spelling}'.{did_you_mean(spelling, known)}",
                             where="model.lora.train_tokens", fix="auto chooses by itself, null trains none")
    return sorted({vocabulary[spelling] for spelling in spellings})


def say(tokenizer: "Tokenizer", ids: Sequence[int], obstacle: str | None = None) -> None:
    """One line on tokens that the base was never trained on: that their rows learn now, or why they do not."""
    *others, last = [tokenizer.hf.convert_ids_to_tokens(id_) for id_ in ids]
    names = f"{', '.join(others)} and {last}" if others else last
    were, are = ("were", "their rows are") if others else ("was", "its row is")
    if obstacle is None:
        log.info("%s %s never trained in this base: %s trained with the adapters", names, were, are)
    else:
        log.warning("%s %s never trained in this base, and %s frozen, since %s: answers may not end", names, were, are,
                    obstacle)
