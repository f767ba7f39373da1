"""If this breaks, somebody has added a key to the config that no test sets: nobody knows whether it does anything."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.sources import Source
from lit_llm.peft_method import LoRA
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer

TESTS = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")
                  if path.name != Path(__file__).name)
KEYS = [*(("model", key) for key in inspect.signature(CausalLMModule.__init__).parameters),
        *(("data", key) for key in inspect.signature(TextDataModule.__init__).parameters),
        *(("trainer", key) for key in inspect.signature(Trainer.__init__).parameters),
        *(("model.lora", field.name) for field in fields(LoRA)), *(("data.sources", field.name) for field in fields(Source))]


UNTESTED = {"max_time": "handed to Lightning's timer as it is", "subset": "of a data set on the hub, which no test reaches",
            "self": "", "kwargs": ""}


@pytest.mark.parametrize(("place", "key"), [pair for pair in KEYS if pair[1] not in UNTESTED])
def test_every_key_is_set_by_some_test(place, key):
    assert re.search(rf"\b{key}=|[\"'.]{key}\b|\b{key}: ", TESTS), f"no test sets {place}.{key}"
