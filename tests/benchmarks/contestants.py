"""Run one trainer in one process: `python contestants.py '{"who": ..., ...}'`, started by `train.py`.

All trainers get the same weights and the same token ids with the same labels. Each first takes one step on a few
conversations, so that losses can be compared. Then it trains for one turn whenever it reads a line, and pauses between two
steps, so that all processes can coexist and take turns of some seconds. Lines of its output that begin with MARK are
measurements.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", WANDB_MODE="disabled")
WARM_UP = 3                                             # steps that no time is taken of
MARK = "measured "


def say(**figures):
    print(MARK + json.dumps(figures), flush=True)


class Clock:
    """Seconds and real tokens of the steps of a turn; without seconds a single step is all."""

    def __init__(self, seconds):
        self.seconds, self.steps, self.tokens, self.began = seconds, 0, 0, 0.0

    def step(self, tokens):
        """Whether it was the last step. Waits for the next turn at the end of a turn and after the warm-up."""
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        took = time.perf_counter() - self.began
        if not self.seconds or self.steps < WARM_UP or (self.steps > WARM_UP and took < self.seconds):
            return not self.seconds
        say(tokens_per_s=self.tokens / took)
        if not sys.stdin.readline():
            return True
        self.tokens, self.began = 0, time.perf_counter()
        return False


# ---- Hugging Face's Trainer and TRL ----------------------------------------------------------------------------------

def hugging_face(spec, rows, seconds):
    """First loss of transformers' Trainer: sequences padded to 512, or to the longest of a batch of similar lengths."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    clock, losses = Clock(seconds), []
    width = None if spec.get("group_by_length") else spec["pad_to"]

    def collate(batch):
        longest = width or max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        for row in batch:
            row["attention_mask"] = [1] * len(row["input_ids"])
        collate.tokens += sum(len(row["input_ids"]) for row in batch)
        return {key: torch.tensor([list(row[key]) + [pad] * (longest - len(row[key])) for row in batch])
                for key, pad in fill.items()}

    class Watch(TrainerCallback):
        before = 0

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = clock.step(collate.tokens - self.before)
            self.before = collate.tokens

        def on_log(self, args, state, control, logs=None, **_):
            losses.append(logs.get("loss", losses[-1] if losses else 0))

    collate.tokens = 0
    more = {"train_sampling_strategy": "group_by_length"} if spec.get("group_by_length") else {}
    args = TrainingArguments(
        output_dir=spec["scratch"], per_device_train_batch_size=min(spec["batch"], len(rows)), bf16=spec["bf16"],
        learning_rate=spec["lr"], num_train_epochs=1000, logging_steps=1 if seconds == 0 else 10, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_num_workers=0, remove_unused_columns=False,
        max_steps=1 if seconds == 0 else -1, seed=0, lr_scheduler_type="constant", **more)
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collate,
            callbacks=[Watch()]).train()
    return losses[0]


def trl(spec, rows, seconds):
    """First loss of TRL's SFTTrainer with best-fit packing, which isolates documents by a mask under sdpa."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, losses = Clock(seconds), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = clock.step(seen.pop())

        def on_log(self, args, state, control, logs=None, **_):
            losses.append(logs.get("loss", losses[-1] if losses else 0))

    args = SFTConfig(
        output_dir=spec["scratch"], per_device_train_batch_size=spec.get("gate_rows", 4) if seconds == 0 else spec["rows"], bf16=spec["bf16"],
        packing=True, packing_strategy="bfd", max_length=spec["seq_len"], gradient_checkpointing=False,
        learning_rate=spec["lr"], num_train_epochs=1000, logging_steps=1 if seconds == 0 else 10, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, max_steps=1 if seconds == 0 else -1, seed=0,
        lr_scheduler_type="constant")
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
                         processing_class=AutoTokenizer.from_pretrained(spec["model"]))
    seen, collate = [], trainer.data_collator

    def counted(batch):
        seen.insert(0, sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    trainer.data_collator = counted
    trainer.train()
    return losses[0]


# ---- lit_llm ------------------------------------------------------------------------------------------------------------

def lit_llm_packing(spec, rows, seconds):
    """First loss of `fit` as the command line runs it: Lightning, callbacks, loader, optimizer."""
    import lightning as L

    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source
    from lit_llm.system.library_warnings import listen
    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.trainer import Trainer

    listen()
    clock, losses = Clock(seconds), []

    class Watch(L.Callback):
        tokens = 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.tokens += batch["num_tokens"]
            if batch["last_in_step"]:
                if seconds == 0:
                    losses.append(float(trainer.callback_metrics["train/loss"]))
                trainer.should_stop = clock.step(self.tokens)
                self.tokens = 0

    file = spec["gate"] if seconds == 0 else spec["data"]
    data = TextDataModule([Source(file, **spec.get("source", {}))], tokenizer=spec["model"], seq_len=spec["seq_len"],
                          batch_size=spec.get("gate_rows", 4) if seconds == 0 else spec["rows"], packing=spec.get("packing", "best_fit"),
                          cache_dir=spec["scratch"] + "/cache")
    trainer = Trainer(strategy=spec["strategy"], precision="bf16-mixed" if spec["bf16"] else "32-true", accelerator="cpu",
                      devices=1, max_epochs=1000, default_root_dir=spec["scratch"] + "/run", callbacks=[Watch()],
                      enable_checkpointing=False, gradient_clip_val=1.0, log_every_n_steps=1 if seconds == 0 else 10)
    trainer.fit(CausalLMModule(base=spec["model"], lr=spec["lr"], schedule="constant", warmup=0), datamodule=data)
    return losses[0] if losses else 0.0


def main():
    spec = json.loads(sys.argv[1])
    run = {"hf": hugging_face, "trl": trl, "ours": lit_llm_packing}[spec["who"]]
    rows = [json.loads(line) for line in Path(spec["rows_file"]).read_text().splitlines()] if spec["who"] != "ours" else []
    say(first_loss=run(spec, rows[:spec["gate_size"]], 0))
    run(spec, rows, spec["seconds"])
    say(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
