"""If this breaks: the model is silently trained on the user's text, never learns to stop, or gets another prompt when served than
in training.
"""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Document, Message
from lit_llm.text.tokenizer import IGNORE_INDEX, Tokenizer
from tests.conversations import (
    KINDS,
    NEMO,
    QWEN3,
    QWEN25,
    SIMPLE,
    SMOL,
    answer_and_stop,
    assert_prompts_as_trained,
    chat,
    controls,
    may_refuse,
    plain,
    quick,
    spoken,
    supervised_runs,
    texts,
    with_template,
)

# ---- the mask --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "stop"), [("tiny", "<|im_end|>"), ("stories", "</s>"), ("qwen2", "<|im_end|>"),
                                            (QWEN25, "<|im_end|>"), (SMOL, "<|im_end|>"), (NEMO, "</s>")])
def test_exactly_the_answers_and_their_stop_tokens_are_supervised(load, kind, stop):
    tokenizer = load(kind)
    conversation = chat("What colour?", "Red. 红", "And how\nhigh?", "12 m high, é 🙂")
    (sequence,) = tokenizer.encode_conversation(conversation)
    assert [answer_and_stop(tokenizer, ids) for _, ids in supervised_runs(sequence)] == [("Red. 红", stop), ("12 m high, é 🙂", stop)]
    assert tokenizer.stop_ids[0] == tokenizer.hf.convert_tokens_to_ids(stop)


def test_a_template_that_rewrites_history_gives_one_sequence_per_answer(load):
    """Qwen3 shows reasoning only after the last question; each answer is trained after the prompt that is served.
    """
    tokenizer = load(QWEN3)
    conversation = Conversation((Message("user", "1+1?"), Message("assistant", "2", reasoning_content="one more"),
                                 Message("user", "and 1?"), Message("assistant", "3", reasoning_content="again")))
    first, second = tokenizer.encode_conversation(conversation)
    for sequence, answer in ((first, "<think>\none more\n</think>\n\n2"), (second, "<think>\nagain\n</think>\n\n3")):
        ((_, ids),) = supervised_runs(sequence)
        assert answer_and_stop(tokenizer, ids) == (answer, "<|im_end|>")
    assert "one more" not in tokenizer.decode(second.input_ids)


@quick
@given(user=spoken, one=spoken, again=spoken, two=spoken)
@pytest.mark.parametrize("kind", SIMPLE)
def test_any_answer_is_supervised_to_the_letter(load, kind, user, one, again, two):
    tokenizer = load(kind)
    sequences = tokenizer.encode_conversation(chat(user, one, again, two))
    got = [answer_and_stop(tokenizer, ids) for sequence in sequences for _, ids in supervised_runs(sequence)]
    stop = tokenizer.hf.convert_ids_to_tokens(tokenizer.stop_ids[0])
    if kind == "stories":                           # sentencepiece's own sign for a space
        one, two = (text.replace("▁", " ") for text in (one, two))
    assert got == [(one, stop), (two, stop)]


def test_train_on(load):
    tokenizer = load("tiny")
    a, b = ("yes", "<|im_end|>"), ("no", "<|im_end|>")

    def supervised_texts(train_on, *flags):
        roles = ("user", "assistant", "user", "assistant")
        messages = tuple(Message(role, text, train=flag) for role, text, flag in
                         zip(roles, ("q", "yes", "r", "no"), flags or [None] * 4, strict=True))
        (sequence,) = tokenizer.encode_conversation(Conversation(messages), train_on=train_on)
        return [answer_and_stop(tokenizer, ids) for _, ids in supervised_runs(sequence)], sequence

    assert supervised_texts("assistant")[0] == [a, b]
    assert supervised_texts("last")[0] == [b]
    assert supervised_texts("assistant", None, False, None, None)[0] == [b]
    assert supervised_texts("last", None, True, None, None)[0] == [a, b]
    everything = supervised_texts("all")[1]
    assert (everything.labels == everything.input_ids).all()
    but_one = supervised_texts("all", None, False, None, None)[1]
    (start, stop) = np.flatnonzero(but_one.labels == IGNORE_INDEX)[[0, -1]]
    assert answer_and_stop(tokenizer, but_one.input_ids[start:stop + 1].tolist()) == a


