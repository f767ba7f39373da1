"""Models defined by their shape, with random weights created on the device, and packed sequences of random tokens.

For measurements on a GPU: no file is read, nothing is downloaded, and no weight passes through CPU memory.
"""

from contextlib import contextmanager

import numpy as np
import torch

from lit_llm.data.rows.loader import batch_of
from lit_llm.training.module import CausalLMModule
from lit_llm.training.rules import table

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
LLAMA3_8B = LLAMA | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
                     "rope_theta": 500000.0}
QWEN3_06B = QWEN3 | {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                     "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                     "max_position_embeddings": 40960, "rope_theta": 1000000.0}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@contextmanager
def adapters_on_random_weights():
    """Allow adapters on random weights, which runs refuse because they could not be loaded again."""
    before = table.RULES
    table.RULES = tuple(rule for rule in before if "`model.init`" not in (rule.first, rule.second))
    try:
        yield
    finally:
        table.RULES = before


class Shaped(CausalLMModule):
    """The module with random weights of a given shape, created on the device, instead of a base.

    Args:
        shape: `model_type` and keys of its config; null takes `base` as users do.
        options: Options of the module.
    """

    def __init__(self, shape=None, **options):
        super().__init__(**({"base": "drawn"} if shape else {}), **options)
        if shape:
            self.base, self.init = None, shape      # adapters too: a real base is no quicker

    def configure_model(self):
        with torch.device(self.trainer.strategy.root_device):
            super().configure_model()

    def _tokenizer_facts(self):
        return {}


def batches(vocabulary, *, rows, seq_len, count=1, mean=None, seed=0):
    """Batches of full packed sequences of documents with lognormal lengths around `mean`; all but first tokens are supervised."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        places = []
        for _ in range(rows):
            left, segments = seq_len, []
            while left:
                length = left if mean is None else min(left, max(2, int(draw.lognormal(np.log(mean), 0.6))))
                length = left if left - length < 2 else length
                segments.append((draw.integers(0, vocabulary, length), np.ones(length, dtype=bool)))
                left -= length
            places.append(segments)
        made.append(batch_of(places, seq_len=seq_len, pad_id=0, token_bytes=np.ones((2, vocabulary), np.int64)))
    return made


def reach(batch):
    """Twice the mean attended length: sum(length^2) / sum(length) of the documents."""
    lengths = batch["cu_seqlens"].diff().double()
    return float(lengths.square().sum() / lengths.sum())


class Rounds:
    """Repeated batches as a loader for Lightning."""

    def __init__(self, made, length):
        self.made, self.length = made, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return (self.made[at % len(self.made)] for at in range(self.length))
