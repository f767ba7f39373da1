"""Remove superfluous white space from texts, as configured for a source."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from lit_llm.text.conversation import Conversation, Document

Clean = Literal["none", "strip", "collapse"]
_BLANKS, _LINES = re.compile(r"[^\S\n]+"), re.compile(r"\n{3,}")


def cleaned(content: Document | Conversation, how: Clean) -> Document | Conversation:
    """The document or conversation with cleaned texts; the same object if nothing changed."""
    if how == "none":
        return content
    if isinstance(content, Document):
        text = clean(content.text, how)
        return content if text == content.text else Document(text)
    messages = tuple(replace(message, content=clean(message.content, how)) for message in content.messages)
    return content if messages == content.messages else replace(content, messages=messages)


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
    pending, has_begun = "", False
    for block in blocks:
        text = _collapsed(pending + block) if how == "collapse" else pending + block
        text = text if has_begun else text.lstrip()
        solid = text.rstrip()
        pending = text[len(solid):]                        # white space that may end the document
        if solid:
            has_begun = True
            yield solid


def _collapsed(text: str) -> str:
    text = _BLANKS.sub(" ", text).replace(" \n", "\n").replace("\n ", "\n")
    return _LINES.sub("\n\n", text)
