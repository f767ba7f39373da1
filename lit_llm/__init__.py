"""A large language model's whole life on PyTorch Lightning: data, pretraining, SFT, evaluation, chat and API.

Public names are imported when they are first used, so that `import lit_llm` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_llm.conversation import Conversation, Document, Message
    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.sources import Source
    from lit_llm.errors import InputError
    from lit_llm.inference.completion import TextEngine
    from lit_llm.inference.export import export
    from lit_llm.inference.sampling import SamplingParams
    from lit_llm.peft_method import LoRA
    from lit_llm.tokenizer import Tokenizer, TokenSequence
    from lit_llm.training.metrics import Perplexity
    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["CausalLMModule", "Conversation", "Document", "InputError", "LoRA", "Message", "Perplexity",
           "SamplingParams", "Source", "TextDataModule", "TextEngine", "TokenSequence", "Tokenizer", "Trainer",
           "export"]

_HOMES = {
    "conversation": ("Conversation", "Document", "Message"), "errors": ("InputError",), "peft_method": ("LoRA",),
    "tokenizer": ("Tokenizer", "TokenSequence"), "data.datamodule": ("TextDataModule",), "data.sources": ("Source",),
    "training.metrics": ("Perplexity",), "training.module": ("CausalLMModule",), "training.trainer": ("Trainer",),
    "inference.completion": ("TextEngine",), "inference.sampling": ("SamplingParams",), "inference.export": ("export",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lit_llm.{home}"), name)
    raise AttributeError(f"module 'lit_llm' has no attribute '{name}'")
