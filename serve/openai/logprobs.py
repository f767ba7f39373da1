"""Log-probabilities in the two formats of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from lit_llm.inference.logprobs import TokenLogprob
from lit_llm.text.tokenizer import Tokenizer

LEAST = -9999.0                                     # OpenAI's number for a probability of zero; JSON has no infinity


class LogprobWriter:
    """Writes log-probabilities for one model.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The format of chat completions."""
        content = []
        for token in tokens:
            top = [self._token(id_, value) for id_, value in token.top]
            content.append({**self._token(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """The format of plain completions.

        Args:
            tokens: In order.
            offsets: Where the text of each begins in the text of the choice.
        """
        tops = []
        for token in tokens:
            # the token itself is always among them, so there may be one more than was asked for
            pairs = [*token.top, (token.token_id, token.logprob)]
            tops.append(None if token.logprob is None else {self._text(id_): _finite(value) for id_, value in pairs})
        return {"tokens": [self._text(token.token_id) for token in tokens],
                "token_logprobs": [_finite(token.logprob) for token in tokens],
                "top_logprobs": tops, "text_offset": list(offsets)}

    def _token(self, id_: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._text(id_), "logprob": _finite(logprob), "bytes": list(self._bytes(id_))}

    def _text(self, id_: int) -> str:
        """The text of a token; part of a character is spelled as OpenAI does, "bytes:" and hexadecimal digits."""
        spelled = self._bytes(id_)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _bytes(self, id_: int) -> bytes:
        """Empty for ids that the model has and the tokenizer has not."""
        spellings = self._tokenizer.spellings
        return spellings[id_] if id_ < len(spellings) else b""


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
