"""If this breaks: a penalty, a bias, a limit or a log-probability is not what its name says, or depends on other requests.
Oracles: `generate` of plain transformers with the same options, and formulas in float64 on its logits.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.inference.completion import Detokenizer
from lit_llm.inference.engine import Engine
from lit_llm.inference.forward import batched
from lit_llm.inference.sampling import SamplingParams, adjust
from lit_llm.text.tokenizer import Tokenizer

PROMPT = [5, 6, 7, 5]
STOP = 9


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()


@pytest.fixture(scope="module")
def engine(tiny_model):
    return Engine.load(tiny_model("llama"), stop_ids=[STOP])


def run(engine, **requests):
    """Events of each request, all computed together: name=(prompt, options)."""
    for name, (prompt, options) in requests.items():
        engine.add(name, prompt, SamplingParams(**{"max_tokens": 24, "temperature": 0} | options))
    got = {name: [] for name in requests}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            got[event.request_id].append(event)
    return got


def ids_of(events):
    return [event.token_id for event in events]


def generated(model, engine, **options):
    seed = options.pop("seed", None)
    if seed is not None:
        torch.manual_seed(seed)
        options |= {"do_sample": True, "top_k": 0} | options
    out = model.generate(torch.tensor([PROMPT]), eos_token_id=sorted(engine.stop_ids), pad_token_id=0,
                         **{"do_sample": False, "max_new_tokens": 24} | options)
    return out[0, len(PROMPT):].tolist()


@pytest.mark.parametrize(("options", "generate_options"), [
    ({"repetition_penalty": 1.7}, {}), ({"repetition_penalty": 0.6, "seed": 3, "temperature": 0.8}, {}),
    ({"min_p": 0.4, "seed": 4, "temperature": 1.3}, {}), ({"min_p": 0.02, "top_p": 0.9, "top_k": 40, "seed": 5, "temperature": 1.0}, {}),
    ({"logit_bias": ((8, 6.0), (40, -3.5), (STOP, 4.0))}, {"sequence_bias": {(8,): 6.0, (40,): -3.5, (STOP,): 4.0}}),
    ({"logit_bias": ((STOP, 60.0),), "min_tokens": 7}, {"sequence_bias": {(STOP,): 60.0}, "min_new_tokens": 7}),
    ({"logit_bias": ((STOP, 5.0),), "min_tokens": 3, "repetition_penalty": 1.3, "min_p": 0.01, "seed": 6, "temperature": 0.7},
     {"sequence_bias": {(STOP,): 5.0}, "min_new_tokens": 3}),
], ids=str)
def test_an_answer_with_options_is_generates(options, generate_options, model, engine):
    shared = {name: value for name, value in options.items() if name not in ("logit_bias", "min_tokens")}
    got = run(engine, plain=(PROMPT, {}), with_options=(PROMPT, options), other=([8] * 30, {"seed": 1, "temperature": 1.0}))
    assert ids_of(got["with_options"]) == generated(model, engine, **shared, **generate_options)
    assert ids_of(got["plain"]) == generated(model, engine)
    assert ids_of(got["with_options"]) != ids_of(got["plain"])


def test_a_seed_gives_the_same_answer_alone_and_in_any_mixture(engine):
    """All options at once, beside greedy requests, the same seed, and other options."""
    options = {"seed": 7, "temperature": 1.1, "top_p": 0.95, "top_k": 60, "min_p": 0.001, "repetition_penalty": 1.2,
               "presence_penalty": 0.5, "frequency_penalty": -0.3, "logit_bias": ((20, 1.5),), "min_tokens": 4, "logprobs": 3}
    alone = run(engine, alone=(PROMPT, options))["alone"]
    mixed = run(engine, one=([3] * 50, {"temperature": 1.0, "seed": 7}), same=(PROMPT, options), greedy=(PROMPT, {}),
                again=(PROMPT, options), other=(PROMPT, options | {"seed": 8}))
    assert ids_of(mixed["same"]) == ids_of(mixed["again"]) == ids_of(alone)
    assert ids_of(mixed["other"]) != ids_of(alone)


def test_presence_and_frequency_count_the_answer_alone():
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence; tokens of the prompt do not count."""
    torch.manual_seed(0)
    for _ in range(20):
        logits, answer = torch.randn(12), torch.randint(0, 12, (9,)).tolist()
        presence, frequency = (torch.rand(2) * 4 - 2).tolist()
        want = [float(logits[at]) - answer.count(at) * frequency - (at in answer) * presence for at in range(12)]
        adjust(logits, SamplingParams(presence_penalty=presence, frequency_penalty=frequency), [1, 1, 2], answer, ())
        assert torch.allclose(logits.double(), torch.tensor(want, dtype=torch.float64), atol=1e-5)


def test_what_ends_an_answer(model, engine):
    def ends(**options):
        events = run(engine, with_options=(PROMPT, {"logit_bias": ((STOP, 100.0),)} | options))["with_options"]
        return ids_of(events), events[-1].finish_reason

    free = generated(model, engine)
    ids, reason = ends()
    assert (ids, reason) == ([STOP], "stop")
    assert ends(ignore_eos=True) == ([STOP] * 24, "length")
    assert ends(ignore_eos=True, stop_token_ids=(STOP,)) == ([STOP], "stop")
    assert ends(min_tokens=5, max_tokens=5) == (ends(min_tokens=5)[0][:5], "length")
    chosen = free[3]
    ids, reason = ends(logit_bias=(), stop_token_ids=(chosen,))
    assert (ids, reason) == (free[:free.index(chosen) + 1], "stop")
    ids, reason = ends(logit_bias=(), stop_token_ids=(chosen,), min_tokens=20, max_tokens=20)
    assert chosen not in ids
    assert (len(ids), reason) == (20, "length")


