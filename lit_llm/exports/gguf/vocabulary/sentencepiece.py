"""Describe a BPE of characters with byte fallback (Llama 2, Mistral, Gemma, Phi-3) as llama.cpp's SPM vocabulary.

llama.cpp merges the pair whose token has the best score, tokenizer.json the pair that is first among its merges. Both
give the same tokens if every pair that forms a token is a merge, and the merges of one token stand together.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lit_llm.exports.gguf.vocabulary.byte_level import pairs

SPACE = "▁"
BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")
LOWEST = -1e6                                       # score of tokens that no merge forms


def scores(model: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """(score of each token that a merge forms, ""), or ({}, reason) if scores cannot express the order of the merges.

    Args:
        model: The `model` of tokenizer.json.
    """
    vocabulary, joined = model["vocab"], dict.fromkeys(pairs(model))
    rank, apart = _ranks(joined, frozenset())
    if apart:                                       # only runs of one character may share a score
        runs = frozenset(token[0] for token in apart)
        rank, apart = _ranks(joined, runs)
        gaps = [char for char in runs if not _is_complete(char, rank)]
        if apart or gaps:
            return {}, f"the merges that form {(apart or gaps)[0]!r} do not stand together"
    for token in vocabulary:
        if len(token) < 2 or BYTE.match(token):
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in joined and pair[0] in vocabulary and pair[1] in vocabulary and _reachable(pair, rank):
                return {}, f"its merges do not join {pair[0]!r} and {pair[1]!r}, which llama.cpp would join"
    return {token: -float(place) for token, place in rank.items()}, ""


def _ranks(joined: Iterable[tuple[str, str]], runs: frozenset[str]) -> tuple[dict[str, int], list[str]]:
    """(place of each token among the merges, tokens whose merges are interrupted by those of others).

    Args:
        joined: The merges in order.
        runs: Characters whose repetitions count as one token. Llama 2 has such runs of spaces: all have the lowest
            score, so that both ways of merging let the leftmost run grow by one.
    """
    rank: dict[str, int] = {}
    groups: dict[str, int] = {}
    apart: list[str] = []
    last = ""
    for left, right in joined:
        whole = left + right
        group = whole[0] if whole[0] in runs and not whole.strip(whole[0]) else whole
        if group != last and group in groups:
            apart.append(whole)
        rank[whole] = groups.setdefault(group, len(groups))
        last = group
    return rank, apart


def _is_complete(char: str, rank: Mapping[str, int]) -> bool:
    """Whether runs of a character have every length from two on, so that they grow by one."""
    lengths = sorted(len(token) for token in rank if not token.strip(char))
    return lengths == list(range(2, len(lengths) + 2))


def _reachable(pair: tuple[str, str], rank: Mapping[str, int]) -> bool:
    """Whether both tokens can occur while text is merged: characters, or results of merges."""
    return all(len(part) == 1 or part in rank for part in pair)


def prefix(rules: Mapping[str, Any]) -> tuple[bool, str, str]:
    """(whether a text begins with a space, note, reason) of the rules of a tokenizer.json.

    The reason says why llama.cpp would read text differently; it is empty otherwise. The note is for the user.
    """
    before, reason = _normalizer(rules.get("normalizer"))
    if reason:
        return False, "", reason
    split = rules.get("pre_tokenizer")
    if split is None or (split.get("type") == "Split" and (split.get("pattern") or {}).get("String") == " "):
        return before, "", ""
    if split.get("type") != "Metaspace" or split.get("replacement", SPACE) != SPACE or before:
        return False, "", f"it splits text by a rule that llama.cpp does not have ({split.get('type')})"
    if split.get("split", True) and any(SPACE in token[1:] for token in rules["model"]["vocab"]):
        return False, "", "it splits at spaces, but has tokens with a space inside, which llama.cpp would use"
    scheme = split.get("prepend_scheme", "always")
    if scheme == "first":
        return False, "a text that does not begin with a special token has no space before it in llama.cpp", ""
    note = "a text that begins with a space has one more space before it in llama.cpp" if scheme == "always" else ""
    return scheme == "always", note, ""


def _normalizer(rule: Mapping[str, Any] | None) -> tuple[bool, str]:
    """(whether a space is put before the text, reason) of a normalizer."""
    before = False
    for part in (rule or {}).get("normalizers") or ([rule] if rule else []):
        kind = part.get("type")
        if kind == "Prepend" and part.get("prepend") == SPACE:
            before = True
        elif kind != "Replace" or (part.get("pattern") or {}).get("String") != " " or part.get("content") != SPACE:
            return False, f"its normalizer ({kind}) changes the text"
    return before, ""
