"""A data module's options in; an error for each that was set and can do nothing, alone or beside the others.

What a file decides (`split`, `subset`, `document` of a source) is refused where its files are found, in `sources.py`.
"""

import logging

from lit_llm.data.interface import Data
from lit_llm.data.rows.corpus import Corpus
from lit_llm.errors import InputError
from lit_llm.system import ranges

log = logging.getLogger(__name__)
LIMIT, BUFFER = 0.1, 4_000_000                      # what bad_record_limit and stream_buffer are where nothing is said


def check(data: Data) -> None:
    """Refuse what another option switches off, and a weight that draws nothing.

    Raises:
        InputError: It names the key, and the option that would have to change.
    """
    for source in data.sources:
        ranges.check("data.sources.weight", source.weight)
    for stage in ("val", "test"):
        own, share = getattr(data, f"{stage}_sources"), getattr(data, f"{stage}_fraction")
        if own and share:
            raise InputError(f"data.{stage}_sources is given too, so no share of data.sources is held out",
                             where=f"data.{stage}_fraction", fix=f"set --data.{stage}_fraction 0, or "
                             f"--data.{stage}_sources null")
        for source in own or ():
            if source.weight != 1:
                raise InputError(f"weight {source.weight} would change nothing: evaluation takes each record once",
                                 where=f"data.{stage}_sources", fix="leave `weight` out")
    if data.stream_buffer != BUFFER and not data.streaming:
        raise InputError("only a stream has this buffer", where="data.stream_buffer",
                         fix="leave it out, or set --data.streaming true")
    if data.streaming and len(data.sources) == 1 and data.sources[0].weight != 1:
        raise InputError(f"weight {data.sources[0].weight} would change nothing: in a stream it is a share of the "
                         "records, and there is one source", where="data.sources", fix="leave `weight` out")
    if data.bad_record_limit != LIMIT and data.on_bad_record == "error":
        raise InputError("the first bad record stops the run, so no share of them is allowed",
                         where="data.bad_record_limit", fix="leave it out, or set --data.on_bad_record quarantine")
    evaluates = data.val_sources or data.val_fraction or data.test_sources or data.test_fraction
    if data.packing == "concat" and data.overlong != "cut" and not evaluates:
        raise InputError("concat cuts everything anywhere, so nothing is too long for a row", where="data.overlong",
                         fix="leave it out, or set --data.packing best_fit")


def note_documents(corpus: Corpus, train_on: str, *, rank: int) -> None:
    """Say that an option for conversations has none to act on."""
    if rank == 0 and train_on != "assistant" and corpus.is_document.all():
        log.warning("data.train_on: there are only documents, which are learned whole, so %s changes nothing", train_on)
