"""If this breaks: the training benchmark fails on a GPU after a minute, or reports a wrong share of the peak rate.

The code that runs on a GPU is executed with tiny shapes on the CPU; FLOPs are compared with torch's own counter.
"""

import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.models.adapters.adapter import wrap_peft
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.models.load import init_causal_lm
from lit_llm.training.planning import estimate
from tests.benchmarks import cross_entropy, on_gpu, train
from tests.random_models import LLAMA, SMALL


def test_the_benchmark_runs_as_it_does_on_a_gpu(monkeypatch, capsys):
    """All weights, and adapters; both lose at first what guessing loses."""
    for benchmark in (on_gpu, cross_entropy):
        monkeypatch.setattr(benchmark, "alone", lambda call, *arguments: call(*arguments))       # in this process, to be quick
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cuda", "--smoke", "--seconds", "0.01", "--only", "0.6B"])
    train.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    whole = {row[0]: row for row in rows if row[0].startswith("Qwen3")}
    assert len(whole) == 5
    assert [name for name, row in whole.items() if "skipped" not in row[1]] == ["Qwen3-0.6B, all weights", "Qwen3-0.6B, LoRA"]
    for name in ("Qwen3-0.6B, all weights", "Qwen3-0.6B, LoRA"):
        assert float(whole[name][-1]) == pytest.approx(math.log(SMALL["vocab_size"]), abs=0.15), whole[name]
    alone = {row[0]: row for row in rows if row[0].startswith("loss")}
    assert [name for name, row in alone.items() if "skipped" not in row[1]] == [
        "loss, Qwen3-0.6B, head learns, fused", "loss, Qwen3-0.6B, frozen head, fused"]
    assert all(float(figure) < 1e-2 for figure in alone["loss, Qwen3-0.6B, head learns, fused"][3:])


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_flops_are_those_that_torch_counts(lora):
    """Its counter takes attention as whole squares; of frozen weights the first layer's three need no gradient at all."""
    shape, tokens = LLAMA | SMALL | {"num_hidden_layers": 6}, 96
    counts, _ = on_gpu.needs(shape, {"lora": {"r": 4}} if lora else {}, "32-true", 1, tokens)
    inner = init_causal_lm(shape, attention="eager")
    model = wrap_peft(inner, LoRA(r=4).as_peft()) if lora else inner
    ids = torch.randint(SMALL["vocab_size"], (1, tokens))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    estimated = tokens * (2 * estimate.flops_per_token(counts, tokens) - estimate.flops_per_token(counts, 0.0))
    width, key = SMALL["hidden_size"], SMALL["hidden_size"] // 2
    spared = 2 * tokens * (width * width + 2 * width * key) if lora else 0
    spared += 2 * tokens * 3 * 4 * width if lora else 0         # nor do the inputs of their adapters
    assert counter.get_total_flops() == pytest.approx(estimated - spared, rel=1e-4)         # some releases rotate by a product
