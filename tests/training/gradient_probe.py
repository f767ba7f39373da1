"""Train an epoch under a list of settings and write, for every optimizer step, the gradient and the documents of the step.

test_gradient.py imports it for one process and runs it for two: `python gradient_probe.py PLAN.json`; Lightning starts the
second process with the same command. The learning rate is so small that no float32 weight changes, so each step of the epoch
has the gradient of the same model.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import lightning as L
import torch

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer


class Watch(L.Callback):
    """Gradients right before the optimizer reads them, and the conversations of each micro-batch."""

    def __init__(self):
        self.steps, self.talks, self.documents = [], [], []

    def on_train_start(self, trainer, module):
        self.forwards = 0
        module.model.get_input_embeddings().register_forward_hook(self.count)
        if trainer.gradient_clip_val:
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.steps[-1].update(clipped=gradients(module)))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()
        bounds = batch["cu_seqlens"].tolist()
        for start, stop in pairwise(bounds):
            supervised = [place for place in range(start, stop) if labels[place] != -100]
            if supervised:                                 # padding and line ends do not matter
                self.talks.append(ids[start : supervised[-1] + 1])
                self.documents.append((ids[start:stop], labels[start:stop]))

    def count(self, *_):
        self.forwards += torch.is_grad_enabled()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append({"grads": gradients(module), "talks": self.talks, "forwards": self.forwards,
                           "documents": self.documents})
        self.talks, self.documents, self.forwards = [], [], 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch["last_in_step"]:
            logged = trainer.callback_metrics
            self.steps[-1] |= {"loss": float(logged["train/loss"]), "aux_loss": float(logged.get("train/aux_loss", 0.0))}


def gradients(module):
    return {name.removeprefix("model."): gradient(weight) for name, weight in module.named_parameters()
            if weight.requires_grad}


def gradient(weight):
    if hasattr(weight, "_hp_mapping") or hasattr(weight, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(weight).clone()
    return (weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad).clone()


def run(case, folder):
    """One epoch; the steps that this rank saw."""
    watch = Watch()
    lora = LoRA(r=2) if case.get("lora") else None
    module = CausalLMModule(base=case["base"], lr=1e-30, weight_decay=0.0, lora=lora, **case.get("model", {}))
    data = TextDataModule([Source(case["data"])], tokenizer=case["base"], seq_len=case["seq_len"],
                          batch_size=case["batch_size"], packing=case["packing"])
    trainer = Trainer(
        strategy=case.get("strategy", "auto"), accelerator="cpu", devices=case.get("devices", 1), max_epochs=1,
        precision=case.get("precision", "32-true"), accumulate_grad_batches=case["accumulate"], default_root_dir=str(folder),
        callbacks=[watch], gradient_clip_val=case.get("clip"), enable_checkpointing=False, enable_progress_bar=False,
        log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    return watch.steps, trainer.global_rank


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for case in plan:
        folder = Path(sys.argv[1]).parent / case["name"]
        steps, rank = run(case, folder)
        torch.save(steps, folder.with_suffix(f".rank{rank}"))


def on_two_ranks(cases, folder):
    """The steps of either rank for each case, computed under one command in `folder`."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, __file__, str(plan)], capture_output=True, text=True, timeout=400,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(torch.load(folder / f"{case['name']}.rank{rank}", weights_only=True) for rank in (0, 1)) for case in cases]


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
