"""If this breaks: a request is answered by another adapter than it names, or adapters of one step change each other.

Oracle: PEFT's own model of each adapter, which generates for each prompt alone.
"""

import json
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.models.vocabulary import grow

ALL = "all-linear"


def make(base, folder, seed, rows=None, **keys):
    """A LoRA adapter with random weights that change answers; `rows` is its number of token ids if that is not the base's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        grow(model, rows)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **keys}))
    for name, weight in model.named_parameters():
        if "lora_" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    if rows:
        (folder / "vocabulary.json").write_text(json.dumps({"rows": rows}))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    base, home = str(tiny_model("llama")), tmp_path_factory.mktemp("adapters")
    return base, {"red": make(base, home / "red", 1), "blue": make(base, home / "blue", 2, r=2, use_rslora=True, target_modules=["q_proj", "down_proj"])}


def oracle_answer(base, adapter, prompt, rows=None):
    """Eight greedy tokens of PEFT's model, for one prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if rows:
        grow(model, rows)
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    out = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                         max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[0, len(prompt):].tolist()


def answers(engine, requests):
    got, waiting = {name: [] for name in requests}, list(requests)
    while waiting or engine.has_work:
        if waiting:
            name = waiting.pop(0)
            engine.add(name, requests[name][1], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), requests[name][0])
        for event in engine.step():
            assert event.error is None
            got[event.request_id].append(event.token_id)
    return got


@pytest.mark.parametrize("together", [True, False])
def test_requests_of_several_adapters_and_of_the_base_share_steps(folders, together, monkeypatch):
    """Prompts are the same for all, so that keys and values of another adapter would be taken over if they could be."""
    base, adapters = folders
    if not together:
        from lit_llm.inference.forward import proof
        monkeypatch.setattr(proof, "obstacle", lambda model: "a test")
    engine, draw = Engine.load(base, adapters=adapters), random.Random(0)
    assert engine.adapters == {"red", "blue"}
    assert (engine.obstacle is None) == together
    prompts = [[draw.randrange(3, 60) for _ in range(length)] for length in (1, 20, 40)]
    requests = {f"{name}, {len(prompt)}, {turn}": (name, prompt) for turn in (0, 1) for prompt in prompts
             for name in ("red", None, "blue")}
    got, want = answers(engine, requests), {}
    for name in ("red", "blue", None):
        for prompt in prompts:
            want[name, len(prompt)] = oracle_answer(base, adapters.get(name), prompt)
    for key, (name, prompt) in requests.items():
        assert got[key] == want[name, len(prompt)], key
    assert want["red", 40] != want["blue", 40] != want[None, 40]


def test_an_unknown_adapter_is_refused(folders):
    base, adapters = folders
    with pytest.raises(InputError, match="no adapter 'green'"):
        Engine.load(base, adapters=adapters).add("one", [5], SamplingParams(), "green")


ROWS = list(range(20, 200, 3))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("kind", "rows"), [("llama", {"embed_tokens": ROWS, "lm_head": ROWS}), ("qwen3", ROWS), ("gemma2", ROWS), ("llama", ROWS)])
def test_trained_token_rows_belong_to_the_requests_of_their_adapter(kind, rows, together, tiny_model, tmp_path, monkeypatch):
    """In the prompt and in the answer; embedding and head are tied in two of the models, and one scales its embedding."""
    base = str(tiny_model(kind))
    adapters = {"rows": make(base, tmp_path / "rows", 1, trainable_token_indices=rows),
                "others": make(base, tmp_path / "others", 3, trainable_token_indices={"embed_tokens": [21, 23, 50]}),
                "head": make(base, tmp_path / "head", 4, target_modules=["q_proj", "lm_head"]),
                "plain": make(base, tmp_path / "plain", 2)}
    if not together:
        from lit_llm.inference.forward import proof
        monkeypatch.setattr(proof, "obstacle", lambda model: "a test")
    engine, draw = Engine.load(base, adapters=adapters), random.Random(0)
    assert (engine.obstacle is None) == together
    prompts = [[draw.randrange(3, 200) for _ in range(length)] for length in (1, 20, 40)]
    requests = {f"{name}, {len(prompt)}": (name, prompt) for prompt in prompts for name in ("rows", None, "plain", "others", "head")}
    got = answers(engine, requests)
    for key, (name, prompt) in requests.items():
        assert got[key] == oracle_answer(base, adapters.get(name), prompt), key
    assert any(id_ in ROWS for prompt in prompts for id_ in got[f"rows, {len(prompt)}"])        # the test sees replaced logits
    assert all(got[f"rows, {len(prompt)}"] != got[f"None, {len(prompt)}"] for prompt in prompts[1:])


def test_prompt_logprobs_with_trained_rows_are_pefts(tiny_model, tmp_path):
    """All tokens of a prompt are outputs then, beside a request of the base with only its last one."""
    base = str(tiny_model("llama"))
    adapter = make(base, tmp_path / "rows", 1, trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS})
    engine, prompt = Engine.load(base, adapters={"rows": adapter}), [20, 5, 23, 8, 26, 7]
    engine.add("base", [9, 8, 7], SamplingParams(max_tokens=1, temperature=0))
    engine.add("scored", prompt, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), "rows")
    (event,) = [event for event in engine.step() if event.request_id == "scored"]
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        want = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)[range(5), prompt[1:]]
    assert torch.allclose(torch.tensor([token.logprob for token in event.prompt_logprobs[1:]]), want, atol=1e-4)


def test_an_adapter_with_a_larger_vocabulary_leaves_the_base_as_it_was(tiny_model, tmp_path):
    """New tokens are for its own requests only: others neither generate them nor may send them."""
    base, rows = str(tiny_model("llama")), 330
    plain = make(base, tmp_path / "plain", 2)
    larger = make(base, tmp_path / "larger", 5, rows=rows, trainable_token_indices={"embed_tokens": ROWS + list(range(320, 330)), "lm_head": ROWS + list(range(320, 330))})
    engine, prompt = Engine.load(base, adapters={"larger": larger, "plain": plain}), [5, 20, 60, 7]
    assert engine.vocab_size == rows
    requests = {"larger": ("larger", [*prompt, 325]), "base": (None, prompt), "plain": ("plain", prompt)}
    got = answers(engine, requests)
    assert got["larger"] == oracle_answer(base, larger, [*prompt, 325], rows)
    assert got["plain"] == oracle_answer(base, plain, prompt)
    assert got["base"] == oracle_answer(base, None, prompt)
    for name in (None, "plain"):
        with pytest.raises(InputError, match="from 0 to 319; the vocabulary of another adapter is larger"):
            engine.add("no", [5, 325], SamplingParams(), name)
        engine.add(f"biased {name}", prompt, SamplingParams(max_tokens=1, logit_bias=((325, 100.0),)), name)
    drawn = [event.token_id for event in engine.step()]
    assert len(drawn) == 2
    assert max(drawn) < 320


@pytest.mark.parametrize(("keys", "reason"), [({"use_dora": True}, "more than LoRA"), ({"modules_to_save": ["lm_head"]}, "lm_head"),
                                              ({"target_modules": ["embed_tokens"]}, "embed_tokens"), ({"lora_bias": True}, "more than LoRA")])
def test_adapters_that_cannot_stay_apart_are_refused_with_the_way_to_serve_them(tiny_model, tmp_path, keys, reason):
    base = str(tiny_model("llama"))
    folder = make(base, tmp_path / "one", 1, **keys)
    with pytest.raises(InputError, match=reason) as error:
        Engine.load(base, adapters={"one": folder})
    assert "--adapter FOLDER" in str(error.value)
