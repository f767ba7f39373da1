"""Read the prompts of a file: questions without answers, or training records whose last answer is the reference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.data.records.formats import convert
from lit_llm.data.records.recognition import ANSWERS, ASKS, turns_key
from lit_llm.data.records.record import LongText, Record
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Document

REFERENCES = ("reference", "expected")              # keys of a right answer beside a prompt
HELD_OUT = {"prompt": "completion", "instruction": "output"}      # the answer's key of a format, by the question's key
OPEN = "answer"                                     # of all other names of a question
PLACEHOLDER = "?"                                   # an answer that is removed again


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model answers.

    Args:
        index: Number of the record in the input, from 0.
        place: Its file and line, for messages.
        content: The conversation up to the answer, or a document that the model continues.
        reference: The right answer; null if there is none.
        id: The record's `id`, which the output repeats.
    """

    index: int
    place: str
    content: Conversation | Document
    reference: str | None = None
    id: str | int | None = None

    def to_json(self) -> dict[str, Any]:
        """The prompt as an output line shows it, in a form that this module reads."""
        if isinstance(self.content, Document):
            return {"text": self.content.text}
        messages = self.content.to_openai()
        if len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == "user":
            return {"prompt": messages[0]["content"]}
        return {"messages": messages} | ({"tools": list(self.content.tools)} if self.content.tools else {})


def read(path: str, *, format: str = "auto", columns: Mapping[str, str] | None = None, split: str = "train",
         limit: int | None = None, template_args: Mapping[str, Any] | None = None) -> list[Prompt]:
    """Read all prompts, so that a bad record is reported before anything is computed.

    Args:
        path: As in `Source`.
        format: As in `Source`.
        columns: As in `Source`.
        split: As in `Source`.
        limit: Only the first records.
        template_args: Values of the chat template's variables for all prompts; a record's own have precedence.

    Raises:
        InputError: A record is no prompt; the error names its file and line.
    """
    source = Source(path, format=format, columns=dict(columns or {}), split=split)
    prompts = list(_prompts(source, limit, template_args or {}))
    if not prompts:
        raise InputError("the file contains no prompts", where=path)
    return prompts


def _prompts(source: Source, limit: int | None, template_args: Mapping[str, Any]) -> Iterator[Prompt]:
    for index, (record, place) in enumerate(source.read()):
        if limit is not None and index >= limit:
            return
        try:
            content, reference = interpret(record, source.format, source.columns)
        except InputError as error:
            raise error.at(place) from None
        if template_args and isinstance(content, Conversation):
            content = replace(content, template_args={**template_args, **content.template_args})
        name = record.get("id") if isinstance(record, dict) else None
        yield Prompt(index, place, content, reference, name if isinstance(name, str | int) else None)


def interpret(record: Record, format: str = "auto", columns: Mapping[str, str] | None = None,
              ) -> tuple[Conversation | Document, str | None]:
    """The prompt of a record, and its reference.

    A document is continued as it is. A conversation that ends with the assistant's message loses this message, which
    becomes the reference, unless the record names another.

    Raises:
        InputError: The record is none of the known forms.

    >>> interpret({"instruction": "1+1?", "output": "2"})[1]
    '2'
    >>> interpret({"prompt": "1+1?"})[0].messages[0].content
    '1+1?'
    """
    if isinstance(record, LongText):
        record = "".join(record.blocks)
    assert not isinstance(record, bytes), "records are parsed"
    reference, completed = None, record
    if isinstance(record, dict):
        reference = next((record[key] for key in REFERENCES if record.get(key) is not None), None)
        if reference is not None and not isinstance(reference, str):
            raise InputError("the reference must be a string", fix="write one right answer for each prompt")
        record = {key: value for key, value in record.items() if key not in REFERENCES}
        completed = _with_answer(record, format, columns or {})
    content = convert(completed, format=format, columns=columns)
    if isinstance(content, Document):
        return content, reference
    *before, last = content.messages
    if last.role != "assistant":
        return content, reference
    if not before:
        raise InputError("the conversation has only the assistant's message, so there is no prompt")
    held_back = None if completed is not record else last.content.strip() or None
    return content.upto(len(before)), held_back if reference is None else reference


def _with_answer(record: dict[str, Any], format: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with an answer for the reader, if it is a question without one."""
    names = {columns.get(key, key): key for key in (*ASKS, *ANSWERS)}
    keys = {names.get(key, key) for key, value in record.items() if value is not None}
    if format not in ("auto", "alpaca", "prompt") or turns_key(record) or "turns" in columns:
        return record
    asks = [key for key in ASKS if key in keys] or [key for key in ("input",) if key in keys]
    if not asks or keys & set(ANSWERS):
        return record
    return {**record, HELD_OUT.get(asks[0], OPEN): PLACEHOLDER}
