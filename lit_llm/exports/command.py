"""Export a finished run: merged weights, quantized weights or its adapter, with tokenizer, template and model card.

It reads only files of the run, so it works after any strategy and on another machine. Each folder has a `check.json`:
how far the written model, read back, is from the checkpoint's model. A folder that differs too much is not written.
"""

import logging
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_llm import disk, names
from lit_llm.errors import InputError
from lit_llm.exports import contents
from lit_llm.exports.card import card
from lit_llm.exports.contents import Dtype, Quantized
from lit_llm.exports.trained import Checkpoint, find, load
from lit_llm.report import writing
from lit_llm.system.lock import HeldError, Lock
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def export(run: str, checkpoint: str = "best", out: str | None = None, dtype: Dtype = "auto",
           base: str | None = None, quantize: Quantized | None = None, adapter: bool = False) -> Path:
    """Write a run's model as a folder that transformers loads without changes.

    Args:
        run: Run folder, e.g. runs/sft.
        checkpoint: `best` by the monitored metric (the newest if none was measured), `last`, or a folder name such as
            step_40.
        out: Output folder; null is `export` in the run folder, or `export-int8`, `export-nf4`, `export-adapter`. An
            existing model folder is replaced.
        dtype: Dtype of the written weights; `auto` keeps that of the base for adapters, else that of training.
        base: Folder of the adapters' base model, if it was moved; a different model is refused.
        quantize: Store the weights of linear layers except the head in 8 bits (int8) or 4 bits (nf4) of bitsandbytes,
            which loads them again; null stores all of them in `dtype`.
        adapter: Write the adapter alone, in PEFT's format, and not the merged model.

    Returns:
        The folder. Its `check.json` is verified whenever the folder is loaded.

    Raises:
        InputError: No such run or checkpoint, the reloaded folder differs from the trained model, the folder cannot be
            written, or another process is writing it; an earlier export is kept.
    """
    if adapter and (quantize or dtype != "auto"):
        raise InputError("an adapter is written in the dtype of its training", where="adapter",
                         fix="leave --quantize and --dtype out")
    source = find(Path(run), checkpoint, base)
    kind = "-adapter" if adapter else f"-{quantize}" if quantize else ""
    target = _target(Path(run), out, source.base) if out else Path(run) / f"export{kind}"
    lock = Lock()
    with suppress(OSError):                         # errors of writing are reported below, with the free space
        target.parent.mkdir(parents=True, exist_ok=True)
        refusal = lock.take(target.with_name(f".{target.name}.lock"), "out", target)
        if isinstance(refusal, HeldError):
            raise refusal
    try:
        return _exported(source, target, dtype, quantize, adapter)
    finally:
        lock.release()


def _exported(source: Checkpoint, target: Path, dtype: Dtype, quantize: Quantized | None, adapter: bool) -> Path:
    """Load a checkpoint, write it, read it back, compare, and replace an earlier export."""
    from lit_llm.exports import difference

    trained = load(source)
    before = difference.scores(trained.model, trained.rows)
    with _replacing(target) as partial:
        if adapter:
            contents.write_adapter(source, trained, partial)
        else:
            contents.write_model(trained, partial, dtype, quantize)
        trained.tokenizer.save(partial)
        _write_card(source, partial)
        written = contents.read_adapter(source, partial) if adapter else contents.read_model(partial)
        kind = quantize or str(written.dtype).removeprefix("torch.")
        after = difference.scores(written, trained.rows)
        facts = difference.compared(trained.rows, before, after, kind, partial)
        check.check_export(partial, Tokenizer.load(str(partial)), trained.references, trained.nll, written,
                           quantize=trained.quantize, weights=quantize, more=facts)
    log.info("%s", difference.line(facts))
    return target


@contextmanager
def _replacing(target: Path) -> Generator[Path, None, None]:
    """A new folder that replaces `target` at the end; after an error nothing of it is left.

    Raises:
        InputError: It cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        disk.replace_folder(partial, target)
    except BaseException as error:
        free = disk.free(partial.parent)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or disk.is_full(error):
            raise InputError(f"the export could not be written: {disk.reason(error)}; {free}", where=str(target),
                             fix=f"{disk.remedy(error, target.parent)}, or name another folder: --out") from error
        raise


def _write_card(source: Checkpoint, folder: Path) -> None:
    """Write the model card and the picture that it shows."""
    drawn = writing.picture_of(source.run)
    if drawn:
        (folder / writing.PICTURE).write_text(drawn, encoding="utf-8")
    text = card(source.run, source.facts, source.folder.name, picture=writing.PICTURE if drawn else "")
    (folder / "README.md").write_text(text, encoding="utf-8")


def _target(run: Path, out: str, base: str | None) -> Path:
    """The user's output folder: new, empty, or an earlier export, but neither a run nor the base."""
    target = Path(out).expanduser().resolve()
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    exported = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    needed = [run.resolve(), *run.resolve().parents]
    if base is not None:
        needed.append(names.path_of(base).resolve())
    if target in needed or not (empty or (exported and not (target / "checkpoints").exists())):
        raise InputError(f"{target} is not an export and would be replaced", where="out",
                         fix="choose a new folder")
    return target
