"""Score windows of tokens with a server that gives the log-probabilities of a prompt's tokens.

The windows are sent as token ids to `/v1/completions` with `echo` and `logprobs`, so the server tokenizes nothing. It
needs no other interface than OpenAI's, which this project's server, vLLM and SGLang have.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lit_llm.errors import InputError
from lit_llm.evaluation.material import Material, Window
from lit_llm.evaluation.scoring.local import Scores
from lit_llm.inference.chat.remote import RemoteModel

AT_ONCE = 8                                         # requests
LONGEST = 1 << 28                                   # bytes of a response
NO_LOGPROBS = ("the evaluation needs a server whose /v1/completions takes token ids and gives the log-probabilities of "
               "the prompt (echo and logprobs): python -m serve, or vLLM")


class ServedModel:
    """A model of a server.

    Args:
        url: Address of the API, such as http://127.0.0.1:8000/v1.

    Raises:
        InputError: No server answers there.
    """

    has_base = False

    def __init__(self, url: str) -> None:
        self._server = RemoteModel(url)
        self.url, self.name = self._server.url, self._server.name
        self._new_tokens = 0                        # some servers generate at least one token

    def score(self, rows: Sequence[Sequence[Window]], material: Material, *, base: bool = False) -> Scores:
        """Score the tokens of a batch, in their order.

        Raises:
            InputError: The server refuses, or gives no log-probabilities of the prompt.
        """
        assert not base
        windows = [window for row in rows for window in row]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            scored = list(pool.map(self._window, windows))
        return Scores(*map(np.concatenate, zip(*scored, strict=True)))

    def _window(self, window: Window) -> Scores:
        """The scored tokens of a window."""
        try:
            answer = self._completion(window)
        except InputError as error:
            if self._new_tokens or "max_tokens" not in error.what:
                raise
            self._new_tokens = 1
            answer = self._completion(window)
        count = len(window.ids)
        try:
            logprobs = answer["choices"][0]["logprobs"]
            values = [0.0 if value is None else float(value) for value in logprobs["token_logprobs"][:count]]
            missing = [value is None for value in logprobs["token_logprobs"][:count]]
            top = logprobs.get("top_logprobs")
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError("the server gave no log-probabilities of the prompt", where="url",
                             fix=NO_LOGPROBS) from None
        scored = np.flatnonzero(window.supervised)
        if len(values) != count or any(missing[place] for place in scored):
            raise InputError(f"the server gave {len(values) - sum(missing)} log-probabilities for a prompt of {count} "
                             "tokens", where="url", fix=NO_LOGPROBS)
        best = [_best(entry) for entry in top[:count]] if isinstance(top, list) and len(top) >= count else []
        has_best = bool(best) and all(best[place] is not None for place in scored)
        correct = [int(values[place] >= (best[place] or 0.0)) if has_best else -1 for place in scored]
        return Scores(-np.array(values)[scored], np.array(correct, np.int64))

    def _completion(self, window: Window) -> Any:
        body = {"model": self.name, "prompt": window.ids.tolist(), "max_tokens": self._new_tokens, "echo": True,
                "logprobs": 1, "temperature": 0}
        with self._server.request("/completions", body) as reply:
            try:
                return json.loads(reply.read(LONGEST))
            except ValueError:
                raise InputError("the server's answer is not JSON", where="url", fix=NO_LOGPROBS) from None


def _best(entry: Any) -> float | None:
    """The highest log-probability of a position; null if the server does not tell."""
    values = [value for value in entry.values() if value is not None] if isinstance(entry, dict) else []
    return max(values, default=None)
