"""A memory-mapped folder of token sequences that is written once.

The folder gets its final name by one rename, so it is either complete or absent: safe against kill -9 and against a
second process. `encode.py` builds the blocks that are appended here; `prepare.py` decides when.

    tokens.bin      uint16 or uint32, all sequences concatenated
    marks.bin       uint8, bit 0: the token is supervised; higher bits: index of its speaker in SPEAKERS
    sequences.bin   one SEQUENCE each: offset, kind, record
    meta.json       files, counts; quarantine.jsonl has the records that were set aside
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm import disk
from lit_llm.data.records.jsonfile import parse_line
from lit_llm.data.records.record import Place
from lit_llm.data.tokens.encode import DOCUMENTS, SEQUENCE, Block
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import SPEAKERS

WRITTEN = 1 << 20                                       # tokens that are written at a time
MANY = 100                                              # distinct reasons and notes
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
CONTROLS |= {code: "\ufffd" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}   # they reorder text
LONGEST = int(np.iinfo("<i4").max)                      # tokens of a sequence


@dataclass
class Report:
    """Counts of a source's records. `read` = `kept` + dropped; tokens are those of kept records."""

    source: str
    read: int = 0
    kept: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)       # reason -> count, first place
    quarantined: int = 0
    marks: list[int] = field(default_factory=lambda: [0] * 2 * len(SPEAKERS))
    stopless: int = 0                                   # conversations without a supervised stop token
    cleaned: int = 0                                    # records whose white space was cleaned
    double_bos: int = 0                                 # sequences that begin with two BOS tokens
    notes: dict[str, int] = field(default_factory=dict)         # other notes -> records
    mended: dict[str, int] = field(default_factory=dict)        # corrections -> files
    fixes: dict[str, str] = field(default_factory=dict)         # reason -> advice

    def drop(self, reason: str, place: str, fix: str = "") -> None:
        """Count a dropped record; reasons quote records, so their number is limited."""
        reason = reason.translate(CONTROLS)
        if reason not in self.dropped and len(self.dropped) >= MANY:
            reason = "other reasons"
        count, first = self.dropped.get(reason, (0, place))
        self.dropped[reason] = (count + 1, first)
        if fix and reason != "other reasons":
            self.fixes.setdefault(reason, fix.translate(CONTROLS))

    def refuse_flood(self, limit: float, fix: str) -> None:
        """Raise if a larger share than `limit` of the records read so far was set aside."""
        if self.quarantined > limit * self.read:
            reason, (count, first) = max(self.dropped.items(), key=lambda item: item[1][0])
            raise InputError(f"{self.quarantined:,} of {self.read:,} records are bad, more than the limit of "
                             f"{limit:.1%}; {count:,} of them: {reason} (first at {first})", where=self.source,
                             fix=" ".join(filter(None, (self.fixes.get(reason), fix))))

    def refuse_nothing(self) -> None:
        """Raise if there was no record, or none that could be kept."""
        if not self.read:
            raise InputError("no record found: the source is empty or has only blank lines", where=self.source)
        if not self.kept:
            reason, (count, first) = next(iter(self.dropped.items()))
            raise InputError(f"no record of {self.read} could be kept: {reason} ({count} times)",
                             where=first or self.source, fix=self.fixes.get(reason, ""))

    @property
    def noted(self) -> dict[str, int]:
        """Descriptions of corrections and oddities -> counts, without zeros."""
        counts = {"cleaned": self.cleaned, **{f"files: {name}": count for name, count in self.mended.items()},
                  **{f"records: {name}": count for name, count in self.notes.items()},
                  "conversations without a supervised stop token": self.stopless,
                  "sequences begin with two BOS tokens": self.double_bos}
        return {name: count for name, count in counts.items() if count}

    @property
    def speakers(self) -> dict[str, tuple[int, int]]:
        """Speaker -> (tokens, supervised tokens)."""
        pairs = zip(SPEAKERS, self.marks[::2], self.marks[1::2], strict=True)
        return {name: (others + supervised, supervised) for name, others, supervised in pairs if others + supervised}


