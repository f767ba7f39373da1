"""If this breaks: tokens of a conversation attend to another conversation in the same packed sequence."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.kernels import attention
from lit_llm.models.load import init_causal_lm
from tests.conftest import SHAPES

KINDS = {
    "llama": SHAPES["llama"],
    "qwen3": SHAPES["qwen3"],
    "gpt2": SHAPES["gpt2"],
    "mistral": SHAPES["llama"] | {"model_type": "mistral", "sliding_window": 5},       # smaller than most documents
    "qwen2": SHAPES["llama"] | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
                                "max_window_layers": 1},                               # one layer full, one sliding
    "gemma3_text": SHAPES["llama"] | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5,
                                      "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": SHAPES["llama"] | {"model_type": "phi3", "pad_token_id": 0},
    "glm4": SHAPES["llama"] | {"model_type": "glm4", "head_dim": 8, "pad_token_id": 0},
    "olmo2": SHAPES["llama"] | {"model_type": "olmo2"},
    "granite": SHAPES["llama"] | {"model_type": "granite", "residual_multiplier": 0.3, "attention_multiplier": 0.4},
    "smollm3": SHAPES["llama"] | {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": 0},
    "cohere2": SHAPES["llama"] | {"model_type": "cohere2", "sliding_window": 4, "logit_scale": 0.5,
                                  "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": SHAPES["llama"] | {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": SHAPES["qwen3"] | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                                    "moe_intermediate_size": 32},
    "deepseek_v3": SHAPES["llama"] | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 16,
                                      "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
                                      "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                                      "first_k_dense_replace": 1, "moe_intermediate_size": 32},     # narrower values
}
LENGTHS = [[7, 12, 7, 1, 30, 7, 12], [3, 9, 5], [40], [6, 6, 6]]
VOCABULARY = 61


def pair(kind, plain="eager"):
    """The same random weights twice: packed, and as transformers runs them by itself."""
    torch.manual_seed(3)
    spec = KINDS[kind] | {"initializer_range": 0.2}
    packed = init_causal_lm(spec, attention="lit_varlen", vocab_size=VOCABULARY).eval()
    keys = {key: value for key, value in spec.items() if key != "model_type"}
    config = AutoConfig.for_model(spec["model_type"], **keys, vocab_size=VOCABULARY)
    alone = AutoModelForCausalLM.from_config(config, attn_implementation=plain).eval()
    alone.load_state_dict(packed.state_dict())
    return packed, alone


def row_of(documents):
    """One packed sequence as the loader makes it."""
    lengths = [len(document) for document in documents]
    borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return {"input_ids": torch.cat(documents)[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seqlens": borders, "max_seqlen": max(lengths), "attention_mask": None, "use_cache": False}


def some_documents(lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=draw) for length in lengths]


def losses(logits, ids):
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def packed_losses(model, documents):
    logits = model(**row_of(documents)).logits[0].split([len(document) for document in documents])
    return torch.cat([losses(*pair) for pair in zip(logits, documents, strict=True)])


def lone_losses(model, documents):
    return torch.cat([losses(model(input_ids=document[None], use_cache=False).logits[0], document)
                      for document in documents])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("kind", "plain"), [*((kind, "eager") for kind in KINDS), ("llama", "sdpa"),
                                             ("mistral", "sdpa")])
def test_every_token_has_the_loss_of_its_document_unpacked(kind, plain, record_property):
    packed, alone = pair(kind, plain)
    worst = 0.0
    with torch.no_grad():
        for lengths in LENGTHS:
            documents = some_documents(lengths)
            worst = max(worst, (packed_losses(packed, documents) - lone_losses(alone, documents)).abs().max().item())
    record_property("max_abs", worst)
    assert worst < 1e-5


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_unpacked_documents(kind, record_property):
    packed, alone = pair(kind)
    documents = some_documents(LENGTHS[0])
    packed_losses(packed, documents).sum().backward()
    lone_losses(alone, documents).sum().backward()
    worst = 0.0
    for (name, actual), (_, expected) in zip(packed.named_parameters(), alone.named_parameters(), strict=True):
        assert expected.grad is not None, name
        worst = max(worst, ((actual.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-6)).item())
    record_property("max_relative", worst)
    assert worst < 1e-5


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks(kind):
    """A changed token in one document changes no bit of other documents' logits and gradients."""
    packed, _ = pair(kind)
    documents = some_documents(LENGTHS[0])
    others = [document.clone() for document in documents]
    others[2] = (others[2] + 1) % VOCABULARY
    starts = row_of(documents)["cu_seqlens"].tolist()
    inside = torch.zeros(starts[-1], dtype=torch.bool)
    inside[starts[2]:starts[3]] = True
    with torch.no_grad():
        one, two = (packed(**row_of(batch_documents)).logits[0] for batch_documents in (documents, others))
    assert torch.equal(one[~inside], two[~inside])
    assert (one[inside] != two[inside]).any()
    embedded = packed.get_input_embeddings()(row_of(documents)["input_ids"]).detach().requires_grad_()
    row = row_of(documents)
    del row["input_ids"]
    packed(inputs_embeds=embedded, **row).logits[0][inside].sum().backward()
    assert (embedded.grad[0][~inside] == 0).all()
    assert (embedded.grad[0][inside] != 0).any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_against_a_loop_over_queries(window, groups):
    """Brute force in float64: each query's softmax over the keys that it may see."""
    torch.manual_seed(5)
    heads, width, borders = 4, 6, [0, 5, 5, 12, 17, 18]
    query = torch.randn(1, heads, 18, width, dtype=torch.float64)
    key, value = (torch.randn(1, heads // groups, 18, width, dtype=torch.float64) for _ in range(2))
    out, weights = attention.lit_varlen(torch.nn.Identity(), query, key, value, None, scaling=0.3,
                                        cu_seqlens=torch.tensor(borders, dtype=torch.int32), sliding_window=window)
    assert weights is None
    want = torch.empty_like(out)
    for start, stop in itertools.pairwise(borders):
        for at in range(start, stop):
            first = start if window is None else max(start, at - window + 1)
            for head in range(heads):
                seen = key[0, head // groups, first:at + 1]
                share = (seen @ query[0, head, at] * 0.3).softmax(0)
                want[0, at, head] = share @ value[0, head // groups, first:at + 1]
    assert (out - want).abs().max() < 1e-12


def test_dropout_is_drawn_in_training_only():
    states = torch.randn(1, 2, 9, 4)
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    layer = torch.nn.Identity()

    def run():
        return attention.lit_varlen(layer, states, states, states, None, cu_seqlens=borders, dropout=0.5)[0]

    assert not torch.equal(run(), run())
    layer.eval()
    assert torch.equal(run(), run())


def test_a_mask_or_no_borders_is_refused():
    states = torch.randn(1, 2, 4, 4)
    for mask, borders in ((torch.ones(1, 1, 4, 4), torch.tensor([0, 4])), (None, None)):
        with pytest.raises(InputError, match="could not be isolated"):
            attention.lit_varlen(torch.nn.Identity(), states, states, states, mask, cu_seqlens=borders)


@pytest.mark.parametrize(("kind", "keys"), [
    ("gemma2", {"head_dim": 8, "num_key_value_heads": 2}),                              # caps its scores
    ("gpt_oss", {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks
    ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),    # convolutions
    ("llama4_text", {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 1}), # chunks
    ("nemotron", {"num_key_value_heads": 2}),                                           # keeps our keywords to itself
    ("doge", {"num_key_value_heads": 2}),                                               # makes a mask of its own
    ("mamba", {}), ("bloom", {}), ("falcon", {}), ("gptj", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}),
])
def test_what_cannot_be_kept_apart_is_refused(kind, keys):
    base = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config_keys = AutoConfig.for_model(kind).to_dict()
    spec = {key: value for key, value in base.items() if key in config_keys} | keys
    with pytest.raises(InputError, match=r"packed|documents"):
        init_causal_lm(spec | {"model_type": kind}, attention="lit_varlen", vocab_size=VOCABULARY)(
            **row_of(some_documents([4, 5])))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_under_autocast_attention_is_in_half_precision(kind, monkeypatch):
    """Rotary embeddings convert queries and keys to float32; CUDA's kernel supports half precision only."""
    seen = set()
    flash = attention._flash
    monkeypatch.setattr(attention, "_flash", lambda query, dropout: seen.add(query.dtype) or flash(query, dropout))
    packed, alone = pair(kind, "sdpa")
    documents = some_documents([20, 9])
    with torch.autocast("cpu", torch.bfloat16):
        actual = packed_losses(packed, documents).float()
        expected = torch.cat([losses(alone(input_ids=document[None], use_cache=False).logits[0], document)
                              for document in documents]).float()
    assert seen == {torch.bfloat16}
    torch.testing.assert_close(actual, expected, atol=3e-2, rtol=3e-2)
