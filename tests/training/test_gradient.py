"""If this breaks: batch size, accumulation, packing or the number of processes silently change the gradient: short answers
count more than long ones, the last window of an epoch is scaled wrongly, or two processes use half of the learning rate.

Oracle: plain transformers in float64, one conversation at a time, with ChatML written by hand: the sum of the cross entropy
over the answers' tokens (including the stop token) of the conversations of a step, divided by their number.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from gradient_probe import on_two_ranks, run
from torch.nn.functional import cross_entropy

WORDS = ["Tom", "has", "a", "red", "kite", "小明", "风筝", "flies", "high", "over", "the", "hill", "what", "one"]
WINDOW = 8                                              # sequences of an optimizer step, however they are divided
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def talks():
    """29 conversations of one or two turns, of very unequal lengths: unpacked, three windows and a short one."""
    dice = random.Random(3)

    def say(most):
        return " ".join(dice.choices(WORDS, k=dice.randint(1, most)))

    return [[(say(12), say(dice.choice([2, 30]))) for _ in range(dice.randint(1, 2))] for _ in range(29)]


@pytest.fixture(scope="module")
def data(talks, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "talks.jsonl"
    lines = []
    for turns in talks:
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


class Oracle:
    """Loss and gradient of any set of conversations under plain transformers."""

    def __init__(self, folder, talks):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.model.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.rows = [self.spell(turns) for turns in talks]

    def spell(self, turns):
        ids, supervised = [], []
        for question, answer in turns:
            prompt = self.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            answer_ids, rest = self.encode(f"{answer}<|im_end|>"), self.encode("\n")
            ids += prompt + answer_ids + rest
            supervised += [False] * len(prompt) + [True] * len(answer_ids) + [False] * len(rest)
        return ids[: -len(rest)], supervised[: -len(rest)]

    def gradient(self, which):
        self.model.zero_grad()
        count = sum(sum(self.rows[number][1]) for number in which)
        loss = 0.0
        for number in which:
            ids, supervised = self.rows[number]
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            places = [place for place, is_learned in enumerate(supervised) if is_learned]
            nll = cross_entropy(logits[[place - 1 for place in places]], torch.tensor([ids[place] for place in places]),
                                reduction="sum") / count
            nll.backward()
            loss += nll.item()
        return loss, {name: weight.grad.clone() for name, weight in self.model.named_parameters()}

    def check(self, steps):
        """Every step against the oracle; the largest relative error of a gradient, in norm."""
        seen, worst = [], 0.0
        for step in steps:
            which = [[row[0] for row in self.rows].index(ids) for ids in step["talks"]]
            seen += which
            loss, wanted = self.gradient(which)
            assert step["loss"] == pytest.approx(loss, rel=TOLERANCE)
            assert wanted.keys() == step["grads"].keys()
            worst = max(worst, distance(step["grads"], wanted))
        assert sorted(seen) == list(range(len(self.rows))), "each conversation is used once in an epoch"
        return worst


def distance(actual, wanted):
    """|actual - wanted| / |wanted| over all parameters together."""
    apart = sum((actual[name].double() - wanted[name].double()).square().sum() for name in wanted)
    return (apart / sum(weight.double().square().sum() for weight in wanted.values())).sqrt().item()


def record(worst):
    print(f"largest relative gradient error {worst:.2e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_micro_batches_of_one_process(kind, packing, tiny_model, talks, data, tmp_path):
    """1x8, 2x4 and 8x1 give the oracle's gradient, in whole windows and in the short last one."""
    base = tiny_model(kind)
    oracle = Oracle(base, talks)
    first = None
    for batch_size in (1, 2, 8):
        case = dict(base=base, data=data, seq_len=256, batch_size=batch_size, accumulate=WINDOW // batch_size,
                    packing=packing)
        steps, _ = run(case, tmp_path / str(batch_size))
        assert len(steps) > 1
        record(oracle.check(steps))
        first = first or steps
        record(max(distance(step["grads"], other["grads"]) for step, other in zip(steps, first, strict=True)))


