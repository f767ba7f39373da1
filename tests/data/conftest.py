"""Fixtures: a small byte-level tokenizer with a ChatML template, and files of records."""

import json
from pathlib import Path

import pytest

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """256 bytes, no merges: token counts can be checked by counting bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                 additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    hf.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    hf.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from lit_llm.text.tokenizer import Tokenizer

    return Tokenizer.load(str(tokenizer_folder))


@pytest.fixture
def jsonl(tmp_path):
    """Writes records as JSON lines and gives the path."""
    def write(records, name="data.jsonl"):
        path = Path(tmp_path) / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return str(path)
    return write
