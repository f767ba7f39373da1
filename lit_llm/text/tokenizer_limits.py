"""Refuse a `tokenizer.json` whose rules could take unbounded time or memory.

The rules are untrusted, and the library that applies them can be neither interrupted nor bounded. How much the rules
can lengthen a text is therefore computed from the file, and regular expressions of unknown form are first tried in a
process with limits on time and memory. The verdict is cached under the file's hash.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_llm import disk, names
from lit_llm.errors import InputError

FORMAT = 1                                          # version of cached verdicts; increase it when verdicts change
BYTES = 256 << 20                                   # bytes of a file; the largest published ones have 35 MB
GROWTH = 64                                         # output characters per input character, of all rules together
ADDED = 64                                          # characters that rules may add before a text
AROUND = 50_000                                     # characters of the post-processor's rules
WORD = 1000                                         # characters of a word that WordPiece splits
PATTERN = 10_000                                    # characters of a regular expression
PATIENCE = 60                                       # seconds to wait for the trial, which may use `CPU` of them
CPU, MEMORY = 5, 2 << 30
# Alternatives in published tokenizers with two repetitions that cannot backtrack into each other.
KNOWN = frozenset((
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s*[\r\n]",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"))
TRY = """
import json, resource, sys
patterns, texts, seconds, memory = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
from tokenizers import Regex, pre_tokenizers
for pattern in patterns:
    rule = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        rule.pre_tokenize_str(text)
