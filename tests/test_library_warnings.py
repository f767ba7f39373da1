"""If this breaks: a library's warning of a wrong gradient or export is hidden (bitsandbytes once trained adapters on weights
without a backward pass), or a shipped run prints warnings that do not concern it.

The warnings are real: the libraries are used in the way that they warn of.
"""

import logging
import re
import warnings

import pytest
import torch

from lit_llm.system import library_warnings
from lit_llm.system.library_warnings import KNOWN, Listener, listen


@pytest.fixture
def heard(capsys, monkeypatch):
    """What was written since the last call, with the listener in place as `lit_llm` places it."""
    monkeypatch.setattr(logging.Logger, "callHandlers", logging.Logger.callHandlers)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)     # as Python itself does, outside pytest
        listen()
        yield lambda: capsys.readouterr().err.splitlines()


def adapter_with_a_useless_key(tiny_model):
    from lit_llm.models.adapters.adapter import wrap_peft
    from lit_llm.models.load import load_causal_lm

    spec = {"class_path": "LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj"], "exclude_modules": ["other"]}}
    return wrap_peft(load_causal_lm(tiny_model("llama")), spec)


def test_a_warning_of_peft_is_shown_once_in_one_line(heard, tiny_model):
    for times in (1, 0):
        adapter_with_a_useless_key(tiny_model)
        lines = [line for line in heard() if line.startswith("warning from")]
        assert len(lines) == times
        assert all(line.startswith("warning from peft: You have passed exclude_modules=") for line in lines)


def test_a_warning_of_torch_is_shown_once_whatever_its_origin(heard):
    """`stacklevel` attributes the warning to this file; the message names the library."""
    for times in (1, 0):
        torch.nn.functional.softmax(torch.ones(2))
        assert [line.split(": ")[0] for line in heard()] == ["warning from torch"] * times


def test_a_warning_of_a_logger_is_shown_once_and_its_progress_is_not(heard):
    from transformers.utils.logging import get_logger

    logger = get_logger("transformers.generation.utils")
    for times in (1, 0):
        logger.warning("Your prompt is\n longer than the model.")
        logger.info("It is being read.")
        logging.getLogger("lightning.pytorch").info("GPU available: False")
        assert heard() == ["warning from transformers: Your prompt is longer than the model."] * times


def test_known_texts_are_silent(heard, tiny_model):
    from lit_llm.models.load import load_causal_lm

    model = load_causal_lm(tiny_model("llama"))
    heard()
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):    # otherwise this test would prove nothing
        assert not model.is_gradient_checkpointing
    assert not model.is_gradient_checkpointing
    assert heard() == []


def test_only_the_first_process_speaks(heard, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)      # an earlier test's group may still be there
    monkeypatch.setenv("LOCAL_RANK", "1")
    warnings.warn("two processes say the same", stacklevel=1)
    assert heard() == []


def test_our_own_warnings_keep_their_words(heard, caplog):
    logging.getLogger("lit_llm.training").warning("documents go one by one")
    assert caplog.messages == ["documents go one by one"]
    assert not any("warning from" in line for line in heard())


def test_every_silent_text_has_its_reason_and_hides_no_other(heard):
    for entry in KNOWN:
        assert re.compile(entry.text)
        assert len(entry.why) > 20
        assert not re.match(entry.text, "some other warning")
        assert not library_warnings.is_known("another library", entry.text)


def test_a_long_warning_is_cut(capsys):
    Listener().hear("torch", "word " * 1000)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 700
