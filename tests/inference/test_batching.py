"""If this breaks: requests that are computed in one pass change each other's answers, a long prompt stops the others, or
requests are lost when the cache is full. Oracle: `model.generate` of plain transformers for each prompt alone.
"""

import copy
import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lit_llm.inference.engine import Engine
from lit_llm.inference.forward import batched, slots
from lit_llm.inference.sampling import SamplingParams
from tests.benchmarks.architectures import SPECIAL, VARIANTS, randomize, tiny

GREEDY = SamplingParams(max_tokens=6, temperature=0)
CASES = {"llama, 1 kv head": {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1}, "gpt2": {"model_type": "gpt2"},
         "mistral, short window": VARIANTS["mistral, short window"], "qwen3_moe": {"model_type": "qwen3_moe"}}
WORDS, CONTEXT = 60, 256


def build(keys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny({**SPECIAL.get(keys["model_type"], {}), **keys})).eval()
    randomize(model, 1)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def models(request):
    """A model for the engine, and the same for the oracle with the answers that were asked of it."""
    model = build(request.param)
    return model, copy.deepcopy(model), {}


def oracle(models, prompt, count):
    _, plain, answers = models
    if prompt not in answers:
        out = plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                             max_new_tokens=20, do_sample=False, pad_token_id=0)
        answers[prompt] = out[0, len(prompt):].tolist()
    return answers[prompt][:count]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), running=st.integers(1, 9), room=st.sampled_from([0, 1500, 100_000]),
       chunk=st.sampled_from([9, 64, 256]))
@example(seed=3236, running=4, room=1500, chunk=64)    # a slot changed places while tokens of this step were not counted
def test_any_mixture_gives_the_answers_of_generate(models, seed, running, room, chunk):
    """Requests of all lengths that join, are cancelled, begin alike, wait for room and give it to others."""
    draw, monkey = random.Random(seed), pytest.MonkeyPatch()
    monkey.setattr(batched, "CHUNK", chunk)
    model = models[0]
    model.config.max_position_embeddings = min(model.config.max_position_embeddings, CONTEXT)
    engine = Engine(model, max_running=running, cache_tokens=room)
    assert engine.obstacle is None
    begins = [tuple(draw.randrange(1, WORDS) for _ in range(length)) for length in (1, 5, 30, 110)]
    requests = {f"r{at}": (draw.choice(begins) + tuple(draw.randrange(1, WORDS) for _ in range(draw.randrange(4))),
                        draw.randrange(1, 21)) for at in range(draw.randrange(1, 11))}
    got, gone, waiting = {name: [] for name in requests}, set(), list(requests)
    while waiting or engine.has_work:
        for _ in range(draw.randrange(3)):
            if waiting:
                name = waiting.pop()
                engine.add(name, requests[name][0], SamplingParams(max_tokens=requests[name][1], temperature=0))
        if draw.random() < 0.1:
            gone.add(draw.choice(list(requests)))
            for name in gone - set(waiting):
                engine.cancel(name)
        for event in engine.step():
            assert event.error is None
            got[event.request_id].append(event.token_id)
        cache = engine._forward.slots
        assert cache.allocated <= cache.limit
        assert all(pool.busy <= len(pool.slots) for pool in cache.pools)
    monkey.undo()
    for name, (prompt, count) in requests.items():
        want = oracle(models, prompt, count)
        assert got[name] == want[:len(got[name])]
        assert name in gone or len(got[name]) == count


def test_a_long_prompt_does_not_stop_the_others(tiny_model, monkeypatch):
    monkeypatch.setattr(batched, "CHUNK", 16)
    engine = Engine.load(tiny_model("llama"))
    engine.stop_ids = frozenset()
    engine.add("short", [5, 6], SamplingParams(max_tokens=40, temperature=0))
    engine.step()
    engine.add("long", list(range(3, 203)), GREEDY)
    steps = 0
    while "long" not in (names := [event.request_id for event in engine.step()]):
        assert names == ["short"]
        steps += 1
    assert steps == 200 // 16


