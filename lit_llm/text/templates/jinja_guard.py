"""The subset of Jinja whose cost is bounded; templates that use more are rendered in another process.

A template is untrusted code. Most templates only loop over messages, compare, slice and join short strings. Such a
template runs in this process, and every operation is charged for the data that it reads or creates. Operations of
unknown cost (powers, formats with widths, most filters, structures with many shared references, large numbers) raise
`OutsideError`, and the caller renders in a process with limits on time and memory (`jinja_process.py`).
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import BuiltinMethodType
from typing import Any

from lit_llm.system.private import others

WORK = " work"                                          # key in a template's context that no template can name
BUDGET = 20_000_000                                     # characters and elements of one render; a text has about 10,000
SECONDS = 0.5                                           # of one render
LARGE = 1_000_000                                       # characters of one string, and of all contents
SMALL = 4096                                            # characters per loop iteration that are not charged
INTEGER = 1 << 31
ELEMENTS = 20_000                                       # elements of one structure; shared ones count each time
SOURCE = 200_000                                        # characters of a template; published ones have up to 30,000
WIDTH = re.compile(r"\d{3}|[*{]")                       # in a format: a potentially large width

NODES = frozenset((
    "Add", "And", "Assign", "AssignBlock", "Break", "Call", "CallBlock", "Compare", "Concat", "CondExpr", "Const",
    "Continue", "Dict", "Div", "ExtensionAttribute", "Filter", "FilterBlock", "FloorDiv", "For", "Getattr", "Getitem",
    "If", "Keyword", "List", "Macro", "Mod", "Mul", "NSRef", "Name", "Neg", "Not", "Operand", "Or", "Output", "Pair",
    "Pos", "Slice", "Sub", "Template", "TemplateData", "Test", "Tuple", "With"))
# Filters whose cost is at most the length of their value, or that are lazy.
SHORT = frozenset(("abs", "first", "last", "list", "map", "max", "min",
                   "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique", "dictsort"))
CONSTANT = frozenset(("count", "d", "default", "items", "length", "safe"))
# Filters that read the whole value and return at most as much.
LINEAR = frozenset(("capitalize", "e", "escape", "float", "int", "lower", "string", "title", "tojson", "trim", "upper"))
METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower",
    "isnumeric", "isspace", "istitle", "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "upper"))
INTERNAL = frozenset(("_loop_vars", "_block_vars"))     # arguments that Jinja itself adds to calls


class OutsideError(Exception):
    """This template or conversation must be rendered in the other process."""


class Work:
    """Accumulated cost of one render."""

    __slots__ = ("_end", "_left", "_looks")

    def __init__(self) -> None:
        self._left, self._looks, self._end = BUDGET, 0, 0.0

    def charge(self, size: int) -> None:
        """Charge one operation that reads or creates `size` characters or elements.

        Raises:
            OutsideError: The budget of the render is exhausted.
        """
        self._left -= size + 16
        self._looks += 1
        if self._left < 0:
            raise OutsideError
        if self._looks % 64 == 0 or size > SMALL:
            now = time.monotonic()
            self._end = self._end or now + SECONDS
            if now > self._end:
                raise OutsideError


def size_of(value: object) -> int:
    """Characters and elements of a value with its content; shared parts count each time.

    Raises:
        OutsideError: The value is too large, or its type has no known size.
    """
    if type(value) is str:
        if len(value) > LARGE:
            raise OutsideError
        return len(value)
    size = elements = 0
    stack = [value]
    while stack:
        one = stack.pop()
        elements += 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, int):                      # also bool
            if not -(1 << 63) <= one < 1 << 63:
                raise OutsideError
        elif isinstance(one, list | tuple):
            if len(one) > ELEMENTS:
                raise OutsideError
            stack += one
        elif isinstance(one, dict):
            if len(one) > ELEMENTS:
                raise OutsideError
            stack += one
            stack += one.values()
        elif one is not None and not isinstance(one, float) and not isinstance(one, _undefined()):
            raise OutsideError
        if elements > ELEMENTS or size > LARGE:
            raise OutsideError
    return size + elements


@cache
def _undefined() -> type:
    from jinja2 import Undefined

    return Undefined


def _length(value: object) -> int:
    """Length of a value that is not read as a whole."""
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


# ---- operations ------------------------------------------------------------------------------------------------------

def _written(value: object) -> Any:
    """Check a value for output: a string of any length (the caller adds them up) or a value with a short string."""
    if type(value) is not str:
        size_of(value)
    return value


def _charged(context: Any, value: Any) -> Any:
    """Charge a value that is joined or stored."""
    if type(value) is not str:
        context.parent[WORK].charge(size_of(value))
    elif len(value) > SMALL:
        context.parent[WORK].charge(len(value))
    return value


def _sliced(context: Any, value: Any) -> Any:
    context.parent[WORK].charge(_length(value))
    return value


def _counted(context: Any, items: Any) -> Iterator[Any]:
    """The elements of a loop, charged one by one."""
    work = context.parent[WORK]
    work.charge(64)
    for number, item in enumerate(items):
        if number % 64 == 63:
            work.charge(1024)
        yield item


def _binop(environment: Any) -> Callable[[Any, str, Any, Any], Any]:
    """`environment.call_binop`."""
    table = environment.binop_table

    def call(context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) is int and type(right) is int and operator != "**":
            if not (-INTEGER < left < INTEGER and -INTEGER < right < INTEGER):
                raise OutsideError
        elif type(left) is str and type(right) is str and operator == "+":
            if len(left) + len(right) > SMALL:
                context.parent[WORK].charge(len(left) + len(right))
        else:
            context.parent[WORK].charge(_cost_of(operator, left, right))
        return table[operator](left, right)

    return call


def _cost_of(operator: str, left: Any, right: Any) -> int:
    """Cost of an operation of which at least one operand is neither a string nor an integer."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    lists = isinstance(left, list | tuple) and isinstance(right, list | tuple)
    if operator == "+" and lists:
        return len(left) + len(right)
    if operator == "+" or (numbers and operator != "**"):
        return size_of(left) + size_of(right)
    if operator == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
        if (size := size_of(left) * max(0, right)) <= LARGE:
            return size
    elif operator == "%" and isinstance(left, str) and len(left) < SMALL and not WIDTH.search(left):
        return len(left) * (1 + size_of(right))
    raise OutsideError


