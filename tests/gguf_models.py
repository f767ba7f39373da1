"""Tiny random models of each family that GGUF files are written for, with real tokenizers. Every weight is random, norms and biases too."""

import json
import shutil
from pathlib import Path

import torch

from lit_llm.models.load import init_causal_lm
from lit_llm.text.tokenizer import Tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512}
PATTERN = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "short_factor": [1.0 + 0.1 * at for at in range(8)],
        "long_factor": [2.0 + 0.5 * at for at in range(8)], "original_max_position_embeddings": 256}
# Name -> keys of the config. Each key that llama.cpp's metadata must state differs from its default somewhere.
MODELS = {
    "llama": {"model_type": "llama", "rope_theta": 50000.0, "rms_norm_eps": 1e-3},
    "llama 3": {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 256},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 128}},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1000000.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
               "layer_types": PATTERN, "tie_word_embeddings": True, "final_logit_softcapping": 30.0, "rope_parameters": {
                   "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                   "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}}},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3, long": {"model_type": "phi3", "original_max_position_embeddings": 256, "rope_parameters": LONG},
    "smollm3": {"model_type": "smollm3", "rope_theta": 5000000.0},
}
QWEN2_RULES = {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}}


def build(folder: Path, name: str, tokenizer: str, *, seed: int = 0, **more: object) -> Path:
    """Write a model folder as transformers loads it.

    Args:
        folder: The folder.
        name: A key of MODELS.
        tokenizer: Folder of a tokenizer.
        seed: Seed of the weights.
        more: Further keys of the config.
    """
    loaded = Tokenizer.load(tokenizer)
    torch.manual_seed(seed)
    model = init_causal_lm({**SIZES, **MODELS[name], **more, "vocab_size": loaded.vocab_size + 3, "eos_token_id": loaded.eos_id,
                            "pad_token_id": loaded.pad_id, "bos_token_id": loaded.bos_id})
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("norm.weight"):
                weight.copy_(0.3 * torch.randn_like(weight) + (0.0 if "gemma" in name else 1.0))
            elif weight.ndim == 1:
                weight.copy_(0.3 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (0.2 if "embed" in key else 1.2 / weight.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    loaded.save(folder)
    _own_rules(folder)
    if name == "qwen2":                             # transformers takes Qwen2's rules for this model_type in any case
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | QWEN2_RULES))
    return folder


def phi3_tokenizer(data: Path, folder: Path) -> str:
    """Phi-3's tokenizer from the vocabulary that llama.cpp publishes, as transformers converts it."""
    return _converted(data, folder, "phi-3", "<|end|>")


def llama2_tokenizer(data: Path, folder: Path) -> str:
    """Llama 2's tokenizer, in the same way, with the rules of the published tokenizer.json."""
    _converted(data, folder, "llama-spm", "</s>")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}}))
    return str(folder)


def _converted(data: Path, folder: Path, name: str, end: str) -> str:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(data / "tokenizers" / "gguf", gguf_file=f"ggml-vocab-{name}.gguf").save_pretrained(folder)
    _own_rules(folder, eos_token=end)
    return str(folder)


def _own_rules(folder: Path, **more: str) -> None:
    """Let transformers read the tokenizer by its own file and not by the rules of the model's family."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast", **more}))


def qwen2_tokenizer(data: Path, folder: Path) -> str:
    """Qwen2's tokenizer with a tokenizer.json."""
    from transformers import AutoTokenizer

    shutil.copytree(data / "tokenizers" / "qwen2", folder / "files")
    AutoTokenizer.from_pretrained(folder / "files").save_pretrained(folder)
    return str(folder)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def llama3_tokenizer(data: Path, folder: Path) -> str:
    """Llama 3's tokenizer from its file of ranked tokens; takes half a minute."""
    import base64

    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    lines = (data / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    def text(token):
        return "".join(letters[byte] for byte in token)

    merges = [[text(part) for part in _parts(token, ranks, rank)] for token, rank in ranks.items() if len(token) > 1]
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    added = [{"id": len(ranks) + at, "content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
              "single_word": False} for at, name in enumerate(specials)]
    begin = {"SpecialToken": {"id": specials[0], "type_id": 0}}
    rules = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                 {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                 {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
             "post_processor": {"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
                                "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                                "special_tokens": {specials[0]: {"id": specials[0], "ids": [len(ranks)], "tokens": [specials[0]]}}},
             "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
             "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                       "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                       "vocab": {text(token): rank for token, rank in ranks.items()}, "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[0], "eos_token": specials[2]}))
    return str(folder)


def _parts(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The two tokens that merge into a token: its bytes, merged by rank below its own."""
    parts = [token[at:at + 1] for at in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda at: ranks.get(parts[at] + parts[at + 1], limit))
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts
