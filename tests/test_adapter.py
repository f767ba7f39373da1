"""If this breaks: adapters miss layers, change the base's output before training, or are saved in a form that PEFT cannot load."""

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llm.errors import InputError
from lit_llm.models import anatomy
from lit_llm.models.adapters.adapter import has_virtual_tokens, is_peft, load_adapter, save_adapter, wrap_peft
from lit_llm.models.adapters.merging import merge
from lit_llm.models.adapters.peft_method import LoRA, adds_virtual_tokens, spec_of
from lit_llm.models.adapters.trained_rows import chooses_rows, row_obstacle
from lit_llm.models.load import load_causal_lm, save_causal_lm
from tests.tiny_models import IDS, KINDS, disturb, logits


def is_linear(layer):
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_adapts_every_linear_layer_but_the_head_and_starts_at_the_base(tiny_model, kind):
    base = load_causal_lm(tiny_model(kind))
    linears = {name for name, layer in base.named_modules() if is_linear(layer) and name != "lm_head"}
    before = logits(base)
    model = wrap_peft(base, LoRA(r=4).as_peft())
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    adapted = {name.removeprefix("base_model.model.") for name in layers}
    assert adapted == linears
    assert len(linears) == {"llama": 14, "qwen3": 14, "gpt2": 8}[kind]
    assert torch.equal(logits(model), before)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name), name
        if "lora_B" in name:
            assert (weight == 0).all()
        if "lora_A" in name:
            assert weight.abs().sum() > 0
    count = anatomy.count_parameters(model)
    assert count.trainable == sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)
    assert count.total == sum(w.numel() for w in model.parameters())
    assert f"{count.trainable:,} of {count.total:,}" in str(count)