def few(talks, data, folder):
    """A file of seven conversations, and what the oracle is to make of them."""
    file = folder / "seven.jsonl"
    file.write_text("".join(line + "\n" for line in Path(data).read_text(encoding="utf-8").splitlines()[:7]), encoding="utf-8")
    return str(file), talks[:7]


@pytest.mark.parametrize(("batch_size", "accumulate", "forwards"), [(1, 32, 7), (4, 32, 2), (10**6, 1, 1), (10**6, 3, 1)])
def test_micro_batches_without_rows_are_not_computed(batch_size, accumulate, forwards, tiny_model, talks, data, tmp_path):
    """Seven sequences have the gradient and cost of seven, whatever the size of a step."""
    base = tiny_model("llama")
    file, seven = few(talks, data, tmp_path)
    steps, _ = run(dict(base=base, data=file, seq_len=256, batch_size=batch_size, accumulate=accumulate, packing="none"), tmp_path)
    assert [step["forwards"] for step in steps] == [forwards]
    record(Oracle(base, seven).check(steps))


def test_micro_batches_of_two_processes(tiny_model, talks, data, tmp_path):
    """The same with 2 processes that share each window, under DDP and under ZeRO.

    Gemma-2 caps its logits behind a tied head, which ZeRO-3 cuts into shards.
    """
    cases = [dict(name=f"{strategy}-{packing}-{batch_size}", base=tiny_model(kind), data=data, seq_len=256,
                  batch_size=batch_size, accumulate=WINDOW // 2 // batch_size, packing=packing, strategy=strategy,
                  devices=2)
             for strategy, packing, batch_size, kind in [
                 ("ddp", "none", 1, "llama"), ("ddp", "none", 2, "llama"), ("ddp", "best_fit", 2, "llama"),
                 ("ddp", "best_fit", 4, "llama"), ("deepspeed_stage_1", "none", 2, "llama"),
                 ("deepspeed_stage_2", "best_fit", 1, "llama"), ("deepspeed_stage_3", "best_fit", 2, "gemma2")]]
    file, seven = few(talks, data, tmp_path)            # in micro-batches of 3 and 3, then of 1 and none
    shorts = [dict(name=f"short-{strategy}", base=tiny_model("llama"), data=file, seq_len=256, batch_size=3, accumulate=5,
                   packing="none", strategy=strategy, devices=2)
              for strategy in ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2")]
    cases += shorts
    oracles = {base: Oracle(base, talks) for base in {case["base"] for case in cases}}
    for case, ranks in zip(cases, on_two_ranks(cases, tmp_path), strict=True):
        steps = [dict(one, talks=one["talks"] + other["talks"]) for one, other in zip(*ranks, strict=True)]
        print(case["name"], end=": ")
        if case in shorts:
            assert [[step["forwards"] for step in rank] for rank in ranks] == [[2], [2]]
            record(Oracle(case["base"], seven).check(steps))
        else:
            record(oracles[case["base"]].check(steps))
        for one, other in zip(*ranks, strict=True):     # all ranks step alike
            assert distance(other["grads"], one["grads"]) == 0.0


def test_clipping_scales_the_whole_gradient(tiny_model, talks, data, tmp_path):
    """The optimizer gets a gradient with the clipped norm and the direction of the oracle's."""
    base, limit = tiny_model("llama"), 0.01
    case = dict(base=base, data=data, seq_len=256, batch_size=4, accumulate=2, packing="none", clip=limit)
    steps, _ = run(case, tmp_path)
    oracle = Oracle(base, talks)
    for step in steps:
        rows = [row[0] for row in oracle.rows]
        wanted = oracle.gradient([rows.index(ids) for ids in step["talks"]])[1]
        norm = sum(grad.square().sum() for grad in wanted.values()).sqrt()
        assert norm > 10 * limit
        record(distance(step["clipped"], {name: grad * (limit / norm) for name, grad in wanted.items()}))
