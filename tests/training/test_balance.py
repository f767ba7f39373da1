"""If this breaks: a mixture of experts is trained without its load-balancing loss, or with a weight that depends on the
division of a step into micro-batches and processes; or the loss is part of `train/loss` and `val/nll`.

Oracle: plain transformers in float64, one document at a time, with `output_router_logits=True`: its logits, and its
`aux_loss`, which its own class computes.
"""

import numpy as np
import pytest
import torch
from gradient_probe import on_two_ranks, run
from test_gradient import data, distance, talks  # noqa: F401
from torch.nn.functional import cross_entropy

from lit_llm.errors import InputError

COEFFICIENT = 0.7                                       # large, so that it cannot be overlooked
NARROW = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=256, initializer_range=0.1, num_experts_per_tok=2,
              router_aux_loss_coef=COEFFICIENT)
SHAPES = {
    "mixtral": NARROW | dict(num_local_experts=4),
    "qwen3_moe": NARROW | dict(num_experts=4, moe_intermediate_size=24, head_dim=8, tie_word_embeddings=True),
    "gpt_oss": NARROW | dict(num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2),
}
DECLARED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared", "phimoe", "jamba",
            "minimax", "dbrx", "ernie4_5_moe", "jetmoe", "gpt_oss", "qwen3_next"]
CACHE = {}


