"""Constraints by llguidance: a grammar decides after each token which tokens may come next.

Grammars come from requests and are untrusted; the library's limits bound the time of a compilation to about 0.1 s, and
that of a step to some milliseconds.
"""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_llm.errors import InputError
from lit_llm.inference.constraint import Grammar

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llm.text.tokenizer import Tokenizer

LARK = "lark"
NOTHING = "no text satisfies it"
COMPILED = 64                                           # grammars that are kept compiled
SAMPLE = '{"a b": [1, -2.5, true, null], "é东": "x\\n\\"y\\" 🙂"}'
# Fuel is about 50,000 (initial) and 14,000 (step) per millisecond; items 20,000 per millisecond.
LIMITS: dict[str, Any] = {"max_items_in_row": 1000, "initial_lexer_fuel": 2_000_000, "step_lexer_fuel": 200_000,
          "step_max_items": 50_000, "max_lexer_states": 50_000, "max_grammar_size": 100_000,
          "precompute_large_lexemes": False, "verbose_errors": False}


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of all tokens, which can be pickled.

    Args:
        tokens: Bytes of each token; empty for ids without a token.
        special_ids: Added tokens, which no text contains.
        stop_ids: Tokens that may end an answer where the grammar is satisfied.
    """

    tokens: tuple[bytes, ...]
    special_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """The vocabulary of a tokenizer that is byte-level, or sentencepiece's with a token for each byte.

        Raises:
            InputError: Another kind, whose tokens do not join to the text.
        """
        decoder = tokenizer.hf.backend_tokenizer.decoder
        rules = decoder.__getstate__().decode() if decoder is not None else ""
        if not any(name in rules for name in ("ByteLevel", "Metaspace", "▁", "\\u2581")):
            raise InputError("answers of this model cannot be constrained: its tokenizer is neither byte-level nor "
                             "sentencepiece's")
        added = tokenizer.hf.backend_tokenizer.get_added_tokens_decoder()
        special = tuple(id_ for id_, token in added.items() if token.special or token.content.strip())
        made = cls(tuple(tokenizer.spellings), special, tokenizer.stop_ids)
        ids = tokenizer.encode_text(SAMPLE)
        if b"".join(made.tokens[id_] for id_ in ids).lstrip(b" ") != SAMPLE.encode():
            raise InputError("answers of this model cannot be constrained: its tokens do not join to the text")
        return made

    def of_bytes(self) -> "Vocabulary":
        """A vocabulary of single bytes with the same special ids: small, and as good for the check of a grammar."""
        tokens = [b""] * (len(self.tokens) + 256)
        for id_ in self.special_ids:
            tokens[id_] = self.tokens[id_]
        free = (id_ for id_, token in enumerate(tokens) if not token and id_ not in self.stop_ids)
        for byte, id_ in zip(range(256), free, strict=False):
            tokens[id_] = bytes([byte])
        return Vocabulary(tuple(tokens), self.special_ids, self.stop_ids)

    def __call__(self, text: "str | bytes") -> list[int]:
        """A tokenization of a text, the longest tokens first; the library asks for it."""
        rest, ids = text.encode() if isinstance(text, str) else text, list[int]()
        while rest:
            size = next((size for size in range(min(len(rest), 64), 0, -1) if rest[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[rest[:size]])
            rest = rest[size:]
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_ids)
        return {token: id_ for id_, token in enumerate(self.tokens) if token and id_ not in special}

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again."""
        return {name: getattr(self, name) for name in ("tokens", "special_ids", "stop_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields of a frozen dataclass."""
        self.__dict__.update(state)


class Guidance:
    """Builds constraints from grammars in Lark format (`Grammar.kind` is `lark`); it is the engine's factory.

    Args:
        vocabulary: The tokens of the model's tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock, self._compiling = threading.Lock(), threading.Lock()

    def __call__(self, grammar: Grammar, vocab_size: int) -> "Guide":
        """A constraint at its beginning. A grammar that was compiled before takes no time.

        Raises:
            InputError: A grammar that is not valid, too large, or that no text satisfies.
        """
        if grammar.kind != LARK:
            raise InputError(f"there is no kind of grammar {grammar.kind[:40]!r}", where=grammar.where)
        with self._lock:
            matcher = self._compiled.get(grammar.text)
        if matcher is None:
            with self._compiling:                       # one at a time: it may take much memory
                matcher = self._compile(grammar)
            with self._lock:
                self._compiled[grammar.text] = matcher
                if len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy(), vocab_size)

    def check(self, grammar: Grammar) -> None:
        """Refuse a grammar that cannot be used.

        Raises:
            InputError: As in a call.
        """
        self(grammar, len(self.vocabulary.tokens))

    def prepare(self) -> None:
        """Build the library's tokenizer, which takes about a second for a vocabulary of 150,000 tokens."""
        with self._compiling:
            _ = self._tokenizer

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        _, _, rest = grammar.text.partition("\n")
        body = [f"start: body\n{rest}"] if rest.startswith("body:") else []     # without the reasoning before it
        for text in (*body, grammar.text):
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS))
            reason = _reason(matcher.get_error()) if matcher.is_error() else self._obstacle(matcher)
            if reason:
                raise InputError(f"this cannot be enforced: {reason}", where=grammar.where)
        return matcher

    def _obstacle(self, matcher: Any) -> str:
        """Why no token can begin an answer; empty if one can."""
        try:
            return "" if Guide(matcher.deep_copy(), len(self.vocabulary.tokens)).allowed().any() else NOTHING
        except RuntimeError as error:
            return NOTHING if "NoExtension" in str(error) else str(error)

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Tokens(self.vocabulary)), eos_token=list(self.vocabulary.stop_ids))

    def __getstate__(self) -> dict[str, Any]:
        """The vocabulary only: compiled grammars stay in their process."""
        return {"vocabulary": self.vocabulary}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without compiled grammars."""
        self.__init__(**state)                          # type: ignore[misc]


class Guide:
    """The state of one answer.

    Args:
        matcher: A matcher of llguidance, of this answer alone.
        vocab_size: Tokens of the model's vocabulary.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> "Tensor":
        """(V,) bool: tokens that may come next; tokens that end the answer where the grammar is satisfied.

        Raises:
            RuntimeError: The grammar needs more time or memory than a step may take.
        """
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar cannot be followed: {_reason(self._matcher.get_error())}")
        allowed = np.unpackbits(bits, bitorder="little")[:self._vocab_size].astype(bool)
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        mask[:len(allowed)] = torch.from_numpy(allowed)
        return mask

    def accept(self, token_id: int) -> None:
        """Add a token of the answer.

        Raises:
            RuntimeError: It was not allowed.
        """
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(f"the grammar cannot be followed: {_reason(self._matcher.get_error())}")


class _Tokens:
    """A vocabulary as llguidance's `TokenizerWrapper` reads it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.special_token_ids = list(vocabulary.tokens), list(vocabulary.special_ids)
        self.eos_token_id, self._vocabulary = vocabulary.stop_ids[0], vocabulary

    def __call__(self, text: str | bytes) -> list[int]:
        return self._vocabulary(text)


def _reason(error: str) -> str:
    """The first line of the library's message, without a place in the grammar that the user has not seen."""
    line = re.sub(r"^at \d+\(\d+\): ", "", error.strip().split("\n")[0])
    return line[:200] or "unknown error"


def guidance_or_reason(tokenizer: "Tokenizer") -> Guidance | InputError:
    """The factory of constraints for a tokenizer, or the reason why its answers cannot be constrained."""
    try:
        import llguidance  # noqa: F401

        return Guidance(Vocabulary.of(tokenizer))
    except ModuleNotFoundError:
        return InputError("answers cannot be constrained: the package 'llguidance' is not installed",
                          fix="pip install llguidance")
    except InputError as error:
        return error
