"""Show each warning of a library once, in one line with the library's name, on the first process.

It captures the `warnings` module and the loggers of libraries. Only the texts in `KNOWN` are silenced, each with the
reason why it does not apply here. Deprecation warnings keep Python's default (shown with -W or PYTHONWARNINGS).
"""

import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any, TextIO

from lit_llm.system.redaction import RedactingFilter, redact_text

BEGINNING = "warning from"                           # start of each line
MOST_CHARACTERS = 600                               # limit on shown characters of a warning
# Loggers with level INFO, whose messages below WARNING are not shown.
CHATTY = ("lightning", "lightning.pytorch", "lightning.fabric", "DeepSpeed", "httpx")
# Loggers of this project and the server's, and wandb, which prints its own messages.
PASSED_ON = ("lit_llm", "serve", "uvicorn", "litserve", "wandb")
WRAPPERS = (__name__, "warnings", "_py_warnings", "typing_extensions")  # modules between the caller and this listener
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
          "printed if torch finds no GPU; the run prints its device itself"),
    Known("transformers", r"`is_gradient_checkpointing` is deprecated",
          "PEFT's own use of transformers, for its authors to change"),
    Known("transformers", r"We strongly recommend passing in an `attention_mask` since your input_ids may be padded",
          "attention keeps documents and padding apart by their bounds in the row, and padding is not supervised"),
    Known("peft", r"fan_in_fan_out is set to False but the target module is `Conv1D`\. Setting fan_in_fan_out to True",
          "PEFT then does what GPT-2's layers need"),
    Known("peft", r"Position ids are not supported for parameter efficient tuning\. Ignoring position ids",
          "prompts behind virtual tokens are answered one at a time and without padding, where PEFT's own are right"),
    Known("bitsandbytes", r"Failed to load CPU gemm_4bit_forward from kernels-community",
          "an optional package that downloads kernels; without it bitsandbytes computes with its own"),
    Known("peft", r"Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
          "an adapter on the embedding is saved with the embedding, as PEFT does by default"),
)


class Listener:
    """Replaces `warnings.showwarning` and precedes the handlers of libraries' loggers."""

    def __init__(self) -> None:
        self._shown: set[tuple[str, str]] = set()

    def hear(self, library: str, text: str) -> None:
        """Show a warning, unless it is known or was shown before."""
        text = " ".join(text.split())
        if (library, text) in self._shown or is_known(library, text):
            return
        self._shown.add((library, text))
        if _is_first_process():
            text = redact_text(text)
            shown = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
            print(f"{BEGINNING} {library}: {shown}", file=sys.stderr, flush=True)

    def showwarning(self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
                    file: TextIO | None = None, line: str | None = None) -> None:
        """As `warnings.showwarning`."""
        compiled = "(Triggered internally at " in str(message)      # torch's C++ code warns in its caller's name
        self.hear("torch" if compiled else _origin(filename), str(message).partition("(Triggered internally")[0])


def is_known(library: str, text: str) -> bool:
    """Whether a warning is one of `KNOWN`."""
    return any(entry.library == library and re.match(entry.text, text) for entry in KNOWN)


def listen() -> None:
    """Capture the warnings of libraries in this process from now on.

    Handlers for each library's logger would have to wait for its import, when libraries install their own handlers; so
    the one method that all records pass through is replaced.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # otherwise tokenizers warns after each fork
    listener = Listener()
    warnings.showwarning = listener.showwarning
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(present, RedactingFilter) for present in handler.filters):
            handler.addFilter(RedactingFilter())
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
    """Raise the level of libraries' loggers to WARNING; needed again after an import that sets a level."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _origin(filename: str) -> str:
    """The library that called `warn`, regardless of its stacklevel."""
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