def test_a_prompt_that_begins_as_an_earlier_one_reads_what_is_new(tiny_model):
    """The next turn of a chat pays for its new tokens; the answer is that of a new engine."""
    first, more = list(range(3, 93)), [7, 8, 9]
    engine, fresh = (Engine.load(tiny_model("llama")) for _ in range(2))
    read = []
    engine.model.register_forward_pre_hook(lambda *_, **options: read.append(_[2]["input_ids"].numel()), with_kwargs=True)
    answers = []
    for name, prompt in (("one", first), ("again", first), ("next", first + more)):
        del read[:]
        engine.add(name, prompt, GREEDY)
        answers.append([event.token_id for _ in range(6) for event in engine.step()])
        assert read[0] == {"one": 90, "again": 1, "next": 3}[name]
    assert answers[0] == answers[1]
    fresh.add("next", first + more, GREEDY)
    assert answers[2] == [event.token_id for _ in range(6) for event in fresh.step()]
    assert engine.stats.reused_tokens == 89 + 90


def test_two_chats_by_turns_keep_what_they_have_read(tiny_model):
    """All chats begin with the tokens of the template; that alone takes no slot from another chat."""
    begin, engine, read = [3, 4, 5], Engine.load(tiny_model("llama")), []
    engine.model.register_forward_pre_hook(lambda *_, **options: read.append(_[2]["input_ids"].numel()), with_kwargs=True)
    for turn in (0, 1):
        for number in (0, 1):
            prompt = begin + [20 + number] * 57 + [9] * 2 * turn
            del read[:]
            engine.add(f"{number}, {turn}", prompt, GREEDY)
            while engine.has_work:
                engine.step()
            assert turn == 0 or read[0] == 2


