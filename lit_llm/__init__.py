"""Train, evaluate and serve language models on PyTorch Lightning: data, pretraining, SFT, evaluation, chat and API.

Public names are imported at first use, so that `import lit_llm` is fast. `dir(lit_llm)` lists them. A config may name
the callbacks, strategies and data classes among them as `lit_llm.NAME`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source
    from lit_llm.data.rows.loader import Batch
    from lit_llm.errors import InputError
    from lit_llm.exports.command import export
    from lit_llm.inference.completion import Completion, TextEngine
    from lit_llm.inference.sampling import SamplingParams
    from lit_llm.models.adapters.peft_method import LoRA
    from lit_llm.text.conversation import Conversation, Document, Message
    from lit_llm.text.tokenizer import Tokenizer, TokenSequence
    from lit_llm.training.forward import Sums
    from lit_llm.training.metrics import Perplexity
    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.parallel.fsdp import Fsdp2Strategy
    from lit_llm.training.parallel.zero import ZeroStrategy
    from lit_llm.training.run.checkpoint import StepCheckpoint
    from lit_llm.training.run.finite import FiniteGuard
    from lit_llm.training.run.progress import Progress
    from lit_llm.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Batch", "CausalLMModule", "Completion", "Conversation", "Document", "FiniteGuard", "Fsdp2Strategy",
           "InputError", "LoRA", "Message", "Perplexity", "Progress", "SamplingParams", "Source", "StepCheckpoint",
           "Sums", "TextDataModule", "TextEngine", "TokenSequence", "Tokenizer", "Trainer", "ZeroStrategy", "export"]

_HOMES = {
    "text.conversation": ("Conversation", "Document", "Message"), "errors": ("InputError",),
    "text.tokenizer": ("Tokenizer", "TokenSequence"), "models.adapters.peft_method": ("LoRA",),
    "data.datamodule": ("TextDataModule",), "data.records.sources": ("Source",), "data.rows.loader": ("Batch",),
    "training.forward": ("Sums",), "training.metrics": ("Perplexity",), "training.module": ("CausalLMModule",),
    "training.trainer": ("Trainer",), "training.parallel.zero": ("ZeroStrategy",),
    "training.parallel.fsdp": ("Fsdp2Strategy",), "training.run.checkpoint": ("StepCheckpoint",),
    "training.run.finite": ("FiniteGuard",), "training.run.progress": ("Progress",),
    "inference.completion": ("Completion", "TextEngine"), "inference.sampling": ("SamplingParams",),
    "exports.command": ("export",),
}


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lit_llm.{home}"), name)
    raise AttributeError(f"module 'lit_llm' has no attribute '{name}'")
