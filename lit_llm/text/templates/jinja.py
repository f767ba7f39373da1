"""Compile a chat template into a function that renders messages in bounded time and memory.

A template is untrusted code. Its environment is the sandbox of transformers, so the text equals that of
`apply_chat_template`. Templates of known cost are rendered in this process (`jinja_guard.py`), all others in a process
with limits on time and memory (`jinja_process.py`). A template that is slow repeatedly is refused.
"""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from lit_llm.errors import GivenUpError, InputError, did_you_mean
from lit_llm.system.private import transformers as transformers_private
from lit_llm.text.templates import jinja_guard, jinja_process
from lit_llm.text.templates.jinja_guard import WORK, OutsideError, Work, size_of

SECONDS, CHARACTERS = 5.0, 50_000_000                   # of one text, which usually takes a millisecond
LOST = 30.0                                             # seconds that slow texts may take in total
REGAINED = 0.1                                          # share of the elapsed time that the budget regains
SLOW, SLOW_TURN, SLOW_CHARACTER = 0.05, 1e-3, 1e-7      # seconds that a text, each message and each character may take
SOURCE = 500_000                                        # characters of a template; published ones have up to 30,000
TRIES = 8                                               # texts rendered in the other process before all are


Render = Callable[[list[dict], list[dict] | None, bool, Mapping[str, Any]], str]
REASONING = ("reasoning_content", "reasoning", "thinking")      # names that templates use for it


HANDED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))     # variables that a user cannot set
TemplateArgs = Mapping[str, bool | int | float | str | list[str] | None]


def variables(source: str, special_tokens: Mapping[str, object]) -> frozenset[str]:
    """The variables that a template reads and a user may set, such as `enable_thinking`.

    Raises:
        InputError: The source is not valid Jinja; the error names the line.
    """
    from jinja2 import meta

    environment = _environment()
    with _as_input_error(source):
        read = meta.find_undeclared_variables(_parsed(environment, source))
    return frozenset(read - HANDED - environment.globals.keys() - special_tokens.keys())


def check_args(template_args: Mapping[str, object], names_of_variables: frozenset[str], where: str) -> None:
    """Refuse values for variables that a template does not use, because they would have no effect.

    Raises:
        InputError: Located at `where`; the error lists the variables of the template.
    """
    for name in map(str, template_args):            # keys of YAML may be numbers
        if name not in names_of_variables:
            names = ", ".join(sorted(names_of_variables)[:20])
            existing = f"it reads {names}" if names else "it reads none that can be set"
            raise InputError(f"the chat template has no variable '{name[:40]}'; {existing}."
                             f"{did_you_mean(name[:40], sorted(names_of_variables))}", where=where)


def with_defaults(source: str, template_args: TemplateArgs) -> str:
    """The same template with default values for variables that are not passed.

    The defaults are part of the template, so every renderer uses them: training, chat, the server, plain transformers,
    or another server with the exported folder.

    >>> with_defaults("{{ x }}", {"x": False})
    '{%- if x is not defined %}{%- set x = False %}{%- endif +%}{{ x }}'
    """
    lines = "".join(f"{{%- if {name} is not defined %}}{{%- set {name} = {value!a} %}}{{%- endif +%}}"
                    for name, value in sorted(template_args.items()))
    return source if source.startswith(lines) else lines + source


def compiled(source: str, special_tokens: Mapping[str, object]) -> Render:
    """`(messages, tools, add_generation_prompt, template_args) -> text`.

    Args:
        source: The template.
        special_tokens: Variables for special tokens, such as `bos_token`.

    Raises:
        InputError: The source is not valid Jinja; the error names the line.
    """
    return _Template(source, special_tokens).render


