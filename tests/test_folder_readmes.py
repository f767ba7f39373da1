"""If this breaks, the README of a package shows code that does not run, or a result that it does not give."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lit_llm"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (PACKAGE / name / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_a_record_on_its_way_to_a_batch(tmp_path):
    (code,), (wanted,) = blocks("data", "python"), blocks("data", "text")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(PACKAGE.parent)},
                          capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == wanted


def test_another_term_in_the_loss(tmp_path, tiny_model):
    """The penalty is part of the training loss, divided as the rest, and no part of what validation measures."""
    import torch

    from lit_llm import LoRA, Source, TextDataModule, Trainer

    names = {}
    exec(blocks("training", "python")[0], names)
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"prompt": "say one", "completion": "one"}\n{"prompt": "say two", "completion": "two two two"}\n')
    losses = []
    for kind in (names["CausalLMModule"], names["WithPenalty"]):
        torch.manual_seed(0)
        module = kind(base=tiny_model("llama"), lora=LoRA(r=2), lr=1e-30, weight_decay=0.0)
        data = TextDataModule([Source(str(rows))], val_sources=[Source(str(rows))], tokenizer=tiny_model("llama"),
                              seq_len=64, batch_size=1, packing="none")
        trainer = Trainer(accelerator="cpu", max_steps=1, accumulate_grad_batches=2, enable_progress_bar=False,
                          default_root_dir=str(tmp_path / kind.__name__))
        trainer.fit(module, datamodule=data)
        figures = trainer.callback_metrics
        losses.append((float(figures["train/loss"]), float(figures["val/nll"])))
    penalty = sum(float(weight.float().square().sum()) for weight in module.parameters() if weight.requires_grad)
    assert penalty > 0
    assert losses[1][0] - losses[0][0] == pytest.approx(1e-4 * penalty, rel=1e-3)
    assert losses[1][1] == losses[0][1]
