r"""Render a conversation to text and find the spans of its answers.

This is the only place that renders conversations, for training, evaluation, chat and serving. An answer is the text
that the model must generate after the exact prompt that it is served with; otherwise the conversation is refused with
the reason.
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
    "{%- if tools %}{{ raise_exception('this chat template does not support tools') }}{% endif -%}"
    "{%- for message in messages %}"
    "{{ START + message['role'] + '\\n' + message['content'] + END + '\\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ START + 'assistant\\n' }}{% endif -%}"
)


def chatml(start: str, end: str) -> str:
    """ChatML with two existing special tokens of the tokenizer, so that no untrained embedding is needed.

    >>> chatml("<s>", "</s>").count("<s>")
    2
    """
    return CHATML.replace("START", repr(start)).replace("END + ", repr(end) + " + ")


def chosen(hf: Any, path: str, wanted: str | None) -> tuple[str, str]:
    """The template of a tokenizer (`path` is its folder), and a note for the user about the choice."""
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
    return chatml(start, end), (f"the tokenizer of {path} has no chat template: ChatML is used with its own "
                                f"{start} and {end} (set data.chat_template for another)")


class ChatTemplate(Renderer):
    """A chat template that also finds where each answer begins and ends.

    Args:
        render: `(messages, tools, add_generation_prompt, template_args) -> text`; the tokenizer's sandboxed jinja.
        special_tokens: Spellings that the tokenizer turns into control tokens; a stop token is one of them.
        eos: The end-of-text token, which ends an answer if the template writes no stop token.
    """

    def __init__(self, render: Render, special_tokens: list[str], eos: str) -> None:
        super().__init__(render, special_tokens)
        self.eos = eos

    def render(self, conversation: Conversation, *, generation_prompt: bool = False) -> Rendered:
        """Text, literal spans and answer spans of a conversation.

        Raises:
            InputError: The template refuses the conversation, or it contains control tokens at a place that the
                template rewrites, so that user text could be taken for structure.
        """
        self.refuse_forgery("tools", conversation.tools)
        self.refuse_forgery("the template's arguments", conversation.template_args)
        for place, message in enumerate(conversation.messages):
            if message.is_plain:
                continue
            others = (message.reasoning_content, message.name, message.tool_call_id, message.tool_calls)
            self.refuse_forgery(f"message {place + 1}", others)
        text = self.text(conversation, generation_prompt=generation_prompt)
        if generation_prompt and (missing := _missing_from_prompt(conversation, text)):
            raise InputError(f"the chat template does not show {missing}")
        spans = self.contents(conversation, text, generation_prompt)
        whole = None if generation_prompt else text
        answers: list[tuple[int, int, int]] = []
        literals: list[Span] = []
        assistant_spans: list[Span] = []
        for place, span in spans:
            (assistant_spans if conversation.messages[place].role == "assistant" else literals).append(span)
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant" and not generation_prompt:       # each would need its own prompt
                answer = self._answer(conversation, place, text, spans, whole)
                if answer:
                    answers.append((place, *answer))
        speakers = tuple((*span, conversation.messages[place].role) for place, span in spans)
        return Rendered(text, tuple(literals), tuple(assistant_spans), tuple(answers), speakers)

    # ---- spans of answers --------------------------------------------------------------------------------------------

    def _answer(self, conversation: Conversation, place: int, text: str, contents: list[tuple[int, Span]],
                whole: str | None) -> Span | None:
        """Span that the model must generate at this turn: from the end of its prompt to the end of its stop token.

        None where this text does not show the answer so; `served` gives the reason.
        """
        if not place:
            return None                             # a greeting without a prompt
        before = conversation.upto(place)
        prompt = self.text(before, generation_prompt=True)
        if not text.startswith(prompt):
            return None                             # the template shows this turn differently from how it was generated
        ends = place + 1 == len(conversation.messages)
        fresh = whole if ends and whole is not None else self.text(conversation.upto(place + 1))    # as generated
        own = next((span for index, span in contents if index == place and span[0] >= len(prompt)), None)
        if own and text[len(prompt):own[0]].strip() and prompt == self.text(before):
            return None                             # no generation prompt: the header would be trained on
        message = conversation.messages[place]
        stop = self._stop(fresh, len(prompt), own, message)
        if not stop or text[:stop] != fresh[:stop]:
            return None
        if _missing_from_prompt(before, prompt) or _missing_from_answer(message, text[len(prompt):stop]):
            return None
        return len(prompt), stop

    def _stop(self, fresh: str, begin: int, own: Span | None, message: Message) -> int:
        """End of the last turn's stop token, or 0 if the template writes none."""
        if own and not message.tool_calls:
            if self._tail and fresh.startswith(self._tail, own[1]):
                return own[1] + len(self._tail)
            match = self.special.search(fresh, own[1])
            return match.end() if match else 0
        after = list(self.special.finditer(fresh, begin))     # calls contain control tokens; the last one ends the turn
        last = next((stop for stop in reversed(after) if self._tail.endswith(stop[0])), None)
        return (last or after[-1]).end() if after and self._tail else 0

    def served(self, conversation: Conversation) -> Rendered:
        """The last answer after its own generation prompt, for templates that show it differently in a conversation.

        They write white space or an empty reasoning block into the prompt only, move the system message, drop
        reasoning, or write no stop token; then the end-of-text token is used.

        Raises:
            InputError: The answer's begin or end cannot be determined; the error gives the reason.
        """
        place = len(conversation.messages) - 1
        message, before = conversation.messages[place], conversation.upto(place)
        prompt, fresh = self.render(before, generation_prompt=True), self.text(conversation)
        spans = self.contents(conversation, fresh, False)
        own = next((span for index, span in spans if index == place), None)
        prompt_end = max((stop for index, (_, stop) in spans if conversation.messages[index].role != "assistant"),
                         default=0)
        begin = self._begin(prompt, fresh, prompt_end, own)
        if begin is None:
            answer, own = self._reasoned(prompt.text, message), None
        elif own and fresh[begin:own[0]].strip() and prompt.text == self.text(before):
            raise InputError("the chat template has no generation prompt, so the answer's header would be trained on")
        else:
            stop = self._stop(fresh, begin, own, message)
            end = own[1] if own and not message.tool_calls else len(fresh.rstrip())     # calls follow the content
            answer = fresh[begin:stop] if stop else fresh[begin:end] + self._own_end()
        if missing := _missing_from_answer(message, answer):
            if missing == "tool calls" and new_entities(answer, message.to_openai()):
                raise InputError(f"the chat template writes HTML entities into the tool calls of message {place + 1}, "
                                 "whether their arguments are text or an object")
            raise InputError(f"the chat template does not show the {missing} of message {place + 1}")
        shift = len(prompt.text) - (begin or 0)
        shifted = [(own[0] + shift, own[1] + shift)] if own else []
        return Rendered(prompt.text + answer, prompt.literals, (*prompt.assistant_spans, *shifted),
                        ((place, len(prompt.text), len(prompt.text) + len(answer)),),
                        (*prompt.speakers, *((*span, "assistant") for span in shifted)))

    def answer_text(self, conversation: Conversation) -> str:
        """What the model generates as the last message of a conversation, with its stop token.

        Raises:
            InputError: As in `render` and `served`.
        """
        rendered = self.render(conversation)
        rendered = rendered if rendered.answers else self.served(conversation)
        _, start, stop = rendered.answers[-1]
        return rendered.text[start:stop]

    def _begin(self, prompt: Rendered, fresh: str, prompt_end: int, own: Span | None) -> int | None:
        """Where the answer begins in `fresh`; None if the prompt opens a reasoning block that `fresh` lacks.

        After the other contents both texts continue equally; the prompt may have an additional empty reasoning block.
        """
        if fresh.startswith(prompt.text):
            return len(prompt.text)
        expected = WORD.findall(prompt.text[prompt.literals[-1][1] if prompt.literals else 0:])
        shown = list(WORD.finditer(fresh, prompt_end, own[0] if own else len(fresh)))
        same = next((number for number, (one, two) in enumerate(zip(expected, shown, strict=False)) if one != two[0]),
                    min(len(expected), len(shown)))
        more, rest = expected[same:], [match[0] for match in shown[same:]]
        skip = 0
        if more == ["<think>"] and rest[:1] != ["</think>"]:
            return None
        if 1 < len(more) < 4 and _closes(more[-1], more[0]):
            skip = int(rest[:1] == more[-1:])       # the text shows only the end of the block
        elif more and not (len(more) == 1 and rest and _closes(rest[0], more[0])):
            raise InputError(f"the generation prompt ends with {' '.join(more)[:80]!r}, but the answer as the chat "
                             f"template shows it begins with {' '.join(rest)[:80]!r}")
        at = same + skip
        return shown[at].start() if at < len(shown) else own[0] if own else shown[-1].end()

    def _reasoned(self, prompt: str, message: Message) -> str:
        """The answer after a prompt that opens a reasoning block: reasoning, end tag, content, stop token."""
        content, thoughts = message.content, message.reasoning_content
        if thoughts is None and (match := re.match(r"\s*<think>(.*?)</think>(.*)", content, re.DOTALL)):
            thoughts, content = match[1], match[2]
        if thoughts is None or message.tool_calls:
            raise InputError("the chat template starts the answer inside a block of reasoning, but this answer has no "
                             "reasoning: add reasoning_content, or begin the content with <think>")
        self.refuse_forgery("the answer", message.content)
        end = self._tail.strip() or self._own_end()
        return thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + end

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """The template's text after a plain answer: (up to its stop token, all of it).

        The stop token is one of the control tokens that follow the answer whether or not another turn follows: the
        end-of-text token, or else the last one before a token that opens a turn. A token that ends the whole text is
        not a stop token.
        """
        for tools in ((), (PROBE_TOOL,)):
            plain = (Message("user", "x", in_parts=True), Message("assistant", "y", in_parts=True))
            exchange = Conversation(plain, tools)
            tails: list[str] = []
            opens: set[str] = set()
            for conversation in (exchange, exchange.append(Message("user", "z", in_parts=True))):
                with suppress(InputError):
                    text = self.text(conversation)
                    spans = self.contents(conversation, text, False)
                    tails += [text[stop:] for index, (_, stop) in spans if index == 1]
                    opens |= {match for index, (start, _) in spans if index == 0
                              for match in self.special.findall(text, 0, start)}
            if tails:
                break
        else:
            return "", "?"
        ends = [match for match in self.special.finditer(tails[0])
                if not match.start() or tails[-1].startswith(tails[0][:match.end()])]
        own = [match for match in ends if match[0] == self.eos]
        more = list(takewhile(lambda match: match[0] not in opens, ends[1:]))
        first = next(self.special.finditer(tails[0]), None)
        last = own[0] if own else more[-1] if more else first
        stop = last.end() if last else 0
        return tails[0][:stop], tails[0].strip()

    @property
    def _tail(self) -> str:
        return self._probe[0]

    def _own_end(self) -> str:
        """The end-of-text token, for templates that write nothing after an answer."""
        tail, rest = self._probe
        if tail or rest == "?":
            raise InputError("the chat template does not show where the answer ends")
        if rest:
            raise InputError(f"the chat template ends an answer with {rest[:40]!r}, which is not a control token of "
                             "this tokenizer, so generation would not stop there")
        return self.eos

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The control tokens that end an answer, and those that end a tool call if they differ."""
        question, call = Message("user", "x"), {"type": "function", "id": "abcdefgh1", "function": {
            "name": "probe", "arguments": {"x": 1}}}
        stops = self.special.findall(self._tail)[-1:]
        for calls in ((call,), (call, call)):
            with suppress(InputError):
                calling = Conversation((question, Message("assistant", tool_calls=calls)), (PROBE_TOOL,))
                stops += self.special.findall(self.answer_text(calling))[-1:]
        return tuple(dict.fromkeys(stops))


def _missing_from_answer(message: Message, answer: str) -> str:
    """The part of a message that the answer lacks; empty if it is complete."""
    content, thoughts = _thought(message)
    if content.strip() not in answer:
        return "content"
    if thoughts.strip() not in answer:
        return "reasoning"
    return "" if shows_calls(answer, message.tool_calls, content, thoughts) else "tool calls"


def _thought(message: Message) -> tuple[str, str]:
    """Content and reasoning of an answer; reasoning has its own key or is in `<think>` at the beginning."""
    if match := re.match(r"\s*<think>(.*?)</think>(.*)", message.content, re.DOTALL):
        return match[2], match[1]
    return message.content, message.reasoning_content or ""


def _missing_from_prompt(conversation: Conversation, prompt: str) -> str:
    """The part of a conversation that the prompt lacks: tools or a message; empty if it is complete."""
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
    functions = [tool.get("function", tool) for tool in tools]
    return [str(tool.get("name", "")) for tool in functions if isinstance(tool, Mapping)]