def _filter(name: str, plain: Callable[..., object]) -> Callable[..., Any]:
    """The same filter with its cost charged, or deferred to the other process."""
    from jinja2 import pass_context

    wants = others.first_argument(plain)
    plain_text, constant = name in LINEAR - {"int", "tojson"}, name in CONSTANT

    @pass_context
    def guarded(context: Any, value: Any, *args: Any, **keys: Any) -> Any:
        first = {"": (), "context": (context,), "eval_context": (context.eval_ctx,)}.get(wants, (context.environment,))
        if constant or (plain_text and type(value) is str and len(value) < SMALL and not args and not keys):
            return plain(*first, value, *args, **keys)
        if hasattr(value, "__next__"):
            value = _counted(context, value)
            if name == "join":
                value = list(value)
        work = context.parent[WORK]
        work.charge(_cost(name, value, [*args, *keys.values()]))
        out = plain(*first, value, *args, **keys)
        if type(out) is str:
            work.charge(len(out))
        return out

    return guarded


def _cost(name: str, value: object, arguments: list[Any]) -> int:
    """Cost of a filter with these arguments."""
    more = sum(map(size_of, arguments))
    if name in SHORT:
        return 4 * _length(value) + more
    if name in LINEAR:
        size = size_of(value)
        if name == "int" and size > 1000:
            raise OutsideError
        if name == "tojson" and any(size_of(one) > 8 or (isinstance(one, int) and one > 8) for one in arguments):
            raise OutsideError
        return size + more
    if name == "replace" and len(arguments) >= 2 and isinstance(value, str):
        return _replaced(value, *arguments[:2])
    if name == "indent" and isinstance(value, str) and all(isinstance(one, int) and one <= 80 for one in arguments):
        return len(value) + 80 * value.count("\n")
    if name == "join" and all(isinstance(one, str) for one in arguments):
        return size_of(value) + _length(value) * more
    raise OutsideError


