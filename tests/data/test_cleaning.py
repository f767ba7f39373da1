"""If this breaks: cleaning removes more than white space, or a long text is cleaned differently from a short one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.records.cleaning import clean, clean_blocks, cleaned
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.prepare import prepare
from lit_llm.text.conversation import Conversation, Document

spaced = st.text(alphabet="ab的 \t\u3000\n", max_size=60)


@given(spaced, st.sampled_from(["strip", "collapse"]))
def test_only_white_space_goes(text, how):
    out = clean(text, how)
    assert re.sub(r"\s", "", out) == re.sub(r"\s", "", text)
    assert out == out.strip()
    assert clean(out, how) == out
    if how == "collapse":
        assert not re.search(r"\n\n\n|[ \t\u3000]{2}|\n | \n", out)
        assert out.split() == text.split()


@given(st.lists(spaced, max_size=6), st.sampled_from(["none", "strip", "collapse"]))
def test_blocks_are_cleaned_as_their_text(lines, how):
    blocks = [line + "\n" for line in lines]
    assert "".join(clean_blocks(blocks, how)) == clean("".join(blocks), how)


def test_conversations_keep_all_but_white_space():
    talk = Conversation.from_openai([{"role": "user", "content": " a  b "},
                                     {"role": "assistant", "content": "c\n", "reasoning_content": " r "}])
    out = cleaned(talk, "collapse")
    assert [message.content for message in out.messages] == ["a b", "c"]
    assert out.messages[1].reasoning_content == " r "
    assert cleaned(out, "collapse") is out
    assert cleaned(Document(" x"), "none") == Document(" x")


@pytest.mark.parametrize("how", ["none", "strip", "collapse"])
def test_a_source_is_cleaned_and_counted(how, tokenizer, jsonl):
    path = jsonl([{"text": " a   b\n\n\n\nc "}, {"text": "clean"}])
    store = prepare(Source(path, clean=how), tokenizer)
    first = store.sequences[0]
    decoded = tokenizer.decode(store.tokens[: first["length"] - 1].tolist())
    assert decoded == {"none": " a   b\n\n\n\nc ", "strip": "a   b\n\n\n\nc", "collapse": "a b\n\nc"}[how]
    assert store.report.cleaned == (how != "none")
