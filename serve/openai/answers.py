"""Build responses in OpenAI's JSON format."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from lit_llm.inference.completion import Completion
from serve.openai.choices import Choice
from serve.openai.logprobs import LogprobWriter


def usage(choices: Sequence[Choice], lasts: Sequence[Completion]) -> dict[str, int]:
    """Token counts: each prompt once, and all answers with their stop tokens, as `generate` returns them."""
    prompts = sum(len(choice.ids) for choice in choices if not choice.sample)
    answers = sum(last.completion_tokens for last in lasts)
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


class Shape:
    """Builds the parts of one response, which share an id and a time.

    Args:
        model: Name of the model in the API.
        choices: The answers to come.
        writer: Writes log-probabilities.
        chat: Whether it is a chat completion or a plain completion.
    """

    def __init__(self, model: str, choices: Sequence[Choice], writer: LogprobWriter, *, chat: bool) -> None:
        self.chat, self._choices, self._writer = chat, choices, writer
        self._messages = [choice.plan.message_builder() for choice in choices]
        name = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._whole = {**head, "object": name}
        self._chunk = {**head, "object": f"{name}.chunk" if chat else name}

    def whole(self, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The body of a response that is not streamed.

        Args:
            answers: The pieces of each choice.
        """
        choices = []
        for index, pieces in enumerate(answers):
            text = "".join(piece.text for piece in pieces)
            self._messages[index].push(text, final=True)
            content = {"message": self._messages[index].message()} if self.chat else {"text": text}
            choices.append(self._choice(index, content, self._reason(index, pieces[-1]), pieces))
        return {**self._whole, "choices": choices, "usage": usage(self._choices, [pieces[-1] for pieces in answers])}

    def openings(self) -> list[dict[str, Any]]:
        """The first chunks, which name the role of each choice; plain completions have none."""
        opening = {"role": "assistant", "content": ""}
        return [self._with(index, opening, None) for index in range(len(self._choices))] if self.chat else []

    def chunks(self, index: int, piece: Completion) -> list[dict[str, Any]]:
        """The chunks of a piece, at its end one with the finish reason."""
        contents = [{"text": piece.text}] if piece.text else []
        if self.chat:                                   # text is held back until its part of the message is known
            contents = self._messages[index].push(piece.text, final=piece.finish_reason is not None)
        if piece.logprobs and not contents:
            contents = [{"content": ""} if self.chat else {"text": ""}]
        parts = [self._with(index, content, None, () if number else [piece]) for number, content in enumerate(contents)]
        if piece.finish_reason:
            parts.append(self._with(index, {} if self.chat else {"text": ""}, self._reason(index, piece)))
        return parts

    def accounts(self, lasts: Sequence[Completion]) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._chunk, "choices": [], "usage": usage(self._choices, lasts)}

    def _with(self, index: int, content: dict[str, Any], finish_reason: str | None,
              pieces: Sequence[Completion] = ()) -> dict[str, Any]:
        content = {"delta": content} if self.chat else content
        return {**self._chunk, "choices": [self._choice(index, content, finish_reason, pieces)]}

    def _choice(self, index: int, content: dict[str, Any], finish_reason: str | None,
                pieces: Sequence[Completion]) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": self._logprobs(pieces), "finish_reason": finish_reason}

    def _reason(self, index: int, last: Completion) -> str | None:
        return self._messages[index].finish_reason(last.finish_reason) if self.chat else last.finish_reason

    def _logprobs(self, pieces: Sequence[Completion]) -> dict[str, Any] | None:
        tokens = [token for piece in pieces for token in piece.logprobs]
        if not tokens:
            return None
        if self.chat:
            return self._writer.chat(tokens)
        return self._writer.completion(tokens, [offset for piece in pieces for offset in piece.offsets])
