"""Lines of a person in, answers on the terminal as they come; the conversation is kept until it fills the context.

The `chat` verb.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lit_llm.errors import InputError
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.engine import budget, model_folder
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Message

EXIT_WORDS = ("exit", "quit", "退出")
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    model: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: list[str] | None = None,
    seed: int | None = None,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    template_args: dict[str, bool | int | float | str | list[str] | None] | None = None,
    threads: int | Literal["auto"] = "auto",
) -> None:
    """Talk to a model in the terminal.

    Answers are streamed. `exit`, `quit`, `退出` or Ctrl-D leave, Ctrl-C stops an answer, `/reset` forgets the
    conversation. Lines piped in are answered one by one, and only the answers are printed.

    Args:
        model: A run's folder (its export/ is taken), or any folder that transformers loads.
        prompt: Answer this once and leave.
        system: A system message to begin every conversation with.
        max_tokens: New tokens of an answer at most; null takes what the context leaves.
        temperature: 0 always takes the likeliest token, so an answer can be repeated; 0.7 is livelier, 1 is the model
            as trained.
        top_p: Keep the likeliest tokens whose probabilities reach this sum; 1 keeps all.
        top_k: Keep this many likeliest tokens; 0 keeps all.
        stop: An answer ends before the first of these strings.
        seed: Makes answers at temperatures above 0 repeatable; null draws freely.
        adapter: A PEFT adapter's folder to put on the model.
        device: `auto` takes the GPU where there is one; or cpu, cuda, mps.
        dtype: `auto` takes the checkpoint's own; or float32, bfloat16, float16.
        template_args: Values of the chat template's variables, such as `{enable_thinking: true}`; null takes those that
            the model was trained with.
        threads: Of a CPU. `auto` measures at the start which number is fastest; on busy cores it is often 1.

    Raises:
        InputError: No such folder, no model in it, or a setting out of its range.
    """
    params = SamplingParams(max_tokens, temperature, top_p, top_k, tuple(stop or ()), seed)
    folder = model_folder(model)
    _hush()
    engine = TextEngine.load(folder, device=device, dtype=dtype, adapter=adapter, threads=threads)
    if engine.tokenizer.note:
        _note(engine.tokenizer.note)
    if template_args:
        engine.tokenizer.check_template_args(template_args, "template_args")
    session = Session(engine, params, system, template_args)
    try:
        if prompt is not None:
            _show(session.ask(_clean(prompt)), terminal=sys.stdout.isatty())
        elif sys.stdin.isatty():
            _converse(session, folder)
        else:
            _answer_lines(session)
    except BrokenPipeError:                         # `chat ... | head`: the reader has closed the pipe
        sys.stdout = None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


class Session:
    """A conversation with a model, trimmed from its oldest end when the context is full.

    Args:
        engine: Who answers.
        params: How.
        system: Stays at the beginning whatever is trimmed.
        template_args: Values of the chat template's variables.
    """

    def __init__(self, engine: TextEngine, params: SamplingParams, system: str | None = None,
                 template_args: Mapping[str, Any] | None = None) -> None:
        self.engine, self.params, self._template_args = engine, params, template_args or {}
        self._head = (Message("system", system),) if system else ()
        self.messages: tuple[Message, ...] = ()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = ()

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. What has come when the iterator is closed is remembered as the answer.

        Raises:
            InputError: The message alone does not fit into the context.
        """
        before, said = self.messages, ""
        self.messages = (*before, Message("user", text))
        try:
            ids = self._fit()
            for piece in self.engine.stream(ids, self.params):
                said += piece.text
                yield piece.text
        finally:
            # A turn without an answer never happened: templates and training know none.
            self.messages = (*self.messages, Message("assistant", said)) if said else before

    def _fit(self) -> list[int]:
        """Prompt ids, after forgetting the oldest turns where prompt and answer would not fit."""
        context = self.engine.engine.context_length
        reserve = self.params.max_tokens or context // 4
        forgotten = 0
        while True:
            ids = self.engine.encode(Conversation((*self._head, *self.messages), template_args=self._template_args))
            if len(ids) + reserve <= context or len(self.messages) == 1:
                break
            self.messages, forgotten = self.messages[2:], forgotten + 2
        if forgotten:
            _note(f"the context of {context} tokens is full: the oldest {forgotten} messages are forgotten")
        budget(len(ids), self.params, context)
        return ids


# ---- the terminal ----------------------------------------------------------------------------------------------------

def _converse(session: Session, folder: str) -> None:
    """With a person at the keyboard."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    _note(f"{folder}: {session.engine.engine.context_length} tokens of context. exit, quit, 退出 or Ctrl-D leaves, "
          "Ctrl-C stops an answer, /reset forgets.")
    while True:
        try:
            line = _clean(input("you> ")).strip()
        except KeyboardInterrupt:
            print("\n(exit or Ctrl-D leaves)")
            continue
        except EOFError:
            print()
            return
        if line in EXIT_WORDS:
            return
        if line == "/reset":
            session.reset()
            _note("forgotten")
        elif line:
            _answer(session, line, terminal=True)


def _answer_lines(session: Session) -> None:
    """With another program, or a file, on stdin."""
    for raw in sys.stdin:
        line = _clean(raw).strip()
        if line in EXIT_WORDS:
            return
        if line == "/reset":
            session.reset()
        elif line:
            _answer(session, line, terminal=False)


def _answer(session: Session, line: str, *, terminal: bool) -> None:
    """One turn; a message that cannot be answered does not end the program."""
    try:
        _show(session.ask(line), terminal=terminal)
    except InputError as error:
        _note(str(error))


def _show(pieces: Iterator[str], *, terminal: bool) -> None:
    """Print pieces as they come; at a terminal, Ctrl-C ends the answer and not the program."""
    try:
        for piece in pieces:
            # Control characters in an answer could rewrite the screen.
            sys.stdout.write(piece.translate(CONTROLS) if terminal else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not terminal:
            raise
        sys.stdout.write(" (stopped)")
    print(flush=True)


def _note(text: str) -> None:
    """For the person, not for the program that reads the answers."""
    print(text, file=sys.stderr, flush=True)


def _clean(text: str) -> str:
    """Bytes that are no UTF-8 come in as surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _hush() -> None:
    """No progress bars between question and answer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