@pytest.fixture
def base(tiny_tokenizer, tmp_path_factory):
    """`base(kind)`: a folder with a tiny mixture of experts in float64, whose config leaves `output_router_logits` false."""
    from lit_llm.models.load import init_causal_lm
    from lit_llm.text.tokenizer import Tokenizer

    def make(kind):
        if kind not in CACHE:
            tokenizer = Tokenizer.load(tiny_tokenizer)
            torch.manual_seed(5)
            model = init_causal_lm(SHAPES[kind] | {"model_type": kind}, vocab_size=tokenizer.vocab_size, bos_token_id=None,
                                   eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
            assert not model.config.output_router_logits
            CACHE[kind] = str(tmp_path_factory.mktemp(kind))
            model.save_pretrained(CACHE[kind])
            tokenizer.save(CACHE[kind])
        return CACHE[kind]

    return make


def oracle(folder, documents, coefficient=COEFFICIENT):
    """Mean NLL, mean balance by tokens, and the gradient of a step of these documents."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager",
                                                 experts_implementation="eager")
    count = sum(sum(label != -100 for label in labels) for _, labels in documents)
    tokens, nll, balance = sum(len(ids) for ids, _ in documents), 0.0, 0.0
    for ids, labels in documents:
        out = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False)
        part = cross_entropy(out.logits[0, :-1], torch.tensor(labels[1:]), reduction="sum") / count
        even = out.aux_loss * len(ids) / tokens
        (part + coefficient * even).backward()
        nll, balance = nll + part.item(), balance + even.item()
    return nll, balance, {name: weight.grad for name, weight in model.named_parameters()}


def check(folder, step, coefficient=COEFFICIENT):
    nll, balance, wanted = oracle(folder, step["documents"], coefficient)
    assert step["loss"] == pytest.approx(nll, rel=1e-6)
    assert step["aux_loss"] == pytest.approx(balance if coefficient else 0.0, rel=1e-6)
    worst = distance(step["grads"], wanted)
    print(f"relative gradient error {worst:.1e}")
    assert worst < 1e-6


def case(folder, file, batch_size, rows=8, **more):
    return dict(base=folder, data=file, seq_len=256, batch_size=batch_size, accumulate=rows // batch_size,
                packing="best_fit") | more


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_micro_batches_of_one_process(kind, base, data, tmp_path):  # noqa: F811
    """Packed, and document by document (GPT-OSS): 1x8, 2x4 and 8x1 give the oracle's gradient; so it does unpacked."""
    folder = base(kind)
    for name, batch_size, more in [("1", 1, {}), ("2", 2, dict(packing="none")),
                                   ("4", 2, dict(model=dict(gradient_checkpointing=True))),
                                   ("5", 4, dict(model=dict(gradient_checkpointing="selective"))), ("8", 8, {})]:
        steps, _ = run(case(folder, data, batch_size, **more), tmp_path / name)
        for step in steps[:2]:
            check(folder, step)


def test_it_can_be_turned_off_and_set(base, data, tmp_path):  # noqa: F811
    folder = base("qwen3_moe")
    for wanted in (0.0, 2.0):
        steps, _ = run(case(folder, data, 8, model=dict(router_aux_loss=wanted)), tmp_path / str(wanted))
        check(folder, steps[0], wanted)


def test_false_in_a_new_models_config_turns_it_off(tmp_path, tiny_tokenizer, data):  # noqa: F811
    """`init: {output_router_logits: ...}` is no dead key: typed as false it is another run than as true."""
    import lightning as L

    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source
    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.trainer import Trainer

    def weights(**typed):
        L.seed_everything(1)
        module = CausalLMModule(init=SHAPES["mixtral"] | {"model_type": "mixtral"} | typed, lr=1e-3)
        rows = TextDataModule([Source(data)], tokenizer=tiny_tokenizer, seq_len=128, batch_size=4)
        Trainer(accelerator="cpu", max_steps=2, default_root_dir=str(tmp_path / str(typed)), enable_checkpointing=False,
                enable_progress_bar=False).fit(module, datamodule=rows)
        return torch.cat([weight.detach().flatten() for weight in module.model.parameters()])

    on, true, false = weights(), weights(output_router_logits=True), weights(output_router_logits=False)
    assert torch.equal(on, true)
    assert not torch.equal(on, false)


def test_two_processes(base, data, tmp_path):  # noqa: F811
    """Under every strategy the two ranks share the oracle's gradient."""
    folder = base("mixtral")
    cases = [case(folder, data, 4, rows=4, name=strategy, strategy=strategy, devices=2, **more) for strategy, more in (
        ("ddp", {}), ("deepspeed_stage_2", {}), ("deepspeed_stage_3", {}),
        ("fsdp2", dict(model=dict(gradient_checkpointing=True))))]
    for settings, ((one, *_), (other, *_)) in zip(cases, on_two_ranks(cases, tmp_path), strict=True):
        print(settings["name"], end=": ")
        check(folder, one | {"documents": one["documents"] + other["documents"]})


def test_adapters_learn_from_it(base, data, tmp_path):  # noqa: F811
    """With LoRA on a frozen router its balance reaches the adapters below it."""
    first, second = (run(case(base("mixtral"), data, 8, lora=True, model=dict(router_aux_loss=wanted)),
                         tmp_path / str(wanted))[0][0] for wanted in (0.0, 5.0))
    assert second["loss"] == first["loss"]
    assert second["aux_loss"] > 0.9
    assert distance(second["grads"], first["grads"]) > 1e-3


@pytest.mark.parametrize("kind", DECLARED)
def test_what_the_models_own_class_computes(kind):
    """Of one document, through the backbone and through the whole model: transformers' `aux_loss` and its gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_llm.data.rows.loader import batch_of
    from lit_llm.models import miniature
    from lit_llm.training import balance, forward
    from tests.benchmarks.architectures import SPECIAL

    like = AutoConfig.for_model(kind, **SPECIAL.get(kind, {}))
    torch.manual_seed(0)
    for config in miniature.candidates(like, whole=False):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
            break
        except Exception:
            continue
    ids = torch.randint(3, 60, (40,))
    batch = batch_of([[(ids.numpy(), np.ones(40, bool))]], seq_len=40, pad_id=0, token_bytes=np.ones((2, 64), np.int64))
    wanted = model(input_ids=ids[None], output_router_logits=True, use_cache=False).aux_loss
    router = [weight for weight in model.parameters() if weight.ndim > 1 and weight.requires_grad]
    slopes = torch.autograd.grad(wanted, router, allow_unused=True)
    assert balance.coefficient(model, None) > 0
    assert balance.coefficient(model, 0.0) == 0
    for own_logits in (False, True):
        way = forward.Way(packed=False, own_logits=own_logits, fast_norms=False)
        sums = forward.nll(model, batch, forward.Choices(way, balance=True))
        assert (sums.balance / 40).item() == pytest.approx(wanted.item(), rel=1e-5)
        for actual, slope in zip(torch.autograd.grad(sums.balance / 40, router, allow_unused=True), slopes, strict=True):
            assert (actual is None) == (slope is None)
            assert slope is None or torch.allclose(actual, slope, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "doge"])
def test_a_model_without_such_a_loss_refuses_a_coefficient(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_llm.models import miniature
    from lit_llm.training import balance

    torch.manual_seed(0)                                # Doge declares a coefficient but has experts only on request
    model = AutoModelForCausalLM.from_config(next(iter(miniature.candidates(AutoConfig.for_model(kind), whole=False))))
    assert balance.coefficient(model, None) == 0
    with pytest.raises(InputError, match="no load-balancing loss"):
        balance.coefficient(model, 0.01)


@pytest.mark.parametrize(("stage", "ranks", "recompute", "coefficient", "refused"), [
    (3, 2, "full", 0.01, True), (3, 2, "selective", 0.01, True), (3, 1, "full", 0.01, False),
    (3, 2, "none", 0.01, False), (3, 2, "full", 0.0, False), (2, 2, "full", 0.01, False)])
def test_what_would_hang_is_refused(stage, ranks, recompute, coefficient, refused):
    """ZeRO-3 on several ranks with recomputed layers: the ranks would wait for each other forever."""
    from contextlib import nullcontext

    from lit_llm import CausalLMModule
    from lit_llm.errors import InputError
    from lit_llm.training.parallel.zero import ZeroStrategy
    from lit_llm.training.rules import table

    module = CausalLMModule(base="sample:base")
    module.balance_coefficient, module.recompute = coefficient, recompute
    with pytest.raises(InputError, match="load-balancing loss") if refused else nullcontext():
        table.check(table.Setup(module, ZeroStrategy(stage=stage), ranks))
