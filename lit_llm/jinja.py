"""A chat template's source in; a function that renders messages with it out, in bounded time.

A template is a stranger's program. The environment is the sandbox of transformers, so that the text is the one that
`apply_chat_template` renders; added is a clock that loops and calls look at, and a bound on strings. What a single
filter does is bounded by neither.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_llm.errors import InputError, did_you_mean

SECONDS, CHARACTERS = 5, 50_000_000                     # of one text, which takes a thousandth of a second as a rule
CLOCK = " clock"                                        # no name that a template could spell


Render = Callable[[list[dict], list[dict] | None, bool, Mapping[str, Any]], str]
REASONING = ("reasoning_content", "reasoning", "thinking")      # the names by which templates ask for it


HANDED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))     # variables that are not the user's
TemplateArgs = Mapping[str, bool | int | float | str | list[str] | None]


def variables(source: str, special_tokens: Mapping[str, Any]) -> frozenset[str]:
    """The variables that a template reads and a user may set, such as `enable_thinking`.

    Raises:
        InputError: The source is not jinja; it names the line.
    """
    from jinja2 import TemplateSyntaxError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment
    try:
        read = meta.find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not jinja: line {error.lineno}: {error.message}") from None
    return frozenset(read - HANDED - environment.globals.keys() - special_tokens.keys())


def check_args(template_args: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Refuse values for variables that a template does not read, which would change nothing.

    Raises:
        InputError: At `where`; it names the variables that there are.
    """
    for name in template_args:
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
    from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment.overlay()

    @pass_context
    def counted(context: Any, items: Any) -> Iterator[Any]:
        clock = context.parent[CLOCK]
        for item in items:
            clock.look()
            yield item

    def call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        context.parent[CLOCK].look()
        return type(environment).call(environment, context, function, *args, **kwargs)

    environment.filters = environment.filters | {"counted": counted, "short": _short}
    environment.call = call
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table = environment.binop_table | {"*": _times, "**": _power}
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            if not loop.recursive:                      # those call themselves, and calls are counted
                loop.iter = _filtered(loop.iter, "counted")
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [_filtered(node, "short") for node in joined.nodes]
        for added in tree.find_all(nodes.Add):
            added.left, added.right = _filtered(added.left, "short"), _filtered(added.right, "short")
        template = Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not jinja: line {error.lineno}: {error.message}") from None

    def render(messages: list[dict], tools: list[dict] | None, generation_prompt: bool,
               template_args: Mapping[str, Any]) -> str:
        told = [{**dict.fromkeys(REASONING, message["reasoning_content"]), **message}
                if "reasoning_content" in message else message for message in messages]
        context = template.new_context({
            **special_tokens, **template_args, "messages": told, "tools": tools, "documents": None,
            "add_generation_prompt": generation_prompt, CLOCK: _Clock()})
        pieces, length = [], 0
        for piece in template.root_render_func(context):
            length += len(piece)
            if length > CHARACTERS:
                raise InputError(f"it writes more than {CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)

    return render


def _filtered(node: Any, name: str) -> Any:
    from jinja2 import nodes

    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Clock:
    """Stops a template that takes too long; conversations as they are never make it look at the time."""

    def __init__(self) -> None:
        self._looks, self._end = 0, 0.0

    def look(self) -> None:
        """Once in every round of a loop, and for every call."""
        self._looks += 1
        if self._looks % 256 == 0:
            now = time.monotonic()
            self._end = self._end or now + SECONDS
            if now > self._end:
                raise InputError(f"it takes longer than {SECONDS} seconds")


def _short(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > CHARACTERS:
        raise InputError(f"it writes more than {CHARACTERS:,} characters")
    return value


def _times(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int) and len(one) * other > CHARACTERS:
            raise InputError(f"it writes more than {CHARACTERS:,} characters")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if not (abs(left) < 1 << 64 and abs(right) < 1 << 10):
        raise InputError("it computes a power that is too large")
    return left ** right
