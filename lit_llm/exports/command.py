"""Export a finished run: merged weights, quantized weights or its adapter, with tokenizer, template and model card.

It reads only files of the run, so it works after any strategy and on another machine. Each folder has a `check.json`:
how far the written model, read back, is from the checkpoint's model. A folder that differs too much is not written.
"""

import logging
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.exports import contents, hub_upload, metadata
from lit_llm.exports.card import Form, card
from lit_llm.exports.contents import Dtype, Quantized
from lit_llm.exports.gguf.file import Type
from lit_llm.exports.trained import Checkpoint, find, load
from lit_llm.report import writing
from lit_llm.system.lock import HeldError, Lock
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Format = Literal["transformers", "gguf"]


def export(run: str, checkpoint: str = "best", out: str | None = None, dtype: Dtype = "auto",
           base: str | None = None, quantize: Quantized | None = None, adapter: bool = False,
           format: Format = "transformers", gguf_type: Type = "auto", prove: bool | None = None,
           license: str | None = None, push: str | None = None, public: bool = False) -> Path:
    """Write a run's model as a folder that transformers loads without changes, or as a GGUF file for llama.cpp.

    Args:
        run: Run folder, e.g. runs/sft. With `format: gguf` a model folder, such as an export, is accepted as well.
        checkpoint: `best` by the monitored metric (the newest if none was measured), `last`, or a folder name such as
            step_40.
        out: Output folder; null is `export` in the run folder, or `export-int8`, `export-nf4`, `export-adapter`,
            `export-gguf-q8_0`. An existing model folder is replaced.
        dtype: Dtype of the written weights; `auto` keeps that of the base for adapters, else that of training.
        base: Folder of the adapters' base model, if it was moved; a different model is refused.
        quantize: Store the weights of linear layers except the head in 8 bits (int8) or 4 bits (nf4) of bitsandbytes,
            which loads them again; null stores all of them in `dtype`.
        adapter: Write the adapter alone, in PEFT's format, and not the merged model.
        format: `transformers`, or `gguf`: a file for llama.cpp and Ollama, with a Modelfile. For Llama, Mistral, Qwen2,
            Qwen3, Gemma 3 (text), Phi-3 and SmolLM3; needs the package `gguf`.
        gguf_type: Format of the matrices in a GGUF file; `auto` is f32, f16 or bf16, as the weights are. q8_0 has 8.5
            bits per weight, q5_1 6, q5_0 5.5, q4_1 5 and q4_0 4.5; the output layer then has 8.5.
        prove: Whether llama.cpp computes with the GGUF file, which is refused if its NLL, its tokens of a conversation
            or (in f32) its greedy text differ from the model's; null does so where llama.cpp is installed
            (llama-cpp-python, or a Python with it in the environment variable LIT_LLM_LLAMA_CPP).
        license: License of the model for its card, as the hub spells it, e.g. apache-2.0; null takes that of the base's
            card.
        push: Repository of the Hugging Face hub, `owner/name`, to which the folder is uploaded once it is checked. The
            token is that of `hf auth login` or of the environment variable HF_TOKEN. The repository is private. This
            was tested with a stand-in of the hub's interface, not with the hub itself.
        public: Make a new repository public.

    Returns:
        The folder. Its `check.json` is verified whenever transformers' folder is loaded.

    Raises:
        InputError: No such run or checkpoint, the reloaded folder differs from the trained model, the folder cannot be
            written, or another process is writing it; an earlier export is kept.
    """
    if adapter and (quantize or dtype != "auto"):
        raise InputError("an adapter is written in the dtype of its training", where="adapter",
                         fix="leave --quantize and --dtype out")
    _check_format(format, gguf_type, prove, adapter or quantize is not None, license)
    if public and not push:
        raise InputError("only a pushed model can be public", where="public", fix="--push owner/name")
    if push:
        hub_upload.check(push)                      # before minutes of merging
    if format == "gguf" and (names.path_of(run) / "config.json").is_file():
        unused = checkpoint != "best" or dtype != "auto" or base is not None
        return _converted(run, out, gguf_type, prove, push, public, unused=unused)
    source = find(Path(run), checkpoint, base)
    if push and adapter and not metadata.base_id(source.base):
        raise InputError(f"the base of this adapter is a local folder, {source.base}, so nobody else could load it",
                         where="push", fix="leave --adapter out, which uploads the merged model")
    kind = "-adapter" if adapter else f"-{quantize}" if quantize else ""
    kind = kind if format == "transformers" else f"-gguf-{gguf_type}"
    target = _target(Path(run), out, source.base) if out else Path(run) / f"export{kind}"
    with _locked(target):
        if format == "transformers":
            _exported(source, target, dtype, quantize, Form(push or ".", adapter, quantize, license, source.base))
        else:
            _as_gguf(source, target, dtype, gguf_type, prove)
        if push:
            hub_upload.upload(target, push, public=public)
    return target


