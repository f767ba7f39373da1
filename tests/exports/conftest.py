"""A short run that is exported in every format."""

import json

import pytest

from tests.training.short_runs import fit


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A short run of LoRA on the embedded base, as `fit` leaves it."""
    folder = tmp_path_factory.mktemp("handed")
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": [
        {"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}) for n in range(30)))
    fit(folder, tokenizer="sample:base", passes=1, steps=3, peft={
        "class_path": "LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}})
    return folder / "run"
