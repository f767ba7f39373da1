"""If this breaks: one request with a bad prompt, a broken grammar or too little memory ends or changes the answers of everybody.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llm.inference import engine as engine_module
from lit_llm.inference.constraint import Grammar
from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams
from tests.tiny_models import MEMORY, NAN, poison

SEED = 13                                           # draws with it fail
HEALTHY = [([20 + n, 30, 40 + n], n + 2) for n in range(6)]


class Broken:
    """A constraint whose library fails, at one of its two methods."""

    def __init__(self, where):
        self.where = where

    def allowed(self):
        if self.where == "allowed":
            raise RuntimeError("a panic of the library")
        return torch.ones(3, dtype=torch.bool) if self.where == "shape" else None

    def accept(self, token_id):
        if self.where == "accept":
            raise RuntimeError("a panic of the library")


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = Engine.load(tiny_model("llama"), max_running=6)
    engine.constraints = lambda grammar, vocabulary: Broken(grammar.text)
    poison(engine.model)
    draw, patch = engine_module.next_ids, pytest.MonkeyPatch()

    def next_ids(logits, params, generators):
        if params[0].seed == SEED:
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")
        return draw(logits, params, generators)

    patch.setattr(engine_module, "next_ids", next_ids)
    yield engine
    patch.undo()


def params(new, **options):
    return SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, **options)


POISON = {
    "nan": ([5, NAN, 6], params(5)), "nan at the end of a long prompt": ([7] * 200 + [NAN], params(5)),
    "memory": ([MEMORY, 6], params(5)), "memory in the second part": ([8] * 200 + [MEMORY], params(5)),
    "sampler": ([5, 6, 7], SamplingParams(max_tokens=5, seed=SEED)),
    **{f"grammar {where}": ([5, 6, 7], params(5, grammar=Grammar("broken", where))) for where in ("allowed", "accept", "shape")},
}


def drain(engine, answers, steps=10**6):
    while engine.has_work and steps:
        for event in engine.step():
            answers.setdefault(event.request_id, []).append(event.error or event.token_id)
        steps -= 1


@pytest.fixture(scope="module")
def alone(engine):
    answers = {}
    for prompt, new in HEALTHY:
        outcomes = {}
        engine.add("one", prompt, params(new))
        drain(engine, outcomes)
        answers[tuple(prompt)] = outcomes["one"]
    return answers


@settings(max_examples=25, deadline=None, derandomize=True, report_multiple_bugs=False)
@given(arrivals=st.lists(st.tuples(st.sampled_from([*range(len(HEALTHY)), *POISON]), st.integers(0, 3), st.booleans()), min_size=4, max_size=14))
def test_poison_harms_nobody_else(arrivals, engine, alone):
    for name in [*engine._running, *(request.name for request in engine._waiting)]:
        engine.cancel(name)                         # of a case that failed
    outcomes, wanted, cancelled = {}, {}, set()
    for number, (which, pause, cancels) in enumerate(arrivals):
        name = f"{which}-{number}"
        prompt, own = POISON[which] if which in POISON else (HEALTHY[which][0], params(HEALTHY[which][1]))
        engine.add(name, prompt, own)
        wanted[name] = None if which in POISON else alone[tuple(prompt)]
        drain(engine, outcomes, pause)
        if cancels and pause and len(outcomes.get(name, [])) == 0:
            engine.cancel(name)
            cancelled.add(name)
    drain(engine, outcomes)
    for name, tokens in wanted.items():
        if name in cancelled:
            continue
        if tokens is None:
            assert isinstance(outcomes[name][-1], Exception), name
            assert all(isinstance(token_id, int) for token_id in outcomes[name][:-1])
        else:
            assert outcomes[name] == tokens, name
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)


@pytest.mark.parametrize("spared", [0, 1, 3])
def test_no_memory_for_keys_and_values_ends_one_request(spared, tiny_model, monkeypatch):
    """At its start and when its answer outgrows its place; so many allocations of the step still succeed."""
    engine, cat, calls = Engine.load(tiny_model("llama"), max_running=6), torch.cat, []
    prompts = {"short": ([20, 30, 40], 5), "grows": ([21, 31, 41], 150), "long": ([22] * 140, 5), "after": ([23, 33], 5)}
    alone = {}
    for name, (prompt, new) in prompts.items():
        engine.add(name, prompt, params(new))
        drain(engine, alone)

    def limited(tensors, dim=0):
        if tensors[0].dim() == 4 and tensors[0].shape[2] > 128:         # larger slots are added
            calls.append(1)
            if len(calls) > spared:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return cat(tensors, dim)

    for name in ("grows", "long"):
        outcomes = {}
        for other in ("short", "after"):
            engine.add(other, prompts[other][0], params(prompts[other][1]))
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "cat", limited)
            for at in range(3):
                engine.add(f"{name}{at}", prompts[name][0], params(prompts[name][1]))
            drain(engine, outcomes)
        ended = [outcomes[f"{name}{at}"] for at in range(3)]
        assert any(isinstance(answer[-1], RuntimeError) for answer in ended)
        assert all(answer == alone[name] or (isinstance(answer[-1], RuntimeError) and answer[:-1] == alone[name][:len(answer) - 1])
                   for answer in ended)
        assert (outcomes["short"], outcomes["after"]) == (alone["short"], alone["after"])
        again = {}
        for at in range(3):                         # the memory is there again
            engine.add(f"{name}{at}", prompts[name][0], params(prompts[name][1]))
        drain(engine, again)
        assert all(answer == alone[name] for answer in again.values())
    assert (engine.stats.running, engine.stats.waiting, engine.stats.cached_tokens) == (0, 0, 0)
