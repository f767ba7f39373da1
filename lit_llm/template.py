r"""A conversation in; the text that the model reads out, with the spans of it that are content and that are answers.

The one place where a conversation is rendered, for training, evaluation, chat and serving. Knows the chat template
(jinja) and characters, never token ids.

    <|im_start|>user\n What is 2+2? <|im_end|>\n<|im_start|>assistant\n 4 <|im_end|> \n
                       ~~~~literal~~                                    ~literal
                                                                        ^^answer^^^^   supervised: stop token too
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.conversation import ROLES, Conversation, Message
from lit_llm.errors import InputError

Span = tuple[int, int]

CHATML = (
    "{%- if tools %}{{ raise_exception('this chat template knows no tools') }}{% endif -%}"
    "{%- for message in messages %}"
    "{{ START + message['role'] + '\\n' + message['content'] + END + '\\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ START + 'assistant\\n' }}{% endif -%}"
)


def chatml(start: str, end: str) -> str:
    """ChatML written with two special tokens that the tokenizer has, so that no embedding is new and untrained.

    >>> chatml("<s>", "</s>").count("<s>")
    2
    """
    return CHATML.replace("START", repr(start)).replace("END + ", repr(end) + " + ")


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text with its anatomy; all spans are character offsets into `text`.

    Args:
        text: What the model reads, special tokens spelled out.
        literals: Where the content of others stands: every spelled token in there is only text.
        words: Where the assistant's content stands: control tokens in there are only text, but what it says with tokens
            that are not special (`<think>`) is read as it said it.
        answers: For each assistant turn that the text shows as it was produced: (message index, start, stop); start is
            where the generation prompt ends, stop lies behind the stop token.
        speakers: (start, stop, role) of each content.
    """

    text: str
    literals: tuple[Span, ...]
    words: tuple[Span, ...] = ()
    answers: tuple[tuple[int, int, int], ...] = ()
    speakers: tuple[tuple[int, int, str], ...] = ()