def _replaced(text: str, old: object, new: object) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        raise OutsideError
    size = len(text) + (1 + len(text) // max(1, len(old))) * len(new)
    if size > LARGE:
        raise OutsideError
    return size


def _call(environment: Any) -> Callable[..., Any]:
    """`environment.call`."""
    from jinja2.runtime import Macro

    namespaces = tuple(map(environment.globals.get, ("namespace", "dict")))
    sequence, plain = environment.globals["range"], type(environment).call

    def call(context: Any, function: Any, *args: Any, **keys: Any) -> Any:
        owner = function.__self__ if type(function) is BuiltinMethodType else getattr(function, "__self__", None)
        if type(owner) is str and type(function) is BuiltinMethodType:
            name = function.__name__
            if name not in METHODS or len(owner) > SMALL or (name.startswith("r") and _width(args) > 64):
                context.parent[WORK].charge(_cost_of_method(name, owner, args))
            if keys and not keys.keys() <= INTERNAL:
                raise OutsideError
            return function(*args)
        work, arguments = context.parent[WORK], [*args, *(value for key, value in keys.items() if key not in INTERNAL)]
        name, size = getattr(function, "__name__", ""), sum(map(_length, arguments))
        if isinstance(function, Macro) or name == "_generation_support":
            work.charge(size)
            text = plain(environment, context, function, *args, **keys)
            work.charge(len(text))
            return text
        if any(function is one for one in namespaces):
            size = sum(map(size_of, arguments))
        elif name == "strftime_now":
            if size > 100 or any(isinstance(one, str) and WIDTH.search(one) for one in arguments):
                raise OutsideError
        elif not ((isinstance(owner, dict) and name in ("items", "keys", "values", "get")) or name == "raise_exception"
                  or function is sequence or isinstance(function, _undefined())):
            raise OutsideError
        work.charge(size)
        return plain(environment, context, function, *args, **keys)

    return call


def _cost_of_method(name: str, owner: str, arguments: Sequence[object]) -> int:
    """Cost of a string method with these arguments."""
    if name == "replace" and len(arguments) >= 2:
        return _replaced(owner, *arguments[:2])
    if name not in METHODS or (name.startswith("r") and _width(arguments) > 64):
        raise OutsideError
    return len(owner) * (4 if "split" in name else 1) + _width(arguments)


def _width(values: Iterable[object]) -> int:
    return sum(map(_length, values))


# ---- an environment and a tree with guards ---------------------------------------------------------------------------

def guard(environment: Any) -> Any:
    """The same environment with every filter, call and operation charged, without constant folding."""
    from jinja2 import pass_context

    guarded = environment.overlay()
    filters = {name: _filter(name, plain) for name, plain in environment.filters.items()}
    guarded.filters = filters | {" charged": pass_context(_charged), " sliced": pass_context(_sliced),
                                 " counted": pass_context(_counted)}
    guarded.intercepted_binops = frozenset(environment.binop_table)
    guarded.call_binop, guarded.call, guarded.finalize = _binop(guarded), _call(guarded), _written
    return guarded


def guard_tree(tree: Any) -> Any:
    """The same template with charges for what the environment does not see: loops, slices, stored strings, structures.

    Raises:
        OutsideError: It has a statement of unknown cost.
    """
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Guard(NodeTransformer):
        def generic_visit(self, node: Any, *args: Any, **keys: Any) -> Any:
            if type(node).__name__ not in NODES or getattr(node, "name", "") in ("varargs", "kwargs"):
                raise OutsideError
            if any(getattr(node, name, None) for name in ("recursive", "dyn_args", "dyn_kwargs")):
                raise OutsideError
            node = super().generic_visit(node)
            if isinstance(node, nodes.For):
                node.iter = _filtered(node.iter, " counted")
            elif isinstance(node, nodes.Concat):
                node.nodes = [_filtered(one, " charged") for one in node.nodes]
            elif isinstance(node, nodes.AssignBlock):
                node.filter = _filtered(node.filter, " charged")
            elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
                return _filtered(node, " sliced")
            literal = isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and getattr(node, "ctx", "load") == "load"
            if literal and not all(isinstance(one, nodes.Const) for one in node.iter_child_nodes()):
                return _filtered(node, " charged")
            return node

    return Guard().visit(tree)


def _filtered(node: Any, name: str) -> Any:
    from jinja2 import nodes

    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno if node is not None else 1)
