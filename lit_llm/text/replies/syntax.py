r"""How a chat template writes tool calls, as literal texts around the names and the arguments.

    [TOOL_CALLS][ {"name": " ~NAME~ ", "arguments": ~ARGUMENTS~ , "id": "~ID~"} , {"name": " ... "} ]
    ~~opening~~~~ ~~before~~        ~~~~middle~~~~~             ~~~~after~~~~~~ ~separator          ~closing

The arguments are one JSON value, or each key and value has literals of its own (`Keyed`):

    <function= ~NAME~ > <parameter= ~KEY~ >\n ~VALUE~ \n</parameter> </function>
                ~middle ~key_start~       ~~~key_end  ~~value_end~~~ ~~after~~~~
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.text.replies.source import WORD

Quoting = Literal["raw", "json"]                        # how the string values of keyed arguments are written


@dataclass(frozen=True, slots=True)
class Keyed:
    """Arguments whose keys and values have literals of their own.

    Args:
        key_start: Before a key.
        key_end: Between a key and its value.
        value_end: After a value.
        separator: Between two arguments.
        quoting: Whether string values are written as they are (`raw`), or quoted.
    """

    key_start: str
    key_end: str
    value_end: str
    separator: str
    quoting: Quoting

    @property
    def bare_keys(self) -> bool:
        """Whether nothing but the separator is between a value and the next key, as in Python."""
        return not self.value_end.strip()


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a template writes the calls of one message. `ID` in a literal stands for the call's id.

    Args:
        opening: Before the first call.
        before: Begins a call.
        middle: Between the name and the arguments, or the arguments and the name.
        after: Ends a call.
        separator: Between two calls.
        closing: After the last call.
        name_first: Whether the name is before the arguments.
        object_keys: Keys of name and arguments, where a call is a JSON object with them; it is then read as JSON.
        as_text: Whether the arguments are a JSON string that contains JSON.
        keyed: How arguments are written one by one; null where they are one JSON value.
        several: Whether a message may have several calls.
        after_content: Whether the template shows a content before the calls.
    """

    opening: str
    before: str
    middle: str
    after: str
    separator: str = ""
    closing: str = ""
    name_first: bool = True
    object_keys: tuple[str, str] | None = None
    as_text: bool = False
    keyed: Keyed | None = None
    several: bool = False
    after_content: bool = False

    @property
    def literals(self) -> tuple[str, ...]:
        """All literals, to find the special tokens among them."""
        own = (self.opening, self.before, self.middle, self.after, self.separator, self.closing)
        keyed = self.keyed
        return own if keyed is None else (*own, keyed.key_start, keyed.key_end, keyed.value_end, keyed.separator)

    @property
    def begin(self) -> str:
        """What begins a call, before its JSON object if it is one."""
        return self.before[:self.before.index("{")] if self.object_keys else self.before

    @property
    def end(self) -> str:
        """What ends a call, after its JSON object if it is one."""
        return self.after[self.after.index("}") + 1:] if self.object_keys else self.after

    @property
    def marker(self) -> str:
        """The word that begins calls behind a content; empty if it is too short to be told from a content."""
        text = (self.opening + self.begin).strip()
        words = (*WORD.findall(text)[:1], *text.split()[:1])
        return next((word for word in words if len(word) > 2), "")


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The tags around the reasoning at the beginning of an answer."""

    start: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends inside the block, so that the answer begins with reasoning."""
        return prompt.rstrip().endswith(self.start.strip())

    def is_closed(self, prompt: str) -> bool:
        """Whether a prompt ends with an empty block, so that the answer has no reasoning."""
        return prompt.rstrip().endswith(self.end.strip())


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of each function -> JSON schema of its arguments."""
    schemas = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        if not isinstance(parameters, dict):
            parameters = {"type": "object", "properties": {}}
        schemas[str(function.get("name"))] = parameters
    return schemas


def types_of(schema: Any, root: Any) -> set[str]:
    """JSON types that a schema allows, as far as it names them; empty if it names none."""
    for _ in range(8):                                  # references to references
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for step in reference[2:].split("/"):
            schema = schema.get(step) if isinstance(schema, dict) else None
    if not isinstance(schema, dict):
        return set()
    own = schema.get("type")
    types = {own} if isinstance(own, str) else {kind for kind in own or () if isinstance(kind, str)}
    if "enum" in schema and not types and isinstance(schema["enum"], list):
        types |= {"string" if isinstance(value, str) else "other" for value in schema["enum"]}
    for key in ("anyOf", "oneOf"):
        for alternative in schema.get(key) or () if isinstance(schema.get(key), list) else ():
            types |= types_of(alternative, root)
    return types


def keyed_value(text: str, quoting: Quoting, allowed: set[str]) -> Any:
    """The value of an argument that is written by itself.

    A string that is not quoted is known by its schema: `37` is a string where only strings are allowed, and a number
    otherwise.
    """
    if quoting == "raw" and allowed == {"string"}:
        return text
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        pass
    if quoting == "raw":
        return text
    try:
        return ast.literal_eval(text.strip())           # True, None and quotes of Python
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text
