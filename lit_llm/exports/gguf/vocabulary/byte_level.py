"""Find llama.cpp's name for the way in which a byte-level BPE splits text before merging.

A GGUF file names the rule (`tokenizer.ggml.pre`) and cannot describe one, so a tokenizer with another rule is refused.
The rules are compared as they stand in tokenizer.json; llama.cpp's own converter compares the tokens of one text.
"""

from collections.abc import Iterable, Mapping
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
QWEN35 = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*" + r"|\p{N}" + SLASHED
GPT4O = f"{WORD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{WORD}{UPPER}+{LOWER}*{CONTRACTIONS}?" + r"|\p{N}{1,3}" + SLASHED
# (regular expressions in order, whether a token that equals a whole word is taken without merging) -> name
NAMES = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((CL100K,), True): "llama-bpe",
    ((CL100K,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}
HAN = r"\p{Han}"


def alphabet() -> dict[str, int]:
    """Character of each byte in a byte-level vocabulary (GPT-2's table), and its byte.

    >>> alphabet()["Ġ"], len(alphabet())
    (32, 256)
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def name_of(rules: Mapping[str, Any]) -> tuple[str, str]:
    """(name, "") of the rule of a tokenizer.json, or ("", reason) if llama.cpp has none.

    Args:
        rules: The parsed tokenizer.json of a byte-level BPE.
    """
    if reason := _unsuitable(rules):
        return "", reason
    expressions = _expressions(rules.get("pre_tokenizer") or {})
    if expressions is None:
        return "", "it splits text by rules that llama.cpp does not have"
    ignores = bool(rules["model"].get("ignore_merges"))
    if expressions[:1] == (HAN,) and splits_without_effect(rules["model"]):
        expressions = expressions[1:]
    name = NAMES.get((expressions, ignores))
    if name is None:
        named = NAMES.get((expressions, not ignores))
        if named:
            return "", f"ignore_merges is {str(ignores).lower()}, and llama.cpp's rule {named} has the opposite"
        return "", f"llama.cpp has no rule that splits text by {' and '.join(expressions)[:160]}"
    return name, ""


def _unsuitable(rules: Mapping[str, Any]) -> str:
    """Why a byte-level BPE differs from llama.cpp's, apart from its splitting; empty if it does not."""
    normalizer = rules.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return f"its normalizer ({normalizer.get('type')}) changes the text"
    model = rules["model"]
    missing = len(alphabet().keys() - model["vocab"].keys())
    if missing:
        return f"its vocabulary lacks {missing} of the 256 bytes"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its BPE has {key}"
    return ""


def _expressions(rule: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions that isolate pieces in order; null for any other kind of rule."""
    expressions: list[str] = []
    for part in rule.get("pretokenizers") or [rule]:
        kind = part.get("type")
        if kind == "ByteLevel":
            if part.get("add_prefix_space"):
                return None
            if part.get("use_regex", True):
                expressions.append(GPT2)
        elif kind == "Split" and not part.get("invert") and _isolates(part):
            expressions.append(str((part.get("pattern") or {}).get("Regex")))
        elif kind == "Digits" and part.get("individual_digits"):
            expressions.append(r"\p{N}")
        else:
            return None
    return tuple(expressions)


def _isolates(part: Mapping[str, Any]) -> bool:
    """Whether a split keeps each match as a piece; `Removed` with inversion means the same for these expressions."""
    return part.get("behavior") == "Isolated"


def splits_without_effect(model: Mapping[str, Any]) -> bool:
    """Whether isolating each Chinese character changes no tokens, because no merge could cross its borders.

    It is so if no token holds two spaces or line ends (whose pieces depend on what follows), and no merge joins the end
    of one character to the beginning of another where either may be Chinese. The embedded tokenizer is of this kind.

    Args:
        model: The `model` of tokenizer.json, a byte-level BPE.
    """
    bytes_of = alphabet()
    if any(len(token) > 1 and all(bytes_of.get(char, 0x41) in b" \t\n\r\x0b\x0c" for char in token)
           for token in model["vocab"]):
        return False
    for left, right in pairs(model):
        end, start = bytes_of.get(left[-1], 0), bytes_of.get(right[0], 0)
        if start & 0xC0 != 0x80 and (start >= 0xE2 or end >= 0x80) and (end < 0x80 or end & 0xC0 == 0x80):
            return False                            # a border of characters, one of which has three bytes or more
    return True


def pairs(model: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The merges of a BPE in order; tokenizer.json writes them as pairs or as one text."""
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right
