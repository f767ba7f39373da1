"""Check the values of a config, and describe their ranges in the help.

`check_plain` checks YAML values before their types are known, `check` a parsed config. What a key accepts is derived
from the signature of its class or function and from the table in `ranges.py`.
"""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_llm.errors import InputError
from lit_llm.system import ranges

LARGEST = 2**63                                     # larger integers are always an error
LONGEST = 4096                                      # characters of a text; the limit of a path
MOST = 100_000                                      # values in a config
FREE_TEXTS = ("data.template_args", "chat.prompt", "chat.system", "chat.stop", "chat.template_args", "model.init")
FREE_LENGTH = 1_000_000
DEPTH = 50


def check_plain(value: object, where: str = "", *, depth: int = 0) -> int:
    """Refuse values that no key accepts: infinity, NaN, and overlong numbers, texts and nesting.

    Args:
        value: A value from YAML or JSON, or a parsed config.
        where: Its key.
        depth: Nesting depth of the value.

    Returns:
        Number of values, including those within lists and mappings.

    Raises:
        InputError: The error names the key, the value and what is allowed.
    """
    if depth > DEPTH:
        raise InputError(f"mappings and lists are nested more than {DEPTH} levels deep", where=where[:80],
                         fix="use numbers, texts, and lists and mappings of a few levels")
    inside_model = where.startswith("model.init.")      # some models have infinite limits
    if isinstance(value, float) and not math.isfinite(value) and not inside_model:
        raise InputError(f"{value} is not a finite number", where=where, fix=_example(where))
    if isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{ranges.shown(value)} is too large for any key", where=where, fix=_example(where))
    if isinstance(value, str):
        _check_text(value, where)
    count = 1
    for key, part in _parts(value):
        named = isinstance(value, Mapping)
        if named:
            check_plain(key, where, depth=depth + 1)
        count += check_plain(part, _join(where, key) if named else where, depth=depth + 1)
        if count > MOST:
            raise InputError(f"more than {MOST:,} values", where=where, fix="a config contains settings; data belong "
                             "in files that data.sources names")
    return count


def _check_text(text: str, where: str) -> None:
    most = FREE_LENGTH if where.startswith(FREE_TEXTS) else LONGEST
    if len(text) > most:
        raise InputError(f"the text has {len(text):,} characters; at most {most:,} are allowed", where=where)
    if "\0" in text:
        raise InputError(f"'{ranges.shown(text)}' contains a NUL character, which names and paths cannot contain",
                         where=where, fix="remove the character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"'{ranges.shown(text)}' is not text in UTF-8", where=where, fix="correct the text")


def _parts(value: object) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _example(where: str) -> str:
    numbers = ranges.of(where)
    return f"{where} takes {numbers}, for example --{where} {numbers.example}" if numbers else (
        "use a finite number, or leave the key out for its default")


def plain(value: object) -> Any:
    """Convert a parsed config to mappings, lists and scalars."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


# ---- a parsed config -------------------------------------------------------------------------------------------------

def check(config: Mapping[str, Any], kinds: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse nulls and numbers that a key does not accept.

    Args:
        config: The parsed config as plain values.
        kinds: Key -> the class that gets the values below it.

    Raises:
        InputError: The error names the key, the value, what is allowed and what to type.
    """
    check_plain(config)
    for key, kind in kinds.items():
        if isinstance(config.get(key), Mapping):
            check_arguments(key, config[key], kind)
        elif key in config:
            raise InputError(f"{ranges.shown(config[key])} is not a mapping of keys to values", where=key,
                             fix=f"{key}: {{KEY: VALUE}}; or leave it out")


def check_arguments(where: str, values: Mapping[str, object], kind: Callable[..., object], *, prefix: str = "") -> None:
    """Check the arguments of one class or function.

    Args:
        where: Key of the arguments; empty for options of a verb.
        values: The arguments by name.
        kind: The class or function.
        prefix: Prefix of the keys in the table of ranges; `where` if empty.
    """
    hints = arguments(kind)
    for name, value in values.items():
        place = _join(where, name)
        key = next((f"{own}.{name}" for own in names(kind) if not prefix and ranges.knows(f"{own}.{name}")),
                   f"{prefix or where}.{name}")
        hint, default = hints.get(name, (Any, inspect.Parameter.empty))
        if value is None and default is not None and not takes_null(hint):
            raise InputError(f"null is not allowed; {place} takes {_words(key, hint)}", where=place,
                             fix=_typed(place, key, default))
        # the default of an argument that is passed on (`**kwargs` of TensorBoardLogger) is not in the signature
        if value == "" and name in hints and default != "" and not key.startswith(FREE_TEXTS):
            raise InputError(f"the text is empty; {place} takes {_words(key, hint)}", where=place,
                             fix=_typed(place, key, default))
        ranges.check(key, value, where=place)
        for one in value if isinstance(value, list) else [value]:
            _check_inside(place, key, one, hint)


def _check_inside(where: str, key: str, value: object, hint: object) -> None:
    """Check the arguments of a class given by class_path, or of a dataclass."""
    if not isinstance(value, Mapping):
        return
    classes = [kind for kind in flat(hint) if isinstance(kind, type)]
    if isinstance(named := value.get("class_path"), str) and "." in named:
        if not any(kind is dict for kind in classes):
            module, _, name = named.rpartition(".")
            init_args = value.get("init_args")
            check_arguments(f"{where}.init_args", init_args if isinstance(init_args, Mapping) else {},
                            getattr(import_module(module), name))
        return
    for kind in classes:
        if is_dataclass(kind):
            check_arguments(where, value, kind, prefix=key)


def arguments(kind: Callable[..., object]) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of a class or function, including base classes if it has `**kwargs`."""
    parameters_by_name: dict[str, tuple[Any, Any]] = {}
    functions = [base.__dict__["__init__"] for base in kind.__mro__ if "__init__" in base.__dict__] if isinstance(
        kind, type) else [kind]
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters
            hints = get_type_hints(function)
        except (NameError, TypeError, ValueError):  # a name for type checkers only, or a C function
            break
        for name, parameter in parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name != "self":
                parameters_by_name.setdefault(name, (hints.get(name, Any), parameter.default))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return parameters_by_name


def names(kind: object) -> list[str]:
    """Names of a class and its base classes in the table of ranges."""
    return [base.__name__ for base in kind.__mro__] if isinstance(kind, type) else []


def takes_null(hint: object) -> bool:
    """Whether a key may be null, by its annotation."""
    return any(part in (Any, type(None)) for part in flat(hint))


def flat(hint: object) -> list[Any]:
    """The member types of a union or list."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType, list):
        return [member for part in get_args(hint) for member in ([part] if part is type(None) else flat(part))
                if not (origin is list and part is type(None))]
    return [hint if origin is None else origin if origin is not Literal else hint]


# ---- annotations as JSON ---------------------------------------------------------------------------------------------

PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "tuple": tuple,
         "None": type(None), "Any": Any}
