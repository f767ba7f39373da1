"""If this breaks: the commands of the toy do not work with a real checkpoint, real Alpaca files in two languages, or GPT-2."""

import json
from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.slow
def test_real_base_and_real_alpaca(stories, shared_data, lit_llm, tmp_path):
    """`fit --config configs/sft.yaml --model.base stories260K` on Alpaca in two languages trains and exports."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = [str(shared_data / "sft/llamafactory" / f"alpaca_{language}_demo.json") for language in ("en", "zh")]
    sources = json.dumps([{"path": path} for path in files])
    words = [
        "--config",
        CONFIGS / "sft.yaml",
        "--model.base",
        stories,
        "--data.sources",
        sources,
        "--data.val_sources",
        "null",
        "--data.val_fraction",
        "0.02",
        "--data.seq_len",
        "512",
        "--data.batch_size",
        "4",
    ]
    done = lit_llm("fit", *words, "--trainer.max_steps", "8", "--trainer.log_every_n_steps", "1")
    assert done.code == 0, done.err[-2000:]
    assert "999 records" in done.err
    run = tmp_path / "runs" / "sft"
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["val/perplexity"] < figures["before/val/perplexity"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "export"),
        AutoTokenizer.from_pretrained(run / "export"),
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == [2]
    done = lit_llm(
        "validate", *words, "--model.base", run / "export", "--model.lora", "null", "--data.tokenizer", run / "export"
    )
    assert done.code == 0, done.err[-2000:]
    nll = float(next(line.split()[1] for line in done.out.splitlines() if line.startswith("val/nll")))
    assert nll == pytest.approx(figures["val/nll"], rel=1e-5)


@pytest.mark.slow
def test_the_chapters_quick_start_made_correct(tiny_model, shared_data, lit_llm, tmp_path):
    """configs/tutorial.yaml with a GPT-2 from a folder and WikiText from a file: LoRA on c_attn and c_proj, in bf16."""
    text = (shared_data / "pretrain/wikitext-2/wiki.valid.tokens").read_text(encoding="utf-8")[:60_000]
    (tmp_path / "wiki.txt").write_text(text, encoding="utf-8")
    source = json.dumps([{"path": "wiki.txt", "document": "line"}])
    done = lit_llm(
        "fit",
        "--config",
        CONFIGS / "tutorial.yaml",
        "--model.base",
        tiny_model("gpt2"),
        "--data.sources",
        source,
        "--data.val_sources",
        source,
        "--data.seq_len",
        "128",
        "--trainer.max_steps",
        "4",
        "--trainer.accelerator",
        "cpu",
    )
    assert done.code == 0, done.err[-2000:]
    adapter = json.loads(
        next((tmp_path / "runs/tutorial/checkpoints").glob("step_*/adapter/adapter_config.json")).read_text()
    )
    assert set(adapter["target_modules"]) == {"c_attn", "c_proj"}
    assert torch.isfinite(torch.tensor(json.loads((tmp_path / "runs/tutorial/metrics.json").read_text())["val/nll"]))


@pytest.mark.slow
def test_pretraining_from_random_weights(shared_data, lit_llm, tmp_path):
    """configs/pretrain.yaml on a real book with the sample tokenizer: another text, the same way."""
    book = (shared_data / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8")[:120_000]
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    done = lit_llm(
        "fit",
        "--config",
        CONFIGS / "pretrain.yaml",
        "--data.sources",
        "[{path: book.txt, document: paragraph}]",
        "--data.val_sources",
        "null",
        "--data.val_fraction",
        "0.1",
        "--data.seq_len",
        "128",
        "--trainer.max_steps",
        "6",
    )
    assert done.code == 0, done.err[-2000:]
    figures = json.loads((tmp_path / "runs/pretrain/metrics.json").read_text())
    assert figures["val/perplexity"] < figures["before/val/perplexity"]
