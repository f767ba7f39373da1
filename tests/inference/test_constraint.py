"""If this breaks: an answer that must be JSON is not, a constraint of one request changes another, or its error ends the engine.
Oracle: `generate` of plain transformers with `prefix_allowed_tokens_fn`.
"""

import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.inference.constraint import Grammar
from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams

TURNS = Grammar("turns", "7 8 9|20 21|7 30 31|40")
PROMPT = [5, 6, 7]


class Turns:
    """The tokens at each place, by turns; the text says which."""

    def __init__(self, grammar, vocab_size):
        if grammar.kind != "turns":
            raise InputError(f"no language {grammar.kind!r}", where="grammar")
        self.sets = [[int(word) for word in turn.split() if word != "none"] for turn in grammar.text.split("|")]
        self.vocab_size, self.at = vocab_size, 0

    def allowed(self):
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[self.sets[self.at]] = True
        return mask

    def accept(self, token_id):
        if token_id == 31:
            raise ValueError("not this one")
        self.at = (self.at + 1) % len(self.sets)


def answers(engine, requests):
    for name, params in requests.items():
        engine.add(name, PROMPT, params)
    got = {name: [] for name in requests}
    while engine.has_work:
        for event in engine.step():
            got[event.request_id].append(event.error or event.token_id)
    return got


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5, "top_k": 2, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_a_constrained_answer_is_generates(sampling, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    sets = [[7, 8, 9], [20, 21], [7, 30], [40]]
    torch.manual_seed(4)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, eos_token_id=2, pad_token_id=0,
                          prefix_allowed_tokens_fn=lambda _, ids: sets[(len(ids) - 3) % 4], **({"do_sample": False} | sampling))
    own_options = {name: value for name, value in sampling.items() if name != "do_sample"} or {"temperature": 0}
    free = SamplingParams(max_tokens=20, temperature=0)
    bound = SamplingParams(max_tokens=20, seed=4, grammar=Grammar("turns", "7 8 9|20 21|7 30|40"), **own_options)
    engine = Engine.load(tiny_model("llama"), constraints=Turns)
    alone = answers(engine, {"free": free})
    got = answers(engine, {"free": free, "bound": pickle.loads(pickle.dumps(bound))})
    assert got["bound"] == want[0, 3:].tolist()
    assert got["free"] == alone["free"]


def test_its_errors_are_one_requests(tiny_model):
    free = SamplingParams(max_tokens=6, temperature=0)
    engine = Engine.load(tiny_model("llama"), constraints=Turns)
    alone = answers(engine, {"free": free})["free"]
    for text, error in {"31": ValueError, "9|none": RuntimeError, "100000": IndexError}.items():
        requests = {"bound": SamplingParams(max_tokens=6, temperature=0, grammar=Grammar("turns", text)), "free": free}
        got = answers(engine, requests)
        assert got["free"] == alone
        assert isinstance(got["bound"][-1], error)
    with pytest.raises(InputError, match="no language 'json'"):
        engine.add("other", PROMPT, SamplingParams(grammar=Grammar("json", "{}")))
    with pytest.raises(InputError, match="cannot constrain"):
        Engine(engine.model).add("other", PROMPT, SamplingParams(grammar=TURNS))
    assert not engine.has_work
