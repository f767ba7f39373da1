"""Check the first records of a source before libraries are imported, so that a broken file is reported at once.

A record that is refused here is refused with the same message when it is tokenized. The rest of a file is not read, and
errors that need a tokenizer are found later.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from lit_llm.data.records import formats
from lit_llm.data.records.readers import kind_of, scan_file
from lit_llm.data.records.record import LongText
from lit_llm.errors import InputError

RECORDS, FILES = 200, 8                             # of each file; files of a source
SECONDS = 0.2                                       # after which no further record of a source is read


def check(files: Sequence[Path], *, document: str, format: str, columns: Mapping[str, str]) -> None:
    """Refuse files with a bad record among the first ones; binary tables are not read.

    Args:
        files: The files of a source.
        document: As in `Source`.
        format: As in `Source`; that of a package of the user is not checked.
        columns: As in `Source`.

    Raises:
        InputError: As from the data module.
    """
    until = time.monotonic() + SECONDS
    for path in files[:FILES]:
        if kind_of(path) == "table":
            continue
        for record, place in islice(scan_file(path, document=document), RECORDS):
            if isinstance(record, InputError):
                raise record.at(str(place))
            try:
                if isinstance(record, LongText):
                    next(record.blocks, None)
                    break                           # the next record begins where this one has been read to its end
                if not isinstance(record, bytes) and format in ("auto", *formats.FORMATS):
                    formats.convert(record, format=format, columns=columns)
            except InputError as error:
                raise error.at(str(place)) from None
            if time.monotonic() > until:
                return
