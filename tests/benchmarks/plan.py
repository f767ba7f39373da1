"""Compare planned and measured peak memory of real runs: `python tests/benchmarks/plan.py [WORD]` (Linux, CPU).

With a word, only cases that contain it run, such as "60M" or "nf4". Each case is `plan` and then `fit` with its export, each
in a process of its own; measured is the peak resident memory of one process (VmHWM). Adapters are trained on chats with a
base of random weights, everything else on plain text.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192}
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8}
INITS = {
    "llama 6M": LLAMA | SMALL,
    "llama 30M": LLAMA | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10},
    "llama 60M": LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14},
    "llama 100M": LLAMA | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16000},
    "qwen3 6M": LLAMA | SMALL | {"model_type": "qwen3", "head_dim": 32},
    "gemma2 8M": LLAMA | SMALL | {"model_type": "gemma2", "intermediate_size": 1024, "head_dim": 32,
                                  "attn_logit_softcapping": None},
    "gpt2 7M": {"model_type": "gpt2", "n_embd": 256, "n_head": 8, "n_layer": 8, "n_positions": 2048},
}
MODEL = ("gradient_checkpointing", "lora", "optimizer", "quantize")
CASES = [
    ("llama 6M", {}), ("llama 6M", {"seq_len": 2048, "batch_size": 2}), ("llama 6M", {"precision": "bf16-mixed"}),
    ("llama 6M", {"seq_len": 2048, "gradient_checkpointing": True}), ("qwen3 6M", {}), ("gemma2 8M", {}),
    ("gpt2 7M", {}), ("llama 30M", {"gradient_checkpointing": "selective"}), ("llama 100M", {}),
    ("llama 100M", {"seq_len": 2048, "gradient_checkpointing": True}), ("llama 6M", {"strategy": "deepspeed_stage_1"}),
    ("llama 6M", {"strategy": "deepspeed_stage_2", "devices": 2, "precision": "bf16-mixed"}),
    ("llama 6M", {"strategy": "deepspeed_stage_3", "devices": 2}),
    ("llama 60M", {"lora": {"r": 8}, "batch_size": 4}),
    ("llama 60M", {"lora": {"r": 16}, "seq_len": 2048, "batch_size": 2, "precision": "bf16-true"}),
    ("llama 60M", {"lora": {"r": 8}, "batch_size": 2, "gradient_checkpointing": "selective", "precision": "bf16-mixed"}),
    ("llama 60M", {"lora": {"r": 8}, "strategy": "deepspeed_stage_2", "devices": 2, "precision": "bf16-mixed"}),
    ("llama 60M", {"lora": {"r": 8}, "quantize": "nf4", "precision": "bf16-mixed"}),
    ("llama 60M", {"lora": {"r": 8}, "quantize": "nf4", "seq_len": 2048, "batch_size": 2}),
    ("llama 100M", {"lora": {"r": 8}, "quantize": "nf4", "precision": "bf16-mixed", "gradient_checkpointing": True}),
    ("llama 30M", {"strategy": "fsdp2", "devices": 2}), ("llama 30M", {"optimizer": "muon", "batch_size": 2}),
]


def config(init, keys):
    """Each key where it belongs."""
    data = {"sources": [{"path": "sample:documents.jsonl"}], "tokenizer": "sample:base", "packing": "concat",
            "seq_len": 1024, "batch_size": 1}
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_steps": 3, "default_root_dir": "run"}
    model = {"init": init, "lr": 1e-4}
    for key, value in keys.items():
        (data if key in data else model if key in MODEL else trainer)[key] = value
    if "lora" in keys:
        del model["init"]
        model["base"] = base(init)
        data |= {"sources": [{"path": "sample:conversations.jsonl"}], "packing": "best_fit"}
    return {"model": model, "data": data, "trainer": trainer}


def base(init):
    """A folder with a model of random weights."""
    from lit_llm.models.load import init_causal_lm, save_causal_lm
    from lit_llm.names import resolve
    from lit_llm.text.tokenizer import Tokenizer

    folder, tokenizer = tempfile.mkdtemp(prefix="base-"), Tokenizer.load(resolve("sample:base"))
    save_causal_lm(init_causal_lm(init, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id), folder,
                   stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


def family(pid):
    """A process and all below it."""
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            pids += family(int(child))
    return pids


def peak(folder, *words):
    """The most of one process."""
    child = subprocess.Popen([sys.executable, "-m", "lit_llm", *words, "--config", "run.yaml"], cwd=folder,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    most = 0
    while child.poll() is None:
        try:
            for pid in family(child.pid):
                status = Path(f"/proc/{pid}/status").read_text()
                most = max(most, int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM" in status else 0)
        except OSError:                             # it has just ended
            pass
        time.sleep(0.02)
    assert child.returncode == 0, words
    return most / 1024


def main():
    print(f"{'model':<12}{'':<70}{'planned MiB':>12}{'measured MiB':>14}{'ratio':>8}")
    for name, keys in [case for case in CASES if all(word in str(case) for word in sys.argv[1:])]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "run.yaml").write_text(yaml.safe_dump(config(INITS[name], keys)))
            measured = peak(folder, "fit")
            peak(folder, "plan", "--json", "plan.json")
            plan = json.loads((Path(folder) / "plan.json").read_text())
            planned = sum(plan["memory"][str(plan["setting"]["stage"])].values()) / 2**20
            settings = " ".join(f"{key}={value}" for key, value in keys.items())
            print(f"{name:<12}{settings:<70}{planned:>12.0f}{measured:>14.0f}{planned / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
