"""A tokenizer with its chat template: documents and conversations to token sequences, and token ids to text.

The files are read by `tokenizer_file.py`; `template.py` renders conversations and `encoder.py` finds the exact ids.
Batches, padding and the shift of labels belong to `data/` and `training/`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.text import check
from lit_llm.text.answers import EMPTY, UNASKED, TrainOn, hidden, spans_of, trained
from lit_llm.text.conversation import ROLES, Conversation, Document
from lit_llm.text.cutting import Piece
from lit_llm.text.encoder import Encoder
from lit_llm.text.reading import LongReading, Reading
from lit_llm.text.templates.jinja import Render, TemplateArgs, check_args, compiled, variables, with_defaults
from lit_llm.text.templates.rendering import Rendered, Span
from lit_llm.text.templates.template import ChatTemplate, chosen
from lit_llm.text.tokenizer_file import load_fast
from lit_llm.text.tokenizer_limits import panicked

__all__ = ["IGNORE_INDEX", "SPEAKERS", "TokenSequence", "Tokenizer", "TrainOn"]
IGNORE_INDEX = -100
RENAMED = 0.02                                      # share of a base's tokens that may have other names
SPEAKERS = ("template", *ROLES, "document")             # who says a token; what stands around contents, the template


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One document or conversation as the model sees it, unpacked and unpadded.

    Args:
        input_ids: (T,) int32.
        labels: (T,) int32, Hugging Face's convention: position i holds the token AT i, or -100 where it is not
            supervised. Nobody has shifted it; `training/loss.py` will.
        speakers: (T,) uint8, who says each token: a place in SPEAKERS. Null is a document.
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
        source: Where it came from, for messages.
        note: What `load` decided for the user, to be said once; empty if nothing.
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
        """A tokenizer from a folder or hub id.

        Args:
            path: Folder with tokenizer files, or a hub id.
            chat_template: A .jinja file, or the name of one of the tokenizer's templates. Null takes the tokenizer's
                own; if it has none, ChatML is written with special tokens that the tokenizer already has.
            template_args: Values of the template's variables; they become defaults that stand in the template.

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
               template_args: Mapping[str, Any]) -> str:
        if self._compiled is None or self._compiled[0] != self.hf.chat_template:
            self._compiled = self.hf.chat_template, compiled(self.hf.chat_template, self.hf.special_tokens_map)
        if template_args:
            template_args = {name: value for name, value in template_args.items() if name in self.template_variables}
        return self._compiled[1](messages, tools, generation_prompt, template_args)

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """The variables of the chat template that a user may set, such as `enable_thinking`."""
        return variables(self.hf.chat_template, self.hf.special_tokens_map)

    def check_template_args(self, template_args: Mapping[str, Any], where: str) -> None:
        """Refuse values for variables that the chat template does not read.

        Raises:
            InputError: At `where`.
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
        """Ids that end an answer: the chat template's end of turn and of a call, then the tokenizer's end of text."""
        return tuple(dict.fromkeys([*map(self.hf.convert_tokens_to_ids, self.template.stop_tokens), self.eos_id]))

    # ---- text to tokens ----------------------------------------------------------------------------------------------

    def encode_document(self, document: Document, *, end: bool = True) -> TokenSequence:
        """A document with the tokenizer's own beginning (BOS, where it adds one) and, with `end`, its end of text.

        All tokens are labelled; the first has nothing before it, so it is never predicted.
        """
        ids = [*self._prefix, *self.encode_text(document.text)]
        if end:
            ids.append(self.eos_id)
        array = np.asarray(ids, dtype=np.int32)
        return TokenSequence(array, array.copy())

    def pieces(self, blocks: Iterable[str]) -> Iterator[tuple[Piece, bool, bool]]:
        """A long document in pieces for `encode_pieces`: (piece, whether it is the first, whether the last)."""
        return self._encoder.pieces(blocks)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray | InputError]:
        """Ids of many texts together, which is faster; an error stands where one of them cannot be read."""
        return self._encoder.texts(pieces)

    def framed(self, ids: np.ndarray, *, first: bool = True, last: bool = True) -> np.ndarray:
        """(T,) int32: a document's ids, with the tokenizer's beginning before it and its end of text behind it."""
        prefix, end = self._prefix if first else [], [self.eos_id] if last else []
        return np.concatenate([np.array(part, dtype=np.int32) for part in (prefix, ids, end)])

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and a spelled control token stays text."""
        return _listed(self._encoder.encode(Rendered(text, ((0, len(text)),))))

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """What the model reads before it answers: exactly the ids that stand before that answer in training."""
        return _listed(self._encoder.encode(self.template.render(conversation, generation_prompt=True)))

    def encode_conversation(self, conversation: Conversation, *, train_on: TrainOn = "assistant",
                            notes: set[str] | None = None) -> tuple[TokenSequence, ...]:
        """A conversation with its answers labelled.

        One sequence as a rule; one for each trained answer where the template rewrites history (Qwen3 drops earlier
        thinking) or refuses the whole, so that each answer is learned behind the very prompt it is served with.

        Args:
            conversation: What was said.
            train_on: `assistant` labels every answer with its stop token, `last` only the last answer, `all` every
                token. An assistant message's own `train` overrides it.
            notes: What is left out is added to it: answers that are empty, or that nothing asked for.

        Raises:
            InputError: Nothing to learn from, or the template hides where an answer begins or ends.
        """
        if train_on == "all":
            return (self._everything(conversation),)
        left_out = self._unread(conversation)
        wanted = self._asked(conversation, trained(conversation, train_on, left_out), left_out)
        if notes is not None:
            notes |= left_out
        if not wanted:
            why = f": {'; '.join(sorted(left_out & {EMPTY, UNASKED}))}" if left_out & {EMPTY, UNASKED} else ""
            raise InputError(f"nothing to learn from: no assistant message is trained on{why}")
        with suppress(InputError):                      # a turn that follows may be what it refuses
            rendered = self.template.render(conversation)
            spans = spans_of(rendered, wanted)
            if len(spans) == len(wanted):
                reading = self._encoder.encode(rendered, [start for start, _ in spans])
                if set(reading.torn) <= {spans[-1][0]}:     # a later prompt is read whole, where no answer parts it
                    return (self._labelled(rendered, reading, spans),)
        return tuple(self._turn(conversation.upto(place + 1)) for place in wanted)

    def _unread(self, conversation: Conversation) -> set[str]:
        """Notes on variables that the chat template does not read; one that nearly spells another is an error."""
        if not conversation.template_args:
            return set()
        for name in (unread := conversation.template_args.keys() - self.template_variables):
            if get_close_matches(name, self.template_variables, n=1, cutoff=0.85):
                self.check_template_args({name: None}, "")
        return {f"the chat template has no variable '{name[:40]}'" for name in unread}

    def _asked(self, conversation: Conversation, wanted: list[int], left_out: set[str]) -> list[int]:
        """The wanted answers but for a first that follows no user, where the template writes no prompt for it."""
        if wanted and all(message.role == "system" for message in conversation.messages[:wanted[0]]):
            try:
                self.template.render(conversation.upto(wanted[0]), generation_prompt=True)
            except InputError:
                left_out.add(UNASKED)
                return wanted[1:]
        return wanted

    def _turn(self, conversation: Conversation) -> TokenSequence:
        """A conversation with its last answer labelled."""
        place = len(conversation.messages) - 1
        rendered = self.template.render(conversation)
        if not spans_of(rendered, [place]):
            rendered = self.template.served(conversation)
        spans = spans_of(rendered, [place])
        return self._labelled(rendered, self._encoder.encode(rendered, [spans[0][0]]), spans)

    def _labelled(self, rendered: Rendered, reading: Reading | LongReading, spans: Sequence[Span]) -> TokenSequence:
        ids = np.asarray(reading.ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        for start, stop in spans:
            first, last = reading.begun(start), reading.begun(stop)
            labels[first:last] = ids[first:last]
            stops = np.flatnonzero(np.isin(ids[first:last], self.stop_ids))
            if stops.tolist() != [last - first - 1]:
                text = self.decode(ids[first:last][-1000:], skip_special_tokens=False)
                raise InputError(f"serving would not stop where this answer does: {text[-80:]!r} must end with one of "
                                 f"{', '.join(self.hf.convert_ids_to_tokens(self.stop_ids))}, and hold none before")
        return TokenSequence(ids, labels, _speakers(rendered, reading))

    def _everything(self, conversation: Conversation) -> TokenSequence:
        """Every token labelled, but for the answers that are not to be trained on."""
        rendered = self.template.render(conversation)
        silent = [place for place, message in enumerate(conversation.messages)
                  if message.role == "assistant" and message.train is False]
        if unseen := set(silent) - {place for place, *_ in rendered.answers}:
            raise hidden(min(unseen))
        spans = spans_of(rendered, silent)
        reading = self._encoder.encode(rendered, [start for start, _ in spans])
        ids = np.asarray(reading.ids, dtype=np.int32)
        labels = ids.copy()
        for start, stop in spans:
            labels[reading.begun(start):reading.begun(stop)] = IGNORE_INDEX
        return TokenSequence(ids, labels, _speakers(rendered, reading))

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a document by itself."""
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
    def token_bytes(self) -> np.ndarray:
        """(2, V) int64: UTF-8 bytes of text that each id stands for, 0 for control tokens; for bits per byte.

        The second row is of a text's first token: sentencepiece puts a space before the text, which is none of its
        bytes. (Of a text that begins with one, some put none there; then a byte is missing.)
        """
        byte_level = '"ByteLevel"' in self._backend.to_str()
        added = self._backend.get_added_tokens_decoder()
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, id_ in self.hf.get_vocab().items():
            if id_ in self.special_ids or id_ >= self.vocab_size:
                continue
            if id_ in added:
                counts[id_] = len(token.encode())
            elif byte_level:
                counts[id_] = len(token)            # one character stands for one byte
            else:
                counts[id_] = 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
        first, start = counts.copy(), self.encode_text("a")[0]
        if self.hf.convert_ids_to_tokens(start).startswith("▁"):
            spaced = [id_ for token, id_ in self.hf.get_vocab().items() if token.startswith("▁") and counts[id_]]
            first[spaced] -= 1
        return np.stack([counts, first])

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with its chat template where `AutoTokenizer.from_pretrained` finds both."""
        self.hf.save_pretrained(str(folder))


def unlike(tokenizer: Tokenizer, base: str) -> str | None:
    """How the tokenizer of a run differs from its base's own; null where it is that one, or has more tokens.

    A few tokens may have other names, as control tokens are renamed. A base without a tokenizer is like any.

    Args:
        tokenizer: Of the run.
        base: A folder or hub id.
    """
    base = names.resolve(base)
    if base == tokenizer.source:
        return None
    try:
        own = load_fast(str(names.path_of(base))).get_vocab()
    except InputError:
        return None
    given = tokenizer.hf.get_vocab()
    other = sorted((id_, token) for token, id_ in own.items() if given.get(token) != id_)
    if len(other) <= RENAMED * len(own):
        return None
    id_, token = next((pair for pair in other if pair[1] in given), other[0])
    return (f"{len(other):,} of the {len(own):,} tokens of the base's own tokenizer have another id, or none: "
            f"{token!r} is {id_} there and {given.get(token, 'missing')} here")


def _listed(reading: Reading | LongReading) -> list[int]:
    return reading.ids if isinstance(reading.ids, list) else reading.ids.tolist()


def _speakers(rendered: Rendered, reading: Reading | LongReading) -> np.ndarray:
    """(T,) uint8: who says each token; of an answer, all that its model says: reasoning, calls and the stop token.

    A token belongs to where it begins; one that swallows spaces may end behind it.
    """
    said = np.zeros(len(reading.ids), dtype=np.uint8)
    for _, start, stop in rendered.answers:
        said[reading.begun(start):reading.begun(stop)] = SPEAKERS.index("assistant")
    for start, stop, role in rendered.speakers:
        said[reading.begun(start):reading.begun(stop)] = SPEAKERS.index(role)
    return said
