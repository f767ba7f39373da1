"""Find the files or the hub dataset of a source and read its raw records.

It handles folders, globs, packaged samples and the hub. `readers.py` reads files, and `formats.py` interprets records.
"""

import contextlib
import glob
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lit_llm import hub, names
from lit_llm.data.records.cleaning import Clean
from lit_llm.data.records.readers import KINDS, kind_of, scan_file, scan_table
from lit_llm.data.records.record import Found, Record
from lit_llm.errors import InputError, did_you_mean

DOCUMENT_CHOICES = ("auto", "file", "paragraph", "line")
SPLITS = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing",)}     # as the hub has it
_ABOUT = re.compile(r"(?i)(readme|licen[sc]e)(?![a-z])|(changelog|notice|contributing)(\.\w+)*$|"
                    r"(dataset_infos?|state|config)\.json$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class Source:
    """One corpus.

    Args:
        path: A file, a folder, a glob (`data/*.jsonl`), or a hub id (`owner/name`). `sample:NAME` is a file that ships
            with the package. Extensions: .txt .md .jsonl .ndjson .json .csv .tsv .parquet .arrow; all but the last two
            also with .gz or .zst. A folder is read recursively, except hidden files and those about the data (README*,
            LICENSE*, dataset_info.json); if file names contain splits (`train.jsonl`, `test-00000.parquet`), only those
            of `split`. Text must be UTF-8: a BOM is removed and counted; other encodings and damage (NUL, a lone
            surrogate, a duplicate key) are refused with their names.
        format: How to interpret records. `auto` recognises each record by its keys and refuses ambiguous ones; `text`
            is {text}; `alpaca` {instruction, input, output, system, history} and other names for these (question and
            answer, instruction and context and response); `prompt` {prompt, completion}; `messages`, `sharegpt` and
            `firefly` are turns under messages, conversations or conversation. Unused keys are counted in the report.
            Preference records need `columns`; answers with `label: false` are refused.
        split: Split of a hub dataset, a saved dataset, or a folder whose files are named after splits.
        subset: Configuration of a hub dataset with several, such as `wikitext-2-raw-v1`.
        weight: How often its records are drawn per epoch, above 0 and at most 1,000: 2 draws each twice; 0.25 draws a
            quarter of them, another quarter in each epoch, so that four epochs see all. For a long document it is a
            quarter of its windows.
        columns: Standard key -> the record's key, if they differ: `{prompt: question, completion: answer}`,
            `{text: paragraphs}`, or for a preference record `{prompt: conversations, completion: chosen}`.
        document: How a text file is split into documents. `auto` splits at lines that are exactly `<|endoftext|>`, the
            usual separator of published corpora, or takes the whole file; `file`; `paragraph` (separated by blank
            lines); `line`. The text itself is unchanged, except that CRLF becomes LF and a BOM is removed.
        clean: White space to remove. `strip`: at the ends of a text or message; `collapse`: also runs of blanks become
            one space, and runs of empty lines one.
    """

    path: str
    format: str = "auto"
    split: str = "train"
    subset: str | None = None
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)
    document: str = "auto"
    clean: Clean = "none"

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read(self) -> Iterator[tuple[Record, str]]:
        """Yield each record with its place, `file:line`.

        Raises:
            InputError: Something cannot be read; the error names the place.
        """
        for record, place in self.scan():
            if isinstance(record, InputError):
                raise record.at(str(place))
            yield record, str(place)

    def scan(self, *, parse: bool = True) -> Iterator[Found]:
        """Yield each record, or its error, with its place; raises for files that cannot be opened.

        Args:
            parse: False yields JSON lines as bytes, for parsing in another process.
        """
        if self.is_hub:
            yield from scan_table(self.hub_dataset(), self.path)
            return
        for path in self.files():
            yield from scan_file(path, document=self.document, parse=parse)

    def parts(self) -> list[Callable[[], Iterator[Found]]]:
        """Parts of the source that can be scanned independently: its files, or a hub dataset's shards.

        JSON lines are yielded as bytes, for parsing where they are tokenized.
        """
        if self.is_hub:
            return shards(self.hub_dataset(streaming=True), self.path)
        return [partial(scan_file, path, document=self.document, parse=False) for path in self.files()]

    # ---- which files -------------------------------------------------------------------------------------------------

    @property
    def is_hub(self) -> bool:
        """Whether the source is a hub dataset."""
        return is_hub(self.path)

    def files(self) -> list[Path]:
        """The local files, sorted. A single file needs no known extension if `format` is `text`.

        Raises:
            InputError: The path does not exist (with similar names), or there is no file of a supported type.
        """
        if self.document not in DOCUMENT_CHOICES:
            raise InputError(f"document must be one of {', '.join(DOCUMENT_CHOICES)}, not '{self.document}'."
                             f"{did_you_mean(self.document, list(DOCUMENT_CHOICES))}", where=self.path)
        files = self._find()
        self._refuse_idle(files)
        return files

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each of its files; null for a hub dataset, where they are unknown."""
        return None if self.is_hub else {str(path): path.stat().st_size for path in self.files()}

    def _refuse_idle(self, files: list[Path]) -> None:
        """Refuse settings that have no effect with these files.

        Raises:
            InputError: The error names the setting.
        """
        if self.subset is not None:
            raise InputError(f"subset: {self.subset} has no effect: only hub datasets have several",
                             where=self.path, fix="Leave `subset` out.")
        saved = locate(self.path) / "dataset_dict.json"
        wanted = [name for name, words in SPLITS.items() if self.split in (name, *words)]
        if self.split != "train" and not saved.is_file() and not any(_split_of(path) in wanted for path in files):
            raise InputError(f"split: {self.split} has no effect: no file here is named after a split",
                             where=self.path, fix="Leave `split` out, or name the files.")
        if self.document != "auto" and self.format != "text" and not any(kind_of(path) == "text" for path in files):
            raise InputError(f"document: {self.document} has no effect: it splits text files (.txt, .md)",
                             where=self.path, fix="Leave `document` out.")

    def _find(self) -> list[Path]:
        """The files of a path."""
        path = locate(self.path)
        if path.is_dir():
            files = _folder(path, self.split)
        elif path.exists():
            if not path.is_file():                          # a pipe would block and can be read only once
                raise InputError("not a regular file", where=str(path), fix="Write its content to a file first.")
            if not kind_of(path) and self.format != "text":
                raise InputError(f"unknown extension '{path.suffix}'; supported are {', '.join(KINDS)}",
                                 where=str(path), fix="Rename it, or set `format: text` if it is plain text.")
            return [path]
        elif glob.has_magic(str(path)):
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True)
                           if kind_of(Path(name)) and Path(name).is_file())
        else:
            raise _missing(path)
        if not files:
            raise InputError(f"no readable file here; supported are {', '.join(KINDS)}", where=self.path)
        return files

    def hub_dataset(self, *, streaming: bool = False) -> Any:
        """Load a hub dataset, from the cache if possible; with `streaming` its records are loaded lazily.

        Raises:
            InputError: It cannot be loaded; the error names alternatives without the hub.
        """
        if self.document != "auto":
            raise InputError(f"document: {self.document} has no effect: it splits text files, but a dataset of "
                             "the hub has records", where=self.path, fix="Leave `document` out.")
        import datasets
        import huggingface_hub.constants

        if hub.offline():                                   # both clients would retry for half a minute
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            with quiet_hub():
                return datasets.load_dataset(self.path, self.subset, split=self.split, streaming=streaming)
        except Exception as error:                          # the hub client raises about thirty types
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            raise InputError(
                f"there is no such file or folder, and the hub dataset cannot be loaded: {reason}", where=self.path,
                fix="Without the hub: give a local folder or file; or set HF_HOME to a cache that contains it, with "
                    "HF_HUB_OFFLINE=1; or HF_ENDPOINT to a mirror.") from None


def shards(rows: Any, name: str) -> list[Callable[[], Iterator[Found]]]:
    """The shards of a streamed `datasets` table."""
    count = rows.num_shards
    return [partial(scan_table, rows.shard(count, number), f"{name} shard {number}") for number in range(count)]


# ---- paths -----------------------------------------------------------------------------------------------------------

def locate(path: str) -> Path:
    """The local path of `path`; `sample:NAME` is in the installed package, so configs run from any folder."""
    if not path:
        raise InputError("a source has an empty path", where="data.sources", fix="Name a file, a folder or a hub id.")
    try:
        local_path = names.path_of(path)
        local_path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path[:80]} is no path: {str(error)[:80]}", where="data.sources") from None
    return local_path


def is_hub(path: str) -> bool:
    """Whether `path` is a hub id, `owner/name`: neither that path nor a folder `owner` exists locally."""
    if not _HUB_ID.fullmatch(path) or kind_of(Path(path)):
        return False
    return not Path(path).exists() and not Path(path).parent.exists()


def _folder(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").exists():         # written by `DatasetDict.save_to_disk`
        folder = folder / split
        if not folder.is_dir():
            raise InputError(f"the saved dataset has no split '{split}'", where=str(folder.parent))
    if (folder / "state.json").exists():                # `Dataset.save_to_disk`: its .json files are not records
        return sorted(folder.glob("*.arrow"))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path)
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts)
                   and not _ABOUT.match(path.name))
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    if len(set(named.values()) - {None}) < 2:
        return files
    wanted = [name for name, words in SPLITS.items() if split in (name, *words)]
    if not (chosen := [path for path in files if named[path] in wanted]):
        there = ", ".join(sorted(name for name in set(named.values()) if name))
        raise InputError(f"the files here have the splits {there}, but not '{split}'", where=str(folder),
                         fix="Set `split` of the source, or name the files.")
    return chosen


def _split_of(path: Path) -> str | None:
    """The split in the name of a file, or else of the nearest folder above it."""
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        for name, also in SPLITS.items():
            if any(word in words for word in (name, *also)):
                return name
    return None


def check_exists(path: str) -> None:
    """Refuse a local path that does not exist.

    Raises:
        InputError: The error contains the part of the path that exists, or a similar name.
    """
    if not (place := locate(path)).exists():
        raise _missing(place)


def _missing(path: Path) -> InputError:
    if path.is_symlink():
        return InputError(f"a broken symbolic link: it points to '{path.readlink()}'", where=str(path))
    above = path.parent
    while not above.exists():
        above = above.parent
    if above != path.parent:
        return InputError("no such file or folder", where=str(path), fix=f"The path exists as far as '{above}'.")
    close = did_you_mean(path.name, [entry.name for entry in above.iterdir()])
    return InputError(f"no such file or folder.{close}", where=str(path))


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the clients' retry logs; the final error is reported once."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
