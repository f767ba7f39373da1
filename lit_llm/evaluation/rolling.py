"""Word-level perplexity in the convention of the literature on WikiText, as lm-evaluation-harness computes it.

Every token of a document is predicted, the first one from the token that begins (or else ends) a text. Windows have as
many predicted tokens as the context has positions, and overlap by one token; the last window of a document reaches
back until it is full:

    tokens     a b c d e f g h i j      context 4, B begins a text
    window 0   B a b c d                predicts a b c d
    window 1         d e f g h          predicts e f g h
    window 2             f g h i j      predicts i j

`word_perplexity` is exp of the summed NLL divided by the number of words of the raw text, which white space separates;
it depends on the text only, and not on how a tokenizer splits it. `byte_perplexity` and `bits_per_byte` divide by its
UTF-8 bytes. Both count the raw text, before `detokenized`.
"""

import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np

from lit_llm.data.records import formats
from lit_llm.data.records.record import LongText
from lit_llm.data.records.sources import Source
from lit_llm.data.rows.packing import Segments, pack
from lit_llm.errors import InputError
from lit_llm.evaluation.material import Material, Units, Window
from lit_llm.text.conversation import Document
from lit_llm.text.tokenizer import Tokenizer

Rolling = Literal["text", "wikitext"]
REPLACED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "),
            (" ? ", "? "), (" , ", ", "))
CLOSED = ((r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
          (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"))
JOINED = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"), ("\n ", "\n"),
          (" N ", " 1 "), (" 's", "'s"))


def windows(count: int, context: int) -> list[tuple[int, int, int]]:
    """(start, stop, first scored) of each window of a sequence of one beginning token and `count - 1` others.

    Args:
        count: Tokens of the sequence.
        context: Positions of the model.

    >>> windows(11, 4)
    [(0, 5, 1), (4, 9, 5), (6, 11, 9)]
    """
    out = []
    for scored in range(1, count, context):
        stop = min(scored + context, count)
        out.append((max(0, stop - context - 1), stop, scored))
    return out


def material(sources: Sequence[Source], tokenizer: Tokenizer, context: int, kind: Rolling,
             limit: int | None = None) -> Material:
    """Documents in windows of the literature's convention.

    Args:
        sources: Sources of documents; conversations are refused.
        tokenizer: Its own beginning of a text is scored where it adds one, as lm-evaluation-harness does.
        context: Predicted tokens of a window.
        kind: `wikitext` splits the files of WikiText into articles and undoes their tokenization.
        limit: Only this many documents; null for all.

    Raises:
        InputError: A record is not a document, or no article begins where one should.
    """
    texts: list[tuple[int, str, str]] = []              # source, place, raw text
    for number, source in enumerate(sources):
        for place, text in _documents(source):
            pages = articles(text, place) if kind == "wikitext" else iter([text])
            texts += [(number, place, page) for page in pages if page.strip()]
    texts = texts[:limit]
    if not texts:
        raise InputError("there is no document", where="data")
    begins = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    prepared = (detokenized(text) if kind == "wikitext" else text for _, _, text in texts)
    ids = [np.array([begins, *_encoded(tokenizer, text)], np.int64) for text in prepared]
    cuts = [(unit, *cut) for unit, tokens in enumerate(ids) for cut in windows(len(tokens), context)]
    table = np.array(cuts, dtype=np.int64).reshape(-1, 4)
    rows = pack(Segments(np.arange(len(table)), np.zeros(len(table), np.int64), table[:, 2] - table[:, 1]),
                seq_len=context + 1, packing="best_fit")

    def window(segment: int) -> Window:
        unit, start, stop, scored = table[rows.segments.sequence[segment]].tolist()
        return Window(unit, ids[unit][start:stop], np.arange(start, stop) >= scored, segment)

    raw = [text for _, _, text in texts]
    units = Units(
        sources=[source.path for source in sources], source=np.array([number for number, _, _ in texts]),
        content=np.array([_hash(text) for text in raw], dtype=np.uint64),
        tokens=np.array([len(tokens) - 1 for tokens in ids]), bytes=np.array([len(text.encode()) for text in raw]),
        characters=np.array([len(text) for text in raw]),
        words=np.array([len(re.split(r"\s+", text)) for text in raw]))
    settings = {"convention": f"rolling {kind}", "seq_len": context, "windows": "rolling, the last one full"}
    return Material(tokenizer, units, rows, window, context + 1, settings, lambda unit: texts[unit][1],
                    lambda unit: texts[unit][2], last_position=context - 1)


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids as lm-evaluation-harness encodes a text: with what the tokenizer adds, unless the text itself begins with it.

    A control token that the text spells, such as the `<unk>` of WikiText's files for models of words, is that token.
    """
    begins = tokenizer.hf.bos_token or tokenizer.hf.eos_token
    more = {"add_special_tokens": False} if text.startswith(begins) else {}
    return list(tokenizer.hf.encode(text, verbose=False, **more))


def _documents(source: Source) -> Iterator[tuple[str, str]]:
    for record, place in source.read():
        if isinstance(record, LongText):
            yield place, "".join(record.blocks)
            continue
        try:
            content = formats.convert(record, format=source.format, columns=source.columns)  # type: ignore[arg-type]
        except InputError as error:
            raise error.at(place) from None
        if not isinstance(content, Document):
            raise InputError("this is a conversation; word-level perplexity is defined for documents", where=place,
                             fix="leave --rolling out")
        yield place, content.text


def articles(text: str, place: str = "") -> Iterator[str]:
    """The articles of a WikiText file, each from its title ` = Title = ` on; a text of one article is unchanged.

    Raises:
        InputError: The text begins without a title.
    """
    page: list[str] = []
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first and not _is_title(first):
        raise InputError(f"this text does not begin with the title of an article, ' = Title = ': {first[:60]!r}",
                         where=place, fix="give the files of WikiText (wiki.test.raw) or records of whole articles; "
                         "for other texts: --rolling text")
    for line in text.split("\n"):
        if _is_title(line) and any(map(str.strip, page)):
            yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def _is_title(line: str) -> bool:
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def detokenized(text: str) -> str:
    """A text of WikiText without the spaces around punctuation that its tokenization added.

    The rules are those of the `wikitext` task of lm-evaluation-harness, in its order, so that figures are comparable.

    >>> detokenized(" The 2 @,@ 000 ( or so ) men , and ' boys ' .")
    " The 2,000 (or so) men, and 'boys' ."
    """
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in REPLACED:
        text = text.replace(old, new)
    for pattern, new in CLOSED:
        text = re.sub(pattern, new, text)
    for old, new in JOINED:
        text = text.replace(old, new)
    return text


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
