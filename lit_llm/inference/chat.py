"""The `chat` command: answer lines of a user in the terminal, and keep the conversation within the context."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lit_llm.errors import InputError
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.engine import budget
from lit_llm.inference.loading import model_folder
from lit_llm.inference.sampling import DEFAULT_TEMPERATURE, SamplingParams
from lit_llm.text.conversation import Conversation, Message

EXIT_WORDS = ("exit", "quit", "退出")
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    model: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = DEFAULT_TEMPERATURE,
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
    """Chat with a model in the terminal.

    Answers are streamed. `exit`, `quit`, `退出` or Ctrl-D quit, Ctrl-C stops an answer, `/reset` clears the
    conversation. Piped lines are answered one by one, and only the answers are printed.

    Args:
        model: A run folder (its export/ is used), or any folder that transformers loads.
        prompt: Answer this prompt and exit.
        system: System message at the start of every conversation.
        max_tokens: Maximum number of new tokens per answer; null uses the remaining context.
        temperature: 0 always picks the most likely token, so answers are reproducible; 0.7 gives more variety, 1
            samples from the model's own distribution.
        top_p: Sample from the most likely tokens whose probabilities sum to this value; 1 keeps all.
        top_k: Sample from this many most likely tokens; 0 keeps all.
        stop: An answer ends before the first of these strings.
        seed: Makes answers at temperatures above 0 reproducible; null uses a random seed.
        adapter: Folder of a PEFT adapter to apply to the model.
        device: `auto` uses the GPU if there is one; or cpu, cuda, mps.
        dtype: `auto` uses the checkpoint's dtype; or float32, bfloat16, float16.
        template_args: Values of the chat template's variables, such as `{enable_thinking: true}`; null uses those of
            the training.
        threads: Number of CPU threads. `auto` measures at start which number is fastest; on busy cores often 1.

    Raises:
        InputError: No such folder, no model in it, or a value out of its range.
    """
    params = SamplingParams(max_tokens, temperature, top_p, top_k, tuple(stop or ()), seed)
    folder = model_folder(model)
    _disable_progress_bars()
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
    """A conversation with a model; the oldest messages are dropped when the context is full.

    Args:
        engine: Generates the answers.
        params: Sampling parameters.
        system: System message, which is never dropped.
        template_args: Values of the chat template's variables.
    """

    def __init__(self, engine: TextEngine, params: SamplingParams, system: str | None = None,
                 template_args: Mapping[str, Any] | None = None) -> None:
        self.engine, self.params, self._template_args = engine, params, template_args or {}
        self._head = (Message("system", system),) if system else ()
        self.messages: tuple[Message, ...] = ()

    def reset(self) -> None:
        """Clear all messages except the system message."""
        self.messages = ()

    def ask(self, text: str) -> Iterator[str]:
        """Stream the answer. If the iterator is closed early, the text so far is stored as the answer.

        Raises:
            InputError: The message itself does not fit into the context.
        """
        before, answer = self.messages, ""
        self.messages = (*before, Message("user", text))
        try:
            ids = self._fit()
            for piece in self.engine.stream(ids, self.params):
                answer += piece.text
                yield piece.text
        finally:
            # A turn without an answer is dropped: neither templates nor training have such turns.
            self.messages = (*self.messages, Message("assistant", answer)) if answer else before

    def _fit(self) -> list[int]:
        """Prompt ids, after dropping the oldest turns if prompt and answer would not fit."""
        context = self.engine.engine.context_length
        reserve = self.params.max_tokens or context // 4
        forgotten = 0
        while True:
            ids = self.engine.encode(Conversation((*self._head, *self.messages), template_args=self._template_args))
            if len(ids) + reserve <= context or len(self.messages) == 1:
                break
            self.messages, forgotten = self.messages[2:], forgotten + 2
        if forgotten:
            _note(f"the context of {context} tokens is full: the oldest {forgotten} messages were dropped")
        budget(len(ids), self.params, context)
        return ids


# ---- the terminal ----------------------------------------------------------------------------------------------------

def _converse(session: Session, folder: str) -> None:
    """Interactive loop in a terminal."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    _note(f"{folder}: context of {session.engine.engine.context_length} tokens. exit, quit, 退出 or Ctrl-D quits, "
          "Ctrl-C stops an answer, /reset clears the conversation.")
    while True:
        try:
            line = _clean(input("you> ")).strip()
        except KeyboardInterrupt:
            print("\n(exit or Ctrl-D quits)")
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
    """Loop for lines from a pipe or a file."""
    for raw in sys.stdin:
        line = _clean(raw).strip()
        if line in EXIT_WORDS:
            return
        if line == "/reset":
            session.reset()
        elif line:
            _answer(session, line, terminal=False)


def _answer(session: Session, line: str, *, terminal: bool) -> None:
    """Answer one message; an error is printed and does not end the program."""
    try:
        _show(session.ask(line), terminal=terminal)
    except InputError as error:
        _note(str(error))


def _show(pieces: Iterator[str], *, terminal: bool) -> None:
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
    print(flush=True)


def _note(text: str) -> None:
    """Print a note to stderr, so that piped output has answers only."""
    print(text, file=sys.stderr, flush=True)


def _clean(text: str) -> str:
    """Replace surrogates, which stand for bytes that are not UTF-8 and which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _disable_progress_bars() -> None:
    """Disable progress bars and library logs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
