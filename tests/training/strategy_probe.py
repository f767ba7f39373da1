"""Trains a tiny model under a list of settings with real processes, and writes what every rank saw.

Run by test_strategy.py: `python strategy_probe.py PLAN.json`. Lightning starts the other ranks with the same command.
PLAN is {"model", "data", "out", "devices", "cases": [{"name", "stage", "lora", "accumulate", ...}]}.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch.nn.functional import cross_entropy

from lit_llm.training.strategy import ZeroStrategy, gathered_trainable_state

CLIP = 0.05


class ProbeModule(L.LightningModule):
    def __init__(self, model, case):
        super().__init__()
        self.folder, self.case, self.model = model, case, None
        self.seen = {"nll": [], "norm": [], "val": [], "dtypes": []}

    def configure_model(self):
        if self.model is not None:
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(11)
        if self.case.get("scratch"):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder), dtype=torch.float32)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if self.case["lora"]:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(7)
            self.model = get_peft_model(self.model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
        self.model.train()

    def nll(self, batch):
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")

    def training_step(self, batch, index):
        assert type(batch["num_supervised_in_step"]) is int
        assert type(batch["last_in_step"]) is bool
        assert batch["input_ids"].dtype == torch.int64
        nll = self.nll(batch)
        self.seen["nll"].append(nll.item())
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["num_supervised_in_step"]
        return nll * scale

    def on_before_zero_grad(self, optimizer):
        norm = getattr(self.trainer.strategy, "gradient_norm", None)
        if self.trainer.global_step > len(self.seen["norm"]):
            self.seen["norm"].append(norm)

    def validation_step(self, batch, index):
        self.seen["val"].append(self.nll(batch).item())

    def configure_optimizers(self):
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def micro_batches(steps, accumulate, rank, world):
    """This rank's share of each step's rows; the short last step has fewer micro-batches."""
    out = []
    for step in steps:
        inputs, labels = torch.tensor(step["input_ids"]), torch.tensor(step["labels"])
        each = len(steps[0]["input_ids"]) // (accumulate * world)
        count = len(inputs) // (each * world)
        for turn in range(count):
            rows = slice((turn * world + rank) * each, (turn * world + rank + 1) * each)
            out.append(
                {
                    "input_ids": inputs[rows],
                    "labels": labels[rows],
                    "num_supervised_in_step": int((labels[:, 1:] != -100).sum()),
                    "last_in_step": turn == count - 1,
                }
            )
    return out


class Loader:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Share(L.LightningDataModule):
    def __init__(self, steps, accumulate):
        super().__init__()
        self.steps, self.accumulate = steps, accumulate

    def loader(self, steps, accumulate):
        return Loader(micro_batches(steps, accumulate, self.trainer.global_rank, self.trainer.world_size))

    def train_dataloader(self):
        return self.loader(self.steps, self.accumulate)

    def val_dataloader(self):
        return self.loader(self.steps[:1], 1)


def trainer_for(case, devices, out, **more):
    strategy = case.get("strategy") or ZeroStrategy(stage=case["stage"], **case.get("options", {}))
    return L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=case.get("precision", "32-true"),
        accumulate_grad_batches=case["accumulate"], gradient_clip_val=CLIP, max_epochs=case.get("epochs", 1),
        default_root_dir=out, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=1, **more,
    )  # fmt: skip


class SaveAt(L.Callback):
    def __init__(self, step, folder):
        self.step, self.folder = step, folder

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step and not Path(self.folder).exists():
            trainer.save_checkpoint(self.folder)


def run(case, plan, steps, out):
    module = ProbeModule(plan["model"], case)
    saved = str(out / "saved")
    callbacks = [SaveAt(case["save_at"], saved)] if "save_at" in case else []
    trainer = trainer_for(case, plan["devices"], str(out), callbacks=callbacks)
    trainer.fit(module, Share(steps, case["accumulate"]), ckpt_path=case.get("resume"))
    result = dict(module.seen, global_step=trainer.global_step, rank=trainer.global_rank)
    if case.get("engine", True) and "strategy" not in case:
        result["engine_steps"] = trainer.strategy.deepspeed_engine.global_steps
        result["norm"].append(trainer.strategy.gradient_norm)
    result["dtypes"] = sorted({str(weight.dtype) for weight in module.parameters()})
    state = gathered_trainable_state(module)
    assert (state is None) == (trainer.global_rank > 0)
    if state is not None:
        torch.save(state, out / "state.pt")
    if case.get("validate_after"):
        module.seen["val"] = []
        trainer.validate(module, Share(steps, case["accumulate"]), verbose=False)
        result["val_after"] = module.seen["val"]
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    disable_possible_user_warnings()
    torch.set_num_threads(1)
    steps = json.loads(Path(plan["data"]).read_text())
    for case in plan["cases"]:
        out = Path(plan["out"]) / case["name"]
        out.mkdir(parents=True, exist_ok=True)
        run(case, plan, steps, out)


if __name__ == "__main__":
    main()
