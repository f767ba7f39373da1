"""A tokenizer with its chat template: encodes documents and conversations, decodes token ids.

`tokenizer_file.py` loads the files, `template.py` renders conversations and `encoder.py` determines the exact ids.
Batching, padding and the shift of labels belong to `data/` and `training/`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.text import check
from lit_llm.text.answers import EMPTY_ANSWER, UNPROMPTED_ANSWER, TrainOn, answer_spans, hidden_answer, trained_messages
from lit_llm.text.conversation import ROLES, Conversation, Document
from lit_llm.text.cutting import Piece
from lit_llm.text.encoder import Encoder
from lit_llm.text.reading import LongReading, Reading
from lit_llm.text.spelling import sizes, spellings
from lit_llm.text.templates.jinja import Render, TemplateArgs, check_args, compiled, variables, with_defaults
from lit_llm.text.templates.rendering import Rendered, Span
from lit_llm.text.templates.template import ChatTemplate, chosen
from lit_llm.text.tokenizer_file import load_fast
from lit_llm.text.tokenizer_limits import panicked

__all__ = ["IGNORE_INDEX", "SPEAKERS", "TokenSequence", "Tokenizer", "TrainOn"]
IGNORE_INDEX = -100
RENAMED = 0.02                                      # share of a base model's tokens that may have other names
SPEAKERS = ("template", *ROLES, "document")             # source of a token; the text around contents is the template's


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One document or conversation as a token sequence, before packing and padding.

    Args:
        input_ids: (T,) int32.
        labels: (T,) int32, in Hugging Face's convention: position i has the token AT i, or -100 where it is not
            supervised. They are not shifted; `training/loss.py` does that.
        speakers: (T,) uint8, source of each token: an index into SPEAKERS. Null for a document.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    speakers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Tokenizer:
    """A fast Hugging Face tokenizer with its chat template.

    Args:
        hf: The tokenizer, with a chat template set (see `load`).
        source: Its folder or hub id, for messages.
        note: A decision of `load` that is reported to the user once; empty if there is none.
    """

    def __init__(self, hf: Any, *, source: str = "", note: str = "") -> None:
        self.hf, self.source, self.note = hf, source, note
        self._backend = hf.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._encoder = Encoder(self._backend, source)
        self.special_ids = self._encoder.special_ids
        self.template = ChatTemplate(self._jinja, [token.content for token in added.values() if token.special],
                                     str(hf.eos_token))
        self._compiled: tuple[str, Render] | None = None
        self.vocab_size = len(hf)
        self.bos_id, self.eos_id = hf.bos_token_id, hf.eos_token_id
        self.pad_id: int = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id

    @classmethod
    def load(cls, path: str, *, chat_template: str | None = None,
             template_args: TemplateArgs | None = None) -> "Tokenizer":
        """Load a tokenizer from a folder or hub id.

        Args:
            path: Folder with tokenizer files, or a hub id.
            chat_template: A .jinja file, or the name of one of the tokenizer's templates. Null takes the tokenizer's
                own; if it has none, ChatML with special tokens that the tokenizer already has.
            template_args: Values of the template's variables; they become defaults within the template.

        Raises:
            InputError: No such folder, the hub cannot be reached, no such template, a variable that it does not read,
                no end-of-text token.
        """
        path = names.resolve(path)
        hf = load_fast(path)
        template, note = chosen(hf, path, chat_template)
        if template_args:
            check_args(template_args, variables(template, hf.special_tokens_map), "data.template_args")
            template = with_defaults(template, template_args)
        hf.chat_template = template
        tokenizer = cls(hf, source=path, note=note)
        check.check_tokenizer(path, tokenizer, own_template=chat_template is None and not template_args)
        return tokenizer

    def _jinja(self, messages: list[dict], tools: list[dict] | None, generation_prompt: bool,
               template_args: Mapping[str, object]) -> str:
        if self._compiled is None or self._compiled[0] != self.hf.chat_template:
            self._compiled = self.hf.chat_template, compiled(self.hf.chat_template, self.hf.special_tokens_map)
        if template_args:
            template_args = {name: value for name, value in template_args.items() if name in self.template_variables}
        return self._compiled[1](messages, tools, generation_prompt, template_args)

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """The variables of the chat template that a user may set, such as `enable_thinking`."""
        return variables(self.hf.chat_template, self.hf.special_tokens_map)

    def check_template_args(self, template_args: Mapping[str, object], where: str) -> None:
        """Refuse values for variables that the chat template does not use.

        Raises:
            InputError: Located at `where`.
        """
        check_args(template_args, self.template_variables, where)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, rules, chat template and special tokens: equal ids for equal text."""
        own = [self.hf.chat_template, self.eos_id, self.bos_id, self.hf.special_tokens_map]
        text = self._backend.to_str() + json.dumps(own, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the chat template's end of turn and of a tool call, then the end-of-text token."""
        return tuple(dict.fromkeys([*map(self.hf.convert_tokens_to_ids, self.template.stop_tokens), self.eos_id]))

    # ---- text to tokens ----------------------------------------------------------------------------------------------

    def encode_document(self, document: Document, *, end: bool = True) -> TokenSequence:
        """Encode a document with the tokenizer's own beginning (BOS, if it adds one) and, with `end`, its end of text.

        All tokens are labelled; the first one has no context, so it is never predicted.
        """
        ids = [*self._prefix, *self.encode_text(document.text)]
        if end:
            ids.append(self.eos_id)
        array = np.asarray(ids, dtype=np.int32)
        return TokenSequence(array, array.copy())

    def pieces(self, blocks: Iterable[str]) -> Iterator[tuple[Piece, bool, bool]]:
        """Split a long document for `encode_pieces`: (piece, is the first, is the last)."""
        return self._encoder.pieces(blocks)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray | InputError]:
        """Ids of many texts in one batch, which is faster; an error in place of a text that cannot be tokenized."""
        return self._encoder.texts(pieces)

    def framed(self, ids: np.ndarray, *, first: bool = True, last: bool = True) -> np.ndarray:
        """(T,) int32: a document's ids with the tokenizer's beginning (BOS) and end-of-text token."""
        prefix, end = self._prefix if first else [], [self.eos_id] if last else []
        return np.concatenate([np.array(part, dtype=np.int32) for part in (prefix, ids, end)])

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text without BOS; a spelled control token stays text."""
        return _listed(self._encoder.encode(Rendered(text, ((0, len(text)),))))

    def encode_prompt(self, conversation: Conversation, *, generation_prompt: bool = True) -> list[int]:
        """Ids of the prompt: exactly those that precede the same answer in training.

        Args:
            conversation: The conversation.
            generation_prompt: Whether the assistant's turn is opened behind the last message.
        """
        return _listed(self._encoder.encode(self.template.render(conversation, generation_prompt=generation_prompt)))

    def encode_continuation(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation that ends with an unfinished answer, as in training; an `InputError` otherwise."""
        *before, last = conversation.messages
        if last.role != "assistant" or not before:
            raise InputError("the last message must be the assistant's, after a question, to be continued")
        prompt = self.template.render(conversation.upto(len(before)), generation_prompt=True)
        begin, text = len(prompt.text), prompt.text + last.content
        whole = replace(prompt, text=text, assistant_spans=(*prompt.assistant_spans, (begin, len(text))))
        return _listed(self._encoder.encode(whole, [begin]))

    def encode_conversation(self, conversation: Conversation, *, train_on: TrainOn = "assistant",
                            notes: set[str] | None = None) -> tuple[TokenSequence, ...]:
        """Encode a conversation with labels on its answers.

        Usually one sequence; one per trained answer where the template rewrites history (Qwen3 drops earlier reasoning)
        or refuses the whole, so that each answer is trained after the exact prompt that it is served with.

        Args:
            conversation: The conversation.
            train_on: `assistant` labels every answer with its stop token, `last` only the last answer, `all` every
                token. An assistant message's own `train` overrides it.
            notes: Notes on answers that are left out (empty ones, or without a prompt) are added to it.

        Raises:
            InputError: No supervised token, or the template does not show where an answer begins or ends.
        """
        if train_on == "all":
            return (self._everything(conversation),)
        left_out = self._unused_variables(conversation)
        wanted = self._prompted(conversation, trained_messages(conversation, train_on, left_out), left_out)
        if notes is not None:
            notes |= left_out
        if not wanted:
            reasons = sorted(left_out & {EMPTY_ANSWER, UNPROMPTED_ANSWER})
            why = f": {'; '.join(reasons)}" if reasons else ""
            raise InputError(f"no assistant message of this conversation is trained on{why}")
        with suppress(InputError):                      # a later turn may be what the template refuses
            rendered = self.template.render(conversation)
            spans = answer_spans(rendered, wanted)
            if len(spans) == len(wanted):
                reading = self._encoder.encode(rendered, [start for start, _ in spans])
                if set(reading.split_at) <= {spans[-1][0]}:    # later prompts are encoded as a whole
                    return (self._labelled(rendered, reading, spans),)
        return tuple(self._turn(conversation.upto(place + 1)) for place in wanted)

    def _unused_variables(self, conversation: Conversation) -> set[str]:
        """Notes on variables that the chat template does not use; a misspelt one is an error."""
        if not conversation.template_args:
            return set()
        for name in (unread := conversation.template_args.keys() - self.template_variables):
            if get_close_matches(name, self.template_variables, n=1, cutoff=0.85):
                self.check_template_args({name: None}, "")
        return {f"the chat template has no variable '{name[:40]}'" for name in unread}

    def _prompted(self, conversation: Conversation, wanted: list[int], left_out: set[str]) -> list[int]:
        """The wanted answers, without an initial one for which the template writes no prompt."""
        if wanted and all(message.role == "system" for message in conversation.messages[:wanted[0]]):
            try:
                self.template.render(conversation.upto(wanted[0]), generation_prompt=True)
            except InputError:
                left_out.add(UNPROMPTED_ANSWER)
                return wanted[1:]
        return wanted

    def _turn(self, conversation: Conversation) -> TokenSequence:
        """Encode a conversation with labels on its last answer only."""
        place = len(conversation.messages) - 1
        rendered = self.template.render(conversation)
        if not answer_spans(rendered, [place]):
            rendered = self.template.served(conversation)
        spans = answer_spans(rendered, [place])
        return self._labelled(rendered, self._encoder.encode(rendered, [spans[0][0]]), spans)

    def _labelled(self, rendered: Rendered, reading: Reading | LongReading, spans: Sequence[Span]) -> TokenSequence:
        ids = np.asarray(reading.ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        for start, stop in spans:
            first, last = reading.tokens_started(start), reading.tokens_started(stop)
            labels[first:last] = ids[first:last]
            stops = np.flatnonzero(np.isin(ids[first:last], self.stop_ids))
            if stops.tolist() != [last - first - 1]:
                text = self.decode(ids[first:last][-1000:], skip_special_tokens=False)
                raise InputError(f"this answer would not stop when served: {text[-80:]!r} must end with one of "
                                 f"{', '.join(self.hf.convert_ids_to_tokens(self.stop_ids))}, and contain none before")
        return TokenSequence(ids, labels, _speakers(rendered, reading))

    def _everything(self, conversation: Conversation) -> TokenSequence:
        """Encode with labels on every token, except answers that must not be trained on."""
        rendered = self.template.render(conversation)
        silent = [place for place, message in enumerate(conversation.messages)
                  if message.role == "assistant" and message.train is False]
        if unseen := set(silent) - {place for place, *_ in rendered.answers}:
            raise hidden_answer(min(unseen))
        spans = answer_spans(rendered, silent)
        reading = self._encoder.encode(rendered, [start for start, _ in spans])
        labels = np.array(reading.ids, dtype=np.int32)
        for start, stop in spans:
            labels[reading.tokens_started(start):reading.tokens_started(stop)] = IGNORE_INDEX
        return TokenSequence(np.array(reading.ids, dtype=np.int32), labels, _speakers(rendered, reading))

    @cached_property
    def _prefix(self) -> list[int]:
        """Ids that the tokenizer itself puts before a document."""
        plain, whole = self._encoder.whole("a").ids, self.hf("a")["input_ids"]
        return list(whole[: len(whole) - len(plain)]) if whole[-len(plain):] == plain else [
            id_ for id_ in whole[:1] if id_ == self.bos_id]

    # ---- tokens to text ----------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        try:
            return self._backend.decode([int(id_) for id_ in ids], skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise panicked(error, self.source) from None

    @cached_property
    def spellings(self) -> list[bytes]:
        """Bytes of each token, also of control tokens."""
        return spellings(self.hf)

    @cached_property
    def token_sizes(self) -> np.ndarray:
        """(4, V) int64: bytes of text per token id and of a text's first token, and the same in characters."""
        return sizes(self.hf, self.spellings[:self.vocab_size], self.special_ids, self.encode_text("a")[0])

    @property
    def token_bytes(self) -> np.ndarray:
        """(2, V) int64: UTF-8 bytes of text per token id, 0 for control tokens, and those of a text's first token."""
        return self.token_sizes[:2]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and its chat template so that `AutoTokenizer.from_pretrained` finds both."""
        self.hf.save_pretrained(str(folder))


def unlike(tokenizer: Tokenizer, base: str) -> str | None:
    """How the tokenizer of a run differs from the base model's own; null if it is the same or only has more tokens.

    A few tokens may have other names, because control tokens are renamed. A base without a tokenizer never differs.

    Args:
        tokenizer: The tokenizer of the run.
        base: Folder or hub id of the base model.
    """
    base = names.resolve(base)
    if base == tokenizer.source:
        return None
    try:
        base_vocabulary = load_fast(str(names.path_of(base))).get_vocab()
    except InputError:
        return None
    vocabulary = tokenizer.hf.get_vocab()
    changed = sorted((id_, token) for token, id_ in base_vocabulary.items() if vocabulary.get(token) != id_)
    if len(changed) <= RENAMED * len(base_vocabulary):
        return None
    id_, token = next((pair for pair in changed if pair[1] in vocabulary), changed[0])
    return (f"{len(changed):,} of the {len(base_vocabulary):,} tokens of the base model's own tokenizer have another "
            f"id or none here: {token!r} is {id_} in the base and {vocabulary.get(token, 'missing')} here")


def _listed(reading: Reading | LongReading) -> list[int]:
    return reading.ids if isinstance(reading.ids, list) else reading.ids.tolist()


def _speakers(rendered: Rendered, reading: Reading | LongReading) -> np.ndarray:
    """(T,) uint8: source of each token; an answer includes all that the model generates, with calls and stop token.

    A token belongs to the section that it begins in; one that includes spaces may end after it.
    """
    speakers = np.zeros(len(reading.ids), dtype=np.uint8)
    for _, start, stop in rendered.answers:
        speakers[reading.tokens_started(start):reading.tokens_started(stop)] = SPEAKERS.index("assistant")
    for start, stop, role in rendered.speakers:
        speakers[reading.tokens_started(start):reading.tokens_started(stop)] = SPEAKERS.index(role)
    return speakers