def test_samples_of_a_prompt_read_it_once(tiny_model):
    """Eight answers to one prompt, added together, also beside a request that generates; each is that of an engine of its own."""
    prompt, read = list(range(3, 93)), []
    engine = Engine.load(tiny_model("llama"))
    engine.model.register_forward_pre_hook(lambda *_, **options: read.append(_[2]["input_ids"].numel()), with_kwargs=True)
    samplings = {f"r{seed}": SamplingParams(max_tokens=8, seed=seed) for seed in range(8)}
    engine.add("other", [7, 8], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    for name, params in samplings.items():
        engine.add(name, prompt, params)
    engine.add("next", [*prompt[:60], 5, 6], GREEDY)        # begins alike, while the others generate
    got = {name: [] for name in (*samplings, "other", "next")}
    while engine.has_work:
        for event in engine.step():
            got[event.request_id].append(event.token_id)
    assert engine.stats.reused_tokens >= 7 * 89
    assert sum(read) <= 92 + 62 + sum(map(len, got.values()))
    for name, params in samplings.items():
        alone = Engine.load(tiny_model("llama"))
        alone.add(name, prompt, params)
        assert got[name] == [event.token_id for _ in range(8) for event in alone.step()]


def test_answered_requests_do_not_enlarge_the_cache_without_end(tiny_model, monkeypatch):
    """Enlarging copies all keys and values, which would stop running requests again and again."""
    monkeypatch.setattr(slots, "IDLE", 6)
    engine = Engine.load(tiny_model("llama"))
    for number in range(40):
        engine.add(str(number), [number + 3] * 2, SamplingParams(max_tokens=1, temperature=0))
        engine.step()
    assert 6 <= sum(len(pool.slots) for pool in engine._forward.slots.pools) <= 9
    engine.add("kept", [40] * 2, GREEDY)            # the tokens of the last ones are still there
    engine.step()
    assert engine.stats.reused_tokens == 1


def test_requests_that_find_no_room_wait_and_are_read_again(tiny_model, monkeypatch):
    """The cache holds two contexts, for nine requests that grow into it: some give their room to older ones."""
    engine, preempted = Engine.load(tiny_model("llama")), []
    engine = Engine(engine.model, cache_tokens=0, max_running=9)
    engine.stop_ids = frozenset()
    take = engine._forward.preempted
    monkeypatch.setattr(engine._forward, "preempted", lambda: preempted.extend(requests := take()) or requests)
    got = {f"r{at}": [] for at in range(9)}
    for at, name in enumerate(got):
        engine.add(name, [at + 3] * 20, SamplingParams(max_tokens=150, temperature=0))
    while engine.has_work:
        for event in engine.step():
            got[event.request_id].append(event.token_id)
    assert preempted
    alone = Engine(engine.model)
    alone.stop_ids = frozenset()
    for at, name in enumerate(got):
        alone.add(name, [at + 3] * 20, SamplingParams(max_tokens=150, temperature=0))
        assert [event.token_id for _ in range(150) for event in alone.step()] == got[name]


def test_a_request_whose_pass_fails_harms_nobody(tiny_model, monkeypatch):
    """Also where the whole pass raises, as when memory is short: the others are computed alone then."""
    engine = Engine.load(tiny_model("llama"))
    forward = engine.model.forward

    def failing(input_ids, **options):
        if 66 in input_ids:
            raise torch.OutOfMemoryError("too much")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(engine.model, "forward", failing)
    engine.add("bad", [5, 66], GREEDY)
    engine.add("good", [5, 9], GREEDY)
    events = {event.request_id: event for event in engine.step()}
    assert "too much" in str(events["bad"].error)
    got = [events["good"].token_id] + [event.token_id for _ in range(5) for event in engine.step()]
    other = Engine.load(tiny_model("llama"))
    other.add("good", [5, 9], GREEDY)
    assert got == [event.token_id for _ in range(6) for event in other.step()]


def test_numbers_of_a_broken_request_do_not_stay(tiny_model):
    """Keys and values that are nan would reach the next request of the slot through weights of zero."""
    engine = Engine.load(tiny_model("llama"))
    with torch.no_grad():
        before = engine.model.get_input_embeddings().weight[9].clone()
        engine.model.get_input_embeddings().weight[9] = torch.nan
    engine.add("bad", [5] + [9] * 30, GREEDY)
    assert engine.step()[0].error
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[9] = before
    for count in (2, 12):
        engine.add(f"good{count}", [5] * count, GREEDY)
    assert all(event.error is None for _ in range(6) for event in engine.step())


@pytest.mark.parametrize(("kind", "reason"), [("gemma2", "caps"), ("mamba", "layers"), ("falcon_h1", "")])
def test_what_cannot_share_a_pass_is_said(kind, reason):
    engine = Engine(build({"model_type": kind}))
    assert engine.obstacle is not None
    assert reason in engine.obstacle


def test_positions_that_depend_on_the_longest_request_are_computed_alone():
    assert "longest request" in str(Engine(build(VARIANTS["llama, dynamic"])).obstacle)


def test_tokens_that_a_smaller_slot_cannot_hold_are_read(tiny_model):
    """A slot without a request begins like the prompt, and a larger one, whose request is running, like more of it."""
    engine = Engine.load(tiny_model("llama"))
    prompt = [20 + at % 200 for at in range(150)]
    long = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    engine.add("large", prompt, long)
    answers = {event.request_id: [event.token_id] for event in engine.step()}
    engine.add("small", prompt[:40], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    while engine.stats.running != 1 or "small" not in answers:
        for event in engine.step():
            answers.setdefault(event.request_id, []).append(event.token_id)
    engine.add("both", [*prompt, 5], long)
    while engine.has_work:
        for event in engine.step():
            answers.setdefault(event.request_id, []).append(event.token_id)
    other = Engine.load(tiny_model("llama"))
    other.add("both", [*prompt, 5], long)
    assert answers["both"] == [event.token_id for _ in range(60) for event in other.step()]
