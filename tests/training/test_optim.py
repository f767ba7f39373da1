"""If this breaks: norms are decayed to nothing, the rate never warms up, or the run ends at another rate than asked."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lit_llm.adapter import LoRA, wrap_peft
from lit_llm.errors import InputError
from lit_llm.model import init_causal_lm, load_causal_lm
from lit_llm.training.optim import adamw, parameter_groups, scheduler, shape, warmup_steps
from tests.conftest import SHAPES


@pytest.mark.parametrize("kind", SHAPES)
def test_matrices_decay_and_vectors_do_not(kind):
    model = init_causal_lm(SHAPES[kind], vocab_size=64)
    groups = parameter_groups(model.named_parameters(), 0.1)
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for layer in model.modules():
        for name, weight in layer.named_parameters(recurse=False):
            matrix = isinstance(layer, nn.Linear | nn.Embedding) or type(layer).__name__ == "Conv1D"
            assert decay[id(weight)] == (0.1 if matrix and name == "weight" else 0.0)


def test_frozen_weights_are_left_out(tiny_model):
    model = wrap_peft(load_causal_lm(tiny_model("llama")), LoRA(r=2).as_peft())
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert sum(len(group["params"]) for group in groups) == 28
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter is trainable"):
        adamw(model.named_parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)


def test_a_shard_is_decayed_by_its_whole_shape():
    """ZeRO-3 leaves a flat or empty tensor in place of a matrix."""
    weight = nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size([4, 4])
    (group,) = parameter_groups([("weight", weight)], 0.1)
    assert group["weight_decay"] == 0.1


def test_steps_are_those_of_adamw_written_out():
    """Against the formulas of arXiv:1711.05101, algorithm 2."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    want, first, second = weight.detach().clone(), 0.0, 0.0
    optimizer = adamw([("w", weight)], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 6):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        want = want - 0.01 * (update + 0.1 * want)
    assert (weight - want).abs().max() < 1e-9


def test_warmup_is_a_share_or_a_number_of_steps():
    assert [warmup_steps(warmup, 200) for warmup in (0, 0.03, 0.5, 1, 30, 500)] == [0, 6, 100, 1, 30, 500]


def rates(schedule, *, warmup, total, floor=0.1, peak=2.0):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=peak)
    course = scheduler(optimizer, schedule, warmup=warmup, total=total, floor=floor)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        course.step()
    return seen


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_rises_to_the_peak_and_never_climbs_again(schedule):
    seen = rates(schedule, warmup=10, total=100)
    assert seen[0] == pytest.approx(2.0 / 11)
    assert all(b - a == pytest.approx(2.0 / 11) for a, b in pairwise(seen[:11]))
    assert seen[10] == 2.0 == max(seen)
    assert all(b <= a for a, b in pairwise(seen[10:]))
    assert seen[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2, abs=0.1)
    assert shape(schedule, warmup=10, total=100, floor=0.1)(100) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert shape(schedule, warmup=10, total=100, floor=0.1)(10_000) >= 0.1 - 1e-12


def test_cosine_against_torch():
    peak, floor, total = 2.0, 0.1, 90
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=peak * floor)
    for ours in rates("cosine", warmup=0, total=total, floor=floor, peak=peak):
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_wsd_is_flat_until_the_last_fifth():
    seen = rates("wsd", warmup=0, total=100)
    assert seen[:81] == pytest.approx([2.0] * 81)
    assert seen[90] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))


@pytest.mark.parametrize("warmup", [0, 0.5, 3, 50])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_short_runs_and_long_warmups_stay_in_bounds(schedule, warmup):
    for total in (1, 2, 5):
        assert all(0 < rate <= 2.0 and math.isfinite(rate) for rate in rates(schedule, warmup=warmup, total=total))
