"""If this breaks: the exported model differs from the one that the run trained and measured."""

import json
import logging
import warnings

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.models.adapters.adapter import load_adapter, save_adapter, wrap_peft
from lit_llm.models.adapters.merging import UnmergeableError, merge
from lit_llm.models.adapters.peft_method import UNFIT
from lit_llm.models.anatomy import causal_lm
from lit_llm.models.load import init_causal_lm, load_causal_lm, save_causal_lm
from tests.tiny_models import disturb

V = 96
NARROW = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
              max_position_embeddings=64, vocab_size=V, initializer_range=0.2)
SHAPES = {
    "untied": NARROW | dict(model_type="llama"),
    "tied": NARROW | dict(model_type="llama", tie_word_embeddings=True),
    "scaled": NARROW | dict(model_type="gemma3_text", head_dim=8, tie_word_embeddings=True),
    "scaled, untied": NARROW | dict(model_type="gemma3_text", head_dim=8, tie_word_embeddings=False),
    "conv1d": dict(model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=V,
                   initializer_range=0.2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "head bias": NARROW | dict(model_type="phi"),
}
IDS = torch.randint(0, V, (4, 24), generator=torch.Generator().manual_seed(3))
ARGS = {
    "AdaLoraConfig": {"total_step": 100}, "OFTConfig": {"r": 0, "oft_block_size": 8},
    "BOFTConfig": {"boft_block_size": 4}, "TrainableTokensConfig": {"token_indices": [3, 5]},
    "VBLoRAConfig": {"vector_length": 8, "num_vectors": 16}, "C3AConfig": {"block_size": 8},
    "FourierFTConfig": {"n_frequency": 20}, "WaveFTConfig": {"n_frequency": 20}, "RoadConfig": {"group_size": 8},
    "IA3Config": {"feedforward_modules": []},
}
METHODS = [name for name, kind in vars(peft).items() if isinstance(kind, type) and issubclass(kind, peft.PeftConfig)
           and name not in UNFIT and "target_modules" in kind.__dataclass_fields__]
UNMERGED = {"AdaptionPromptConfig", "LilyConfig", "BeftConfig", "AdamssConfig"}     # the last one needs scikit-learn
TARGETS = {"layers": ["q_proj", "c_attn"], "embedding": ["embed_tokens", "wte"], "head": ["lm_head"],
           "both": ["q_proj", "c_attn", "embed_tokens", "wte", "lm_head"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with random models of one layer, by kind."""
    made = {}
    for kind, shape in SHAPES.items():
        torch.manual_seed(1)
        model = init_causal_lm(shape, bos_token_id=None, eos_token_id=0, pad_token_id=0)
        if kind == "head bias":
            torch.nn.init.normal_(model.lm_head.bias, std=0.3)
        made[kind] = tmp_path_factory.mktemp("base") / "model"
        model.save_pretrained(made[kind])
    return made


def nll(model):
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1]:]
        return float(F.cross_entropy(logits[:, :-1].reshape(-1, V).double(), IDS[:, 1:].reshape(-1)))


def trained(base, spec):
    """A model whose adapters do something, and its nll."""
    torch.manual_seed(11)
    model = wrap_peft(load_causal_lm(str(base)), spec)
    disturb(model)
    return model, nll(model)


def exported(base, model, folder):
    """The NLL of an export of this model's checkpoint by plain transformers, and its config."""
    state = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    save_adapter(model, folder / "adapter", state, str(base))
    torch.manual_seed(12)
    merged = merge(load_adapter(load_causal_lm(str(base)), folder / "adapter"))
    save_causal_lm(merged, folder / "export", stop_ids=(0,), pad_id=0)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export")
    return nll(loaded), loaded


def spec_of(name, base, targets, **more):
    names = [name for name in TARGETS[targets] if (name in ("wte", "c_attn")) == ("gpt2" in base.joinpath(
        "config.json").read_text()) or name == "lm_head"]
    small = {"r": 4} if "r" in getattr(peft, name).__dataclass_fields__ else {}
    return {"class_path": name, "init_args": small | ARGS.get(name, {}) | {"target_modules": names} | more}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_merges_exports_what_was_trained(bases, tmp_path, name):
    """On layers, embedding, head and all three of a tied base; what cannot be done is refused before or at merging."""
    done = []
    for targets in TARGETS:
        try:
            model, want = trained(bases["tied"], spec_of(name, bases["tied"], targets))
            got, loaded = exported(bases["tied"], model, tmp_path / targets)
        except InputError:                          # a layer that the method does not know, or no way to merge it
            continue
        assert got == pytest.approx(want, rel=1e-5), targets
        parted = not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
        assert loaded.config.tie_word_embeddings is not parted
        done.append(targets)
    assert done or name in UNMERGED


LORA = {
    "plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "one adapter": {"ensure_weight_tying": True},
    "one dora": {"ensure_weight_tying": True, "use_dora": True}, "conv1d weights": {"fan_in_fan_out": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "c_attn": 2, "embed_tokens": 3, "wte": 3}},
    "pissa": {"init_lora_weights": "pissa"}, "fast pissa": {"init_lora_weights": "pissa_niter_4"},
    "mica": {"init_lora_weights": "mica"}, "biases": {"bias": "all"},
}


@pytest.mark.parametrize("way", LORA)
@pytest.mark.parametrize("kind", ["tied", "scaled", "conv1d"])
def test_every_way_of_lora_on_both_ends_of_a_tied_base(bases, tmp_path, kind, way):
    model, want = trained(bases[kind], spec_of("LoraConfig", bases[kind], "both", **LORA[way]))
    got, loaded = exported(bases[kind], model, tmp_path)
    assert got == pytest.approx(want, rel=1e-5)
    assert loaded.config.tie_word_embeddings == (way == "one adapter")


@pytest.mark.parametrize(("kind", "name", "targets", "more"), [
    ("scaled, untied", "HiraConfig", "both", {}), ("scaled", "TinyLoraConfig", "embedding", {}),
    ("scaled, untied", "LoraConfig", "embedding", {"use_dora": True}),
    ("head bias", "TrainableTokensConfig", "head", {}), ("head bias", "LoraConfig", "both", {}),
    ("tied", "LoraConfig", "head", {"trainable_token_indices": [3, 7]}),
    ("scaled", "LoraConfig", "layers", {"trainable_token_indices": [3, 7]}),
    ("conv1d", "LoraConfig", "layers", {"trainable_token_indices": {"wte": [3, 7]}}),
    ("tied", "LoraConfig", "layers", {"modules_to_save": ["lm_head"]}),
    ("conv1d", "LoraConfig", "layers", {"modules_to_save": ["lm_head"]}),
    ("tied", "LoraConfig", "layers", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("untied", "LoraConfig", "both", {}), ("untied", "LoHaConfig", "head", {}),
], ids=str)
def test_other_places_where_layers_share_or_scale_weights(bases, tmp_path, kind, name, targets, more):
    model, want = trained(bases[kind], spec_of(name, bases[kind], targets, **more))
    got, _ = exported(bases[kind], model, tmp_path)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["tied", "conv1d"])
def test_one_adapter_on_both_ends_stays_one_through_casts_and_steps(bases, tmp_path, kind):
    """PEFT's two parameters share a storage only until the first cast; then the file has two adapters."""
    model, _ = trained(bases[kind], spec_of("LoraConfig", bases[kind], "both", ensure_weight_tying=True))
    model.to(torch.float64)
    learn = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learn, lr=0.05)
    for _ in range(3):
        loss = F.cross_entropy(model(input_ids=IDS).logits[:, :-1].reshape(-1, V), IDS[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inner = causal_lm(model)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    turned = head.lora_B["default"].weight @ head.lora_A["default"].weight
    own = (embedding.lora_embedding_B["default"] @ embedding.lora_embedding_A["default"]).t()
    assert torch.allclose(turned, own, rtol=1e-12)
    model.to(torch.float32)
    want = nll(model)
    got, loaded = exported(bases[kind], model, tmp_path)
    assert got == pytest.approx(want, rel=1e-5)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    plain = peft.PeftModel.from_pretrained(load_causal_lm(str(bases[kind])), str(tmp_path / "adapter"))
    assert nll(plain) == pytest.approx(want, rel=1e-5)


def test_stage_3_refuses_an_adapter_that_two_layers_share(bases):
    """The head would be computed with an empty shard of the embedding's adapter."""
    from lit_llm.training.module import CausalLMModule
    from lit_llm.training.parallel.zero import ZeroStrategy
    from lit_llm.training.rules import table

    spec = spec_of("LoraConfig", bases["tied"], "both", ensure_weight_tying=True)
    module = CausalLMModule(base=str(bases["tied"]), peft=spec)
    table.check(table.Setup(module, ZeroStrategy(stage=2), 2))
    with pytest.raises(InputError, match="ensure_weight_tying"):
        table.check(table.Setup(module, ZeroStrategy(stage=3), 2))


def test_adapters_on_a_tied_matrix_are_explained(bases, caplog):
    """peft warns that merging may go wrong, which it does not here."""
    with caplog.at_level(logging.INFO, "lit_llm"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie_word_embeddings")
        model, _ = trained(bases["tied"], spec_of("LoraConfig", bases["tied"], "embedding"))
        merge(model)
        assert "adapters are on the embedding: the export will have two matrices" in caplog.text
        caplog.clear()
        trained(bases["tied"], spec_of("LoraConfig", bases["tied"], "layers", trainable_token_indices=[3, 7]))
    assert not caplog.text


def test_an_adapter_s_file_must_hold_what_its_config_names(bases, tmp_path):
    model, _ = trained(bases["tied"], spec_of("LoraConfig", bases["tied"], "layers"))
    exported(bases["tied"], model, tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(InputError, match="weights that its config names are missing"):
        load_adapter(load_causal_lm(str(bases["tied"])), tmp_path / "adapter")


def test_what_cannot_be_merged_says_so(bases):
    for more in ({"lora_bias": True}, {"alora_invocation_tokens": [5]}):
        model, _ = trained(bases["untied"], spec_of("LoraConfig", bases["untied"], "layers", **more))
        with pytest.raises(UnmergeableError, match="cannot be merged"):
            merge(model)