class TokenStore:
    """An open store: memory-mapped arrays.

    Args:
        folder: The folder that `prepare` wrote.

    Raises:
        InputError: A file is missing or has another size than when it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, folder.name
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.files: list[str] = meta["files"]
            self.unit: str = meta["unit"]
            self.report = Report(**meta["report"])
            dtype = np.dtype(meta["dtype"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError("meta.json is missing or cannot be read", where=str(folder)) from None
        self.tokens = _mapped(folder / "tokens.bin", dtype, self.report.tokens)
        self.marks = _mapped(folder / "marks.bin", np.dtype("u1"), self.report.tokens)
        self.sequences = _mapped(folder / "sequences.bin", SEQUENCE, self.report.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    def place(self, sequence: int) -> str:
        """Place of the record of a sequence."""
        row = self.sequences[sequence]
        return str(Place(self.files[row["file"]], int(row["number"]), self.unit))


# ---- writing ---------------------------------------------------------------------------------------------------------

class Writer:
    """Appends blocks to the files of a store.

    Args:
        folder: An existing, empty folder.
        name: Name of the source, for the report.
        dtype: Dtype of the tokens.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.files: dict[str, int] = {}
        self.report, self.unit = Report(name), "line"
        self._open: np.ndarray | None = None            # entry of a document whose end has not been read yet
        self._streams = [(folder / name).open("wb") for name in ("tokens.bin", "marks.bin", "sequences.bin")]

    def add(self, new: Block, items: Sequence[tuple[Any, Place]], begins: Sequence[bool]) -> None:
        """Append a block.

        Args:
            new: The arrays.
            items: The records of the block with their places.
            begins: Which of them begin a record; the others continue one.
        """
        self.unit = items[-1][1].unit
        for number, reason in new.faults:
            record, place = items[number]
            if isinstance(reason, InputError):
                self._quarantine(reason, record, place)
            else:
                self.report.drop(reason, str(place))
        rows = new.rows.copy()
        rows["offset"] += self.report.tokens
        files = [self.files.setdefault(place.path, len(self.files)) for _, place in items]
        numbers = [place.number for _, place in items]
        at = rows["number"]
        rows["record"] = self.report.read + np.cumsum(begins)[at]
        rows["file"], rows["number"] = np.take(files, at), np.take(numbers, at)
        self.report.read += sum(begins)
        self.report.kept += sum(begins) - len(new.faults)
        self.report.tokens += len(new.tokens)
        self.report.supervised += int(new.rows["supervised"].sum())
        self.report.stopless += new.stopless
        self.report.double_bos += new.double_bos
        self.report.cleaned += new.cleaned
        _count(self.report.notes, new.notes)
        for (_, place), begin in zip(items, begins, strict=True):
            if begin and place.notes:
                _count(self.report.mended, dict.fromkeys(place.notes, 1))
        for start in range(0, len(new.marks), WRITTEN):     # np.bincount uses eight bytes for each
            counts = np.bincount(new.marks[start:start + WRITTEN], minlength=len(self.report.marks))
            self.report.marks = (counts + self.report.marks).tolist()
        rows = self._joined(rows, new.unbroken, str(items[-1][1]))
        self.report.sequences += len(rows)
        for stream, array in zip(self._streams, (new.tokens, new.marks, rows), strict=True):
            for start in range(0, len(array), WRITTEN):
                stream.write(array[start:start + WRITTEN].tobytes())
        if new.faults and new.faults[-1][0] == len(items) - 1 and not begins[-1]:
            self._forget()

    def _forget(self) -> None:
        """Remove the written part of a document that cannot be read further."""
        assert self._open is not None
        offset, length = int(self._open["offset"]), int(self._open["length"])
        self.report.tokens -= length
        self.report.supervised -= int(self._open["supervised"])
        self.report.marks[int(DOCUMENTS[0]) << 1 | 1] -= length
        for stream, size in zip(self._streams, (self.dtype.itemsize, 1), strict=False):
            stream.truncate(offset * size)
            stream.seek(offset * size)
        self._open = None

    def _joined(self, rows: np.ndarray, unbroken: np.ndarray | None, place: str) -> np.ndarray:
        """Entries of sequences that are complete now; parts of one document become one entry."""
        if unbroken is None:
            return rows
        complete = []
        for row, (first, last) in zip(rows, unbroken, strict=True):
            if first:
                self._open = row.copy()
            else:
                assert self._open is not None
                if int(self._open["length"]) + int(row["length"]) > LONGEST:
                    raise InputError(f"a document has more than {LONGEST:,} tokens", where=place, fix="Put a line "
                                     "<|endoftext|> between its documents, or set `document: paragraph` or `line`.")
                self._open["length"] += row["length"]
                self._open["supervised"] += row["supervised"]
                self._open["content"] = (int(self._open["content"]) * 1000003 ^ int(row["content"])) % 2**64
                self._open["ended"] = row["ended"]
            if last:
                complete.append(self._open)
        return np.array(complete, dtype=SEQUENCE)

    def _quarantine(self, error: InputError, record: object, place: Place) -> None:
        self.report.drop(error.what[:120], error.where, error.fix)
        self.report.quarantined += 1
        line: dict[str, Any] = {"where": error.where, "reason": error.what, **({"fix": error.fix} if error.fix else {})}
        if isinstance(record, bytes):
            record = parse_line(record, Path(place.path), place.number)
        if isinstance(record, dict | str):              # parts of long documents are not copied
            line["record"] = record
        with (self.folder / "quarantine.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        """Write meta.json and flush all files to disk."""
        meta = {"dtype": self.dtype.str, "files": list(self.files), "unit": self.unit, "report": asdict(self.report)}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        for stream in self._streams:
            stream.close()
        for path in self.folder.iterdir():
            disk.sync(path)
        disk.sync(self.folder)


def _count(into: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        name = name.translate(CONTROLS)
        if name in into or len(into) < MANY:            # a hostile file may have different keys in each record
            into[name] = into.get(name, 0) + count


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", where=str(path.parent)) from None
    if size != count * dtype.itemsize:
        raise InputError(f"{path.name} has {size:,} bytes, not {count * dtype.itemsize:,}", where=str(path.parent))
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
