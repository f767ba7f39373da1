"""If this breaks: a meaningless number is accepted and has another effect or none."""

import pytest

from lit_llm import CausalLMModule, InputError, Source, TextDataModule, Trainer
from lit_llm.training.run.checkpoint import StepCheckpoint


@pytest.mark.parametrize("key", ["batch_size", "num_proc", "stream_buffer"])
@pytest.mark.parametrize("value", [0, -1])
def test_data_of_less_than_one_is_refused(key, value):
    with pytest.raises(InputError, match=f"{value} is not a whole number from 1 to") as caught:
        TextDataModule([Source("sample:documents.jsonl")], **{key: value}).prepare_data()
    assert caught.value.where == f"data.{key}"


@pytest.mark.parametrize("key", ["every_n_steps", "keep_last", "keep_every_n_steps"])
def test_checkpoints_of_less_than_one_are_refused(key, tmp_path):
    runner = Trainer(default_root_dir=str(tmp_path / "run"), accelerator="cpu", max_steps=1, enable_progress_bar=False,
                     callbacks=[StepCheckpoint(**{key: 0})])
    data = TextDataModule([Source("sample:conversations.jsonl")], tokenizer="sample:base", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="0 is not a whole number from 1 to") as caught:
        runner.fit(CausalLMModule(base="sample:base"), datamodule=data)
    assert caught.value.where == f"StepCheckpoint.{key}"
    assert f"for example {key}: 1" in str(caught.value)
