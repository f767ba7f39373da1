"""If this breaks: a model is trained or served with wrong tokens, or a correct tokenizer is refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lit_llm.errors import InputError
from lit_llm.names import resolve
from lit_llm.text.tokenizer import Tokenizer


def copied(source, folder, **keys):
    """A tokenizer's folder with other keys in its config."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | keys))
    return str(folder)


@pytest.fixture(scope="module", params=["gpt2", "minimind", "stories", "toy", "qwen2"])
def real(request, tmp_path_factory):
    """A real tokenizer's folder, with a tokenizer.json."""
    if request.param == "toy":
        return resolve("sample:tokenizer")
    data = request.getfixturevalue("shared_data")
    if request.param in ("minimind", "stories"):
        return str(data / {"minimind": "tokenizers/minimind", "stories": "models/stories260K-hf"}[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"} if request.param == "gpt2" else {}
    for file in (data / "tokenizers" / request.param).iterdir():
        shutil.copy(file, folder / names.get(file.name, file.name))
    if names:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    return str(folder / "saved")


def test_real_tokenizers_are_read_as_their_files_say(real, tmp_path):
    """Also with settings that a config may change: a space before the text, added tokens, and tokens around it."""
    folders = [real]
    if Path(real, "tokenizer.json").stat().st_size < 3_000_000:
        folders += [copied(real, tmp_path / "spaced", add_prefix_space=True),
                    copied(real, tmp_path / "bare", add_prefix_space=False, add_bos_token=True),
                    copied(real, tmp_path / "more", additional_special_tokens=["<|new|>", "world"])]
    text = "Once upon a time, 3.14 naïve cafés\n  你好，世界！"
    for folder in folders:
        wanted = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
        assert Tokenizer.load(folder).encode_text(text) == wanted


@pytest.mark.parametrize("rule", [
    {"type": "Whitespace"},
    {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}], ids=str)
def test_a_tokenizer_that_is_loaded_with_other_rules_is_refused(tiny_tokenizer, tmp_path, rule, monkeypatch):
    """As if a release of transformers put a rule of its own before those in the file."""
    folder = copied(tiny_tokenizer, tmp_path / "tokenizer")
    Tokenizer.load(folder)
    own = AutoTokenizer.from_pretrained

    def other(path, **keys):
        hf = own(path, **keys)
        rules = json.loads(hf.backend_tokenizer.to_str())
        rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [rule, rules["pre_tokenizer"]]}
        hf.backend_tokenizer.pre_tokenizer = type(hf.backend_tokenizer).from_str(json.dumps(rules)).pre_tokenizer
        return hf

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", other)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")        # files that were compared are not compared again
    with pytest.raises(InputError, match=r"transformers tokenizes .* its tokenizer.json gives") as caught:
        Tokenizer.load(folder)
    assert "PreTrainedTokenizerFast" in str(caught.value)
    assert len(str(caught.value)) < 900


def test_a_class_whose_rules_are_not_the_file_s_is_refused_and_the_fix_helps(shared_data, tmp_path):
    """What transformers 5 really does: the class that the config names is built anew from the vocabulary."""
    source = shared_data / "tokenizers" / "minimind"
    with pytest.raises(InputError, match=r"'Ġ3', '.', '14'") as caught:
        Tokenizer.load(copied(source, tmp_path / "qwen", tokenizer_class="Qwen2TokenizerFast"))
    assert "tokenizer_class" in str(caught.value)
    Tokenizer.load(copied(source, tmp_path / "right", tokenizer_class="PreTrainedTokenizerFast"))
