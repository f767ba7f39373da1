"""If this breaks: norms are decayed, the learning rate is never warmed up, or a run ends with another rate than configured."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from lit_llm.errors import InputError
from lit_llm.models.adapters.adapter import wrap_peft
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.models.anatomy import embeddings
from lit_llm.models.load import init_causal_lm, load_causal_lm
from lit_llm.training.optim import build, parameter_groups, scheduler, shape, warmup_steps
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
        build("adamw", model.named_parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)


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
    optimizer = build("adamw", [("w", weight)], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 6):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        want = want - 0.01 * (update + 0.1 * want)
    assert (weight - want).abs().max() < 1e-9


# ---- Muon and 8-bit

def test_muon_takes_the_matrices_between_layers():
    """Tables, heads, norms and biases are AdamW's; GPT-2's positions are a table too."""
    for kind in SHAPES:
        model = init_causal_lm(SHAPES[kind], vocab_size=64)
        groups = build("muon", model.named_parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8,
                       embeddings=embeddings(model)).param_groups
        sizes = {matrices: sum(len(group["params"]) for group in groups if group["matrices"] == matrices)
                 for matrices in (True, False)}
        layers = [layer for layer in model.modules() if type(layer).__name__ in ("Linear", "Conv1D")]
        assert sizes[True] == len([layer for layer in layers if layer is not model.get_output_embeddings()])
        assert sum(sizes.values()) == len(list(model.parameters()))


def muon(weights, tables=()):
    return build("muon", [(str(at), weight) for at, weight in enumerate(weights)], lr=0.01, weight_decay=0.1,
                 betas=(0.9, 0.95), eps=1e-8, embeddings=tables)


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (32, 32)])
def test_muon_steps_along_the_nearest_orthogonal_matrix(size):
    """Against the singular vectors of the gradient; the step's root mean square is AdamW's 0.2 (arXiv:2502.16982, 2.2)."""
    torch.manual_seed(0)
    weight, before = nn.Parameter(torch.zeros(size)), torch.randn(size)
    weight.data.copy_(before)
    left, _, right = torch.linalg.svd(gradient := torch.randn(size), full_matrices=False)
    weight.grad = gradient.clone()
    muon([weight]).step()
    step = (before * (1 - 0.01 * 0.1) - weight.detach()) / 0.01
    assert torch.cosine_similarity(step.flatten(), (left @ right).flatten(), dim=0) > 0.97
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_muon_moves_the_rest_as_adamw_and_resumes():
    torch.manual_seed(0)
    start = [torch.randn(8, 8), torch.randn(16, 8), torch.randn(8)]             # a matrix, a table, a norm
    grads = [[torch.randn_like(weight) for weight in start] for _ in range(4)]

    def run(weights, optimizer, steps):
        for step in steps:
            for weight, gradient in zip(weights, step[-len(weights):], strict=True):
                weight.grad = gradient.clone()
            optimizer.step()

    muon_weights, adamw_weights = ([nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    table, norm = adamw_weights[1:]
    whole = muon(muon_weights, [muon_weights[1]])
    run(muon_weights, whole, grads)
    groups = [{"params": [table], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}]
    run(adamw_weights[1:], torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True), grads)
    assert torch.equal(muon_weights[1], table)
    assert torch.equal(muon_weights[2], norm)

    again = [nn.Parameter(weight.clone()) for weight in start]
    first = muon(again, [again[1]])
    run(again, first, grads[:2])
    second = muon(again, [again[1]])
    second.load_state_dict(first.state_dict())
    run(again, second, grads[2:])
    assert all(torch.equal(one, other) for one, other in zip(again, muon_weights, strict=True))


def test_8bit_follows_adamw_with_a_quarter_of_its_state():
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    torch.manual_seed(0)
    start, goal = torch.randn(64, 128), torch.randn(64, 128)
    ends, sizes = [], []
    for name in ("adamw", "adamw_8bit"):
        weight = nn.Parameter(start.clone())
        optimizer = build(name, [("w", weight)], lr=0.02, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
        for _ in range(30):
            weight.grad = weight.detach() - goal
            optimizer.step()
        ends.append(weight.detach())
        sizes.append(sum(part.nbytes for part in optimizer.state[weight].values() if torch.is_tensor(part)))
    assert (ends[0] - start).abs().mean() > 0.3
    assert (ends[1] - ends[0]).abs().mean() < 0.1 * (ends[0] - start).abs().mean()
    assert sizes[1] < 0.35 * sizes[0]


def test_8bit_without_bitsandbytes_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="bitsandbytes") as caught:
        build("adamw_8bit", [("w", nn.Parameter(torch.zeros(2, 2)))], lr=1.0, weight_decay=0.0, betas=(0.9, 0.9), eps=1e-8)
    assert "pip install bitsandbytes" in caught.value.fix


# ---- schedules

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
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=peak * floor)
    for rate in rates("cosine", warmup=0, total=total, floor=floor, peak=peak):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        torch_schedule.step()


def test_wsd_is_flat_until_the_last_fifth():
    seen = rates("wsd", warmup=0, total=100)
    assert seen[:81] == pytest.approx([2.0] * 81)
    assert seen[90] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))


@pytest.mark.parametrize(("warmup", "cooldown", "peaks"), [(10, 0.5, 41), (10, 0.1, 81), (60, 0.5, 1), (0, 0.0, 100)])
def test_wsd_cools_down_for_the_share_that_is_asked(warmup, cooldown, peaks):
    """A share of all steps; where warmup leaves less, all that is left."""
    course = shape("wsd", warmup=warmup, total=100, floor=0.0, cooldown=cooldown)
    factors = [course(step) for step in range(100)]
    assert sum(factor == 1.0 for factor in factors) == peaks
    assert course(100) == 0.0
    falling = factors[warmup + peaks:]
    steps = {round(b - a, 9) for a, b in pairwise(falling)}
    assert len(steps) <= 1


@pytest.mark.parametrize("warmup", [0, 0.5, 3, 50])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_short_runs_and_long_warmups_stay_in_bounds(schedule, warmup):
    for total in (1, 2, 5):
        assert all(0 < rate <= 2.0 and math.isfinite(rate) for rate in rates(schedule, warmup=warmup, total=total))


def test_a_key_of_another_schedule_is_refused_or_reported(caplog):
    from lit_llm.training.module import CausalLMModule

    with pytest.raises(InputError) as caught:
        CausalLMModule(base="sample:base", cooldown=0.5)
    assert caught.value.where == "model.cooldown"
    CausalLMModule(base="sample:base", min_lr_share=0.5, schedule="constant")
    assert "model.min_lr_share" in caplog.text