class ChatTemplate:
    """A jinja chat template and the proof that what it rendered is understood.

    Args:
        render: `(messages, tools, add_generation_prompt) -> text`; the tokenizer's sandboxed jinja.
        special_tokens: Spellings that the tokenizer turns into control tokens; a stop token is one of them.
    """

    def __init__(self, render: Callable[[list[dict], list[dict] | None, bool], str], special_tokens: list[str]) -> None:
        self._render = render
        ordered = sorted(special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._skeletons: dict[tuple[Any, ...], list[str] | None] = {}

    def text(self, conversation: Conversation, *, generation_prompt: bool = False) -> str:
        """The rendered text.

        Raises:
            InputError: The template refuses this conversation (a role it lacks, two equal roles in a row, tools).
        """
        try:
            tools = [dict(tool) for tool in conversation.tools] or None
            return self._render(conversation.to_openai(), tools, generation_prompt)
        except Exception as error:                  # a template is a stranger's program: it may raise anything
            raise InputError(f"the chat template refuses this conversation: {str(error)[:200]}") from None

    def render(self, conversation: Conversation, *, generation_prompt: bool = False) -> Rendered:
        """Text, literal spans and answer spans of a conversation.

        Raises:
            InputError: The template refuses the conversation, or control tokens are spelled where we cannot follow what
                the template does with them, so that user text could pass for structure.
        """
        self._refuse_forgery("tools", conversation.tools)
        for place, message in enumerate(conversation.messages):
            others = (message.reasoning_content, message.name, message.tool_call_id, message.tool_calls)
            self._refuse_forgery(f"message {place + 1}", others)
        text = self.text(conversation, generation_prompt=generation_prompt)
        found = self._contents(conversation, text, generation_prompt)
        whole = None if generation_prompt else text
        answers: list[tuple[int, int, int]] = []
        literals: list[Span] = []
        words: list[Span] = []
        for place, span in found:
            (words if conversation.messages[place].role == "assistant" else literals).append(span)
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant":
                answer = self._answer(conversation, place, text, found, whole)
                if answer:
                    answers.append((place, *answer))
        speakers = tuple((*span, conversation.messages[place].role) for place, span in found)
        return Rendered(text, tuple(literals), tuple(words), tuple(answers), speakers)

    # ---- where content stands ----------------------------------------------------------------------------------------

    def _contents(self, conversation: Conversation, text: str, generation_prompt: bool) -> list[tuple[int, Span]]:
        """(message index, span) of contents in `text`: of all, else of all but the assistant's.

        Templates that rewrite answers (they drop old thinking) still write what others say as it is.
        """
        for roles in (ROLES, tuple(role for role in ROLES if role != "assistant"), ()):
            found = self._literals(conversation, text, generation_prompt, roles)
            if found is not None:
                break
        for place, message in enumerate(conversation.messages):
            if message.role not in roles:
                self._refuse_forgery(f"message {place + 1}", message.content)
        return found or []

    def _literals(self, conversation: Conversation, text: str, generation_prompt: bool,
                  roles: tuple[str, ...]) -> list[tuple[int, Span]] | None:
        """(message index, span) of every content of these roles, or None where the template changed one.

        The same conversation is rendered once more with a mark in place of each content: what stands between the marks
        is the template's own text. If those pieces with the contents between them spell `text`, the spans are proven.
        """
        pieces = self._skeleton(conversation, text, generation_prompt, roles)
        if pieces is None or not text.startswith(pieces[0]):
            return None
        found, at = [], len(pieces[0])
        for number, own in zip(pieces[1::2], pieces[2::2], strict=True):
            place = int(number)
            for content in _as_written(conversation.messages[place].content):
                if text.startswith(content + own, at):
                    found.append((place, (at, at + len(content))))
                    at += len(content) + len(own)
                    break
            else:
                return None
        return found if at == len(text) else None

    def _skeleton(self, conversation: Conversation, text: str, generation_prompt: bool,
                  roles: tuple[str, ...]) -> list[str] | None:
        """The template's own text around marks, with the marks' numbers between; None where it refuses them.

        Contents are gone from it, so conversations of one shape share it: same roles, and nothing but contents.
        """
        mark = _unused([text, *_strings(conversation.to_openai()), *_strings(conversation.tools)])
        shared = not conversation.tools and all(
            message.is_plain and message.role in roles for message in conversation.messages)
        shape = (mark, generation_prompt, roles, *((message.role, bool(message.content))
                                                   for message in conversation.messages))
        if shared and shape in self._skeletons:
            return self._skeletons[shape]
        marked = replace(conversation, messages=tuple(
            replace(message, content=f"{mark}{place}{mark}") if message.content and message.role in roles else message
            for place, message in enumerate(conversation.messages)))
        try:
            pieces = re.split(f"{mark}([0-9]+){mark}", self.text(marked, generation_prompt=generation_prompt))
        except InputError:
            pieces = None
        if shared and len(self._skeletons) < 1000:
            self._skeletons[shape] = pieces
        return pieces

    def _refuse_forgery(self, where: str, value: Any) -> None:
        for text in _strings(value):
            if found := self.special.search(text):
                raise InputError(f"{where} spells the control token {found[0]!r} where the chat template may change "
                                 "it, so it could pass for the template's own")

    # ---- where answers stand -----------------------------------------------------------------------------------------

    def _answer(self, conversation: Conversation, place: int, text: str, found: list[tuple[int, Span]],
                whole: str | None) -> Span | None:
        """What the model must produce at this turn: from the end of its prompt to the end of its stop token."""
        before = conversation.upto(place)
        if not before.messages:
            return None
        prompt = self.text(before, generation_prompt=True)
        if not text.startswith(prompt):
            return None                             # the template shows this turn otherwise than it was produced
        ends = place + 1 == len(conversation.messages)
        fresh = whole if ends and whole is not None else self.text(conversation.upto(place + 1))    # as it was produced
        own = [span for index, span in found if index == place and span[0] >= len(prompt)]
        if own and text[len(prompt):own[0][0]].strip() and prompt == self.text(before):
            return None                             # no generation prompt: the header would be learned as an answer
        if own and not conversation.messages[place].tool_calls:
            stops = list(self.special.finditer(text, own[-1][1]))[:1]
        else:                                       # calls may begin with a control token: the turn's last one ends it
            stops = list(self.special.finditer(fresh, len(prompt)))[-1:]
        if not stops:
            return None
        stop = stops[0].end()
        return (len(prompt), stop) if text[:stop] == fresh[:stop] else None

    def stop_token(self) -> str | None:
        """The control token that ends an answer, or None where the template writes none."""
        probe = Conversation((Message("user", "x"), Message("assistant", "y")))
        rendered = self.render(probe)
        if not rendered.answers:
            return None
        _, start, stop = rendered.answers[-1]
        return list(self.special.finditer(rendered.text, start, stop))[-1][0]


def _as_written(content: str) -> Iterator[str]:
    """A content and the trimmed forms in which templates write it."""
    seen = set()
    for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"),
                 content.lstrip("\n"), content.rstrip("\n")):
        if form not in seen:
            seen.add(form)
            yield form


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _unused(texts: list[str]) -> str:
    """A private-use character that none of the texts holds."""
    for mark in map(chr, range(0xF8FF, 0xDFFF, -1)):
        if not any(mark in text for text in texts):
            return mark
    raise InputError("this conversation uses every private-use character of Unicode")
