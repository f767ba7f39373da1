"""Print the README's hardware table: the results of `plan` for two common shapes. `python tests/benchmarks/hardware.py`.

No weights are needed, because `plan` reads only the config. Each row takes about half a minute.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                   "tie_word_embeddings": True, "max_position_embeddings": 40960},
    "Llama-3-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                   "max_position_embeddings": 8192}}
SELECTIVE = ["--model.gradient_checkpointing", "selective"]
ROWS = [                                            # model, how it is trained, device, sequences at once, options
    ("Qwen3-0.6B", "LoRA", "rtx4090", 4, []),
    ("Qwen3-0.6B", "all weights, selective recomputation", "rtx4090", 4, ["--model.lora", "null", *SELECTIVE]),
    ("Llama-3-8B", "QLoRA, selective recomputation", "rtx4090", 1, ["--config", "configs/with/qlora.yaml", *SELECTIVE]),
    ("Llama-3-8B", "LoRA", "h100", 4, []),
    ("Llama-3-8B", "all weights, ZeRO-3 on 8 devices", "h100", 1,
     ["--model.lora", "null", "--trainer.devices", "8", "--config", "configs/with/zero3.yaml"])]
COMMON = ["--config", "configs/qwen3_lora.yaml", "--data.sources", "[{path: sample:conversations.jsonl}]",
          "--data.val_fraction", "0", "--data.tokenizer", "sample:tokenizer", "--model.lora.train_tokens", "null"]


def main() -> None:
    """Print the rows of the table."""
    for model, how, device, batch, options in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({**SHAPES[model], "torch_dtype": "bfloat16"}))
            command = [sys.executable, "-m", "lit_llm", "plan", *COMMON, "--model.base", folder, "--device", device,
                       "--data.batch_size", str(batch), *options]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (needed, has) = re.findall(r"^(?:fits|does not fit:) +([\d.]+ GiB) into ([\d.]+ GiB)", printed, re.MULTILINE)[0]
        print(f"| {model} | {how} | {device} | {batch} | {needed} of {has} |", flush=True)


if __name__ == "__main__":
    main()
