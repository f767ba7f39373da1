"""If this breaks: a model served in 4 or 8 bits needs the memory of the whole, or answers something else than it computes.

Oracle: the exact model, and transformers' own loading with the same bitsandbytes config.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_llm.errors import InputError
from lit_llm.inference.engine import Engine
from lit_llm.inference.sampling import SamplingParams
from tests.inference.test_adapters import make

CONFIGS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
           "int8": {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Large enough that blocks of 64 weights fill its rows."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantized")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_requests_share_steps_and_answers_are_those_of_the_quantized_model(base, kind, capfd):
    pytest.importorskip("bitsandbytes")
    engine, exact = Engine.load(base, quantize=kind), AutoModelForCausalLM.from_pretrained(base)
    assert engine.obstacle is None
    linear = [layer.weight for name, layer in engine.model.named_modules() if name.endswith("_proj")]
    assert sum(weight.untyped_storage().nbytes() for weight in linear) <= {"nf4": 0.5, "int8": 1}[kind] * sum(
        layer.weight.numel() for name, layer in exact.named_modules() if name.endswith("_proj"))
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**CONFIGS[kind]), device_map={"": "cpu"}).eval()
    prompts = {f"r{at}": [at + 3] * (at * 7 + 1) for at in range(5)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=0))
    got = {event.request_id: event for event in engine.step()}
    for name, prompt in prompts.items():
        with torch.no_grad():
            want = plain(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert got[name].error is None
        assert abs(got[name].logprob.logprob - float(want[got[name].token_id])) < 0.02
        assert want.max() - want[got[name].token_id] < 0.02
    assert "MatMul8bitLt" not in capfd.readouterr().err


def test_an_adapter_stays_unmerged_on_quantized_weights(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = make(base, tmp_path / "one", 1)
    with pytest.raises(InputError, match="NAME=FOLDER"):
        Engine.load(base, quantize="nf4", adapter=folder)
    engine = Engine.load(base, quantize="nf4", adapters={"one": folder})
    for name in (None, "one"):
        engine.add(str(name), [5, 6, 7], SamplingParams(max_tokens=8, temperature=0), name)
    got = {"None": [], "one": []}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            got[event.request_id].append(event.token_id)
    assert got["None"] != got["one"]


def test_another_quantization_is_refused(base):
    with pytest.raises(InputError, match="nf4 or int8"):
        Engine.load(base, quantize="int3")
