"""Describe a tokenizer in a GGUF file's metadata: tokens, types, merges or scores, control tokens and chat template.

A tokenizer that llama.cpp would read differently is refused with the reason. `byte_level.py` and `sentencepiece.py`
describe the two kinds of BPE that llama.cpp has.
"""

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from lit_llm.errors import InputError
from lit_llm.exports.gguf.families import Metadata
from lit_llm.exports.gguf.vocabulary import byte_level, sentencepiece
from lit_llm.text import check

KEY = "tokenizer.ggml."
STRIPPED = ("phi-3", "phi3")                        # names of models whose control tokens llama.cpp lets eat spaces
UNSTRIPPED = {"<unk>", "<s>", "<|endoftext|>"}      # but these
OTHER_NAMES = (*STRIPPED, "modern-bert")            # names that make llama.cpp look for tokens of those models


class Kind(IntEnum):
    """Types of tokens in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def describe(tokenizer: Any, size: int, where: str) -> tuple[Metadata, list[str]]:
    """Metadata of a tokenizer, and notes for the user.

    Args:
        tokenizer: The project's tokenizer of the folder.
        size: Rows of the model's embedding; rows without a token become unused tokens.
        where: The folder, for errors.

    Raises:
        InputError: llama.cpp would tokenize differently; the error says why.
    """
    rules = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    model = rules["model"]
    notes: list[str] = []
    if model.get("type") != "BPE":
        raise refused(f"its model is {model.get('type')}, and GGUF files of these architectures hold a BPE", where)
    if model.get("byte_fallback"):
        own, note, reason = _sentencepiece(rules)
    else:
        own, note, reason = _byte_level(rules)
    reason = reason or _added(rules, bool(model.get("byte_fallback"))) or _opening(rules, tokenizer)
    if reason:
        raise refused(reason, where)
    notes += [note] if note else []
    if (rules.get("normalizer") or {}).get("type") == "NFC":
        notes.append("llama.cpp does not normalize text to NFC, so text with combining accents has other tokens")
    tokens, kinds = _tokens(rules, size, where)
    if own[f"{KEY}model"][1] == "llama":
        score = own.pop("score")[1]
        own[f"{KEY}scores"] = ("ARRAY", [float(score.get(token, sentencepiece.LOWEST)) for token in tokens])
    return own | {f"{KEY}tokens": ("ARRAY", tokens), f"{KEY}token_type": ("ARRAY", [int(kind) for kind in kinds]),
                  **_ends(tokenizer, where), f"{KEY}add_bos_token": ("BOOL", bool(_frame(tokenizer, where)[0])),
                  f"{KEY}add_eos_token": ("BOOL", bool(_frame(tokenizer, where)[1])),
                  "tokenizer.chat_template": ("STRING", str(tokenizer.hf.chat_template))}, notes


def refused(reason: str, where: str) -> InputError:
    """The error for a tokenizer that llama.cpp cannot represent."""
    return InputError(f"llama.cpp cannot represent this tokenizer: {reason}", where=where,
                      fix="export the model with --format transformers")


def name_for(name: str, tokenizer: Any) -> str:
    """A model's name in the file, under which llama.cpp reads its control tokens as the tokenizer does.

    llama.cpp lets the control tokens of models that are called phi-3 remove the spaces behind them, and fails to load
    other models of that name.
    """
    strips = any(token.rstrip for token in tokenizer.hf.backend_tokenizer.get_added_tokens_decoder().values())
    if strips:
        return name if any(part in name.lower() for part in STRIPPED) else f"{name} (Phi-3 tokenizer: phi-3)"
    for part in OTHER_NAMES:
        while (at := name.lower().find(part)) >= 0:
            name = f"{name[:at + 3]}_{name[at + 3:].lstrip('-')}"
    return name


def _byte_level(rules: Mapping[str, Any]) -> tuple[Metadata, str, str]:
    name, reason = byte_level.name_of(rules)
    merges = [f"{left} {right}" for left, right in byte_level.pairs(rules["model"])]
    if not reason and not merges:
        reason = "it has no merges"
    return {f"{KEY}model": ("STRING", "gpt2"), f"{KEY}pre": ("STRING", name), f"{KEY}merges": ("ARRAY", merges)}, \
        "", reason


def _sentencepiece(rules: Mapping[str, Any]) -> tuple[Metadata, str, str]:
    before, note, reason = sentencepiece.prefix(rules)
    missing = sum(f"<0x{byte:02X}>" not in rules["model"]["vocab"] for byte in range(256))
    if missing:
        return {}, "", f"its vocabulary lacks {missing} of the 256 bytes"
    score, why = sentencepiece.scores(rules["model"])
    return {f"{KEY}model": ("STRING", "llama"), f"{KEY}pre": ("STRING", "default"), "score": ("", score),
            f"{KEY}add_space_prefix": ("BOOL", before)}, note, reason or why


def _added(rules: Mapping[str, Any], characters: bool) -> str:
    """Why llama.cpp would find added tokens elsewhere in a text; empty if it would not."""
    added = rules.get("added_tokens") or []
    stripped = {token["content"] for token in added if token.get("rstrip")}
    if stripped and stripped != {token["content"] for token in added if token["special"]
                                 and token["content"] not in UNSTRIPPED} | (stripped & {"</s>"}):
        return f"the token {sorted(stripped)[0]!r} removes spaces behind it, which only Phi-3's tokens can"
    for token in added:
        for key, meaning in (("lstrip", "removes spaces before it"), ("single_word", "is found between words only")):
            if token.get(key):
                return f"the token {token['content']!r} {meaning}"
        if characters and token.get("normalized") and not token["special"]:
            return f"the token {token['content']!r} is found in normalized text (after a space) only"
    return ""


def _opening(rules: Mapping[str, Any], tokenizer: Any) -> str:
    """Why a conversation would begin with other tokens; empty if it would not.

    Some tokenizers put a space before a text that stands at the very beginning, and none behind a control token.
    llama.cpp puts one at both places or at none, so a conversation must begin with a control token.
    """
    if (rules.get("pre_tokenizer") or {}).get("prepend_scheme") != "first":
        return ""
    try:
        text = tokenizer.template.render(check.CONVERSATION).text
    except InputError:
        return ""
    specials = tuple(token["content"] for token in rules.get("added_tokens") or [] if token["special"])
    return "" if text.startswith(specials) else (
        "it puts a space before a text at the beginning only, and its chat template begins with text")


def _tokens(rules: Mapping[str, Any], size: int, where: str) -> tuple[list[str], list[Kind]]:
    """Texts and types of all rows of the embedding."""
    tokens: list[str | None] = [None] * size
    kinds = [Kind.UNUSED] * size
    model = rules["model"]
    unknown = model.get("unk_token")
    added = {token["id"]: token for token in rules.get("added_tokens") or []}
    texts = {place: text for text, place in model["vocab"].items()} | {
        place: token["content"] for place, token in added.items()}
    if (most := max(texts)) >= size:
        raise refused(f"it has the token {most}, and the model's embedding has {size} rows", where)
    for place, text in texts.items():
        tokens[place] = text
        if place in added:
            kinds[place] = Kind.CONTROL if added[place]["special"] else Kind.USER_DEFINED
        elif model.get("byte_fallback") and sentencepiece.BYTE.match(text):
            kinds[place] = Kind.BYTE
        else:
            kinds[place] = Kind.NORMAL
        if text == unknown:
            kinds[place] = Kind.UNKNOWN
    whole = [text if text is not None else f"[PAD{place}]" for place, text in enumerate(tokens)]
    if len(set(whole)) != size or "" in whole:
        raise refused("two of its tokens have the same text, or one has none", where)
    return whole, kinds


def _frame(tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text: BOS, EOS or none."""
    plain = tokenizer.hf("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer.hf("a")["input_ids"]
    at = next((place for place in range(len(framed)) if framed[place:place + len(plain)] == plain), 0)
    before, behind = framed[:at], framed[at + len(plain):]
    if before not in ([], [tokenizer.bos_id]) or behind not in ([], [tokenizer.eos_id]):
        raise refused(f"it puts {before} before and {behind} behind a text, which are not its BOS and EOS", where)
    return before, behind


def _ends(tokenizer: Any, where: str) -> Metadata:
    """Ids of the control tokens: end of text, end of a turn, BOS, padding, unknown.

    llama.cpp stops at the end of text, at the end of a turn, and at tokens with certain names. A tokenizer without BOS
    gets its end of text there, because llama.cpp would otherwise take token 11; it is not added to texts.
    """
    stops = [token for token in tokenizer.stop_ids if token != tokenizer.eos_id]
    ends: Metadata = {f"{KEY}eos_token_id": ("UINT32", int(tokenizer.eos_id)),
                      f"{KEY}bos_token_id": ("UINT32", int(tokenizer.eos_id if tokenizer.bos_id is None
                                                           else tokenizer.bos_id)),
                      f"{KEY}padding_token_id": ("UINT32", int(tokenizer.pad_id))}
    if stops:
        ends[f"{KEY}eot_token_id"] = ("UINT32", int(stops[0]))
    if len(stops) > 1:
        ends[f"{KEY}eom_token_id"] = ("UINT32", int(stops[1]))
    if (unknown := tokenizer.hf.unk_token_id) is not None:
        ends[f"{KEY}unknown_token_id"] = ("UINT32", int(unknown))
    return ends
