"""A chat template's source in; a function that renders messages with it out, in bounded time and memory.

A template is a stranger's program. The environment is the sandbox of transformers, so that the text is the one that
`apply_chat_template` renders. What is cheap is rendered in this process (`jinja_guard.py`), and anything else in one
whose time and memory can be cut (`jinja_process.py`). A template that is slow again and again is given up.
"""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from lit_llm.errors import GivenUpError, InputError, did_you_mean
from lit_llm.text.templates import jinja_guard, jinja_process
from lit_llm.text.templates.jinja_guard import WORK, OutsideError, Work, size_of

SECONDS, CHARACTERS = 5.0, 50_000_000                   # of one text, which takes a thousandth of a second as a rule
LOST = 30.0                                             # seconds that slow texts may take together
REGAINED = 0.1                                          # of the time that passes
SLOW, SLOW_TURN, SLOW_CHARACTER = 0.05, 1e-3, 1e-7      # seconds that a text may take, a turn of it and a character
SOURCE = 500_000                                        # characters of a template; published ones have up to 30,000
TRIES = 8                                               # texts that leave the process before all do


Render = Callable[[list[dict], list[dict] | None, bool, Mapping[str, Any]], str]
REASONING = ("reasoning_content", "reasoning", "thinking")      # the names by which templates ask for it


HANDED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))     # variables that are not the user's
TemplateArgs = Mapping[str, bool | int | float | str | list[str] | None]


def variables(source: str, special_tokens: Mapping[str, Any]) -> frozenset[str]:
    """The variables that a template reads and a user may set, such as `enable_thinking`.

    Raises:
        InputError: The source is not jinja; it names the line.
    """
    from jinja2 import meta

    environment = _environment()
    with _said_of(source):
        read = meta.find_undeclared_variables(_parsed(environment, source))
    return frozenset(read - HANDED - environment.globals.keys() - special_tokens.keys())


def check_args(template_args: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Refuse values for variables that a template does not read, which would change nothing.

    Raises:
        InputError: At `where`; it names the variables that there are.
    """
    for name in map(str, template_args):            # keys of YAML may be numbers
        if name not in known:
            there = f"it reads {', '.join(sorted(known)[:20])}" if known else "it reads none that can be set"
            raise InputError(f"the chat template has no variable '{name[:40]}'; {there}."
                             f"{did_you_mean(name[:40], sorted(known))}", where=where)


def with_defaults(source: str, template_args: TemplateArgs) -> str:
    """The same template with other values where a variable is not given.

    They stand in the template itself, so whatever renders it uses them: training, chat, the server, and plain
    transformers or another server with the exported folder.

    >>> with_defaults("{{ x }}", {"x": False})
    '{%- if x is not defined %}{%- set x = False %}{%- endif +%}{{ x }}'
    """
    lines = "".join(f"{{%- if {name} is not defined %}}{{%- set {name} = {value!a} %}}{{%- endif +%}}"
                    for name, value in sorted(template_args.items()))
    return source if source.startswith(lines) else lines + source


def compiled(source: str, special_tokens: Mapping[str, Any]) -> Render:
    """`(messages, tools, add_generation_prompt, template_args) -> text`.

    Args:
        source: The template.
        special_tokens: What it may name, such as `bos_token`.

    Raises:
        InputError: The source is not jinja; it names the line.
    """
    return _Template(source, special_tokens).render


class _Template:
    """A template and what its texts have cost."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self._source, self._tokens = source, dict(special_tokens)
        self._inner = _inner(source)
        self._left, self._lost, self._then = 0, 0.0, time.monotonic()

    def render(self, messages: list[dict], tools: list[dict] | None, generation_prompt: bool,
               template_args: Mapping[str, Any]) -> str:
        """The text.

        Raises:
            InputError: It takes too much time or memory, or writes too much.
            GivenUpError: So many texts were slow that a run would not end.
        """
        if self._lost > LOST:
            self._spent(0.0)
        told = [{**dict.fromkeys(REASONING, message["reasoning_content"]), **message}
                if "reasoning_content" in message else message for message in messages]
        context = {**template_args, "messages": told, "tools": tools, "documents": None,
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
                               "texts that take a thousandth of a second as a rule", where="data.chat_template",
                               fix="give another template, a .jinja file that you have read")


def _size(context: dict[str, Any]) -> int:
    """Characters of the messages, roughly."""
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
    """The sandbox of transformers, with guards; nothing is computed while a template is compiled."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return jinja_guard.guard(_compile_jinja_template("").environment)


def _parsed(environment: Any, source: str) -> Any:
    if len(source) > SOURCE:
        raise InputError(f"the chat template has {len(source):,} characters; {SOURCE:,} are read at most",
                         where="data.chat_template")
    with _said_of(source):
        return environment.parse(source)


@contextmanager
def _said_of(source: str) -> Generator[None, None, None]:
    """Whatever the compiler raises, as an error of the user."""
    from jinja2 import TemplateSyntaxError

    try:
        yield
    except (InputError, OutsideError):
        raise
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not jinja: line {error.lineno}: {error.message}") from None
    except Exception as error:                      # nested too deeply, numbers too long, half a surrogate pair
        raise InputError(f"the chat template cannot be compiled: {str(error)[:160] or type(error).__name__}",
                         where="data.chat_template") from None


def _inner(source: str) -> Any:
    """The template as it is rendered in this process; null where it cannot be.

    Raises:
        InputError: The source is not jinja.
    """
    from jinja2 import Template

    environment = _environment()
    tree = _parsed(environment, source)
    if len(source) > jinja_guard.SOURCE:
        return None
    with suppress(OutsideError), _said_of(source):
        return Template.from_code(environment, environment.compile(jinja_guard.guard_tree(tree)),
                                  environment.make_globals(None))
    return None
