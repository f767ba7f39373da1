"""Limits on JSON schemas of requests, which are untrusted: size, depth, numbers, patterns and references."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lit_llm.errors import InputError

CHARACTERS = 100_000                                    # of a schema as JSON
DEPTH = 48                                              # nested lists and objects
VALUES = 5_000                                          # in all of its lists and objects
COUNT = 10_000                                          # of characters, items or properties that a keyword may name
PATTERN = 500                                           # characters of a regular expression
ANY_OBJECT: dict[str, Any] = {"type": "object"}
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def check(schema: Any, where: str) -> dict[str, Any]:
    """The schema, if it is within the limits.

    Raises:
        InputError: It is not an object, or exceeds a limit; the error is located at `where`.
    """
    if not isinstance(schema, dict):
        raise InputError("a JSON schema must be an object", where=where)
    try:
        size = len(json.dumps(schema, ensure_ascii=False))
    except (RecursionError, ValueError):
        raise InputError(f"the schema is nested more than {DEPTH} levels deep", where=where) from None
    if size > CHARACTERS:
        raise InputError(f"the schema has {size:,} characters; at most {CHARACTERS:,} are allowed", where=where)
    for number, (depth, key, value) in enumerate(_values(schema)):
        if number > VALUES:
            raise InputError(f"the schema has more than {VALUES:,} values", where=where)
        if depth > DEPTH:
            raise InputError(f"the schema is nested more than {DEPTH} levels deep", where=where)
        if key in ("$ref", "$dynamicRef") and isinstance(value, str) and not value.startswith("#"):
            raise InputError(f"{key} must refer to a place in the same schema (`#/...`), not to {value[:60]!r}",
                             where=where)
        if key in COUNTS and isinstance(value, int | float) and value > COUNT:
            raise InputError(f"{key} is {value:,}; at most {COUNT:,} is allowed", where=where)
        if key == "pattern" and isinstance(value, str) and len(value) > PATTERN:
            raise InputError(f"a pattern has {len(value):,} characters; at most {PATTERN} are allowed", where=where)
    return schema


def _values(schema: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(depth, key or empty, value) of every value, without recursion."""
    rest: list[tuple[int, Any]] = [(1, schema)]
    while rest:
        depth, holder = rest.pop()
        pairs = holder.items() if isinstance(holder, Mapping) else (("", value) for value in holder)
        for key, value in pairs:
            yield depth, key, value
            if isinstance(value, dict | list):
                rest.append((depth + 1, value))
