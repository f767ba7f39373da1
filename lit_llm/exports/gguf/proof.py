"""Prove a GGUF file by llama.cpp: the NLL of fixed rows, the tokens of a conversation and a greedy continuation.

llama.cpp runs in a process of its own, with the Python of this environment if it has `llama_cpp`, or with the one that
the environment variable LIT_LLM_LLAMA_CPP names.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError
from lit_llm.exports.gguf import probe
from lit_llm.exports.rows import Row, Rows
from lit_llm.text import check

VARIABLE = "LIT_LLM_LLAMA_CPP"
NEW_TOKENS, PROMPT = 24, 8                          # greedy tokens, and tokens of the prompt before them
SECONDS = 3600                                      # of llama.cpp, at most
# Accepted difference of the mean NLL: relative above 1 nat, absolute below. On tiny models of seven families and two
# trained ones (tests/benchmarks/gguf_formats.py) the largest are 5e-6, 3e-4, 2e-3, 7e-3 and 4e-2 (f32 to q4_0). In f32
# it is the GELU of Gemma, which llama.cpp reads from a table; in f16 to q8_0, llama.cpp rounds activations as well.
BOUNDS = {"f32": 1e-4, "f16": 2e-3, "bf16": 1e-2, "q8_0": 3e-2, "q5_1": 0.1, "q5_0": 0.1, "q4_1": 0.2, "q4_0": 0.2}


@dataclass(frozen=True, slots=True)
class Proof:
    """What llama.cpp computes with a file, beside what transformers computes with the model.

    Args:
        version: Release of the package llama-cpp-python.
        nll: Nats per supervised token of the rows, by llama.cpp.
        references: The same for each reference sequence.
        conversation: Whether llama.cpp gives a rendered conversation the same token ids.
        text: The same for a plain text; null if the tokenizer is known to differ there.
        greedy: Whether the greedy continuation is the same.
    """

    version: str
    nll: float
    references: tuple[float, ...]
    conversation: bool | None
    text: bool | None
    greedy: bool


def python() -> str | None:
    """A Python that has llama.cpp; null if there is none.

    Raises:
        InputError: The environment variable names a file that is no Python with `llama_cpp`.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return sys.executable if find_spec("llama_cpp") is not None else None
    try:
        done = subprocess.run([named, "-c", "import llama_cpp"], capture_output=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{named} cannot be run: {error}", where=VARIABLE, fix=f"unset {VARIABLE}") from None
    if done.returncode:
        raise InputError(f"{named} cannot import llama_cpp", where=VARIABLE,
                         fix=f"{named} -m pip install llama-cpp-python, or unset {VARIABLE}")
    return named


def run(interpreter: str, path: Path, tokenizer: Any, references: Sequence[check.Reference], rows: Rows,
        model: Any) -> Proof:
    """Compute with the file in llama.cpp, and with the model in transformers.

    Args:
        interpreter: A Python that has `llama_cpp`.
        path: The GGUF file.
        tokenizer: The tokenizer of the model.
        references: Reference sequences; the first `check.scored_length` tokens of each are scored.
        rows: Rows with their supervised tokens.
        model: The model in float32.

    Raises:
        InputError: llama.cpp cannot load the file.
    """
    most = check.scored_length(model)
    texts, wanted = _texts(tokenizer)
    prompt = list(references[0].ids[:PROMPT])
    scored = [Row(list(row.ids[:most]), [True] * len(row.ids[:most])) for row in references] + rows.rows
    request = {"model": str(path), "rows": [row._asdict() for row in scored], "texts": texts, "prompt": prompt,
               "new_tokens": NEW_TOKENS, "context": max(PROMPT + NEW_TOKENS, *(len(row.ids) for row in scored))}
    done = None
    try:
        done = subprocess.run([interpreter, probe.__file__], input=json.dumps(request), capture_output=True, text=True,
                              timeout=SECONDS, check=False)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        output = " ".join((done.stderr or done.stdout).split())[-300:] if done else "it did not answer"
        raise InputError(f"llama.cpp cannot compute with the file: {output}", where=str(path),
                         fix="export it with --format transformers") from None
    alike = [came == ids for came, ids in zip(answer["tokens"], wanted, strict=True)]
    nll = answer["nll"]                             # sums over supervised tokens
    means = [total / (len(row.ids) - 1) for total, row in zip(nll, scored[:len(references)], strict=False)]
    return Proof(answer["version"], sum(nll[len(references):]) / max(1, rows.tokens), tuple(means),
                 alike[0] if len(alike) > 1 else None, alike[-1],
                 answer["greedy"] == _continuation(model, prompt))


def _texts(tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    """A rendered conversation (where the template takes it) and a plain text, with their ids."""
    texts, ids = [check.TEXT], [tokenizer.encode_text(check.TEXT)]
    try:
        rendered = tokenizer.template.render(check.CONVERSATION).text
        texts.insert(0, rendered)
        ids.insert(0, [int(token) for token in
                       tokenizer.encode_conversation(check.CONVERSATION, train_on="all")[0].input_ids])
    except InputError:
        pass
    return texts, ids


def _continuation(model: Any, prompt: Sequence[int]) -> list[int]:
    """The most probable tokens by transformers, without stopping."""
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt):].tolist()


def judge(proof: Proof, kind: str, before: float, references: Sequence[float], where: str) -> float:
    """Refuse a file that is not the model.

    Args:
        proof: What llama.cpp computed.
        kind: Format of the file.
        before: Nats per supervised token of the rows by transformers, in float32.
        references: The same for each reference sequence.
        where: The file.

    Returns:
        The difference of the NLL of the rows.

    Raises:
        InputError: An NLL differs by more than the format explains, the conversation has other tokens, or the
            greedy continuation differs in float32.
    """
    fix = "export it with --format transformers"
    for one, other in ((before, proof.nll), *zip(references, proof.references, strict=True)):
        if not check.nll_difference(one, other) <= BOUNDS[kind]:
            raise InputError(f"llama.cpp gives rows the nll {other:.6g}, and the model has {one:.6g} (bound "
                             f"{BOUNDS[kind]:g} in {kind}); nothing was exported", where=where,
                             fix="use a larger --gguf_type, such as f16" if kind not in ("f32", "f16") else fix)
    if proof.conversation is False:
        raise InputError("llama.cpp gives the rendered conversation other tokens; nothing was exported", where=where,
                         fix=fix)
    if kind == "f32" and not proof.greedy:
        raise InputError("the greedy continuation in float32 differs from the model's; nothing was exported",
                         where=where, fix=fix)
    return check.nll_difference(before, proof.nll)
