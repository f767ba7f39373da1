"""The output file: lines are appended as answers end, and a complete file is put in the order of the input.

A killed run leaves the lines of all answers that had ended, and perhaps a part of one more, which the next run removes.
Each line has a fingerprint of its prompt, model and settings, by which the next run recognises it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lit_llm import disk
from lit_llm.errors import InputError

Line = dict[str, Any]


class Journal:
    """Answers of one model in one file.

    Args:
        file: The output; its folder is created.
        wanted: Fingerprints of all answers, in the order of the input; each occurs once.
        overwrite: Replace answers to other prompts, by other models or with other settings.

    Raises:
        InputError: The file has such answers and `overwrite` is false, or it is something else.
    """

    def __init__(self, file: Path, wanted: Iterable[str], *, overwrite: bool = False) -> None:
        self.file, self._wanted = file, list(wanted)
        stored, complete = self._read()
        expected = set(self._wanted)
        self.lines = {line["fingerprint"]: line for line in stored if line["fingerprint"] in expected}
        others = len(stored) - sum(line["fingerprint"] in expected for line in stored)
        if others and not overwrite:
            raise InputError(f"{others:,} of its {len(stored):,} answers are for other prompts, of another model or "
                             "with other settings", where=str(file),
                             fix="name another file: --out; or replace them: --overwrite true")
        if others or not complete:                  # a torn last line
            self._replace(self.lines.values())
        self._stream: BinaryIO | None = None

    @property
    def missing(self) -> list[str]:
        """Fingerprints of the answers that are still to be generated."""
        return [fingerprint for fingerprint in self._wanted if fingerprint not in self.lines]

    def add(self, line: Line) -> None:
        """Append an answer; after this it is not lost, even if the process is killed."""
        if self._stream is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self.file, "ab", buffering=0)  # noqa: SIM115  (open until `close`)
        self.lines[line["fingerprint"]] = line
        text = _text(line)
        if self._stream.write(text) != len(text):   # a full disk may take a part
            raise OSError(disk.FULL[0], os.strerror(disk.FULL[0]), str(self.file))

    def close(self) -> None:
        """Close the file and flush it to disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def finish(self, more: Mapping[str, Mapping[str, Any]]) -> list[Line]:
        """Write the complete file in the order of the input; it is replaced at once.

        Args:
            more: Keys to set for each fingerprint, such as scores.

        Returns:
            Its lines.
        """
        self.close()
        lines = []
        for fingerprint in self._wanted:
            line = {**self.lines[fingerprint], **more.get(fingerprint, {})}
            line["fingerprint"] = line.pop("fingerprint")       # last
            lines.append(line)
        self._replace(lines)
        return lines

    def _replace(self, lines: Iterable[Line]) -> None:
        disk.replace_text(self.file, b"".join(map(_text, lines)).decode())

    def _read(self) -> tuple[list[Line], bool]:
        """The lines of the file, and whether the last one is whole."""
        if not self.file.exists():
            return [], True
        if not self.file.is_file():
            raise InputError("this is not a file", where=str(self.file), fix="name a file: --out answers.jsonl")
        raw = self.file.read_bytes()
        lines: list[Line] = []
        pieces = raw.split(b"\n")
        torn = pieces.pop()
        for number, piece in enumerate(pieces, 1):
            try:
                line = json.loads(piece)
                lines.append({**line, "fingerprint": str(line["fingerprint"])})
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError("this line was not written by generate", where=f"{self.file}:{number}",
                                 fix="name another file: --out; nothing was changed") from None
        if torn and not (torn.startswith(b"{") and (lines or b'"index"' in torn or len(torn) < 20)):
            raise InputError("this file was not written by generate", where=str(self.file),
                             fix="name another file: --out; nothing was changed")
        return lines, not torn


def _text(line: Line) -> bytes:
    # Lone surrogates cannot be encoded; a model whose bytes are not UTF-8 gives the replacement character instead.
    return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
