"""Render chat templates in a separate process with limits on time and memory.

One such process serves all templates of its parent. It starts when a template first needs an operation that
`jinja_guard.py` cannot bound, and ends with the parent, however the parent ends. It adds about 30 us per render.
"""

import atexit
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lit_llm.errors import InputError
from lit_llm.system.private import transformers as transformers_private

MEMORY = 1 << 30                                        # bytes that one render may take
START = 120.0                                           # seconds for the process to start, on a busy machine
LENGTH = struct.Struct("<cQ")                           # header of an answer: outcome, and number of bytes that follow
DONE, REFUSED, TOO_LONG, NO_MEMORY = b"d", b"r", b"l", b"m"


class TemplateFaultError(Exception):
    """The message of an exception that a template raised."""


class _Process:
    """The process and its pipes; renders one text at a time."""

    def __init__(self) -> None:
        code = "from lit_llm.text.templates.jinja_process import main; main()"
        root = str(Path(__file__).resolve().parents[3])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._source: tuple[str, Any] | None = None
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}, bufsize=0)
        self._receive(START)

    def render(self, source: str, special_tokens: Mapping[str, object], context: dict[str, Any], seconds: float,
               most: int) -> tuple[bytes, str]:
        """Return the outcome, and the text or the reason."""
        template = (source, dict(special_tokens))
        sent = None if template == self._source else template
        data = pickle.dumps((sent, context, seconds, most))
        assert self._child.stdin is not None
        whole = memoryview(struct.pack("<Q", len(data)) + data)
        while whole:
            whole = whole[self._child.stdin.write(whole):]
        self._source = template
        return self._receive(seconds)

    def _receive(self, seconds: float) -> tuple[bytes, str]:
        kind, length = LENGTH.unpack(self._read(LENGTH.size, time.monotonic() + seconds))
        return kind, self._read(length, time.monotonic() + seconds + START).decode("utf-8", "surrogatepass")

    def _read(self, count: int, end: float) -> bytes:
        assert self._child.stdout is not None
        handle, parts = self._child.stdout.fileno(), []
        while count:
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(handle, min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def ended(self) -> bool:
        """Whether the process was terminated from outside."""
        return self._child.poll() is not None

    def end(self) -> None:
        """Kill the process."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class _Home:
    """Owner of the rendering process; a forked process starts its own."""

    def __init__(self) -> None:
        self.pid, self.lock = os.getpid(), threading.Lock()
        self.process: _Process | None = None

    def close(self) -> None:
        """End the process; the next render starts another."""
        if self.process is not None and self.pid == os.getpid():
            self.process.end()
        self.process = None


_home = _Home()
atexit.register(lambda: _home.close())


def render(source: str, special_tokens: Mapping[str, Any], context: dict[str, Any], seconds: float, most: int) -> str:
    """Render a template.

    Args:
        source: The template.
        special_tokens: Variables for special tokens.
        context: Variables of the template; they must be picklable.
        seconds: Limit on time.
        most: Limit on characters of the text.

    Raises:
        InputError: Rendering takes too much time or memory, or the text is too long.
        TemplateFaultError: The template itself raised an exception.
    """
    global _home
    if _home.pid != os.getpid():
        _home = _Home()
    with _home.lock:
        try:
            if _home.process is None or _home.process.ended():
                _home.close()
                _home.process = _Process()
            kind, text = _home.process.render(source, special_tokens, context, seconds, most)
        except BaseException as error:
            _home.close()
            if isinstance(error, TimeoutError):
                raise InputError(f"it takes longer than {seconds:g} seconds") from None
            if isinstance(error, EOFError | BrokenPipeError):       # killed by the kernel
                raise InputError(f"it takes more than {MEMORY >> 30} GiB of memory, or longer than {seconds:g} "
                                 "seconds") from None
            raise
        if kind == NO_MEMORY:
            _home.close()                               # its memory may be fragmented
            raise InputError(f"it takes more than {MEMORY >> 30} GiB of memory")
    if kind == TOO_LONG:
        raise InputError(f"it writes more than {most:,} characters")
    if kind == REFUSED:
        raise TemplateFaultError(text)
    return text


# ---- in the process --------------------------------------------------------------------------------------------------

def main() -> None:
    """Render requests from standard input until it closes."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is handled by the parent
    environment = transformers_private.chat_template_environment()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    _answer(answers, DONE, "")
    template, tokens = None, {}
    _limit(resource.RLIMIT_AS, _memory() + MEMORY)
    while head := requests.read(8):
        sent, context, seconds, most = pickle.loads(requests.read(*struct.unpack("<Q", head)))
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _limit(resource.RLIMIT_CPU, int(used + seconds) + 2)        # in case the parent no longer exists
        try:
            if sent is not None:
                template, tokens = environment.from_string(sent[0]), sent[1]
            assert template is not None
            _answer(answers, *_rendered(template, {**tokens, **context}, most))
        except MemoryError:
            _answer(answers, NO_MEMORY, "")
        except Exception as error:                      # untrusted code may raise anything
            _answer(answers, REFUSED, (str(error) or type(error).__name__)[:2000])


def _rendered(template: Any, context: dict[str, Any], most: int) -> tuple[bytes, str]:
    pieces, length = [], 0
    for piece in template.root_render_func(template.new_context(context)):
        length += len(piece)
        if length > most:
            return TOO_LONG, ""
        pieces.append(piece)
    return DONE, "".join(pieces)


def _answer(answers: IO[bytes], kind: bytes, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    answers.write(LENGTH.pack(kind, len(data)))
    answers.write(data)
    answers.flush()


def _limit(what: int, value: int) -> None:
    """Set a limit of this process, at most the limit that it inherited."""
    import resource

    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _memory() -> int:
    """Bytes of address space in use."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return MEMORY
