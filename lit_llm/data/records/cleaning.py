"""Remove superfluous white space from texts, as configured for a source."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from lit_llm.text.conversation import Conversation, Document

Clean = Literal["none", "strip", "collapse"]
_BLANKS, _LINES = re.compile(r"[^\S\n]+"), re.compile(r"\n{3,}")


def cleaned(said: Document | Conversation, how: Clean) -> Document | Conversation:
    """The document or conversation with cleaned texts; the same object if nothing changed."""
    if how == "none":
        return said
    if isinstance(said, Document):
        text = clean(said.text, how)
        return said if text == said.text else Document(text)
    messages = tuple(replace(message, content=clean(message.content, how)) for message in said.messages)
    return said if messages == said.messages else replace(said, messages=messages)


def clean(text: str, how: Clean) -> str:
    r"""Clean a text. `strip`: trim the ends. `collapse`: also one space per run of blanks, at most one empty line.

    >>> clean("  a \t b  \n\n\n\n c ", "collapse")
    'a b\n\nc'
    """
    return _collapsed(text).strip() if how == "collapse" else text.strip() if how == "strip" else text


def clean_blocks(blocks: Iterable[str], how: Clean) -> Iterator[str]:
    """The same for a text in blocks of whole lines."""
    if how == "none":
        yield from blocks
        return
    held, begun = "", False
    for block in blocks:
        text = _collapsed(held + block) if how == "collapse" else held + block
        text = text if begun else text.lstrip()
        solid = text.rstrip()
        held = text[len(solid):]                        # white space that may end the document
        if solid:
            begun = True
            yield solid


def _collapsed(text: str) -> str:
    text = _BLANKS.sub(" ", text).replace(" \n", "\n").replace("\n ", "\n")
    return _LINES.sub("\n\n", text)