class _Template:
    """A compiled template with its accumulated cost."""

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        self._source, self._tokens = source, dict(special_tokens)
        self._inner = _inner(source)
        self._left, self._lost, self._then = 0, 0.0, time.monotonic()

    def render(self, messages: list[dict], tools: list[dict] | None, generation_prompt: bool,
               template_args: Mapping[str, object]) -> str:
        """Render the text.

        Raises:
            InputError: Rendering takes too much time or memory, or the text is too long.
            GivenUpError: Too many texts were slow.
        """
        if self._lost > LOST:
            self._spent(0.0)
        with_reasoning = [{**dict.fromkeys(REASONING, message["reasoning_content"]), **message}
                if "reasoning_content" in message else message for message in messages]
        context = {**template_args, "messages": with_reasoning, "tools": tools, "documents": None,
                   "add_generation_prompt": generation_prompt}
        began, most = time.monotonic(), SLOW + SLOW_TURN * len(messages)
        try:
            text = self._text(context)
            most += SLOW_CHARACTER * len(text)
        except InputError:
            most = 0.0
            raise
        finally:
            if (took := time.monotonic() - began) > most and took > SLOW:
                self._spent(took - most)
        return text

    def _text(self, context: dict[str, Any]) -> str:
        if self._inner is not None and self._left < TRIES:
            try:
                if _size(context) > jinja_guard.LARGE:
                    raise OutsideError
                inner = self._inner
                pieces, length = [], 0
                for piece in inner.root_render_func(inner.new_context({**self._tokens, **context, WORK: Work()})):
                    length += len(piece)
                    if length > jinja_guard.BUDGET:
                        raise OutsideError
                    pieces.append(piece)
                return "".join(pieces)
            except OutsideError:
                self._left += 1
        return jinja_process.render(self._source, self._tokens, context, SECONDS, CHARACTERS)

    def _spent(self, seconds: float) -> None:
        now = time.monotonic()
        self._lost = max(0.0, self._lost - REGAINED * (now - self._then)) + seconds
        self._then = now
        if self._lost > LOST:
            raise GivenUpError(f"the chat template was too slow too often: {self._lost:.0f} seconds were lost with "
                               "texts that usually take a millisecond", where="data.chat_template",
                               fix="use another template, a .jinja file that you have reviewed")


def _size(context: dict[str, Any]) -> int:
    """Approximate number of characters of the messages."""
    size = 0
    for message in context["messages"]:
        for value in message.values():
            if type(value) is str:
                size += len(value)
            elif value is not None:
                size += size_of(value)
    return size + (size_of(context["tools"]) if context["tools"] else 0)


# ---- source to program -----------------------------------------------------------------------------------------------

def _environment() -> Any:
    """The sandbox of transformers with cost guards and without constant folding."""
    return jinja_guard.guard(transformers_private.chat_template_environment())


def _parsed(environment: Any, source: str) -> Any:
    if len(source) > SOURCE:
        raise InputError(f"the chat template has {len(source):,} characters; at most {SOURCE:,} are allowed",
                         where="data.chat_template")
    with _as_input_error(source):
        return environment.parse(source)


@contextmanager
def _as_input_error(source: str) -> Generator[None, None, None]:
    """Convert whatever the compiler raises to an `InputError`."""
    from jinja2 import TemplateSyntaxError

    try:
        yield
    except (InputError, OutsideError):
        raise
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
    except Exception as error:                      # deep nesting, long numbers, a lone surrogate
        raise InputError(f"the chat template cannot be compiled: {str(error)[:160] or type(error).__name__}",
                         where="data.chat_template") from None


def _inner(source: str) -> Any:
    """The guarded template for this process; null where its cost is unknown.

    Raises:
        InputError: The source is not valid Jinja.
    """
    from jinja2 import Template

    environment = _environment()
    tree = _parsed(environment, source)
    if len(source) > jinja_guard.SOURCE:
        return None
    with suppress(OutsideError), _as_input_error(source):
        return Template.from_code(environment, environment.compile(jinja_guard.guard_tree(tree)),
                                  environment.make_globals(None))
    return None
