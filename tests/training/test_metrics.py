"""If this breaks: the reported perplexity depends on the batch size, overflows, or counts too few tokens."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llm.training.metrics import Perplexity


def batches(count=5, vocabulary=23):
    """Logits in float64 and targets with holes, of uneven sizes."""
    torch.manual_seed(2)
    for size in range(1, count + 1):
        logits = 3 * torch.randn(size, 7 * size, vocabulary, dtype=torch.float64)
        target = torch.randint(vocabulary, (size, 7 * size))
        target[torch.rand(target.shape) < 0.3] = -100
        yield logits, target


def feed(metric, logits, target, bytes_per_token=3):
    on = target != -100
    nll = F.cross_entropy(logits[on], target[on], reduction="sum")
    metric.update(nll, int(on.sum()), bytes_per_token * int(on.sum()), (logits[on].argmax(-1) == target[on]).sum())


def test_against_torchmetrics(record_property):
    from torchmetrics.text import Perplexity as Reference

    metric, reference, right, seen = Perplexity(), Reference(ignore_index=-100).set_dtype(torch.float64), 0, 0
    for logits, target in batches():
        feed(metric, logits, target)
        reference.update(logits, target)
        right += int((logits.argmax(-1) == target).sum())
        seen += int((target != -100).sum())
    want = reference.compute().item()
    report = metric.report()
    record_property("relative", abs(report["perplexity"] / want - 1))
    assert report["perplexity"] == pytest.approx(want, rel=1e-9)
    assert metric.compute().item() == pytest.approx(want, rel=1e-9)
    assert report["nll"] == pytest.approx(math.log(want), rel=1e-9)
    assert report["bits_per_byte"] == pytest.approx(math.log2(want) / 3, rel=1e-9)
    assert report["token_accuracy"] == right / seen
    assert report["tokens"] == seen


def test_ranks_add_up():
    """States of several ranks, merged as torchmetrics merges them, are the state of one that saw everything."""
    whole, parts = Perplexity(), [Perplexity() for _ in range(3)]
    for place, (logits, target) in enumerate(batches()):
        feed(whole, logits, target)
        feed(parts[place % 3], logits, target)
    gathered = {name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in whole._defaults
                if name != "cells"}
    assert {name: reduction.__name__ for name, reduction in whole._reductions.items()} == (
        dict.fromkeys(gathered, "dim_zero_sum") | {"cells": "dim_zero_cat"})
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    for name, value in gathered.items():
        assert torch.allclose(getattr(parts[0], name), value)
    merged, want = parts[0].report(), whole.report()
    assert merged == pytest.approx(want, rel=1e-12)
    assert merged["tokens"] == want["tokens"]


def test_counts_stay_exact_beyond_float32():
    metric = Perplexity()
    for _ in range(3):
        metric.update(torch.tensor(2.0**24, dtype=torch.float32), 2**24 + 1, 2**25 + 1, torch.tensor(2**24 - 1))
    report = metric.report()
    assert report["tokens"] == 3 * (2**24 + 1)
    assert metric.bytes.item() == 3 * (2**25 + 1)
    assert metric.correct.item() == 3 * (2**24 - 1)
    assert report["nll"] == pytest.approx(2**24 / (2**24 + 1), rel=1e-15)


def test_a_small_loss_is_not_lost_beside_a_large_sum():
    metric = Perplexity()
    metric.update(torch.tensor(1e8), 1, 1, torch.tensor(0))
    for _ in range(100):
        metric.update(torch.tensor(0.25), 1, 1, torch.tensor(0))
    assert metric.nll.item() == 1e8 + 25


def test_nothing_supervised_is_not_a_number():
    report = Perplexity().report()
    assert report.pop("tokens") == 0
    assert all(math.isnan(value) for value in report.values())
    assert torch.isnan(Perplexity().compute())


def test_an_impossible_text_is_infinite_and_no_error():
    metric = Perplexity()
    metric.update(torch.tensor(1e6), 10, 10, torch.tensor(0))
    assert metric.report()["perplexity"] == math.inf
    metric.update(torch.tensor(math.nan), 10, 10, torch.tensor(0))
    assert math.isnan(metric.report()["nll"])


def test_reset_starts_anew():
    metric = Perplexity()
    first = next(iter(batches()))
    feed(metric, *first)
    want = metric.report()
    metric.reset()
    assert metric.report()["tokens"] == 0
    feed(metric, *first)
    assert metric.report() == want


def test_half_precision_training_does_not_change_the_sums():
    """`bf16-true` converts the whole module, before and after the first batch."""
    module = torch.nn.ModuleDict({"val": Perplexity()}).to(torch.bfloat16)
    metric = module["val"]
    metric.update(torch.tensor(1.0 + 2**-20, dtype=torch.float64), 1, 1, torch.tensor(1))
    assert metric.nll.dtype == torch.float64
    module.to(dtype=torch.bfloat16).half()
    assert metric.nll.item() == 1.0 + 2**-20
    metric.reset()
    assert metric.nll.dtype == torch.float64