def test_all_is_all_where_the_template_rewrites_history(load):
    tokenizer = load(QWEN3)
    (sequence,) = tokenizer.encode_conversation(chat("a", "b", "c", "d"), train_on="all")
    assert (sequence.labels == sequence.input_ids).all()


def test_a_pad_token_equal_to_eos_does_not_hide_stop_tokens(load):
    tokenizer = load("stories")
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.stop_ids[0]
    (sequence,) = tokenizer.encode_conversation(chat("a", "b"))
    assert sequence.labels.tolist().count(tokenizer.eos_id) == 1
    document = tokenizer.encode_document(Document("Tom"))
    assert document.labels[-1] == tokenizer.eos_id


def test_nothing_to_learn_is_refused(load):
    for conversation in (chat("q"), Conversation((Message("user", "q"), Message("assistant", "a", train=False)))):
        with pytest.raises(InputError, match="no assistant message of this conversation is trained on"):
            load("tiny").encode_conversation(conversation)


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}", "{{ messages[0].content / 0 }}", "{{ 1 / 0 }}", "{% for", "{{ x.y.z }}",
    "{{ ().__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}"])
def test_a_broken_or_hostile_template_is_a_user_error(tiny_tokenizer, tmp_path, template):
    tokenizer = with_template(tiny_tokenizer, tmp_path, template)
    for encode in (tokenizer.encode_prompt, tokenizer.encode_conversation):
        with pytest.raises(InputError):
            encode(chat("q", "a"))


# ---- trained is served -----------------------------------------------------------------------------------------------

@quick
@given(user=spoken, one=spoken, again=spoken, two=spoken)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_before_an_answer_are_the_served_prompt(load, kind, user, one, again, two):
    with may_refuse(kind):
        assert_prompts_as_trained(load(kind), chat(user, one, again, two))


@quick
@given(user=plain, answer=plain, again=plain, system=st.none() | plain)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stories"])
def test_ids_are_transformers_own(load, kind, user, answer, again, system):
    """Where no content spells a control token, `apply_chat_template` of transformers reads the same ids."""
    tokenizer = load(kind)
    conversation = chat(user, answer, again, system=system)
    want = tokenizer.hf.apply_chat_template(conversation.to_openai(), add_generation_prompt=True, tokenize=True,
                                            return_dict=False)
    assert tokenizer.encode_prompt(conversation) == want


def test_ids_are_transformers_own_for_stories(load):
    tokenizer = load("stories")
    conversation = chat("Tom has", "a kite", "where?")
    assert tokenizer.encode_prompt(conversation) == tokenizer.hf.apply_chat_template(
        conversation.to_openai(), add_generation_prompt=True, tokenize=True, return_dict=False)


# ---- tokens and bytes ------------------------------------------------------------------------------------------------

