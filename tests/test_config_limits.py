"""If this breaks: the config of a downloaded model keeps `plan`, `fit` or `chat` busy forever, or takes all memory."""

import json
import shutil
import time
from pathlib import Path

import pytest

from lit_llm.errors import InputError
from lit_llm.models import load as model
from lit_llm.models.load import init_causal_lm, load_causal_lm, skeleton, stored_dtype
from lit_llm.system import config_limits
from lit_llm.text.tokenizer_file import load_fast
from tests.conftest import NARROW
from tests.test_cli import call, place

assert place                                        # a fixture
LLAMA = NARROW | {"model_type": "llama", "vocab_size": 320}
WRONG = {
    "layers": {"num_hidden_layers": 10_000_000}, "negative layers": {"num_hidden_layers": -1},
    "width": {"hidden_size": 10**9}, "huge": {"hidden_size": 10**30}, "text": {"hidden_size": "abc"},
    "vocabulary": {"vocab_size": 10**12}, "no number": {"hidden_size": float("nan")}, "true": {"num_hidden_layers": True},
    "half": {"num_attention_heads": 2.5}, "list": {"num_hidden_layers": [2, 10**9]}, "inner": {"intermediate_size": 10**15},
    "heads": {"num_attention_heads": 10**8, "hidden_size": 4}, "epsilon": {"rms_norm_eps": float("nan")},
    "endless": {"initializer_range": float("inf")}}
HIDDEN_IN = {"mapping": {"hidden_size": {"a": 1}}, "list": {"hidden_size": [32]}, "rope": {"rope_parameters": 5},
             "type": {"model_type": ["llama"]}, "dtype": {"dtype": "__class__"}}


def changed(folder, target, keys):
    """A copy of a model with other keys in its config."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return str(target)


@pytest.mark.parametrize("keys", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_refused_by_name_and_value(keys, tiny_model, tmp_path):
    folder, name = changed(tiny_model("llama"), tmp_path / "base", keys), next(iter(keys))
    began = time.monotonic()
    for read in (load_causal_lm, stored_dtype, load_fast, lambda base: skeleton(base, None)):
        with pytest.raises(InputError, match=f"{name} is ") as error:
            read(folder)
        assert "config.json" in str(error.value)
    for build in (init_causal_lm, lambda init: skeleton(None, init)):
        with pytest.raises(InputError, match=f"model.init: {name} is "):
            build(LLAMA | keys)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("keys", HIDDEN_IN.values(), ids=HIDDEN_IN)
def test_other_types_are_user_errors(keys, tiny_model, tmp_path):
    folder = changed(tiny_model("llama"), tmp_path / "base", keys)
    for read in (load_causal_lm, lambda base: skeleton(base, None)):
        try:
            read(folder)
        except InputError:
            continue
        assert "dtype" in keys                      # which transformers drops


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": ' + "[" * 100_000, "\0"])
def test_a_config_that_is_none(text, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (folder / "config.json").write_text(text)
    for read in (load_causal_lm, stored_dtype, load_fast, lambda base: skeleton(base, None)):
        with pytest.raises(InputError, match=r"config\.json"):
            read(str(folder))


def test_what_names_do_not_tell_is_counted_while_it_is_built(tiny_model, tmp_path, monkeypatch):
    """Sizes that are valid separately, weights that are not in the files, and an endless number of layers."""
    with pytest.raises(InputError, match=r"more than 20,000,000,000,000 parameters"):
        skeleton(None, LLAMA | {"hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 2})
    monkeypatch.setattr(config_limits, "installed_memory", lambda: 1_000_000)
    with pytest.raises(InputError, match="this machine has 0 GB of memory"):
        init_causal_lm(LLAMA | {"intermediate_size": 4096})
    folder = changed(tiny_model("llama"), tmp_path / "base", {"num_hidden_layers": 2000})
    for read in (load_causal_lm, lambda base: skeleton(base, None)):
        with pytest.raises(InputError, match="more than its weight files can contain"):
            read(folder)
    monkeypatch.setattr(config_limits, "SECONDS", 0.0)
    with pytest.raises(InputError, match="building it takes more than 0 seconds"):
        skeleton(None, LLAMA)
    assert not model.torch.nn.modules.module._global_parameter_registration_hooks


def test_the_default_configs_of_all_architectures_pass():
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    passed = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            keys = AutoConfig.for_model(kind).to_dict()
        except Exception:
            continue
        config_limits.check(keys, kind)
        passed += 1
    assert passed > 100


@pytest.mark.parametrize("words", [["plan"], ["fit"], ["inspect"], ["validate"], ["chat"]], ids=" ".join)
def test_each_command_refuses_it_soon(words, place, tiny_model):
    folder = changed(tiny_model("llama"), Path("base"), {"num_hidden_layers": 10_000_000})
    began = time.monotonic()
    arguments = ["--model", folder, "--prompt", "a"] if words == ["chat"] else ["--config", "ok.yaml", "--model.base", folder]
    code, _, err = call(*words, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "num_hidden_layers is 10,000,000; at most 2,000 is allowed" in err
    assert time.monotonic() - began < 20
