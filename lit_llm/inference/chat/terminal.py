"""The terminal of a chat: lines in, answers out, and the history of what was typed."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

from lit_llm.errors import InputError
from lit_llm.inference.chat.commands import Commands, leaves

CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
CONTROLS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))     # they reorder text
PASTE_SECONDS = 0.03                                # lines that come this fast one after the other were pasted
QUOTES = '"""'
HISTORY_LINES = 1000


def note(text: str) -> None:
    """Print a note to stderr, so that piped output has answers only."""
    print(text, file=sys.stderr, flush=True)


def converse(commands: Commands, *, history: bool) -> None:
    """Answer what is typed until the user leaves.

    Args:
        commands: Run the commands and ask the model.
        history: Whether typed lines are kept for later sessions.
    """
    with _line_editor(history):
        while True:
            try:
                message = _typed()
            except KeyboardInterrupt:
                print("\n(exit or Ctrl-D quits)")
                continue
            except EOFError:
                print()
                return
            if leaves(message):
                return
            if message:
                _answer(commands, message, terminal=True)


def answer_lines(commands: Commands) -> None:
    """Answer each line of a pipe or a file; lines between triple quotes are one message."""
    for message in _messages(clean(line) for line in sys.stdin):
        if leaves(message):
            return
        if message:
            _answer(commands, message, terminal=False)


def show(pieces: Iterator[str], *, terminal: bool) -> None:
    """Print pieces as they arrive; in a terminal, Ctrl-C stops the answer but not the program."""
    try:
        for piece in pieces:
            # Control characters in an answer could rewrite the screen.
            sys.stdout.write(piece.translate(CONTROLS) if terminal else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not terminal:
            raise
        sys.stdout.write(" (stopped)")
    finally:
        pieces.close()  # type: ignore[attr-defined]  # a generator, whose end keeps what was answered so far
    print(flush=True)


def clean(text: str) -> str:
    """Replace surrogates, which stand for bytes that are not UTF-8 and which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _answer(commands: Commands, message: str, *, terminal: bool) -> None:
    """Answer one message; an error is printed and does not end the program."""
    try:
        pieces = commands.answer(message)
        if pieces is not None:
            show(pieces, terminal=terminal)
    except InputError as error:
        note(str(error))


def _typed() -> str:
    """One message of the user: a line, lines that were pasted together, or lines between triple quotes."""
    lines = [clean(input("you> "))]
    while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
        try:
            lines.append(clean(input()))
        except EOFError:                            # Ctrl-D, which the next prompt sees again where it is meant
            break
    text = "\n".join(lines)
    if text.lstrip().startswith(QUOTES):
        while not _is_closed(text):
            text += "\n" + clean(input("...> "))
        return _unquoted(text)
    return text.strip()


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """The messages of a pipe's lines."""
    for line in lines:
        if not line.lstrip().startswith(QUOTES):
            yield line.strip()
            continue
        text = line
        while not _is_closed(text) and (following := next(lines, None)) is not None:
            text += following
        yield _unquoted(text)


def _is_closed(text: str) -> bool:
    return len(text.strip()) >= 2 * len(QUOTES) and text.strip().endswith(QUOTES)


def _unquoted(text: str) -> str:
    return text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip()


@contextlib.contextmanager
def _line_editor(history: bool) -> Iterator[None]:
    """Line editing for `input()`, with the history of earlier sessions."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")    # pasted lines stay one line of input
    file = history_file() if history else None
    if file is not None:
        with contextlib.suppress(OSError):
            _make_private(file)
            readline.read_history_file(file)
    earlier_lines = readline.get_current_history_length()
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        if file is not None and (new := readline.get_current_history_length() - earlier_lines) > 0:
            with contextlib.suppress(OSError):
                readline.append_history_file(new, file)


def history_file() -> Path:
    """Where typed lines are kept."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "lit_llm" / "chat_history"


def _make_private(file: Path) -> None:
    """Create the file for its owner alone."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    file.chmod(0o600)
