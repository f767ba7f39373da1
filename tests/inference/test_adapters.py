"""If this breaks: a request is answered by another adapter than it names, or adapters of one step change each other.

Oracle: PEFT's own model of each adapter, which generates for each prompt alone.
"""

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams

ALL = "all-linear"


def make(base, folder, seed, **keys):
    """A LoRA adapter with random weights that change answers."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **keys}))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    base, home = str(tiny_model("llama")), tmp_path_factory.mktemp("adapters")
    return base, {"red": make(base, home / "red", 1), "blue": make(base, home / "blue", 2, r=2, use_rslora=True, target_modules=["q_proj", "down_proj"])}


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
        oracle = AutoModelForCausalLM.from_pretrained(base).eval()
        if name:
            oracle = PeftModel.from_pretrained(oracle, adapters[name]).eval()
        for prompt in prompts:
            out = oracle.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                  max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
            want[name, len(prompt)] = out[0, len(prompt):].tolist()
    for key, (name, prompt) in requests.items():
        assert got[key] == want[name, len(prompt)], key
    assert want["red", 40] != want["blue", 40] != want[None, 40]


def test_an_unknown_adapter_is_refused(folders):
    base, adapters = folders
    with pytest.raises(InputError, match="no adapter 'green'"):
        Engine.load(base, adapters=adapters).add("one", [5], SamplingParams(), "green")


@pytest.mark.parametrize(("keys", "reason"), [({"use_dora": True}, "more than LoRA"), ({"modules_to_save": ["lm_head"]}, "lm_head"),
                                              ({"trainable_token_indices": [3]}, "embed_tokens"),
                                              ({"target_modules": ["lm_head"]}, "lm_head"), ({"lora_bias": True}, "more than LoRA")])
def test_adapters_that_cannot_stay_apart_are_refused_with_the_way_to_serve_them(tiny_model, tmp_path, keys, reason):
    base = str(tiny_model("llama"))
    folder = make(base, tmp_path / "one", 1, **keys)
    with pytest.raises(InputError, match=reason) as error:
        Engine.load(base, adapters={"one": folder})
    assert "--adapter FOLDER" in str(error.value)
