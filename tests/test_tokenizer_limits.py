"""If this breaks: the tokenizer.json of a downloaded model takes all memory, never ends, or causes a panic of the Rust library."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from lit_llm.errors import InputError
from lit_llm.text import tokenizer_limits
from lit_llm.text.tokenizer import Tokenizer
from tests.test_cli import call, place

assert place                                        # a fixture


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern or {"String": "e"}, "content": content}


TOKEN = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
SINGLE, PAIR = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
HOSTILE = {
    "exponential": {"pre_tokenizer": split("(a+)+$|.")},
    "exponential with spaces": {"pre_tokenizer": split(r"(\w+\s?)+!")},
    "alternatives": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("(a|b|ab)*c")]}},
    "cubic": {"pre_tokenizer": split("[a-z ]*[a-z ]*[a-z ]*!")},
    "optional": {"pre_tokenizer": split("a?" * 40 + "a" * 40)},
    "in a normalizer": {"normalizer": replace("x", Regex="([a-z ]+)+!")},
    "long pattern": {"pre_tokenizer": split("a" * 20_000)},
    "growth": {"normalizer": replace("x" * 100_000)},
    "growth by a pattern": {"normalizer": replace("x" * 100, Regex="[a-z]")},
    "growth by nothing": {"normalizer": replace("x" * 100, Regex="")},
    "growth in steps": {"normalizer": {"type": "Sequence", "normalizers": [replace("ee")] * 40}},
    "before": {"normalizer": {"type": "Prepend", "prepend": "x" * 10_000_000}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [replace("ee")] * 40}},
    "around": {"post_processor": {
        "type": "TemplateProcessing", "single": [TOKEN] * 10_000 + [SINGLE], "pair": [SINGLE, PAIR],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0] * 9, "tokens": ["<|endoftext|>"] * 9}}}},
    "padding": {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<|endoftext|>"}},
    "words": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##",
                        "max_input_chars_per_word": 10**12}},
    "types": {"normalizer": {"type": "Replace", "pattern": 5, "content": None}}, "list": {"decoder": [[]], "model": []},
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "%%"}}}
PUBLISHED = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+",
    "deepseek-v3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                   r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek-digits": r"\p{N}{1,3}", "deepseek-chinese": "[一-龥぀-ゟ゠-ヿ]+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
UNUSUAL = [r"(?<=\d)(?=(?:\d{3})+$)", r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s", "(?:<[a-z]+>)+"]


def changed(folder, target, keys):
    """A copy of a tokenizer with other rules."""
    shutil.copytree(folder, target)
    file = Path(target, "tokenizer.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return str(target)


@pytest.mark.parametrize("keys", HOSTILE.values(), ids=HOSTILE)
def test_rules_without_a_bound_are_refused_before_they_are_used(keys, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_limits, "CPU", 2)
    folder = changed(tiny_tokenizer, tmp_path / "bad", keys)
    began = time.monotonic()
    with pytest.raises(InputError, match=re.escape(folder)):
        Tokenizer.load(folder)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rules_are_known(name, monkeypatch):
    """They cost no process at the start."""
    monkeypatch.setattr(tokenizer_limits.subprocess, "run", lambda *_, **__: pytest.fail("tried"))
    tokenizer_limits._check({"pre_tokenizer": split(PUBLISHED[name])})


def test_unusual_rules_are_tried_once_and_remembered(tiny_tokenizer, tmp_path, monkeypatch):
    rules = [split(pattern) for pattern in UNUSUAL]
    keys = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*rules, {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}}
    folder = changed(tiny_tokenizer, tmp_path / "unusual", keys)
    tokenizer_limits.check_folder(folder)
    monkeypatch.setattr(tokenizer_limits.subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    tokenizer_limits._good.clear()                  # as in another process
    assert Tokenizer.load(folder).encode_text("Tom has 1234567 kites")


def test_real_tokenizers_pass(shared_data, monkeypatch):
    monkeypatch.setattr(tokenizer_limits.subprocess, "run", lambda *_, **__: pytest.fail("tried"))
    files = sorted(shared_data.rglob("tokenizer.json"))
    assert files
    for file in files:
        tokenizer_limits.check_folder(str(file.parent))


def test_text_is_neither_cut_nor_padded(tiny_tokenizer, tmp_path):
    keys = {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 3}}
    plain, cut = Tokenizer.load(tiny_tokenizer), Tokenizer.load(changed(tiny_tokenizer, tmp_path / "cut", keys))
    assert cut.encode_text("Tom has a red kite.") == plain.encode_text("Tom has a red kite.")


def test_a_panic_in_rust_is_a_user_error(tiny_tokenizer, tmp_path, monkeypatch):
    """Where the trial let a pattern through: it ends the record, not the program."""
    monkeypatch.setattr(tokenizer_limits, "_check_patterns", lambda _: None)
    folder = changed(tiny_tokenizer, tmp_path / "bad", {"pre_tokenizer": split("(b+)+c|.")})
    tokenizer = Tokenizer.load(folder)
    for read in (tokenizer.encode_text, lambda text: tokenizer.encode_pieces([(piece := tokenizer_piece("Tom")),
                                                                              piece._replace(text=text)])[1]):
        result = None
        try:
            result = read("b" * 60)
        except InputError as error:
            result = error
        assert isinstance(result, InputError)
        assert str(Path(folder, "tokenizer.json")) in str(result)


def tokenizer_piece(text):
    from lit_llm.text.cutting import Piece

    return Piece("", text)


def test_commands_end_in_a_line(place, tiny_model):
    folder = changed(tiny_model("llama"), Path("base"), HOSTILE["exponential"])
    for words in (["inspect", "--config", "ok.yaml", "--data.tokenizer", folder], ["prepare", "--config", "ok.yaml",
                  "--data.tokenizer", folder], ["chat", "--model", folder, "--prompt", "a"]):
        code, _, err = call(*words)
        assert code == 2
        assert "Traceback" not in err
        assert "tokenizer.json" in err
