"""Tools, structured output and reasoning: what a chat request asks for, and the parts of its answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from lit_llm.errors import InputError
from lit_llm.inference.constraint import Grammar
from lit_llm.inference.guidance import LARK, Guidance
from lit_llm.text.replies import grammar, learning, schema
from lit_llm.text.replies.parser import Part, ReplyParser
from lit_llm.text.replies.syntax import CallSyntax, Reasoning, parameters_of
from lit_llm.text.tokenizer import Tokenizer

MOST_TOOLS = 128                                        # OpenAI's limit
TOOLS_CHARACTERS = 300_000                              # of all schemas of a request
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
TAIL = 64                                               # tokens of a prompt that may open a block of reasoning


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a request asks of its answer.

    Args:
        tools: Tools that the prompt shows, validated.
        callable: Functions that may be called.
        required: Whether one of them must be called.
        several: Whether more than one call is allowed.
        answer_schema: Schema of an answer without calls; null if it is a text.
        strict: Whether keywords of the schema that cannot be enforced are errors.
    """

    tools: tuple[dict[str, Any], ...] = ()
    callable: tuple[grammar.Function, ...] = ()
    required: bool = False
    several: bool = True
    answer_schema: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def is_constrained(self) -> bool:
        """Whether the answer needs a grammar."""
        return bool(self.required or self.answer_schema is not None or (self.callable and (
            not self.several or any(function.strict for function in self.callable))))


def requirements_of(tools: Sequence[Mapping[str, Any]] | None, tool_choice: Any, parallel: bool | None,
                    response_format: Mapping[str, Any] | None) -> Requirements:
    """Validate the fields of a request.

    Raises:
        InputError: A field is invalid; the error is located at it.
    """
    answer_schema, strict = _answer_schema(response_format)
    functions = _functions(tools or ())
    kind, named = _choice(tool_choice, functions)
    if kind == "none" or not functions:
        return Requirements(answer_schema=answer_schema, strict=strict)
    chosen = tuple(function for function in functions if named in (None, function.name))
    several = parallel is not False and named is None
    return Requirements(tuple(dict(tool) for tool in tools or ()), chosen, kind == "required", several, answer_schema,
                        strict)


def _answer_schema(response_format: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, bool]:
    where = "response_format"
    kind = response_format.get("type") if response_format is not None else "text"
    if response_format is None or kind == "text":
        return None, False
    if kind == "json_object":
        return schema.ANY_OBJECT, True
    if kind != "json_schema":
        raise InputError("type must be text, json_object or json_schema", where=where)
    definition = response_format.get("json_schema")
    if not isinstance(definition, Mapping) or not isinstance(definition.get("schema", {}), dict):
        raise InputError('json_schema must be {"name": ..., "schema": {...}, "strict": true or false}', where=where)
    return schema.check(definition.get("schema", schema.ANY_OBJECT), where), bool(definition.get("strict"))


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[grammar.Function]:
    functions: dict[str, grammar.Function] = {}
    size = 0
    if len(tools) > MOST_TOOLS:
        raise InputError(f"{len(tools)} tools; at most {MOST_TOOLS} are allowed", where="tools")
    for tool in tools:
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise InputError('a tool must be {"type": "function", "function": {"name": ..., "parameters": {...}}}',
                             where="tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError("the name of a function must be 1 to 64 letters, digits, dots, underscores or hyphens",
                             where="tools")
        if name in functions:
            raise InputError(f"there are two functions '{name}'", where="tools")
        checked = schema.check(parameters, "tools") if parameters is not None else {}
        size += len(str(checked))
        functions[name] = grammar.Function(name, checked, function.get("strict") is True)
    if size > TOOLS_CHARACTERS:
        raise InputError(f"the schemas of all tools have more than {TOOLS_CHARACTERS:,} characters", where="tools")
    return list(functions.values())


def _choice(choice: Any, functions: Sequence[grammar.Function]) -> tuple[str, str | None]:
    """`none`, `auto` or `required`, and the name of the only function that may be called."""
    where = "tool_choice"
    if choice is None:
        return "auto", None
    if choice in ("none", "auto") or (choice == "required" and functions):
        return cast(str, choice), None
    names = [function.name for function in functions]
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(choice.get("function"), Mapping):
        name = choice["function"].get("name")
        if name in names:
            return "required", name
        raise InputError(f"there is no function {str(name)[:64]!r} among the tools", where=where)
    if choice == "required":
        raise InputError("required needs tools", where=where)
    raise InputError('must be none, auto, required, or {"type": "function", "function": {"name": ...}}', where=where)


