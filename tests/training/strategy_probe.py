"""Train a tiny model under a list of settings with real processes, and write the results of every rank.

Run by test_strategy.py: `python strategy_probe.py PLAN.json`; Lightning starts the other ranks with the same command.
PLAN is {"model", "steps", "out", "devices", "cases": [{"name", "strategy", "lora", "accumulate", ...}]}, a step is
{"input_ids", "labels"} of all its sequences, which micro-batches and ranks share.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch

from lit_llm.kernels import cross_entropy as fused
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.training import loss
from lit_llm.training.module import CausalLMModule
from lit_llm.training.parallel.shards import gathered_trainable_state
from lit_llm.training.trainer import Trainer

CLIP, LR, DECAY, RANK = 0.5, 1e-2, 0.1, 4
WHOLE = loss.CHUNK_BYTES, fused.SLICE_BYTES["cpu"]


class Module(CausalLMModule):
    def _adapted(self, inner):
        torch.manual_seed(7)                            # LoRA's A is then the oracle's
        return super()._adapted(inner)

    def _choose_tokens(self, inner):
        return self.tokens


class Rows:
    """A loader that saves its position, also when a step is divided differently."""

    def __init__(self, batches, accumulate):
        self.batches, self.accumulate, self.at = batches, accumulate, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for at in range(self.at, len(self)):
            self.at = (at + 1) % len(self)              # before the yield: Lightning never comes back after the last
            yield self.batches[at]

    def state_dict(self):
        return {"at": self.at, "accumulate": self.accumulate}

    def load_state_dict(self, state):
        self.at = state["at"] // state["accumulate"] * self.accumulate


class Data(L.LightningDataModule):
    """The sequences of each step, distributed over micro-batches and ranks; a short step has half the micro-batches."""

    def __init__(self, steps, accumulate):
        super().__init__()
        self.steps, self.accumulate = steps, accumulate
        self.seq_len = len(steps[0]["input_ids"][0])
        self.tokenizer = SimpleNamespace(vocab_size=128, bos_id=1, eos_id=2, pad_id=None, save=lambda folder: None)

    def train_dataloader(self):
        return Rows([batch for step in self.steps for batch in self.shares(step)], self.accumulate)

    def val_dataloader(self):
        return Rows(self.shares(self.steps[0]), self.accumulate)

    def shares(self, step):
        whole = len(step["input_ids"]) == len(self.steps[0]["input_ids"])
        turns = self.accumulate if whole else max(1, self.accumulate // 2)
        inputs, labels = torch.tensor(step["input_ids"]), torch.tensor(step["labels"])
        per_rank = len(inputs) // (turns * self.trainer.world_size)
        supervised = int((labels != -100).sum())
        mine = range(self.trainer.global_rank, turns * self.trainer.world_size, self.trainer.world_size)
        return [self.batch(inputs[at * per_rank :][:per_rank], labels[at * per_rank :][:per_rank], supervised, at == mine[-1])
                for at in mine]

    def batch(self, inputs, labels, supervised, last):
        rows, length = inputs.shape
        count = int((labels != -100).sum())
        return {"input_ids": inputs, "labels": labels, "position_ids": torch.arange(length).repeat(rows, 1),
                "cu_seqlens": torch.arange(rows + 1, dtype=torch.int32) * length, "max_seqlen": length,
                "num_supervised": count, "num_supervised_in_step": supervised, "last_in_step": last,
                "num_bytes": count, "num_tokens": inputs.numel()}


class Watch(L.Callback):
    def __init__(self, out):
        self.out, self.losses, self.norms, self.notes = out, [], [], {}

    def on_train_start(self, trainer, module):
        state = gathered_trainable_state(module)        # a collective: every rank calls it
        assert (state is None) == (trainer.global_rank > 0)
        if state is not None:
            torch.save(state, self.out / "start.pt")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert type(batch["num_supervised_in_step"]) is int
        assert type(batch["last_in_step"]) is bool

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch["last_in_step"]:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(None if module.gradient_norm is None else float(module.gradient_norm))

    def on_train_end(self, trainer, module):
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        self.notes = {
            "losses": self.losses, "norms": self.norms, "global_step": trainer.global_step,
            "engine_steps": getattr(engine, "global_steps", trainer.global_step),
            "dtypes": sorted({str(weight.dtype) for weight in module.parameters()}),
            "buffers": sorted({str(buffer.dtype) for name, buffer in module.named_buffers() if "inv_freq" in name}),
        }
        state = gathered_trainable_state(module)
        if state is not None:
            torch.save(state, self.out / "end.pt")


def run(case, plan, out):
    watch = Watch(out)
    lora = LoRA(r=RANK, alpha=4 * RANK, target_modules=case.get("targets", "all-linear")) if case["lora"] else None
    loss.CHUNK_BYTES, fused.SLICE_BYTES["cpu"] = (1, 1) if case.get("slices") else WHOLE      # 16 sequences each
    source = {"init": case["init"]} if "init" in case else {"base": plan["model"]}
    module = Module(**source, lora=lora, lr=LR, weight_decay=DECAY, warmup=0, schedule="constant", optimizer=case.get("optimizer", "adamw"),
                    gradient_checkpointing=case.get("checkpointing", False), cross_entropy=case.get("cross_entropy", "fused"))
    module.tokens = case.get("tokens", [])
    trainer = Trainer(
        accelerator="cpu", devices=plan["devices"], strategy=case["strategy"], precision=case.get("precision", "32-true"),
        accumulate_grad_batches=case["accumulate"], gradient_clip_val=CLIP, max_epochs=1,
        max_steps=case.get("max_steps", -1), default_root_dir=str(out), callbacks=[watch], log_every_n_steps=1,
        enable_checkpointing=case.get("saves", False), enable_progress_bar=False)
    data = Data(plan["steps"], case["accumulate"])
    trainer.fit(module, datamodule=data, ckpt_path=case.get("resume"))
    watch.notes["val"] = float(trainer.callback_metrics["val/nll"])
    if case.get("validates"):
        watch.notes["val_after"] = trainer.validate(module, datamodule=data)[0]["val/nll"]
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(watch.notes))


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for case in plan["cases"]:
        out = Path(plan["out"]) / case["name"]
        out.mkdir(parents=True, exist_ok=True)
        run(case, plan, out)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
