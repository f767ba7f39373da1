"""If this breaks: the reported perplexity depends on batch size, packing, windows or the number of processes, or is wrong.

Oracle: plain transformers in float64, one document (or window) at a time, on a published text with a real trained
model. stories260K also has a known result on these five stories: 1,830 tokens, NLL 1.337, perplexity 3.81, where
the line end after each separator is part of the text.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer

TOLERANCE = 1e-6
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def text(shared_data) -> Path:
    return shared_data / "tokenizers" / "cs336" / "tinystories_sample.txt"


@pytest.fixture(scope="module")
def oracle(stories, text):
    """Figures of the text for a window of so many tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64, attn_implementation="eager")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    documents = [part for part in text.read_text(encoding="utf-8").split(SEPARATOR) if part.strip()]
    assert len(documents) == 5

    @torch.no_grad()
    def figures(seq_len):
        nll, tokens, correct = 0.0, 0, 0
        for document in documents:
            ids = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == document.strip()
            for start in range(0, len(ids) - 1, seq_len - 1):       # overlap by one: each token is predicted once
                window = torch.tensor(ids[start : start + seq_len])
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
                nll += cross_entropy(logits, window[1:], reduction="sum").item()
                correct += int((logits.argmax(-1) == window[1:]).sum())
                tokens += len(window) - 1
        size = sum(len(document.encode()) for document in documents)
        return {"val/nll": nll / tokens, "val/perplexity": math.exp(nll / tokens), "val/tokens": tokens,
                "val/bits_per_byte": nll / math.log(2) / size, "val/token_accuracy": correct / tokens}

    return {seq_len: figures(seq_len) for seq_len in (512, 128)}


def check(measured, wanted):
    error = abs(measured["val/nll"] / wanted["val/nll"] - 1)
    print(f"nll {measured['val/nll']:.9f}, relative error {error:.2e}")
    assert error < TOLERANCE
    assert measured["val/tokens"] == wanted["val/tokens"]
    assert measured["val/token_accuracy"] == pytest.approx(wanted["val/token_accuracy"], abs=1e-12)
    assert measured["val/perplexity"] == pytest.approx(wanted["val/perplexity"], rel=2 * TOLERANCE)
    assert measured["val/bits_per_byte"] == pytest.approx(wanted["val/bits_per_byte"], rel=TOLERANCE)


def validate(stories, text, folder, lora=None, **keys):
    module = CausalLMModule(base=stories, lora=lora)
    sources = [Source(str(text))]
    data = TextDataModule(sources, val_sources=sources, tokenizer=stories, **keys)
    trainer = Trainer(accelerator="cpu", default_root_dir=str(folder), enable_progress_bar=False)
    (measured,) = trainer.validate(module, datamodule=data)
    return measured


def test_the_known_figure(stories, text, tmp_path):
    measured = validate(stories, text, tmp_path / "run", seq_len=512)
    assert measured["val/tokens"] == 1830
    assert measured["val/nll"] == pytest.approx(1.3370013577, rel=TOLERANCE)
    assert measured["val/perplexity"] == pytest.approx(3.81, abs=5e-3)


@pytest.mark.parametrize("seq_len", [512, 128])
@pytest.mark.parametrize("packing", ["none", "best_fit", "concat"])
def test_validate_agrees_with_transformers(packing, seq_len, oracle, stories, text, tmp_path):
    for batch_size in (1, 3, 8):
        measured = validate(stories, text, tmp_path, seq_len=seq_len, batch_size=batch_size, packing=packing)
        check(measured, oracle[seq_len])


def test_adapters_that_learned_nothing_change_nothing(oracle, stories, text, tmp_path):
    """LoRA starts at the base, and its dropout is off in evaluation."""
    check(validate(stories, text, tmp_path, lora=LoRA(r=4, dropout=0.5), seq_len=512), oracle[512])


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1"])
def test_two_processes(strategy, oracle, stories, text, tmp_path, lit_llm):
    """The command with two processes: one of them has a batch more to do, and no token counts twice."""
    source = f"[{{path: {text}}}]"
    done = lit_llm("validate", "--model.base", stories, "--data.sources", source, "--data.val_sources", source,
                   "--data.seq_len", 512, "--data.batch_size", 2, "--trainer.accelerator", "cpu",
                   "--trainer.devices", 2, "--trainer.strategy", strategy,
                   "--trainer.default_root_dir", "run", ranks=2)
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    check(measured, oracle[512])
    assert f"{measured['val/nll']:.9g}" in done.out
