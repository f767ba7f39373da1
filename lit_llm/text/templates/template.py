r"""A conversation in; the text that the model reads out, with the spans of it that are answers.

The one place where a conversation is rendered, for training, evaluation, chat and serving. An answer is what the model
must produce behind the very prompt that it is served with, or the conversation is refused with the reason.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Message
from lit_llm.text.templates.calls import PROBE_TOOL, new_entities, shows, shows_calls
from lit_llm.text.templates.jinja import Render
from lit_llm.text.templates.rendering import Rendered, Renderer, Span

WORD = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]|[^\s<\[]+|\S")     # a tag or a word

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


def chosen(hf: Any, path: str, wanted: str | None) -> tuple[str, str]:
    """The text of the template of a tokenizer (`path` is its folder), and what to tell the user about the choice."""
    own = hf.chat_template
    named = own if isinstance(own, dict) else ({"default": own} if own else {})
    if wanted is not None:
        if wanted in named:
            return named[wanted], ""
        try:
            file = Path(wanted).expanduser()
            if file.is_file():
                return file.read_text(encoding="utf-8"), ""
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            raise InputError(f"the template file cannot be read: {str(error)[:120]}", where="data.chat_template",
                             fix="give the path of a .jinja file in UTF-8, not the template itself") from None
        has = ", ".join(named) or "none"
        raise InputError(f"there is no template file {wanted}, and the tokenizer of {path} has no template of that "
                         f"name (it has: {has})", where="data.chat_template", fix="give a .jinja file, or null")
    if named:
        return named.get("default") or next(iter(named.values())), ""
    vocabulary = hf.get_added_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        start, end = "<|im_start|>", "<|im_end|>"
    else:
        start, end = hf.bos_token or hf.eos_token, hf.eos_token
    return chatml(start, end), (f"the tokenizer of {path} has no chat template: ChatML is used, written with its own "
                                f"{start} and {end} (set data.chat_template for another)")


class ChatTemplate(Renderer):
    """A chat template, and where in its text each answer begins and stops.

    Args:
        render: `(messages, tools, add_generation_prompt, template_args) -> text`; the tokenizer's sandboxed jinja.
        special_tokens: Spellings that the tokenizer turns into control tokens; a stop token is one of them.
        eos: The tokenizer's end of text, which ends an answer where the template writes no stop token.
    """

    def __init__(self, render: Render, special_tokens: list[str], eos: str) -> None:
        super().__init__(render, special_tokens)
        self._eos = eos

    def render(self, conversation: Conversation, *, generation_prompt: bool = False) -> Rendered:
        """Text, literal spans and answer spans of a conversation.

        Raises:
            InputError: The template refuses the conversation, or control tokens are spelled where we cannot follow what
                the template does with them, so that user text could pass for structure.
        """
        self.refuse_forgery("tools", conversation.tools)
        self.refuse_forgery("the template's arguments", conversation.template_args)
        for place, message in enumerate(conversation.messages):
            if message.is_plain:
                continue
            others = (message.reasoning_content, message.name, message.tool_call_id, message.tool_calls)
            self.refuse_forgery(f"message {place + 1}", others)
        text = self.text(conversation, generation_prompt=generation_prompt)
        if generation_prompt and (lack := _unasked(conversation, text)):
            raise InputError(f"the chat template does not show {lack}")
        found = self.contents(conversation, text, generation_prompt)
        whole = None if generation_prompt else text
        answers: list[tuple[int, int, int]] = []
        literals: list[Span] = []
        words: list[Span] = []
        for place, span in found:
            (words if conversation.messages[place].role == "assistant" else literals).append(span)
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant" and not generation_prompt:       # it would take a prompt for each
                answer = self._answer(conversation, place, text, found, whole)
                if answer:
                    answers.append((place, *answer))
        speakers = tuple((*span, conversation.messages[place].role) for place, span in found)
        return Rendered(text, tuple(literals), tuple(words), tuple(answers), speakers)

    # ---- where answers stand -----------------------------------------------------------------------------------------

    def _answer(self, conversation: Conversation, place: int, text: str, found: list[tuple[int, Span]],
                whole: str | None) -> Span | None:
        """What the model must produce at this turn: from the end of its prompt to the end of its stop token.

        None where this text does not show it so; `served` knows the reason.
        """
        if not place:
            return None                             # a greeting: nothing was asked
        before = conversation.upto(place)
        prompt = self.text(before, generation_prompt=True)
        if not text.startswith(prompt):
            return None                             # the template shows this turn otherwise than it was produced
        ends = place + 1 == len(conversation.messages)
        fresh = whole if ends and whole is not None else self.text(conversation.upto(place + 1))    # as it was produced
        own = next((span for index, span in found if index == place and span[0] >= len(prompt)), None)
        if own and text[len(prompt):own[0]].strip() and prompt == self.text(before):
            return None                             # no generation prompt: the header would be learned as an answer
        message = conversation.messages[place]
        stop = self._stop(fresh, len(prompt), own, message)
        if not stop or text[:stop] != fresh[:stop]:
            return None
        if _unasked(before, prompt) or _unsaid(message, text[len(prompt):stop]):
            return None
        return len(prompt), stop

    def _stop(self, fresh: str, begin: int, own: Span | None, message: Message) -> int:
        """Where the stop token of the last turn ends, or 0 where the template writes none."""
        if own and not message.tool_calls:
            if self._tail and fresh.startswith(self._tail, own[1]):
                return own[1] + len(self._tail)
            found = self.special.search(fresh, own[1])
            return found.end() if found else 0
        after = list(self.special.finditer(fresh, begin))       # calls hold control tokens: the turn's last one ends it
        last = next((stop for stop in reversed(after) if self._tail.endswith(stop[0])), None)
        return (last or after[-1]).end() if after and self._tail else 0

    def served(self, conversation: Conversation) -> Rendered:
        """The last answer behind its own generation prompt, for templates that show it otherwise in a text.

        They put white space or an empty thinking block into the prompt alone, move the system message, drop thinking,
        or write no stop token; then the tokenizer's end of text is one.

        Raises:
            InputError: Where the answer begins or ends cannot be known; it says why.
        """
        place = len(conversation.messages) - 1
        message, before = conversation.messages[place], conversation.upto(place)
        prompt, fresh = self.render(before, generation_prompt=True), self.text(conversation)
        found = self.contents(conversation, fresh, False)
        own = next((span for index, span in found if index == place), None)
        heard = max((stop for index, (_, stop) in found if conversation.messages[index].role != "assistant"), default=0)
        begin = self._begin(prompt, fresh, heard, own)
        if begin is None:
            said, own = self._reasoned(prompt.text, message), None
        elif own and fresh[begin:own[0]].strip() and prompt.text == self.text(before):
            raise InputError("the chat template writes no generation prompt, so the answer's header would be learned")
        else:
            stop = self._stop(fresh, begin, own, message)
            end = own[1] if own and not message.tool_calls else len(fresh.rstrip())     # calls stand behind the words
            said = fresh[begin:stop] if stop else fresh[begin:end] + self._own_end()
        if lack := _unsaid(message, said):
            if lack == "tool calls" and new_entities(said, message.to_openai()):
                raise InputError(f"the chat template writes HTML entities into the tool calls of message {place + 1}, "
                                 "whether their arguments are text or an object")
            raise InputError(f"the chat template does not show the {lack} of message {place + 1}")
        shift = len(prompt.text) - (begin or 0)
        spans = [(own[0] + shift, own[1] + shift)] if own else []
        return Rendered(prompt.text + said, prompt.literals, (*prompt.words, *spans),
                        ((place, len(prompt.text), len(prompt.text) + len(said)),),
                        (*prompt.speakers, *((*span, "assistant") for span in spans)))

    def _begin(self, prompt: Rendered, fresh: str, heard: int, own: Span | None) -> int | None:
        """Where in `fresh` the model begins to speak; None where its prompt opens a thinking that `fresh` lacks.

        Behind what others say stand the same words in both, the prompt perhaps with an empty thinking block more.
        """
        if fresh.startswith(prompt.text):
            return len(prompt.text)
        asked = WORD.findall(prompt.text[prompt.literals[-1][1] if prompt.literals else 0:])
        shown = list(WORD.finditer(fresh, heard, own[0] if own else len(fresh)))
        same = next((number for number, (one, two) in enumerate(zip(asked, shown, strict=False)) if one != two[0]),
                    min(len(asked), len(shown)))
        more, rest = asked[same:], [match[0] for match in shown[same:]]
        skip = 0
        if more == ["<think>"] and rest[:1] != ["</think>"]:
            return None
        if 1 < len(more) < 4 and _closes(more[-1], more[0]):
            skip = int(rest[:1] == more[-1:])       # the text shows the block's end alone
        elif more and not (len(more) == 1 and rest and _closes(rest[0], more[0])):
            raise InputError(f"the generation prompt ends with {' '.join(more)[:80]!r}, and the answer as the chat "
                             f"template shows it begins {' '.join(rest)[:80]!r}")
        at = same + skip
        return shown[at].start() if at < len(shown) else own[0] if own else shown[-1].end()

    def _reasoned(self, prompt: str, message: Message) -> str:
        """The answer where the prompt has opened its thinking: the thinking, its end, the content, the stop token."""
        content, thoughts = message.content, message.reasoning_content
        if thoughts is None and (found := re.match(r"\s*<think>(.*?)</think>(.*)", content, re.DOTALL)):
            thoughts, content = found[1], found[2]
        if thoughts is None or message.tool_calls:
            raise InputError("the chat template begins the answer inside a block of reasoning, and this answer has "
                             "none: it must come with reasoning_content, or begin with <think>")
        self.refuse_forgery("the answer", message.content)
        end = self._tail.strip() or self._own_end()
        return thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + end

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """What the template writes behind a plain answer: (as far as its stop token, all of it).

        The stop token is one of the control tokens that follow the answer whether or not another turn follows: the
        tokenizer's end of text, or else the last one before a token that opens a turn. A token that ends the whole
        text is not a stop token.
        """
        for tools in ((), (PROBE_TOOL,)):
            asked = Conversation((Message("user", "x", in_parts=True), Message("assistant", "y", in_parts=True)), tools)
            tails: list[str] = []
            opens: set[str] = set()
            for conversation in (asked, asked.append(Message("user", "z", in_parts=True))):
                with suppress(InputError):
                    text = self.text(conversation)
                    found = self.contents(conversation, text, False)
                    tails += [text[stop:] for index, (_, stop) in found if index == 1]
                    opens |= {match for index, (start, _) in found if index == 0
                              for match in self.special.findall(text, 0, start)}
            if tails:
                break
        else:
            return "", "?"
        ends = [match for match in self.special.finditer(tails[0])
                if not match.start() or tails[-1].startswith(tails[0][:match.end()])]
        own = [match for match in ends if match[0] == self._eos]
        more = list(takewhile(lambda match: match[0] not in opens, ends[1:]))
        first = next(self.special.finditer(tails[0]), None)
        last = own[0] if own else more[-1] if more else first
        stop = last.end() if last else 0
        return tails[0][:stop], tails[0].strip()

    @property
    def _tail(self) -> str:
        return self._probe[0]

    def _own_end(self) -> str:
        """The tokenizer's end of text, for templates that write nothing behind an answer."""
        tail, rest = self._probe
        if tail or rest == "?":
            raise InputError("the chat template does not show where the answer stops")
        if rest:
            raise InputError(f"the chat template ends an answer with {rest[:40]!r}, which is no control token of this "
                             "tokenizer, so nothing would stop there")
        return self._eos

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The control tokens that end an answer, and a tool call where that is another."""
        asked, call = Message("user", "x"), {"type": "function", "id": "abcdefgh1", "function": {
            "name": "probe", "arguments": {"x": 1}}}
        stops = self.special.findall(self._tail)[-1:]
        for calls in ((call,), (call, call)):
            with suppress(InputError):
                calling = Conversation((asked, Message("assistant", tool_calls=calls)), (PROBE_TOOL,))
                rendered = self.render(calling)
                rendered = rendered if rendered.answers else self.served(calling)
                ((_, start, stop),) = rendered.answers
                stops += self.special.findall(rendered.text, start, stop)[-1:]
        return tuple(dict.fromkeys(stops))


def _unsaid(message: Message, said: str) -> str:
    """What of a message the answer lacks; empty where it says it all."""
    content, thoughts = _thought(message)
    if content.strip() not in said:
        return "content"
    if thoughts.strip() not in said:
        return "reasoning"
    return "" if shows_calls(said, message.tool_calls, content, thoughts) else "tool calls"


def _thought(message: Message) -> tuple[str, str]:
    """What an answer says, and what it thinks before: under a key of its own, or in `<think>` at its beginning."""
    if found := re.match(r"\s*<think>(.*?)</think>(.*)", message.content, re.DOTALL):
        return found[2], found[1]
    return message.content, message.reasoning_content or ""


def _unasked(conversation: Conversation, prompt: str) -> str:
    """What of the question the prompt lacks: tools, or what someone said; empty where it shows it all."""
    if conversation.tools and not any(name in prompt for name in _tool_names(conversation.tools)):
        return "the tools of this conversation"
    for number, other in enumerate(conversation.messages):
        if other.role != "assistant" and not shows(prompt, other.content):
            return f"message {number + 1} ({other.role})"
    return ""


def _closes(tag: str, other: str) -> bool:
    """Whether a tag ends the block that another opens.

    >>> _closes("</think>", "<think>"), _closes("<think>", "</think>")
    (True, False)
    >>> _closes("<|END_THINKING|>", "<|START_THINKING|>")
    True
    """
    name, opened = (re.sub(r"START_|END_|\W", "", one) for one in (tag, other))
    return name == opened != "" and tag != other and not re.search(r"/|END_|^<\w+\|>", other)


def _tool_names(tools: tuple[dict[str, Any], ...]) -> list[str]:
    found = [tool.get("function", tool) for tool in tools]
    return [str(tool.get("name", "")) for tool in found if isinstance(tool, Mapping)]
