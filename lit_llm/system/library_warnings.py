"""Show each warning of a library once, as one line with the library's name, on the first process.

Both ways in which libraries warn are heard: the `warnings` module and their loggers. Silent are only the texts of
`KNOWN`, each with the reason why it does not apply here. Deprecations keep Python's own default (they are shown to
developers, who ask for them with -W or PYTHONWARNINGS).
"""

import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any, TextIO

from lit_llm.system.redaction import RedactingFilter, redact_text

BEGINNING = "warning from"                           # of each line
MOST_CHARACTERS = 600                               # of a warning that is shown
# Loggers whose own level is INFO: what they say below WARNING is progress of no interest here.
CHATTY = ("lightning", "lightning.pytorch", "lightning.fabric", "DeepSpeed", "httpx")
# Our own loggers, a server's record of what happens, and wandb, which shows what it logs by itself.
PASSED_ON = ("lit_llm", "serve", "uvicorn", "litserve", "wandb")
WRAPPERS = (__name__, "warnings", "_py_warnings", "typing_extensions")     # between who warns and who hears
PACKAGES = {"lightning_utilities": "lightning", "pytorch_lightning": "lightning", "lightning_fabric": "lightning"}


@dataclass(frozen=True, slots=True)
class Known:
    """A warning that is not shown.

    Args:
        library: The package that warns.
        text: A regular expression that matches the beginning of the warning.
        why: Why it does not apply here.
    """

    library: str
    text: str
    why: str


KNOWN: tuple[Known, ...] = (
    Known("lightning", r"LightningCLI's args parameter is intended to run from within Python",
          "the command line hands its own words on, in the order that Lightning wants"),
    Known("lightning", r"Since DeepSpeed handles gradient clipping internally",
          "the engine clips by trainer.gradient_clip_val, which is what the module's hook leaves to it"),
    Known("lightning", r"It is recommended to use `self\.log\('(val|test)/[^']*', \.\.\., sync_dist=True\)`",
          "the perplexity metric has summed over all processes before its figures are logged"),
    Known("lightning", r"Total length of `list` across ranks is zero",
          "a run without validation or test data has an empty list in place of a loader"),
    Known("lightning", r"The number of training batches \(\d+\) is smaller than the logging interval",
          "a run of fewer steps than that logs each of them, and every run logs its last step"),
    Known("lightning", r"When saving the DeepSpeed Stage 3 checkpoint, each worker will save a shard",
          "the trained weights are gathered and saved in one file beside the shards"),
    Known("lightning", r"`isinstance\(treespec, LeafSpec\)` is deprecated",
          "Lightning's own use of torch, for its authors to change"),
    Known("torch", r"`torch\.distributed\.\w+_tensor` is deprecated",
          "DeepSpeed's own use of torch, for its authors to change"),
    Known("deepspeed", r"Setting accelerator to CPU\.",
          "said where torch finds no GPU; the run itself says on what it computes"),
    Known("transformers", r"`is_gradient_checkpointing` is deprecated",
          "PEFT's own use of transformers, for its authors to change"),
    Known("transformers", r"We strongly recommend passing in an `attention_mask` since your input_ids may be padded",
          "attention keeps documents and padding apart by their bounds in the row, and padding is not supervised"),
    Known("peft", r"fan_in_fan_out is set to False but the target module is `Conv1D`\. Setting fan_in_fan_out to True",
          "PEFT then does what GPT-2's layers need"),
    Known("bitsandbytes", r"Failed to load CPU gemm_4bit_forward from kernels-community",
          "an optional package that downloads kernels; without it bitsandbytes computes with its own"),
    Known("peft", r"Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
          "an adapter on the embedding is saved with the embedding, as PEFT does by default"),
)


class Listener:
    """Takes the place of `warnings.showwarning` and stands before the handlers of libraries' loggers."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def hear(self, library: str, text: str) -> None:
        """Show a warning, unless it is known or was shown before."""
        text = " ".join(text.split())
        if (library, text) in self._said or is_known(library, text):
            return
        self._said.add((library, text))
        if _is_first_process():
            text = redact_text(text)
            shown = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
            print(f"{BEGINNING} {library}: {shown}", file=sys.stderr, flush=True)

    def showwarning(self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
                    file: TextIO | None = None, line: str | None = None) -> None:
        """As `warnings.showwarning`."""
        compiled = "(Triggered internally at " in str(message)      # torch's C++ warns in its caller's name
        self.hear("torch" if compiled else _origin(filename), str(message).partition("(Triggered internally")[0])


def is_known(library: str, text: str) -> bool:
    """Whether a warning is one of `KNOWN`."""
    return any(known.library == library and re.match(known.text, text) for known in KNOWN)


def listen() -> None:
    """From now on hear what libraries warn of, in this process.

    A handler for each library's logger would have to wait for the library to be imported, and libraries install
    handlers of their own then; so the one method that all records pass is replaced.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # else tokenizers warns after each fork
    listener = Listener()
    warnings.showwarning = listener.showwarning
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for each in logging.getLogger().handlers:
        if not any(isinstance(present, RedactingFilter) for present in each.filters):
            each.addFilter(RedactingFilter())
    logging.getLogger("lit_llm").setLevel(logging.INFO)
    lower_loggers()
    handle = getattr(logging.Logger.callHandlers, "original", logging.Logger.callHandlers)

    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        library = _package(record.name)
        if record.levelno == logging.WARNING and library not in PASSED_ON:
            listener.hear(library, record.getMessage())
        else:
            handle(logger, record)

    call_handlers.original = handle                 # type: ignore[attr-defined]    # a second call replaces the first
    logging.Logger.callHandlers = call_handlers     # type: ignore[method-assign, assignment]


def lower_loggers() -> None:
    """Loggers of libraries tell no progress; again after an import that sets its own level."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _origin(filename: str) -> str:
    """The library that warned: where `warn` was called, whomever its stacklevel blames."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in WRAPPERS:
        frame = frame.f_back
    name = _package(str(frame.f_globals.get("__name__", ""))) if frame is not None else ""
    return name or os.path.basename(filename)


def _package(name: str) -> str:
    top = name.partition(".")[0]
    return PACKAGES.get(top, top.lower() if top == "DeepSpeed" else top)


def _is_first_process() -> bool:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