print("good")
"""
_good: set[str] = set()


def check_folder(path: str) -> None:
    """Refuse a folder whose `tokenizer.json` has unbounded rules; a folder without the file is accepted.

    Raises:
        InputError: The error names the file and the rule.
    """
    file = names.path_of(path) / "tokenizer.json"
    if not file.is_file():
        return
    for other in file.parent.glob("*.json"):
        if other.stat().st_size > BYTES and not other.name.endswith(".index.json"):
            raise InputError(f"it has {other.stat().st_size:,} bytes; at most {BYTES:,} are allowed", where=str(other))
    content = file.read_bytes()
    key = hashlib.sha256(b"%d " % FORMAT + content).hexdigest()
    cached_verdict = disk.cache_root(None) / "tokenizers" / key[:32]
    if key in _good or cached_verdict.is_file():
        return
    try:
        rules = json.loads(content)
        if not isinstance(rules, dict):
            raise InputError("it is not a mapping of keys to values")
        _check(rules)
    except InputError as error:
        raise error.at(str(file)) from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"it contains no readable tokenizer: {str(error)[:160] or type(error).__name__}",
                         where=str(file)) from None
    _good.add(key)
    with suppress(OSError):                             # without a cache the check runs again next time
        disk.replace_text(cached_verdict, "good\n")


def panicked(error: BaseException, source: str) -> BaseException:
    """The error itself, or an `InputError` where the Rust library panicked on a text."""
    if type(error).__name__ != "PanicException":
        return error
    return InputError(f"its rules fail on a text: {' '.join(str(error).split())[:160]}",
                      where=str(Path(source, "tokenizer.json")) if source else "tokenizer",
                      fix="use the files of another tokenizer")


# ---- rules that make a text longer -----------------------------------------------------------------------------------

def _check(rules: dict[str, Any]) -> None:
    for section in ("normalizer", "decoder", "pre_tokenizer"):
        factor, added = 1, 0
        for rule in _rules(rules.get(section)):
            more, before = _growth(rule)
            factor, added = factor * more, added * more + before
            if factor > GROWTH or added > ADDED:
                raise InputError(f"its {section} could turn one character into {factor:,} and add {added:,} before a "
                                 f"text; at most {GROWTH} and {ADDED} are allowed")
    around = len(json.dumps(rules.get("post_processor")))
    if around > AROUND:
        raise InputError(f"its post_processor has {around:,} characters; at most {AROUND:,} are allowed")
    model = rules.get("model") or {}
    if isinstance(word := model.get("max_input_chars_per_word"), int) and word > WORD:
        raise InputError(f"max_input_chars_per_word is {word:,}; at most {WORD:,} is allowed")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(model.get(key) or "") > ADDED:
            raise InputError(f"{key} has {len(model[key]):,} characters; at most {ADDED} are allowed")
    for key, most in (("truncation", 1 << 30), ("padding", 1 << 20)):
        for number in _numbers(rules.get(key)):
            if number > most:
                raise InputError(f"its {key} contains the number {number:,}; at most {most:,} is allowed")
    _check_patterns(sorted(set(_patterns([rules.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]))))


def _rules(rule: object) -> Iterator[dict[str, Any]]:
    """Each rule of a section; sequences are flattened."""
    if not isinstance(rule, dict):
        return
    inner = rule.get("normalizers") or rule.get("pretokenizers") or rule.get("decoders")
    if isinstance(inner, list):
        for part in inner:
            yield from _rules(part)
    else:
        yield rule


def _growth(rule: dict[str, Any]) -> tuple[int, int]:
    """Output characters per input character, and characters added before a text; without Unicode normalization."""
    kind = rule.get("type")
    if kind == "Replace":
        pattern, length = rule["pattern"], len(rule["content"])
        if "Regex" in pattern:
            return (1 + length if length > 1 else 1), 0
        return max(1, -(-length // max(1, len(pattern["String"])))), 0
    if kind == "Precompiled":
        blob = base64.b64decode(rule["precompiled_charsmap"])
        longest = max(map(len, blob[4 + int.from_bytes(blob[:4], "little"):].split(b"\0")))
        return (1 if longest <= 2 * GROWTH else longest), 0
    before = [rule.get(key) for key in ("prepend", "replacement", "prefix")]
    return 1, sum(len(text) for text in before if isinstance(text, str))


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int):
        yield value


# ---- regular expressions ---------------------------------------------------------------------------------------------

def _patterns(value: object) -> Iterator[str]:
    if isinstance(value, dict) and isinstance(value.get("Regex"), str):
        yield value["Regex"]
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _patterns(part)


def _check_patterns(patterns: list[str]) -> None:
    for pattern in patterns:
        if len(pattern) > PATTERN:
            raise InputError(f"a regular expression has {len(pattern):,} characters; at most {PATTERN:,} are allowed")
    if not (hard := [pattern for pattern in patterns if not _is_plain(pattern)]):
        return
    request = json.dumps([hard, _stress(hard), CPU, MEMORY])
    try:
        tried = subprocess.run([sys.executable, "-P", "-c", TRY], input=request, text=True, timeout=PATIENCE,
                               check=False, capture_output=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    except subprocess.TimeoutExpired:
        tried = None
    if tried is None or tried.stdout != "good\n":
        errors = (tried.stderr.strip().splitlines() if tried else None) or ["it takes too much time or memory"]
        raise InputError(f"its regular expression {max(hard, key=len)[:80]!r} cannot be matched with text: "
                         f"{errors[-1][:120]}", fix="use the files of another tokenizer")


def _is_plain(pattern: str) -> bool:
    """Whether no alternative has two repetitions or a repeated group: such a pattern matches in linear time."""
    return all(part in KNOWN or _repeats_once(part) for part in _parts(pattern))


def _repeats_once(part: str) -> bool:
    classes = re.sub(r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\[pP]\{\^?\w+\}|\\.|[^\]\\\[])*\]", "x", part)
    repeated = len(re.findall(r"[*+]|\{\d*,\d*\}|\{\d{3,}\}", re.sub(r"\{\d,\d{1,2}\}|\{\d{1,2}\}", "", classes)))
    nested = re.search(r"\)[*+{]|[*+?}][*+{]|\(\?[<P(&R]", classes) or re.search(r"\\[1-9gk]", part)
    return repeated <= 1 and not nested and len(re.findall(r"[?{]", classes)) < 8


def _parts(pattern: str) -> list[str]:
    """The alternatives of a pattern at the top level, outside groups and classes."""
    parts, depth, inside, begin, at = [], 0, False, 0, 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            at += 1
        elif inside:
            inside = letter != "]"
        elif letter == "[":
            inside = True
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and depth == 0:
            parts.append(pattern[begin:at])
            begin = at + 1
        at += 1
    return [*parts, pattern[begin:]]


def _stress(patterns: list[str]) -> list[str]:
    """Texts that repeat every character in the pattern and one of each kind, alone and in pairs."""
    spelled = sorted({letter for pattern in patterns for letter in re.sub(r"\\[a-zA-Z]|\{[^}]*\}", "", pattern)})
    letters = [*dict.fromkeys([*"aA1 \n.'é中\u0301🙂\t", *spelled])][:60]
    runs = [letter * count for letter in letters for count in (30, 4096)]
    pairs = [(one + other) * 2048 for one, other in (*pairwise(letters), *pairwise(filter(str.isalnum, spelled)))]
    words = ["word 12 " * 512, "wordword" * 512, "Word\n" * 800, "a b, c. " * 512]
    tails = ("", "\u2603", "\u2603" + "".join(spelled))      # the library first searches for required characters
    return [text + tail for text in (*words, *runs, *pairs) for tail in tails]
