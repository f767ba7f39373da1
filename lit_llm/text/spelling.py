"""Compute the bytes of text that each token of a tokenizer represents."""

import re
from functools import cache
from typing import Any

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


@cache
def _byte_of() -> dict[str, bytes]:
    """The byte of each character of a byte-level vocabulary: printable ones as they are, others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): bytes([byte]) for byte in shown} | {
        chr(0x100 + at): bytes([byte]) for at, byte in enumerate(hidden)}
