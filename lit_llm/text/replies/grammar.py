r"""Grammars of answers: JSON by a schema, and tool calls as the chat template writes them, in llguidance's Lark format.

    start: opening call (separator call)* closing
    call: <[151657]> "\n{\"name\": \"f\", \"arguments\": " %json {...} "}\n" <[151658]>

A tag that is an added token of the tokenizer is that token in the grammar (`<[id]>`). All added tokens count as
special, so that no text within an answer can contain them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.errors import InputError
from lit_llm.text.replies.source import ID
from lit_llm.text.replies.syntax import CallSyntax, Keyed, Reasoning, types_of

# As Python's `json.dumps` writes; templates do the same. Escapes of code points could be lone surrogates.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ",
         "json_allowed_escapes": 'nrtbf\\"'}
TEXT = "TEXT"
ANY_TEXT = "TEXT: /(.|\\n)*/"
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a grammar may call.

    Args:
        name: Its name.
        schema: JSON schema of its arguments.
        strict: Whether a keyword that cannot be enforced is an error.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool = False


class GrammarWriter:
    """Writes grammars for one tokenizer and template.

    Args:
        added: Spelling -> id of the tokenizer's added tokens.
        reasoning: Tags of the template's reasoning.
    """

    def __init__(self, added: Mapping[str, int], reasoning: Reasoning | None = None) -> None:
        ordered = sorted((text for text in added if text.strip()), key=len, reverse=True)
        self._added, self._reasoning = added, reasoning
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def json(self, schema: Mapping[str, object], *, strict: bool, in_reasoning: bool | None = None) -> str:
        """A JSON value, after reasoning.

        Args:
            schema: Its schema, within the limits of `schema.check`.
            strict: Whether a keyword that cannot be enforced is an error; it is ignored otherwise.
            in_reasoning: Whether the prompt has opened a block of reasoning; null if the answer may have none.
        """
        return self._after_reasoning(json_rule(schema, strict), [], in_reasoning)

    def calls(self, syntax: CallSyntax, functions: Sequence[Function], *, several: bool, otherwise: str | None = None,
              in_reasoning: bool | None = None) -> str:
        """Calls of some functions, after reasoning.

        Args:
            syntax: How the template writes calls.
            functions: At least one.
            several: Whether there may be more than one call.
            otherwise: What else the answer may be: `TEXT`, which may have calls behind it, or JSON from `json_rule`.
            in_reasoning: As in `json`.

        Raises:
            InputError: The template writes calls in a way that a grammar cannot describe.
        """
        if syntax.as_text:
            raise InputError("the chat template writes the arguments of a call as JSON within a string, which cannot "
                             "be enforced")
        lead, syntax = _without_lead(syntax)
        rules = self._rules("call", syntax, functions)
        more = f"({self._literal(syntax.separator)} call)*" if several and syntax.several else ""
        rest = f"{more} {self._literal(syntax.closing)}"
        if otherwise == TEXT:
            body, own = self._behind_text(syntax, functions, rest)
            return self._after_reasoning(body, [*rules, *own], in_reasoning)
        body = f"{json.dumps(lead) + '?' if lead else ''} {self._literal(syntax.opening)} call {rest}"
        return self._after_reasoning(f"{body} | {otherwise}" if otherwise else body, rules, in_reasoning)

    def _behind_text(self, syntax: CallSyntax, functions: Sequence[Function], rest: str) -> tuple[str, list[str]]:
        """A text, a text with calls behind it, or calls."""
        begin, marker = syntax.opening or syntax.before, syntax.marker
        if self._literal(begin).startswith("<["):
            return f"TEXT ({self._literal(syntax.opening)} call {rest})?", [ANY_TEXT]
        if not marker:
            other = f"OTHER: /[^{re.escape(begin[0])}](.|\\n)*/"
            return f"OTHER | {self._literal(syntax.opening)} call {rest}", [other]
        head = [f"head[lazy]: TEXT {json.dumps(marker, ensure_ascii=False)}", ANY_TEXT]
        if syntax.opening:
            return f"TEXT | head {self._literal(syntax.opening.removeprefix(marker))} call {rest}", head
        first = self._rules("first", replace(syntax, before=begin.removeprefix(marker)), functions)
        return f"TEXT | head first {rest}", [*head, *first]

    def _after_reasoning(self, body: str, rules: list[str], in_reasoning: bool | None) -> str:
        tags = self._reasoning
        if tags is None or in_reasoning is None:
            return "\n".join([f"start: {body}", *rules])
        end = self._literal(tags.end)
        text = f"THOUGHT {end}" if end.startswith("<[") else "thought"
        more = [f"THOUGHT: {ANY_TEXT.partition(' ')[2]}", "GAP: /\\n{1,2}/"]
        if not end.startswith("<["):
            more.append(f"thought[lazy]: THOUGHT {end}")
        block = f"{text} GAP?" if in_reasoning else f"({self._literal(tags.start)} {text} GAP?)?"
        return "\n".join([f"start: {block} body", f"body: {body}", *rules, *more])

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _rules(self, rule: str, syntax: CallSyntax, functions: Sequence[Function]) -> list[str]:
        """A rule for a call of any of the functions."""
        rules = [f"{rule}: {' | '.join(f'{rule}_{number}' for number in range(len(functions)))}"]
        for number, function in enumerate(functions):
            rules += self._call(syntax, function, f"{rule}_{number}")
        return rules

    def _call(self, syntax: CallSyntax, function: Function, rule: str) -> list[str]:
        before = self._literal(syntax.before)
        middle, after = self._literal(syntax.middle), self._literal(syntax.after)
        name, schema = json.dumps(function.name), function.schema or EMPTY
        if syntax.keyed is None:
            fields = (name, json_rule(schema, function.strict))
            first, second = fields if syntax.name_first else fields[::-1]
            return [f"{rule}: {before} {first} {middle} {second} {after}"]
        arguments, rules = self._keyed(syntax.keyed, function, rule)
        return [f"{rule}: {before} {name} {middle} {arguments} {after}", *rules]

    def _keyed(self, keyed: Keyed, function: Function, rule: str) -> tuple[str, list[str]]:
        """Arguments one by one, in the order of the schema; those that are not required may be left out."""
        properties = function.schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        required = function.schema.get("required")
        required = required if isinstance(required, list) else []
        rules, separator = [], self._literal(keyed.separator)
        for number, (key, schema) in enumerate(properties.items()):
            value, more = self._value(keyed, schema, function, f"{rule}_{number}")
            rules += more
            start = " ".join(part for part in (self._literal(keyed.key_start), json.dumps(key)) if part)
            rules.append(f"{rule}_{number}_pair: {start} {value}")
            # `_first`: no argument yet; `_next`: after a separator
            optional = key not in required
            pair, following = f"{rule}_{number}_pair", number + 1
            for kind, lead in (("first", ""), ("next", separator)):
                one = f"{lead} {pair} {rule}_{following}_next"
                rules.append(f"{rule}_{number}_{kind}: {one}" + (f" | {rule}_{following}_{kind}" if optional else ""))
        last = len(properties)
        rules += [f'{rule}_{last}_first: ""', f'{rule}_{last}_next: ""']
        return f"{rule}_0_first", rules

    def _value(self, keyed: Keyed, schema: Any, function: Function, rule: str) -> tuple[str, list[str]]:
        schema = schema if isinstance(schema, dict) else {}
        kinds, choices = types_of(schema, function.schema), schema.get("enum")
        key_end, end = self._literal(keyed.key_end), self._literal(keyed.value_end)
        if keyed.quoting == "raw" and kinds == {"string"} and isinstance(choices, list):
            options = " | ".join(self._literal(str(choice)) for choice in choices)
            return f"{key_end} ({options}) {end}", []
        if keyed.quoting == "raw" and kinds == {"string"}:
            if end.startswith("<["):
                return f"{key_end} {rule}_text {end}", [f"{rule}_text: {rule.upper()}", f"{rule.upper()}: /(.|\\n)*/"]
            return f"{key_end} {rule}_text", [f"{rule}_text[lazy]: {rule.upper()} {end}", f"{rule.upper()}: /(.|\\n)*/"]
        shared = {name: function.schema[name] for name in ("$defs", "definitions") if name in function.schema}
        return f"{key_end} {json_rule({**shared, **schema}, function.strict)} {end}", []

    def _literal(self, text: str) -> str:
        """A literal as strings and tokens of the grammar; ids are letters and digits."""
        parts: list[str] = []
        at = 0
        for match in [*self._pattern.finditer(text), None]:
            plain = text[at:match.start() if match else len(text)]
            for number, part in enumerate(plain.split(ID)):
                parts += ["/[a-zA-Z0-9]{9}/"] * (number > 0) + [json.dumps(part, ensure_ascii=False)] * bool(part)
            if match:
                parts.append(f"<[{self._added[match[0]]}]>")
                at = match.end()
        return " ".join(parts)


def _without_lead(syntax: CallSyntax) -> tuple[str, CallSyntax]:
    """The white space before the first call, which an answer without a content may lack, and the syntax without it."""
    begin = syntax.opening or syntax.before
    lead, rest = begin[:len(begin) - len(begin.lstrip())], begin.lstrip()
    if syntax.opening:
        return lead, replace(syntax, opening=rest)
    return lead, replace(syntax, before=rest, separator=syntax.separator + lead)


def json_rule(schema: Mapping[str, object], strict: bool) -> str:
    """A JSON value as part of a grammar."""
    style = STYLE if strict else STYLE | {"lenient": True}
    return f"%json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=True)}"
