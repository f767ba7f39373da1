"""Write a model folder as a folder for llama.cpp and Ollama: GGUF file, Modelfile and check.json, each verified."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.exports import rows
from lit_llm.exports.contents import replacing
from lit_llm.exports.gguf import families, file, modelfile, proof, weights
from lit_llm.exports.gguf.vocabulary import metadata
from lit_llm.models import load
from lit_llm.system import integrity
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
AUTO = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def write(source: Path, target: Path, name: str, kind: str = "auto", prove: bool | None = None, *,
          run: Path | None = None) -> Path:
    """Write the folder; one of the same name is replaced when the new one is verified.

    Args:
        source: Model folder as transformers loads it.
        target: The folder.
        name: Name of the model, and of the file in front of its format.
        kind: Format of the matrices, or `auto` for the dtype of the folder's weights.
        prove: Whether llama.cpp must confirm the file; null asks it where it is installed.
        run: Run folder, whose validation rows are scored; null takes embedded documents.

    Returns:
        The folder.

    Raises:
        InputError: llama.cpp cannot compute the model or represent its tokenizer, the disk is too full, the file
            differs from the model, or `prove` is set and there is no llama.cpp.
    """
    interpreter = None if prove is False else proof.python()
    if prove and interpreter is None:
        raise InputError("there is no llama.cpp to prove the file with", where="prove",
                         fix=f"pip install llama-cpp-python, or name a Python that has it: {proof.VARIABLE}=...")
    config, tokenizer = load.config_of(str(source)), Tokenizer.load(str(source))
    kind = AUTO.get(str(getattr(config, "dtype", "")).removeprefix("torch."), "f32") if kind == "auto" else kind
    described = families.describe(config, metadata.name_for(name, tokenizer), str(source))
    own, notes = metadata.describe(tokenizer, config.vocab_size, str(source))
    stored = weights.tensors(source, config, described, kind)
    with replacing(target) as partial:
        path = partial / f"{name}-{kind.upper()}.gguf"
        size = file.write(path, {**described.metadata, **own, **_general(kind)}, stored)
        errors = weights.compare(path, stored)
        log.info("GGUF verified: %d tensors read back, %s bytes; largest error by format: %s", len(stored),
                 f"{size:,}", ", ".join(f"{format_name} {error:.3g}" for format_name, error in errors.items()))
        facts = _facts(path, kind, errors, len(stored), [*described.notes, *notes])
        facts |= _proved(interpreter, path, source, tokenizer, kind, run or source) if interpreter else _unproved(prove)
        disk.replace_text(partial / check.NAME, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        modelfile.write(partial, path.name, tokenizer, described, own)
    for note in facts["notes"]:
        log.warning("GGUF: %s", note)
    return target


def _general(kind: str) -> families.Metadata:
    quantized = kind not in file.RELATIVE
    return {"general.file_type": ("UINT32", file.FILE_TYPES[kind])} | (
        {"general.quantization_version": ("UINT32", file.QUANTIZATION_VERSION)} if quantized else {})


def _facts(path: Path, kind: str, errors: dict[str, float], count: int, notes: Sequence[str]) -> dict[str, Any]:
    """What `check.json` says about the file itself."""
    return {"version": check.VERSION, "format": "gguf", "type": kind,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": integrity.sha256(path)}},
            "tensors": {"count": count, "largest_error": errors}, "notes": list(notes)}


def _unproved(prove: bool | None) -> dict[str, Any]:
    if prove is None:
        log.warning("the file is not compared with the model in llama.cpp, which is not installed: pip install "
                    "llama-cpp-python, or name a Python that has it with %s", proof.VARIABLE)
    return {"llama_cpp": None}


def _proved(interpreter: str, path: Path, source: Path, tokenizer: Tokenizer, kind: str, run: Path) -> dict[str, Any]:
    """Compare the file in llama.cpp with the model in transformers.

    Raises:
        InputError: They differ by more than the format explains.
    """
    from lit_llm.exports import difference

    model = load.load_causal_lm(str(source))
    scored = rows.of(run, tokenizer, check.vocabulary(model), check.positions(model))
    references = check.reference_sequences(tokenizer, check.vocabulary(model))
    scored, scores = difference.before(model, scored)
    before, nll = scores.nll, check.scores(model, references)
    result = proof.run(interpreter, path, tokenizer, references, scored, model)
    apart = proof.judge(result, kind, before, nll, str(path))
    log.info("GGUF proved by llama.cpp (llama-cpp-python %s): nll of %s %s tokens is %.5f in the model and %.5f in %s "
             "(bound %g); greedy text %s", result.version, f"{scored.tokens:,}", scored.kind, before, result.nll, kind,
             proof.BOUNDS[kind], "equal" if result.greedy else "differs")
    return {
        "measured": {"rows": scored.kind, "fingerprint": scored.fingerprint, "sequences": len(scored.rows),
                     "tokens": scored.tokens, "format": kind, "nll_before": before, "nll_after": result.nll,
                     "difference": apart, "bound": proof.BOUNDS[kind]},
        "llama_cpp": {"version": result.version, "conversation_equal": result.conversation, "text_equal": result.text,
                      "greedy_equal": result.greedy},
        "rows": [{"kind": row.kind, "ids": list(row.ids), "nll_before": one, "nll_after": other}
                 for row, one, other in zip(references, nll, result.references, strict=True)]}
