"""Compute with a GGUF file in llama.cpp: token ids of texts, NLL of rows, and a greedy continuation.

`proof.py` runs this file as a script with a Python that has `llama_cpp`, because llama.cpp ends the whole process on a
file that it cannot compute. It reads JSON from stdin and prints JSON; it imports nothing of this project.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def main() -> None:
    """Answer one request: {model, rows, texts, prompt, new_tokens, context}."""
    import llama_cpp

    request = json.load(sys.stdin)
    model = llama_cpp.Llama(
        request["model"], n_ctx=request["context"], n_batch=request["context"], n_ubatch=request["context"],
        n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=True, flash_attn=False, verbose=False,
        type_k=0, type_v=0)                         # 0 is float32: the cache adds no rounding of its own
    answer = {
        "version": llama_cpp.__version__,
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]],
        "nll": [_nll(model, row["ids"], row["supervised"]) for row in request["rows"]],
        "greedy": list(_continuation(model, request["prompt"], request["new_tokens"]))}
    print(json.dumps(answer))


def _nll(model: Any, ids: Sequence[int], supervised: Sequence[bool]) -> float:
    """Sum of nats of the supervised tokens of a row, without its first token."""
    import numpy as np

    model.reset()
    model.eval(ids)
    total = 0.0
    for place in range(1, len(ids)):
        if supervised[place]:
            logits = model.scores[place - 1].astype(np.float64)
            top = logits.max()
            total += float(top + np.log(np.exp(logits - top).sum()) - logits[ids[place]])
    return total


def _continuation(model: Any, prompt: Sequence[int], count: int) -> Iterator[int]:
    """The most probable tokens behind a prompt."""
    model.reset()
    model.eval(prompt)
    for _ in range(count):
        token = int(model.scores[model.n_tokens - 1].argmax())
        yield token
        model.eval([token])


if __name__ == "__main__":
    main()