GENERIC = {"Union": Union, "Literal": Literal, "list": list, "dict": dict, "tuple": tuple}


def spec_of(hint: object) -> Any:
    """An annotation in a form that JSON can hold: a name, or a list of a generic type's name and its arguments.

    >>> spec_of(int | Literal["auto"] | None)
    ['Union', 'int', ['Literal', 'auto'], 'None']
    """
    origin = get_origin(hint)
    if origin is None:
        return "None" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))
    name = "Union" if origin is types.UnionType else getattr(origin, "__name__", None) or origin._name
    if name == "Literal":
        return [name, *get_args(hint)]
    return [name, *map(spec_of, get_args(hint))]


def hint_of(spec: Any) -> Any:
    """The annotation that `spec_of` described; null where it names a class, which is not imported here."""
    if isinstance(spec, str):
        return PLAIN.get(spec)
    name, *parts = spec
    if name != "Literal":
        parts = [hint_of(part) for part in parts]
    if name not in GENERIC or (name != "Literal" and None in parts):
        return None
    return GENERIC[name][tuple(parts)]  # type: ignore[index]


# ---- descriptions ----------------------------------------------------------------------------------------------------

def _words(key: str, hint: object) -> str:
    numbers = ranges.of(key)
    choices = [str(choice) for part in flat(hint) if get_origin(part) is Literal for choice in get_args(part)]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
             dict: "a mapping", tuple: "a list"}
    phrases = [str(numbers)] if numbers else []
    phrases += [phrase for kind, phrase in names.items()
                if kind in flat(hint) and not (numbers and kind in (int, float))]
    return ", ".join([*phrases, *choices]) or "a value of its type"


def _typed(place: str, key: str, default: object) -> str:
    numbers = ranges.of(key)
    if default is not inspect.Parameter.empty and isinstance(default, bool | int | float | str):
        shown = str(default).lower() if isinstance(default, bool) else default
        return f"leave it out, or set it to its default: --{place} {shown}"
    return f"for example --{place} {numbers.example}" if numbers else "leave it out"


def help_of(key: str, hint: object, *, required: bool = False) -> str:
    """Text that the help adds to a key's description: its range, and whether null is not allowed."""
    numbers = ranges.of(key)
    nullable = required or takes_null(hint)
    text = f" {str(numbers)[0].upper()}{str(numbers)[1:]}{', or null' if nullable else ''}." if numbers else ""
    return text if nullable else f"{text} Never null."