@dataclass(slots=True)
class MessageBuilder:
    """The message of one choice, from the pieces of its text.

    Args:
        parser: Splits the text.
    """

    parser: ReplyParser
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def push(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        """The deltas of a chat completion chunk for some text."""
        return [self._delta(part) for part in self.parser.push(text, final=final)]

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.kind == "content":
            self.content += part.text
            return {"content": part.text}
        if part.kind == "reasoning":
            self.reasoning += part.text
            return {"reasoning_content": part.text}
        if part.kind == "call":
            function = {"name": part.text, "arguments": ""}
            self.calls.append({"id": part.call_id, "type": "function", "function": dict(function)})
            return {"tool_calls": [{"index": part.index, **self.calls[-1], "function": function}]}
        self.calls[part.index]["function"]["arguments"] += part.text
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}

    def message(self) -> dict[str, Any]:
        """The whole message."""
        own = {"role": "assistant", "content": self.content or (None if self.calls else ""), "refusal": None}
        if self.reasoning:
            own["reasoning_content"] = self.reasoning
        return own | ({"tool_calls": self.calls} if self.calls else {})

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's finish reason, which tells whether a message has calls."""
        return "tool_calls" if reason == "stop" and self.calls else reason


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is answered.

    Args:
        grammar: Constrains the answer.
        markers: Special tokens that are part of the text, as in `Detokenizer`.
        reasoning: Tags of reasoning that the answer may begin with.
        in_reasoning: Whether the prompt has opened the block.
        syntax: How calls are read; null if there are none.
        tools: The tools of the request.
    """

    grammar: Grammar | None = None
    markers: Mapping[int, str] = field(default_factory=dict)
    reasoning: Reasoning | None = None
    in_reasoning: bool = False
    syntax: CallSyntax | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def message_builder(self) -> MessageBuilder:
        """The reader of one choice."""
        return MessageBuilder(ReplyParser(self.reasoning, in_reasoning=self.in_reasoning, syntax=self.syntax,
                                          functions=parameters_of(self.tools)))


PLAIN = Plan()


class Planner:
    """Plans answers for one model; it must be used in one thread.

    Args:
        tokenizer: The model's tokenizer.
        guidance: The engine's factory of constraints, or the reason why answers cannot be constrained.
    """

    def __init__(self, tokenizer: Tokenizer, guidance: Guidance | InputError) -> None:
        self._tokenizer, self._guidance = tokenizer, guidance
        if isinstance(guidance, Guidance):              # checks grammars before they are sent to the engine
            self._guidance = Guidance(guidance.vocabulary.of_bytes())

    def plan(self, requirements: Requirements, prompt_ids: Sequence[int]) -> Plan:
        """Plan the answer after a prompt.

        Raises:
            InputError: The chat template has no tool calls that can be read, or answers cannot be constrained.
        """
        tags, in_reasoning = self._reasoning, False
        if tags is not None:
            tail = self._tokenizer.decode(prompt_ids[-TAIL:], skip_special_tokens=False)
            in_reasoning = tags.is_open(tail)
            tags = None if tags.is_closed(tail) else tags
        syntax = self._syntax if requirements.callable else None
        plan = Plan(None, self._markers(syntax, tags), tags, in_reasoning, syntax, requirements.tools)
        if not requirements.is_constrained:
            return plan
        where = "response_format" if requirements.answer_schema is not None else "tools"
        if isinstance(self._guidance, InputError):
            raise InputError(self._guidance.what, where=where)
        text = self._grammar(requirements, syntax, in_reasoning if tags is not None else None)
        constraint = Grammar(LARK, text, where)
        self._guidance.check(constraint)
        return replace(plan, grammar=constraint)

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """The spellings of all special tokens that end no answer."""
        ids = sorted(set(self._tokenizer.special_ids) - set(self._tokenizer.stop_ids))
        return {id_: str(self._tokenizer.hf.convert_ids_to_tokens(id_)) for id_ in ids}

    def _grammar(self, requirements: Requirements, syntax: CallSyntax | None, in_reasoning: bool | None) -> str:
        if syntax is None:
            return self._writer.json(requirements.answer_schema or schema.ANY_OBJECT, strict=requirements.strict,
                                     in_reasoning=in_reasoning)
        otherwise = None
        if not requirements.required:
            answer = requirements.answer_schema
            otherwise = grammar.TEXT if answer is None else grammar.json_rule(answer, requirements.strict)
        return self._writer.calls(syntax, requirements.callable, several=requirements.several, otherwise=otherwise,
                                  in_reasoning=in_reasoning)

    @cached_property
    def _reasoning(self) -> Reasoning | None:
        return learning.reasoning(self._tokenizer.template, str(self._tokenizer.hf.chat_template))

    @cached_property
    def _learned(self) -> CallSyntax | InputError:
        try:
            return learning.call_syntax(self._tokenizer.template, self._reasoning)
        except InputError as error:
            return error

    @property
    def _syntax(self) -> CallSyntax:
        if isinstance(self._learned, InputError):
            raise InputError(f"this model's calls of tools cannot be read: {self._learned.what}", where="tools")
        return self._learned

    @cached_property
    def _writer(self) -> grammar.GrammarWriter:
        added = self._tokenizer.hf.backend_tokenizer.get_added_tokens_decoder()
        return grammar.GrammarWriter({token.content: id_ for id_, token in added.items()}, self._reasoning)

    def _markers(self, syntax: CallSyntax | None, tags: Reasoning | None) -> dict[int, str]:
        texts = [*(syntax.literals if syntax else ()), *((tags.start, tags.end) if tags else ())]
        spelled = {match for text in texts for match in self._tokenizer.template.special.findall(text)}
        ids = {int(self._tokenizer.hf.convert_tokens_to_ids(text)): text for text in spelled}
        return {id_: text for id_, text in ids.items() if id_ not in self._tokenizer.stop_ids}