METHODS = {
    "LoraConfig": {"r": 4, "use_dora": True}, "LoHaConfig": {"r": 4}, "IA3Config": {},
    "VeraConfig": {"r": 4}, "OFTConfig": {"r": 0, "oft_block_size": 8}, "AdaLoraConfig": {"total_step": 100},
    "RandLoraConfig": {"r": 4},
    "TrainableTokensConfig": {"token_indices": [3, 5]}, "VBLoRAConfig": {"vector_length": 8, "num_vectors": 16},
    "AdaptionPromptConfig": {"adapter_layers": 1, "adapter_len": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3}, "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


NEARLY = {"VBLoRAConfig": 0.1}                      # starts close to the base, not at it
UNMERGED = ("PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig")


@pytest.mark.parametrize("name", METHODS)
def test_any_peft_method(tiny_model, tmp_path, name):
    """Starts at the base, is trained, is saved in PEFT's format, isolates packed documents, and merges or is refused."""
    from peft import PeftModel

    spec = {"class_path": f"peft.{name}", "init_args": METHODS[name]}
    base = load_causal_lm(tiny_model("llama"))
    before = logits(base)
    model = wrap_peft(base, spec)
    prompt = has_virtual_tokens(model)
    assert prompt == adds_virtual_tokens(spec) == (name in UNMERGED[:2])
    assert 0 < anatomy.count_parameters(model).trainable < anatomy.count_parameters(model).total
    if not prompt:
        assert (logits(model) - before).abs().max() < NEARLY.get(name, 1e-5)
    disturb(model)
    want = logits(model)
    assert not torch.allclose(want, before, atol=1e-3)
    state = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    save_adapter(model, tmp_path, state, "the/base")
    again = PeftModel.from_pretrained(load_causal_lm(tiny_model("llama")), str(tmp_path))
    assert (logits(again) - want).abs().max() < 1e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    if not prompt:
        packed = load_adapter(load_causal_lm(tiny_model("llama"), attention="lit_varlen"), tmp_path).eval()
        assert (two_in_a_row(packed) - torch.cat([want[0], want[0]])).abs().max() < 1e-5
    if name in UNMERGED:
        with pytest.raises(InputError, match="cannot be merged"):
            merge(model)
    else:
        merged = merge(model)
        assert not is_peft(merged)
        assert (logits(merged) - want).abs().max() < 1e-4


def two_in_a_row(model):
    with torch.no_grad():
        length = IDS.shape[1]
        return anatomy.head(model)(anatomy.backbone(model)(
            input_ids=IDS.repeat(1, 2), position_ids=torch.arange(length).repeat(2)[None], attention_mask=None,
            use_cache=False, cu_seqlens=torch.tensor([0, length, 2 * length], dtype=torch.int32),
            max_seqlen=length).last_hidden_state[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_the_adapter(tiny_model, kind):
    model = wrap_peft(load_causal_lm(tiny_model(kind)), LoRA(r=4).as_peft())
    disturb(model)
    want = logits(model)
    merged = merge(model)
    assert (logits(merged) - want).abs().max() < 1e-4
    assert merge(merged) is merged
    if kind == "qwen3":
        assert anatomy.head(merged).weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)                # untied, tied, and GPT-2's tied names
@pytest.mark.parametrize("way", ["plain", "dora", "AdaLora"])
def test_rows_of_single_tokens_learn_beside_the_adapters(tiny_model, tmp_path, kind, way):
    """Trained rows start at the base, are saved and loaded, and change only the merged rows; tied weights stay tied."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = {"plain": LoRA(r=4).as_peft(), "dora": LoRA(r=4, dora=True).as_peft(),
            "AdaLora": {"class_path": "AdaLoraConfig", "init_args": {"total_step": 100}}}[way]
    base = load_causal_lm(tiny_model(kind))
    before, old = logits(base), anatomy.head(base).weight.detach().clone()
    tied = anatomy.head(base).weight is base.get_input_embeddings().weight
    assert row_obstacle(base, spec) is None
    assert not chooses_rows(base, spec)
    model = wrap_peft(base, spec, tokens=[9, 5])
    deltas = {name: weight for name, weight in model.named_parameters() if "tokens_delta" in name}
    assert len(deltas) == (1 if tied else 2)
    assert (logits(model) - before).abs().max() <= (0.0 if way == "plain" else 1e-5)
    disturb(model)
    want, rows = logits(model), list(deltas.values())[-1].detach().clone()
    state = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    save_adapter(model, tmp_path / "adapter", state, tiny_model(kind))
    for again in (PeftModel.from_pretrained(load_causal_lm(tiny_model(kind)), str(tmp_path / "adapter")),
                  load_adapter(load_causal_lm(tiny_model(kind)), tmp_path / "adapter", trainable=True)):
        assert (logits(again) - want).abs().max() < 1e-5
    assert sum(weight.requires_grad for name, weight in again.named_parameters() if "tokens_delta" in name) == len(deltas)
    merged = merge(model)
    save_causal_lm(merged, tmp_path / "merged", stop_ids=(2,), pad_id=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(loaded) - want).abs().max() < 1e-4
    new = loaded.get_output_embeddings().weight
    assert torch.equal(new[[5, 9]], rows)
    others = torch.ones(len(new), dtype=torch.bool)
    others[[5, 9]] = False
    assert torch.equal(new[others], old[others])
    assert (new is loaded.get_input_embeddings().weight) == tied


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(part.numel() for part in torch.utils._pytree.tree_leaves(out)
                                        if isinstance(part, torch.Tensor) and not part._is_view())])
        return out


@pytest.mark.parametrize("tokens", [[9, 5], [31, 7, 200]])
def test_embeddings_of_rows_that_learn_are_peft_s_without_a_copy_of_the_matrix(tiny_model, tokens):
    """Bit-identical forward and backward; the copy of a matrix with 128k rows would cost more than a layer."""
    base = load_causal_lm(tiny_model("llama"))
    layer = wrap_peft(base, LoRA(r=4).as_peft(), tokens=tokens).get_input_embeddings().token_adapter
    layer.base_layer.padding_idx = tokens[1]                    # padding is looked up but not trained
    rows = layer.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows += torch.randn_like(rows)
    ids = torch.tensor([[5, 9, 200, 31, 31, 7, 300, 9]])
    toward = torch.randn(1, 8, rows.shape[1])
    embeddings, (wanted, peft_embeddings) = layer(ids), [type(layer).forward(layer, ids) for _ in range(2)]
    assert torch.equal(embeddings, wanted)
    got, want = (torch.autograd.grad((out * toward).sum(), rows)[0] for out in (embeddings, peft_embeddings))
    assert torch.equal(got, want)
    assert got.abs().sum() > 0
    sizes = []
    for call in (layer, lambda ids: type(layer).forward(layer, ids)):
        with Largest() as largest:
            call(ids).sum().backward()
        sizes.append(largest.numel)
    assert sizes[1] == layer.base_layer.weight.numel() > 20 * sizes[0]


@pytest.mark.parametrize("keys", [
    {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ".*lm_head"},
    {"trainable_token_indices": None}])
def test_a_spec_that_trains_rows_itself_is_unchanged(tiny_model, keys):
    base = load_causal_lm(tiny_model("llama"))
    assert chooses_rows(base, {"class_path": "LoraConfig", "init_args": keys})


def test_what_cannot_train_rows_says_why(tiny_model):
    base = load_causal_lm(tiny_model("llama"))
    assert "LoHaConfig cannot train single rows" in row_obstacle(base, {"class_path": "LoHaConfig"})
    base.lm_head.bias = nn.Parameter(torch.zeros(320))
    assert "bias" in row_obstacle(base, LoRA().as_peft())


@pytest.mark.parametrize(("spec", "message"), [
    ({"class_path": "LoarConfig"}, "Did you mean 'LoraConfig'?"),
    ({"class_path": "peft.LoraConfig", "init_arg": {}}, "'init_arg' is unknown"),
    ({"init_args": {"r": 3}}, "give class_path"),
    ({"class_path": "peft.LoraModel"}, "is unknown"),
    ({"class_path": "os.system"}, "is unknown"),
    ({"class_path": "LoraConfig", "init_args": {"rank": 3}}, "LoraConfig has no key 'rank'"),
    ({"class_path": "LoraConfig", "init_args": {"lora_alhpa": 3}}, "Did you mean 'lora_alpha'?"),
    ({"class_path": "LoraConfig", "init_args": {"target_modules": ["c_attn"]}}, "its linear layers: down_proj, "),
    ({"class_path": "LoraConfig", "init_args": {"r": 0}}, "model.peft"),
    ({"class_path": "LoraConfig", "init_args": {"r": "many"}}, "model.peft"),
    ({"class_path": "PromptTuningConfig"}, "model.peft"),
    ({"class_path": "XLoraConfig"}, "is unknown"),
    ({"class_path": "AdaLoraConfig"}, "total_step"),
])
def test_a_wrong_adapter_is_a_user_error(tiny_model, spec, message):
    with pytest.raises(InputError) as caught:
        wrap_peft(load_causal_lm(tiny_model("llama")), spec)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_one_way_to_ask_for_adapters():
    long = {"class_path": "LoHaConfig"}
    assert spec_of(None, None) is None
    assert spec_of(long, None) == long
    assert spec_of(None, LoRA(r=3, alpha=5))["init_args"]["lora_alpha"] == 5
    with pytest.raises(InputError, match="keep one"):
        spec_of(long, LoRA())
