"""Load a fast tokenizer, and check that transformers tokenizes as the `tokenizer.json` specifies.

Releases of transformers 5 rebuild some tokenizers from their vocabulary, with the rules of the class that
`tokenizer_config.json` names instead of the rules in the file. A model then gets other tokens than in its training.
"""

import json
from pathlib import Path
from typing import Any

from lit_llm import hub, names
from lit_llm.errors import InputError
from lit_llm.system import config_limits
from lit_llm.text import tokenizer_limits

STRESS = (
    "Hello world", " leading", "   three spaces   between\t\ttabs\n\n\nlines \r\n windows \r\n", "\n",
    "a\u00a0b\u3000c\u2009d",
    "don't you're I'LL we've 3.14 1,234,567 2024-05-06 0x1F 100000000", "ünï çødé naïve e\u0301a\u0308 \ufb01 Ⅷ ½ ①",
    "你好，世界！今天天气很好。「引号」 こんにちは ｶﾀｶﾅ 안녕하세요", "👍🏽 👨\u200d👩\u200d👧 🇨🇳 ☃\ufe0f",
    "مرحبا שלום नमस्ते ไทย Привет Ελληνικά", "ⓐ ẞ ſ İ ı", "....!!!???----====____", "x" * 40,
    "def f(x):\n    if x >= 0:\n\treturn [i**2 for i in range(x)]  # done\n",
    "<b>&amp;</b> {\"a\": [1, null]} \\n $x_1^2$", "\u0000\u0001\u007f\u200b\u200d\ufeff",
    "CamelCaseWord snake_case_word ALLCAPS https://example.com/a?b=c#d me@example.org", "\u2581 \u0120 \u010a <0x0A>")
SHOWN = 8                                           # tokens of each reading
_alike: set[tuple[Any, ...]] = set()                # files that were already compared


def load_fast(path: str) -> Any:
    """Load the fast tokenizer of a folder or hub id with transformers.

    Raises:
        InputError: No such folder, the hub cannot be reached, not a fast tokenizer, no end-of-text token, other tokens
            than its own `tokenizer.json` gives, or rules without a bound.
    """
    try:
        return _load(path)
    except BaseException as error:                  # a panic of the Rust library is not an Exception
        raise tokenizer_limits.panicked(error, path) from None


def _load(path: str) -> Any:
    from transformers import AutoTokenizer

    names.check_folder(path, "tokenizer")
    config_limits.check_folder(path, "tokenizer")      # transformers reads the config here as well
    tokenizer_limits.check_folder(path)
    try:
        hf = AutoTokenizer.from_pretrained(
            str(names.path_of(path)), trust_remote_code=False, local_files_only=names.is_local_only(path))
    except Exception as error:                      # untrusted files: transformers raises errors of many types
        if names.path_of(path).is_dir():
            raise InputError(f"the folder {path} contains no readable tokenizer: {' '.join(str(error).split())[:160]}",
                             where="tokenizer", fix="it needs tokenizer.json, or set --data.tokenizer") from None
        raise hub.unreachable(path, where="tokenizer") from None
    if not getattr(hf, "is_fast", False):
        raise InputError(f"{path} has no fast tokenizer (tokenizer.json), and only a fast one gives character offsets",
                         where="tokenizer")
    if hf.eos_token_id is None:
        raise InputError(f"the tokenizer of {path} has no eos_token, so no text would end", where="tokenizer")
    hf.backend_tokenizer.no_truncation()            # lengths are limited by `data`
    hf.backend_tokenizer.no_padding()
    check_reading(hf, Path(path))
    return hf


def check_reading(hf: Any, folder: Path) -> None:
    """Refuse a tokenizer that tokenizes differently from the rules in its own file.

    Both tokenize a few hundred characters: spaces, line ends, scripts, digits, code, control tokens. Differences that
    `tokenizer_config.json` may legitimately cause are left out: added tokens, a space before the text, and tokens
    around it. A process compares the same files once.

    Args:
        hf: The tokenizer as transformers loaded it.
        folder: Its folder; one without `tokenizer.json` is accepted.

    Raises:
        InputError: The error shows the text and both tokenizations.
    """
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not files[0].is_file():
        return
    key = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    if key in _alike:
        return
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(files[0]))
    raw.no_truncation()
    raw.no_padding()
    texts = _texts(hf, raw)
    difference = _first_difference(hf, raw, texts) and _first_difference(hf, _spaced(raw, folder), texts)
    if difference is not None:
        text, loaded, specified = difference
        at = next((place for place, pair in enumerate(zip(loaded, specified, strict=False)) if pair[0] != pair[1]),
                  min(len(loaded), len(specified)))
        raise InputError(f"transformers tokenizes {text[:40]!r} as {loaded[at:at + SHOWN]} from token {at + 1} on, but "
                         f"its tokenizer.json gives {specified[at:at + SHOWN]}", where=f"the tokenizer of {folder}",
                         fix='set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json (it was '
                             f"loaded as {type(hf).__name__}), or install another release of transformers")
    _alike.add(key)


def _texts(hf: Any, raw: Any) -> list[str]:
    """The stress texts without tokens that only one of them has, and a text with control tokens of both."""
    loaded, specified = ({token.content: token for token in backend.get_added_tokens_decoder().values()}
                         for backend in (hf.backend_tokenizer, raw))
    common = [name for name, token in specified.items() if name in loaded and _flags(token) == _flags(loaded[name])]
    different = sorted({*loaded, *specified} - {*common, ""}, key=len, reverse=True)
    controls = [name for name in common if name.strip() and specified[name].special][:4]
    texts = [*STRESS, "".join(f"say {name}now {name} {name}\n" for name in controls)]
    for name in different:
        texts = [text.replace(name, "") for text in texts]
    return texts


def _flags(token: Any) -> tuple[bool, ...]:
    return token.lstrip, token.rstrip, token.single_word, token.normalized, token.special


def _first_difference(hf: Any, raw: Any, texts: list[str]) -> tuple[str, list[str], list[str]] | None:
    for text in texts:
        loaded, specified = (backend.encode(text, add_special_tokens=False) for backend in (hf.backend_tokenizer, raw))
        if loaded.ids != specified.ids:
            return text, loaded.tokens, specified.tokens
    return None


def _spaced(raw: Any, folder: Path) -> Any:
    """The file's rules with `add_prefix_space` of `tokenizer_config.json`, where it is set."""
    try:
        wanted = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("add_prefix_space")
    except (OSError, ValueError, AttributeError, RecursionError):
        return raw
    if not isinstance(wanted, bool):
        return raw
    rules = json.loads(raw.to_str())
    before = rules.get("pre_tokenizer") or {}
    for rule in (before, *(before.get("pretokenizers") or ())):
        if "add_prefix_space" in rule:
            rule["add_prefix_space"] = wanted
        if "prepend_scheme" in rule:
            rule["prepend_scheme"] = "first" if wanted else "never"
    return type(raw).from_str(json.dumps(rules))