def _as_gguf(source: Checkpoint, target: Path, dtype: Dtype, gguf_type: Type, prove: bool | None) -> None:
    """Write a GGUF file of a checkpoint, by way of a folder of transformers."""
    from lit_llm.exports.gguf import folder as gguf

    merged = target.with_name(target.name + ".merged")
    try:
        _exported(source, merged, dtype, None, Form(base=source.base))
        gguf.write(merged, target, source.run.resolve().name, gguf_type, prove, run=source.run)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _check_format(format: Format, gguf_type: str, prove: bool | None, others: bool, license: str | None) -> None:
    """Refuse options of the other format."""
    metadata.check_license(license)
    if format == "gguf" and license is not None:
        raise InputError("it is an entry of a model card, which a GGUF folder does not have", where="license",
                         fix="leave it out")
    if format == "transformers" and (gguf_type != "auto" or prove is not None):
        raise InputError("it is an option of GGUF files", where="gguf_type" if gguf_type != "auto" else "prove",
                         fix="add --format gguf")
    if format == "gguf" and others:
        raise InputError("a GGUF file has its own formats of few bits, and no adapter alone", where="format",
                         fix="use --gguf_type q8_0 or q4_0, without --quantize and --adapter")


def _converted(folder: str, out: str | None, gguf_type: str, prove: bool | None, push: str | None, public: bool, *,
               unused: bool) -> Path:
    """Write a GGUF file of a model folder."""
    if unused:
        raise InputError(f"{folder} is a model folder, so --checkpoint, --dtype and --base have no effect",
                         where="run", fix="leave them out")
    from lit_llm.exports.gguf import folder as gguf

    source = names.path_of(folder).resolve()
    target = _target(source, out, None) if out else source.with_name(f"{source.name}-gguf-{gguf_type}")
    with _locked(target):
        gguf.write(source, target, source.name, gguf_type, prove)
        if push:
            hub_upload.upload(target, push, public=public)
    return target


@contextmanager
def _locked(target: Path) -> Generator[None, None, None]:
    """Hold the folder, so that one process writes it at a time.

    Raises:
        HeldError: Another process writes it.
    """
    lock = Lock()
    with suppress(OSError):                         # errors of writing are reported below, with the free space
        target.parent.mkdir(parents=True, exist_ok=True)
        refusal = lock.take(target.with_name(f".{target.name}.lock"), "out", target)
        if isinstance(refusal, HeldError):
            raise refusal
    try:
        yield
    finally:
        lock.release()


def _exported(source: Checkpoint, target: Path, dtype: Dtype, quantize: Quantized | None, form: Form) -> None:
    """Load a checkpoint, write it, read it back, compare, and replace an earlier export."""
    from lit_llm.exports import difference

    trained = load(source)
    rows, before = difference.before(trained.model, trained.rows)
    with contents.replacing(target) as partial:
        if form.adapter:
            contents.write_adapter(source, trained, partial)
        else:
            contents.write_model(trained, partial, dtype, quantize)
        trained.tokenizer.save(partial)
        written = contents.read_adapter(source, partial) if form.adapter else contents.read_model(partial)
        kind = quantize or str(written.dtype).removeprefix("torch.")
        after = difference.scores(written, rows)
        facts = difference.compared(rows, before, after, kind, partial)
        check.check_export(partial, Tokenizer.load(str(partial)), trained.references, trained.nll, written,
                           quantize=trained.quantize, weights=quantize, more=facts)
        _write_card(source, partial, replace(form, check=facts))
    log.info("%s", difference.line(facts))


def _write_card(source: Checkpoint, folder: Path, form: Form) -> None:
    """Write the model card and the picture that it shows."""
    name, content = writing.picture_of(source.run) or ("", b"")
    if name:
        (folder / name).write_bytes(content)
    form = replace(form, picture=name)
    text = card(source.run, source.facts, source.folder.name, form)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _target(run: Path, out: str, base: str | None) -> Path:
    """The user's output folder: new, empty, or an earlier export, but neither a run nor the base."""
    target = Path(out).expanduser().resolve()
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    exported = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    needed = [run.resolve(), *run.resolve().parents]
    if base is not None:
        needed.append(names.path_of(base).resolve())
    exported = exported or any(target.glob("*.gguf"))
    if target in needed or not (empty or (exported and not (target / "checkpoints").exists())):
        raise InputError(f"{target} is not an export and would be replaced", where="out",
                         fix="choose a new folder")
    return target
