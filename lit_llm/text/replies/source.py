"""Text that arrives in pieces, read by generators that suspend until there is more.

Each reading method is a generator: `value = yield from source.string()`. It yields where it needs text that has not
arrived, and raises `EndError` where the text has ended.
"""

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reader = Generator[None, None, T]
ID = "\ue0fa"                                           # stands for a call's id in literals of a call syntax
NAME = re.compile(r"[\w.-]{1,64}")
ID_TEXT = re.compile(r"[\w.:-]{1,64}")
OUTSIDE, INSIDE = re.compile(r'[^"{}\[\]]+'), re.compile(r'[^"\\]+')     # of the strings of a JSON value
SPACE = " \t\r\n"
WORD = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]|[^\s<\[]+|\S")     # a tag or a word of a literal


class EndError(Exception):
    """The text has ended within what was being read."""


class MismatchError(Exception):
    """The text is not what was expected."""


class Source:
    """The text so far, and the position up to which it is read.

    Args:
        text: The text that has arrived.
    """

    def __init__(self, text: str = "") -> None:
        self.text, self.at, self.ended = text, 0, False

    def more(self) -> Reader[bool]:
        """Wait for more text; false if it has ended."""
        before = len(self.text)
        while not self.ended:
            yield
            if len(self.text) > before:
                return True
        return False

    def char(self) -> Reader[str]:
        """The next character, which stays unread."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                raise EndError
        return self.text[self.at]

    def spaces(self) -> Reader[None]:
        """Skip white space; at the end of the text too."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or not (yield from self.more()):
                return

    def literal(self, text: str) -> Reader[None]:
        """Read a literal whose white space, also at its ends, may differ.

        Raises:
            MismatchError: Other text follows; the position is then undefined.
        """
        for word in WORD.findall(text):
            yield from self.spaces()
            for number, part in enumerate(word.split(ID)):
                if number:
                    yield from self.match(ID_TEXT)
                yield from self.exactly(part)

    def exactly(self, text: str) -> Reader[None]:
        """Read a text."""
        while len(self.text) - self.at < len(text):
            if not text.startswith(self.text[self.at:]):
                raise MismatchError
            if not (yield from self.more()):
                raise EndError
        if not self.text.startswith(text, self.at):
            raise MismatchError
        self.at += len(text)

    def follows(self, text: str) -> Reader[bool]:
        """Whether a literal with at least one word is next; nothing is read."""
        at = self.at
        try:
            yield from self.literal(text)
            return bool(text.strip())
        except (EndError, MismatchError):
            return False
        finally:
            self.at = at

    def match(self, pattern: re.Pattern[str]) -> Reader[str]:
        """Read the longest match of a pattern, of which every prefix matches too."""
        while True:
            match = pattern.match(self.text, self.at)
            if match and match.end() < len(self.text):
                break
            if not match and self.at < len(self.text):
                raise MismatchError
            if not (yield from self.more()):
                if match:
                    break
                raise EndError
        self.at = match.end()
        return match[0]

    def until(self, literal: str) -> Reader[str]:
        """Read up to a literal, which is read too but not returned."""
        start = self.at
        while (position := self.text.find(literal, self.at)) < 0:
            self.at = max(start, len(self.text) - len(literal) + 1)
            if not (yield from self.more()):
                raise EndError
        self.at = position + len(literal)
        return self.text[start:position]

    # ---- JSON --------------------------------------------------------------------------------------------------------

    def string(self) -> Reader[str]:
        """Read a JSON string and return its value."""
        start = self.at
        yield from self.exactly('"')
        yield from self._rest_of_string()
        try:
            value: str = json.loads(self.text[start:self.at], strict=False)
        except ValueError:
            raise MismatchError from None
        return value

    def value(self, emit: Callable[[str], None]) -> Reader[None]:
        """Read a JSON value and hand its text on as it arrives; only quotes and brackets are interpreted."""
        shown = self.at

        def show() -> None:
            nonlocal shown
            if self.at > shown:
                emit(self.text[shown:self.at])
                shown = self.at

        first = yield from self.char()
        if first == '"':
            yield from self.exactly('"')
            yield from self._rest_of_string(show)
        elif first in "{[":
            yield from self._brackets(show)
        else:
            while self.text[self.at:self.at + 1] not in (",", "}", "]", *SPACE) or self.at == len(self.text):
                if self.at < len(self.text):
                    self.at += 1
                elif not (yield from self.more()):
                    break
        show()

    def _brackets(self, show: Callable[[], None]) -> Reader[None]:
        depth = 0
        while True:
            letter = yield from self._char_after(OUTSIDE, show)
            self.at += 1
            if letter == '"':
                yield from self._rest_of_string(show)
            depth += (letter in "{[") - (letter in "}]")
            if not depth:
                return

    def _rest_of_string(self, show: Callable[[], None] = lambda: None) -> Reader[None]:
        """Read a string behind its opening quote."""
        while (yield from self._char_after(INSIDE, show)) != '"':
            while len(self.text) - self.at < 2:
                if not (yield from self.more()):
                    show()
                    raise EndError
            self.at += 2                                # an escaped character
        self.at += 1

    def _char_after(self, skipped: re.Pattern[str], show: Callable[[], None]) -> Reader[str]:
        """The first character after a match, which stays unread."""
        while True:
            if match := skipped.match(self.text, self.at):
                self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            show()
            if not (yield from self.more()):
                raise EndError
