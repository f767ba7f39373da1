"""The fixed rows on which an export is compared with the checkpoint: some of the run's validation data, else samples.

Only their fingerprint and their NLL are published with an export, never the rows themselves.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.text.conversation import Document

FILE = "validation_rows.jsonl"                      # in a run folder: token ids and which of them are supervised
EMBEDDED = "sample:documents_val.jsonl"
TOKENS, LONGEST = 3072, 512                         # of all rows, and of one
BYTES = 4 << 20                                     # of the file


class Row(NamedTuple):
    """Token ids, and of each whether its NLL counts."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows and their origin.

    Args:
        kind: `validation` data of the run, or `embedded` documents of this package.
        rows: The rows; each has at least one supervised token behind its first one.
    """

    kind: Literal["validation", "embedded"]
    rows: list[Row]

    @property
    def fingerprint(self) -> str:
        """sha256 over all ids and supervised tokens."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Supervised tokens that have a context."""
        return sum(sum(row.supervised[1:]) for row in self.rows)


def of(run: Path, tokenizer: Any, vocabulary: int, context: int) -> Rows:
    """Rows of the run's validation data, or embedded documents if it recorded none.

    Args:
        run: The run folder.
        tokenizer: Its tokenizer.
        vocabulary: Vocabulary size of the model.
        context: Positions of the model.
    """
    own = _bounded(_recorded(run / FILE), vocabulary, min(context, LONGEST))
    if own:
        return Rows("validation", own)
    return Rows("embedded", _bounded(_embedded(tokenizer), vocabulary, min(context, LONGEST)))


def _bounded(rows: Iterator[Row], vocabulary: int, longest: int) -> list[Row]:
    """Rows cut to `longest` tokens, `TOKENS` in total; those without a supervised token are left out."""
    chosen: list[Row] = []
    room = TOKENS
    for ids, supervised in rows:
        row = Row(ids[:min(longest, room)], supervised[:min(longest, room)])
        if any(row.supervised[1:]) and max(row.ids) < vocabulary:
            chosen.append(row)
            room -= len(row.ids)
        if room < 2:
            break
    return chosen


def _recorded(file: Path) -> Iterator[Row]:
    if not file.is_file() or file.stat().st_size > BYTES:
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            facts = json.loads(line)
            yield Row([int(id_) for id_ in facts["ids"]], [bool(flag) for flag in facts["supervised"]])
        except (ValueError, KeyError, TypeError):
            return                                  # the end of a file that was being written


def _embedded(tokenizer: Any) -> Iterator[Row]:
    with open(names.resolve(EMBEDDED), encoding="utf-8") as lines:
        for line in lines:
            try:
                ids = [int(id_) for id_ in tokenizer.encode_document(Document(json.loads(line)["text"])).input_ids]
            except InputError:                      # of a text that this tokenizer cannot encode
                continue
            yield Row(ids, [True] * len(ids))
