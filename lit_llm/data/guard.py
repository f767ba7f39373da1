"""Choose a run's guard documents: a bounded sample of text on which forgetting is measured while a run trains."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lit_llm.data.rows import packing as pack
from lit_llm.data.rows.corpus import Corpus, Store
from lit_llm.data.rows.loader import Batch, batch_of
from lit_llm.data.rows.packing import Packing, Rows, Segments
from lit_llm.data.rows.plan import Plan
from lit_llm.errors import InputError

TOKENS = 20_000                                     # default of data.guard_tokens
DOCUMENTS = 30                                      # documents from which an interval over documents holds its level
FEWEST = 5                                          # documents without which there is no interval
BLOCK = 1024                                        # sequences that are counted at a time

Draws = Sequence[tuple[Store, np.ndarray]]


def plan(draws: Draws, names: Sequence[str], *, seq_len: int, tokens: int, packing: Packing,
         made_of: dict[str, Any], stores: Sequence[Any] = ()) -> Plan:
    """The guard documents, packed.

    Each source gets an equal part of `tokens`. Its documents are taken in the order of the hashes of their content,
    which is random and does not depend on the order of files, and exact duplicates are left out. Of a document only the
    beginning is used, at most a thirtieth of the part, so that long documents do not leave fewer than thirty.

    Args:
        draws: Each store with the indices of its sequences.
        names: Paths of the sources.
        seq_len: Tokens per packed sequence.
        tokens: Largest number of supervised tokens.
        packing: Packing policy of the run; `concat` is not used.
        made_of: Identity of the data.
        stores: The token stores, for reports.

    Raises:
        InputError: There are too few documents for an interval.
    """
    whole, share = Corpus(draws, end=False, names=names), tokens // len(draws)
    longest = min(seq_len, max(2, share // DOCUMENTS + 1))      # the first token is context
    chosen = [_chosen(whole, number, share, longest) for number in range(len(draws))]
    if (count := sum(map(len, chosen))) < FEWEST:
        raise InputError(f"{count} different documents with supervised tokens are too few: the interval of a rise "
                         f"needs at least {FEWEST}, better {DOCUMENTS}", where="data.guard_sources",
                         fix="split text files into more documents (document: paragraph), or add sources")
    corpus = Corpus([(store, whole.index[indices]) for (store, _), indices in zip(draws, chosen, strict=True)],
                    end=False, names=names)
    rows = _rows(corpus, longest, seq_len, packing)
    notes = {"cut": int((corpus.lengths > longest).sum())}
    return Plan(corpus, rows, notes, made_of | {"data.guard_tokens": tokens}, stores)


def batches(plan: Plan, batch_size: int, token_bytes: np.ndarray, *, rank: int = 0, world: int = 1
            ) -> Iterator[tuple[np.ndarray, Batch]]:
    """Indices of the documents of each micro-batch of a rank, and the micro-batch, in which they follow each other.

    All ranks have the same number of micro-batches. They have no padding, except that a rank without a document gets
    two padding tokens, because all ranks must make the same collective calls.

    Args:
        plan: The guard documents.
        batch_size: Packed sequences per micro-batch and rank.
        token_bytes: As in `loader.RowLoader`.
        rank: This process, of `world`.
        world: Number of processes.
    """
    for number in range(0, len(plan.rows), world * batch_size):
        first = min(len(plan.rows), number + rank * batch_size)
        segments = plan.rows.take(np.arange(first, min(len(plan.rows), first + batch_size))).segments
        documents = [plan.corpus.read(sequence, 0, stop)
                     for sequence, stop in zip(segments.sequence.tolist(), segments.stop.tolist(), strict=True)]
        yield segments.sequence, batch_of([documents] if documents else [], seq_len=int(segments.lengths.sum()),
                                          pad_id=0, token_bytes=token_bytes)


def _chosen(corpus: Corpus, number: int, share: int, longest: int) -> np.ndarray:
    """Indices of one store's sequences whose beginnings have at most `share` supervised tokens together."""
    own = np.flatnonzero(corpus.store_of == number)
    _, first = np.unique(corpus.column("content")[own], return_index=True)
    order, taken, used = own[first], [], 0
    for at in range(0, len(order), BLOCK):
        part = order[at:at + BLOCK]
        counts = corpus.count(_beginnings(corpus.lengths[part], longest, part))
        part, counts = part[counts > 0], counts[counts > 0]
        ends = used + np.cumsum(counts)
        fitting = int(np.searchsorted(ends, share, side="right"))
        taken.append(part[:fitting])
        if fitting < len(part):
            break
        used = int(ends[-1]) if len(ends) else used
    return np.concatenate(taken or [own[:0]])


def _beginnings(lengths: np.ndarray, longest: int, sequence: np.ndarray) -> Segments:
    return Segments(sequence, np.zeros_like(lengths), np.minimum(lengths, longest))


def _rows(corpus: Corpus, longest: int, seq_len: int, packing: Packing) -> Rows:
    segments = _beginnings(corpus.lengths, longest, np.arange(len(corpus)))
    rows = pack.pack(segments, seq_len=seq_len, packing="none" if packing == "none" else "best_fit")
    return rows.counted(corpus.count(rows.segments))
