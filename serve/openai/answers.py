"""Build responses in OpenAI's JSON format."""

import time
import uuid
from typing import Any

from lit_llm.inference.completion import Completion


def usage(last: Completion) -> dict[str, int]:
    """Token counts, including the stop token, as `generate` returns it."""
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens,
            "total_tokens": last.prompt_tokens + last.completion_tokens}


class Shape:
    """Builds the parts of one response, which share an id and a time.

    Args:
        chat: Whether it is a chat completion or a plain completion.
        model: Name of the model in the API.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        name = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._whole = {**head, "object": name}
        self._chunk = {**head, "object": f"{name}.chunk" if chat else name}

    def whole(self, text: str, last: Completion) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {**self._whole, "choices": [self._choice(content, last.finish_reason)], "usage": usage(last)}

    def opening(self) -> dict[str, Any] | None:
        """The first chunk, which names the role; plain completions have none."""
        return self._with({"role": "assistant", "content": ""}, None) if self.chat else None

    def chunk(self, piece: Completion) -> dict[str, Any]:
        """A chunk of text."""
        return self._with({"content": piece.text} if self.chat else {"text": piece.text}, None)

    def closing(self, last: Completion) -> dict[str, Any]:
        """The last chunk, with the finish_reason."""
        return self._with({} if self.chat else {"text": ""}, last.finish_reason)

    def accounts(self, last: Completion) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._chunk, "choices": [], "usage": usage(last)}

    def _with(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {**self._chunk, "choices": [self._choice({"delta": content} if self.chat else content, finish_reason)]}

    @staticmethod
    def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