@quick
@given(text=texts)
@pytest.mark.parametrize("kind", ["tiny", "qwen2", "stories"])
def test_text_comes_back_and_its_bytes_are_counted(load, kind, text):
    tokenizer = load(kind)
    ids = tokenizer.encode_text(text)
    assert not controls(tokenizer, ids)
    if kind == "stories":
        text = text.replace("▁", " ")               # sentencepiece's sign for a space; it puts one before a text
        assert tokenizer.token_bytes[0][ids].sum() == len(text.encode()) + bool(text)
        assert tokenizer.token_bytes[1][ids[:1]].sum() + tokenizer.token_bytes[0][ids[1:]].sum() == len(text.encode())
    else:
        assert tokenizer.token_bytes[0][ids].sum() == tokenizer.token_bytes[1][ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_a_user_error(load):
    """JSON can spell it, UTF-8 cannot."""
    tokenizer = load("tiny")
    for encode in (tokenizer.encode_text, lambda text: tokenizer.encode_document(Document(text)),
                   lambda text: tokenizer.encode_prompt(chat(text)),
                   lambda text: tokenizer.encode_conversation(chat("q", text))):
        with pytest.raises(InputError, match="surrogate"):
            encode("a\ud800b")


def test_a_document_begins_and_ends_as_the_tokenizer_has_it(load):
    stories, tiny = load("stories"), load("tiny")
    whole = stories.encode_document(Document("Tom")).input_ids.tolist()
    assert whole == [*stories.hf("Tom")["input_ids"], stories.eos_id]
    assert stories.encode_document(Document("Tom"), end=False).input_ids[0] == stories.bos_id
    sequence = tiny.encode_document(Document("Tom"))
    assert sequence.input_ids.tolist() == [*tiny.hf("Tom")["input_ids"], tiny.eos_id]
    assert (sequence.labels == sequence.input_ids).all()
    assert sequence.input_ids.dtype == sequence.labels.dtype == np.int32


def test_a_saved_tokenizer_is_the_same(load, tmp_path):
    for kind in ("tiny", "stories"):
        load(kind).save(tmp_path / kind)
        again = Tokenizer.load(str(tmp_path / kind))
        assert again.fingerprint == load(kind).fingerprint
        assert again.encode_prompt(chat("q</s>")) == load(kind).encode_prompt(chat("q</s>"))
        assert again.stop_ids == load(kind).stop_ids


def test_another_template_has_another_fingerprint(load):
    assert len({load(kind).fingerprint for kind in ("qwen2", QWEN25, QWEN3)}) == 3


def test_what_cannot_be_loaded_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(InputError, match="no folder"):
        Tokenizer.load(str(tmp_path / "none"))
    with pytest.raises(InputError, match="no readable tokenizer"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no readable tokenizer"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(InputError, match="no template file"):
        Tokenizer.load(tiny_tokenizer, chat_template="nowhere.jinja")
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        Tokenizer.load("nobody/nothing")


ANSWERS = ["Well, <think>I ad", "\n <tool_call>\n{", "plain", " led by a space", "<|im_end|> is text", "风筝<think>\n\n</think>是"]


@pytest.mark.parametrize("kind", ["tiny", QWEN25, NEMO])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_sent_back_has_the_tokens_that_it_had(kind, answer, load):
    """Added tokens that are not special are tokens in an answer, as in training; only then does the model continue it.

    Oracle: transformers' tokenizer, which reads the whole text; it cannot tell a spelled control token from a real one.
    """
    tokenizer = load(kind)
    if kind == "tiny":
        hf = copy.deepcopy(tokenizer.hf)
        hf.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>", "<tool_call>")])
        tokenizer = Tokenizer(hf)
    messages = [{"role": "user", "content": "Where is <think> it?"}, {"role": "assistant", "content": answer}]
    ids = tokenizer.encode_continuation(Conversation.from_openai(messages))
    messages[0]["content"] = "Where is it?"         # in a question they are text here
    more = tokenizer.encode_continuation(Conversation.from_openai(messages))
    if "<|im_end|>" in answer:
        assert sum(id_ in tokenizer.special_ids for id_ in more) == sum(id_ in tokenizer.special_ids for id_ in tokenizer.encode_prompt(
            Conversation.from_openai(messages[:1])))
        return
    # transformers lets a line break of the answer join that of its header, which no generated answer does.
    assert answer[0] == "\n" or more == tokenizer.hf.apply_chat_template(messages, continue_final_message=True, return_dict=True)["input_ids"]
    start = len(tokenizer.encode_prompt(Conversation.from_openai(messages[:1])))
    assert ids[-(len(more) - start):] == more[start:]
    trained = tokenizer.encode_conversation(Conversation.from_openai(messages))[0].input_ids.tolist()
    assert trained[:len(more) - 1] == more[:-1]     # the last token may reach into the stop token's text
