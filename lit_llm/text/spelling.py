"""Compute the bytes and characters of text that each token of a tokenizer represents."""

import re
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import numpy as np

BYTE = re.compile(r"<0x([0-9A-F]{2})>")             # sentencepiece's token for one byte


def spellings(hf: Any) -> list[bytes]:
    """Bytes of each token, which concatenate to the text; added tokens as spelled; empty for ids without a token.

    Args:
        hf: A fast tokenizer of transformers, byte-level or sentencepiece's.
    """
    backend = hf.backend_tokenizer
    added, vocabulary = backend.get_added_tokens_decoder(), hf.get_vocab()
    byte_level = '"ByteLevel"' in backend.to_str()
    token_bytes = [b""] * (max([*vocabulary.values(), *added]) + 1)
    for text, id_ in vocabulary.items():
        if id_ in added:
            token_bytes[id_] = added[id_].content.encode()
        elif byte_level:
            token_bytes[id_] = b"".join(_byte_of().get(char) or char.encode() for char in text)
        elif match := BYTE.fullmatch(text):
            token_bytes[id_] = bytes.fromhex(match[1])
        else:
            token_bytes[id_] = text.replace("▁", " ").encode()
    return token_bytes


def sizes(hf: Any, spelled: Sequence[bytes], controls: Collection[int], start: int) -> np.ndarray:
    """(4, V) int64: bytes of each token, bytes of a text's first token, and the same in characters.

    Control tokens have 0. A character belongs to the token with its first byte. The rows of a text's first token differ
    because sentencepiece adds a space before the text that is not part of it. (Some tokenizers add none if the text
    begins with a space; then one is missing.)

    Args:
        hf: The tokenizer of transformers, of V tokens.
        spelled: `spellings` of the first V tokens or fewer.
        controls: Ids of control tokens.
        start: Id of the first token of a text that begins with a letter.
    """
    vocabulary = hf.get_vocab()
    spaced = [id_ for token, id_ in vocabulary.items() if token.startswith("▁") and id_ not in controls]
    counted = hf.convert_ids_to_tokens(start).startswith("▁")

    def rows(size: Callable[[bytes], int]) -> list[np.ndarray]:
        counts = np.array([0 if id_ in controls else size(spelling) for id_, spelling in enumerate(spelled)], np.int64)
        counts = np.pad(counts, (0, len(hf) - len(counts)))
        first = counts.copy()
        if counted:
            first[[id_ for id_ in spaced if counts[id_]]] -= 1
        return [counts, first]

    return np.stack([*rows(len), *rows(lambda spelling: sum(byte & 0xC0 != 0x80 for byte in spelling))])


@cache
def _byte_of() -> dict[str, bytes]:
    """The byte of each character of a byte-level vocabulary: printable ones as they are, others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): bytes([byte]) for byte in shown} | {
        chr(0x100 + at): bytes([byte]) for at, byte in enumerate(hidden)}
