"""Write everything in this folder except the weights: `python -m lit_llm.samples.make`.

Texts, conversations and the tokenizer are a function of the seed. The weights come from `python -m lit_llm fit
--config configs/pretrain.yaml`; `--base` then copies that run's export to `base/`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError
from lit_llm.samples.conversations import write_conversations, write_exam, write_held_out_dialogues
from lit_llm.samples.documents import write_documents
from lit_llm.samples.world import draw_facts

HERE = Path(__file__).resolve().parent
SEED = 7
VOCABULARY = 1536                                   # 256 bytes, 3 specials, the rest merges
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BASE_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
              "tokenizer_config.json", "chat_template.jinja")
# A turn ends with the end-of-text token, not with ChatML's <|im_end|>: documents never contain that one, so its
# embedding row is untrained, and an adapter can hardly make it likely (measured: probability 0.01).
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|endoftext|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def write_texts(folder: Path, *, seed: int = SEED) -> None:
    """`documents`, `documents_val`, `conversations`, `conversations_val` as JSON Lines."""
    facts = draw_facts(seed)
    documents = write_documents(facts, f"train {seed}", rounds=6)
    seen = set(documents)
    others = [text for text in write_documents(facts, f"val {seed}", rounds=1) if text not in seen][::10]
    _write_lines(folder / "documents.jsonl", ({"text": text} for text in documents))
    _write_lines(folder / "documents_val.jsonl", ({"text": text} for text in others))
    training = write_conversations(facts, f"train {seed}", drills=150)
    held_out = write_exam(facts, f"val {seed}") + write_held_out_dialogues(facts, f"val {seed}", count=10)
    _write_lines(folder / "conversations.jsonl", ({"messages": messages} for messages in training))
    _write_lines(folder / "conversations_val.jsonl", ({"messages": messages} for messages in held_out))


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the training texts, with a ChatML-like chat template.

    Chinese characters are split before merging, so that a name always has the same tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.train_from_iterator(_texts(folder), trainer)
    out = folder / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[0], "pad_token": SPECIALS[0],
              "model_max_length": 512, "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def copy_base(export: Path, folder: Path) -> None:
    """Copy the export of a pretraining run to `base/`.

    Raises:
        InputError: A file is missing, or the weights are too large for the package (4 MB).
    """
    for name in BASE_FILES:
        if not (export / name).is_file():
            raise InputError(f"{name} is missing; give the export/ folder of a finished pretraining run",
                             where=str(export))
    if (size := (export / "model.safetensors").stat().st_size) > 4_000_000:
        raise InputError(f"model.safetensors has {size:,} bytes; at most 4,000,000 are allowed for the packaged base",
                         where=str(export))
    (folder / "base").mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        shutil.copyfile(export / name, folder / "base" / name)


def _texts(folder: Path) -> Iterable[str]:
    for name in ("documents.jsonl", "conversations.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield from [record["text"]] if "text" in record else [turn["content"] for turn in record["messages"]]


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lit_llm.samples.make", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into (default: beside this file)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"draws another world (default: {SEED})")
    parser.add_argument("--base", type=Path, help="export/ folder of a pretraining run, to copy as base/")
    options = parser.parse_args()
    try:
        if options.base:
            copy_base(options.base, options.out)
        else:
            write_texts(options.out, seed=options.seed)
            write_tokenizer(options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
