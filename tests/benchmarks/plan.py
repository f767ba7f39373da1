"""Estimated and measured peak of memory of real training steps: `python tests/benchmarks/plan.py`.

Each case is the real command in a process of its own, `plan --probe true`; measured is what torch's
allocator held at most in a step.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192}
CASES = {
    "llama 6M": LLAMA | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8},
    "llama 30M": LLAMA | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10},
    "qwen3 6M": LLAMA | {"model_type": "qwen3", "head_dim": 32, "hidden_size": 256, "intermediate_size": 688,
                         "num_hidden_layers": 8},
    "gpt2 7M": {"model_type": "gpt2", "n_embd": 256, "n_head": 8, "n_layer": 8, "n_positions": 2048,
                "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


def measure(folder, init, **keys):
    config = {"model": {"init": init, "lr": 1e-4} | keys,
              "data": {"sources": [{"path": "sample:documents.jsonl"}], "tokenizer": "sample:base", "packing": "concat",
                       "seq_len": 2048, "batch_size": 1},
              "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_steps": 9,
                          "default_root_dir": "run"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["plan", "--config", "run.yaml", "--probe", "true", "--json", "plan.json"]
    subprocess.run([sys.executable, "-m", "lit_llm", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads((folder / "plan.json").read_text())


def main():
    print(f"{'model':<12}{'recompute':<12}{'estimated MiB':>14}{'measured MiB':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, init in CASES.items():
            for way in (False, "selective", True) if name == "llama 6M" else (False,):
                plan = measure(Path(folder), init, gradient_checkpointing=way)
                need = plan["memory"]["0"]
                estimated, measured = sum(need.values()) / 2**20, plan["probe"]["peak_bytes"] / 2**20
                print(f"{name:<12}{way!s:<12}{estimated:>14.1f}{measured:>14.1f}{estimated / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