def test_a_stop_string_has_no_effect_within_min_tokens(tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    ids = tokenizer.encode_text("END of END, END")
    count = next(at for at in range(len(ids)) if "END of END" in tokenizer.decode(ids[:at]))
    for least, text in ((0, ""), (1, ""), (count - 1, "END of "), (count, "END of END, "), (len(ids), "END of END, END")):
        detokenizer, pieces = Detokenizer(tokenizer, 1, ("END",), least), []
        for at, id_ in enumerate(ids):
            pieces.append(detokenizer.push(id_, "length" if at == len(ids) - 1 else None))
            if pieces[-1].finish_reason:
                break
        assert "".join(piece.text for piece in pieces) == text


# ---- log-probabilities -----------------------------------------------------------------------------------------------

def check_logprobs(model, prompt, events, count):
    """All of an answer and its prompt against float64."""
    ids = [*prompt, *ids_of(events)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    want = logits.log_softmax(-1)
    scored_tokens = [*events[0].prompt_logprobs, *(event.logprob for event in events)]
    scored_tokens = scored_tokens if events[0].prompt_logprobs else [None] * len(prompt) + scored_tokens
    for at, token in enumerate(scored_tokens):
        if token is None:
            continue
        assert token.token_id == ids[at]
        assert (token.logprob is None) == (at == 0)
        if at:
            assert token.logprob == pytest.approx(float(want[at - 1, ids[at]]), abs=1e-5)
            assert len(token.top) == count
            assert [value for _, value in token.top] == pytest.approx(want[at - 1].topk(count).values.tolist(), abs=1e-5)
            assert all(value == pytest.approx(float(want[at - 1, id_]), abs=1e-5) for id_, value in token.top)
            assert token.logprob in [value for _, value in token.top] or all(id_ != token.token_id for id_, _ in token.top)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logprobs_are_the_models(kind, tiny_model, monkeypatch):
    """Of prompts that are read in parts, beside others, again after another request has read them; penalties leave them as they are."""
    monkeypatch.setattr(batched, "CHUNK", 16)
    engine = Engine.load(tiny_model(kind), max_running=5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind)).eval()
    long = [at % 200 + 3 for at in range(50)]
    for _ in range(2):
        got = run(engine, long=(long, {"logprobs": 4, "prompt_logprobs": 4, "max_tokens": 6, "logit_bias": ((8, 5.0),)}),
                  none=(long, {}), one=([5], {"logprobs": 2, "prompt_logprobs": 2, "temperature": 1.0, "seed": 1}),
                  drawn=(PROMPT, {"logprobs": 3, "temperature": 1.5, "seed": 2, "repetition_penalty": 2.0, "top_k": 3}),
                  sure=(PROMPT, {"logprobs": 0}))
        check_logprobs(model, long, got["long"], 4)
        check_logprobs(model, [5], got["one"], 2)
        check_logprobs(model, PROMPT, got["drawn"], 3)
        check_logprobs(model, PROMPT, got["sure"], 0)
        assert all(event.logprob is None and not event.prompt_logprobs for event in got["none"])
        assert len(got["long"][0].prompt_logprobs) == 50
        assert not any(event.prompt_logprobs for event in got["long"][1:])


def test_prompt_logprobs_survive_that_a_request_gives_its_room(tiny_model, monkeypatch):
    """The cache holds two contexts; requests that lose their place read their prompts again."""
    monkeypatch.setattr(batched, "CHUNK", 16)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    engine = Engine(AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval(), cache_tokens=0, max_running=9)
    prompts = {f"r{at}": [at + 3, *range(3, 100)] for at in range(7)}
    got = run(engine, **{name: (prompt, {"prompt_logprobs": 1, "logprobs": 1, "max_tokens": 60, "ignore_eos": True})
                         for name, prompt in prompts.items()})
    for name, prompt in prompts.items():
        check_logprobs(model, prompt, got[name], 1)


def test_a_model_that_is_computed_alone_has_the_same_options():
    from tests.inference.test_batching import build

    model = build({"model_type": "gemma2"})
    engine = Engine(model)
    assert engine.obstacle
    got = run(engine, with_options=(PROMPT, {"logprobs": 2, "prompt_logprobs": 2, "repetition_penalty": 1.4, "max_tokens": 6}))["with_options"]
    check_logprobs(model, PROMPT, got, 2)


@pytest.mark.parametrize("wrong", [
    {"min_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"repetition_penalty": float("nan")}, {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1}, {"logit_bias": ((5, 101.0),)}, {"logit_bias": ((5, True),)}, {"min_tokens": -1},
    {"min_tokens": 9, "max_tokens": 8}, {"logprobs": 21}, {"logprobs": True}, {"prompt_logprobs": -1}, {"stop_token_ids": (1,) * 1025},
], ids=str)
def test_a_wrong_option_is_named(wrong):
    with pytest.raises(InputError) as caught:
        SamplingParams(**wrong)
    assert caught.value.where == next(iter(wrong))


@pytest.mark.parametrize("wrong", [{"logit_bias": ((10**6, 1.0),)}, {"stop_token_ids": (-1,)}, {"stop_token_ids": ("x",)}], ids=str)
def test_tokens_that_the_model_does_not_have_are_refused(wrong, engine):
    with pytest.raises(InputError) as caught:
        engine.add("r", PROMPT, SamplingParams(**wrong))
    assert caught.value.where == next(iter(wrong))
