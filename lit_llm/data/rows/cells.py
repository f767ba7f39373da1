"""Group the supervised tokens of a batch into cells, whose losses are summed for the figures of an evaluation.

A cell is what one document has in one answer at similar positions. The host knows all of it before the forward pass, so
the device only adds each token's loss to its cell:

    tokens    U u u A a a a | U u A a      U, A: a message begins, by the user and by the assistant
    position  0 1 2 3 4 5 6   0 1 2 3      number of tokens before it that the model sees
    answer          1 1 1 1       1 1
    cell            0 1 1 1       2 2      of document, answer, and position 2 to 3, or 4 to 7, ...
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_llm.data.rows.corpus import Corpus
from lit_llm.text.tokenizer import SPEAKERS

ASSISTANT = SPEAKERS.index("assistant")
COLUMNS = ("document", "source", "answer", "position", "tokens", "bytes", "characters")
SUFFIXES = re.compile(r"(\.[A-Za-z]\w{0,7})+$")


class Cells(NamedTuple):
    """The cells of a batch.

    Args:
        table: (C, 7) int64: `COLUMNS`. `document` is the number of the record in its source, `answer` counts the
            assistant's messages of a conversation from 1 and is 0 for other tokens, `position` is the exponent k of the
            positions 2^k to 2^(k+1) - 1. A cell may occur more than once.
        of_token: (N,) int64: the cell of each supervised token, in the order of the batch.
    """

    table: np.ndarray
    of_token: np.ndarray


def cells_of(corpus: Corpus, segments: Sequence[tuple[int, int, int]], sizes: np.ndarray) -> Cells:
    """The cells of some segments of a corpus.

    Args:
        corpus: The corpus.
        segments: (sequence, start, stop) of each, in the order of the batch.
        sizes: (4, V) bytes of a token and of a text's first one, and their characters (`Tokenizer.token_sizes`).
    """
    if not segments:
        return Cells(np.zeros((0, len(COLUMNS)), np.int64), np.zeros(0, np.int64))
    parts = [corpus.scored(*segment) for segment in segments]
    tokens = np.concatenate([part[0] for part in parts]).astype(np.int64)
    marks = np.concatenate([part[1] for part in parts])
    lengths = np.array([len(part[0]) for part in parts])
    segment, begins = np.repeat(np.arange(len(parts)), lengths), np.cumsum(lengths) - lengths
    position = np.arange(len(tokens)) - begins[segment]
    which = np.flatnonzero((marks & 1).view(bool) & (position > 0))
    is_answer = marks >> 1 == ASSISTANT
    starts = np.cumsum(is_answer & ~(np.append(False, is_answer[:-1]) & (position > 0)))
    answers = np.where(is_answer, starts - (starts - is_answer)[begins][segment], 0)
    bucket = np.frexp(position[which])[1] - 1
    first = (position[which] == 1) & (sizes[0][tokens[which - 1]] == 0)
    size, characters = (np.where(first, sizes[row + 1][tokens[which]], sizes[row][tokens[which]]) for row in (0, 2))
    keys = np.stack([segment[which], answers[which], bucket])
    edges = np.flatnonzero((np.diff(keys, axis=1, prepend=-1) != 0).any(axis=0))
    of_token = np.repeat(np.arange(len(edges)), np.diff(np.append(edges, len(which))))
    sequence = np.array([number for number, _, _ in segments])[keys[0, edges]]
    sums = [np.bincount(of_token, values, len(edges)) for values in (np.ones(len(which)), size, characters)]
    columns = [corpus.record_of(sequence), corpus.store_of[sequence], *keys[1:, edges], *sums]
    return Cells(np.stack(columns, axis=1).astype(np.int64), of_token)  # half precision would round other numbers


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Names of sources for metrics: the last part of each path without its suffix, longer where two would be equal.

    >>> short_names(["data/alpaca_zh.jsonl", "sample:base", "en/wiki.txt.gz", "zh/wiki.txt.gz", "zh/wiki.txt.gz"])
    ('alpaca_zh', 'base', 'en/wiki', 'zh/wiki', 'zh/wiki-2')
    """
    parts = [[SUFFIXES.sub("", part) or part for part in re.split(r"[/\\:]+", path) if part] or [path]
             for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(part[-size:]) for part, size in zip(parts, depth, strict=True)]
        counts = Counter(names)
        longer = [min(size + (counts[name] > 1), len(part))
                  for part, size, name in zip(parts, depth, names, strict=True)]
        if longer == depth:
            break
        depth = longer
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return tuple(unique)
