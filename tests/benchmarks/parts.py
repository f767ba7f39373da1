"""Measure one part of training in a process of its own: `python parts.py NAME` prints the result as JSON.

`head` and `full_logits`: a step of a small model with a vocabulary of 131,072, with this project's loss and with the logits
of all tokens. `lightning` and `loop`: the cost of a micro-batch beyond the model's own work on the same packed sequences.
"""

import itertools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")

import torch

from lit_llm.models import anatomy
from lit_llm.models import load as models
from lit_llm.training.loss import nll_sum

WORDS, TOKENS = 131072, 2048


class Peak:
    """Peak memory of this process within the block, beyond its memory before, in MB."""

    def __enter__(self):
        self.before = self.most = self.now()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, self.now())

    def __exit__(self, *_):
        self.over.set()
        self.watch.join()
        self.mb = (self.most - self.before) / 2**20

    @staticmethod
    def now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def llama(words, **more):
    torch.manual_seed(0)
    return models.init_causal_lm({"model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
                                  "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
                                  "max_position_embeddings": TOKENS, "tie_word_embeddings": True} | more, vocab_size=words)


def batch(words, supervised=0.8):
    torch.manual_seed(1)
    ids = torch.randint(0, words, (1, TOKENS))
    labels = torch.where(torch.rand(1, TOKENS) < supervised, ids, -100)
    return ids, labels


def step(our_loss):
    """A whole step: forward, backward, AdamW; two of them, since the first makes the optimizer's states."""
    inner, (ids, labels) = llama(WORDS), batch(WORDS)
    inner.config.use_cache = False
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-5, fused=True)
    count = (labels[:, 1:] != -100).sum()
    for _ in range(2):
        with Peak() as peak:
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                if our_loss:
                    hidden = anatomy.backbone(inner)(input_ids=ids).last_hidden_state[0]
                    loss = nll_sum(hidden, labels[0], anatomy.head(inner)).total / count
                else:
                    loss = inner(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            took = time.perf_counter() - began
    return {"loss": float(loss), "seconds": took, "mb": peak.mb}


def overhead(lightning):
    """Milliseconds of a micro-batch of a very small model, on the same packed sequences in a plain loop."""
    import lightning as L

    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source
    from lit_llm.system.library_warnings import listen
    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.trainer import Trainer

    listen()
    torch.set_num_threads(1)
    steps, times = 600, []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        data = TextDataModule([Source("sample:conversations.jsonl")], tokenizer="sample:base", seq_len=32, batch_size=1,
                              cache_dir=folder)
        module = CausalLMModule(base="sample:base", lr=1e-5)
        trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps if lightning else 1, gradient_clip_val=1.0,
                          default_root_dir=folder + "/run", callbacks=[Watch()])
        trainer.fit(module, datamodule=data)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        for batch in () if lightning else [batch for batch, _ in zip(trainer.train_dataloader, range(steps), strict=False)]:
            (module._nll(batch).total / batch["num_supervised"]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
    took = sorted(after - before for before, after in itertools.pairwise(times[50:]))
    return {"ms": 1000 * took[len(took) // 2], "mean_ms": 1000 * sum(took) / len(took), "steps": len(took)}


PARTS = {"head": lambda: step(True), "full_logits": lambda: step(False), "lightning": lambda: overhead(True),
         "loop": lambda: overhead(False)}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]]()))
