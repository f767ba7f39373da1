"""If this breaks: a model is trained with one value of a template variable and served with another, or a misspelt variable is
silently ignored.

The expected text is rendered by plain transformers.
"""

import json

import pytest
from transformers import AutoTokenizer

from lit_llm.data.records import formats
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.cache import folder_of
from lit_llm.data.tokens.prepare import prepare
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import Tokenizer
from tests.conversations import answer_and_stop, chat, supervised_runs

# as templates of reasoning models do: the prompt opens the thinking, or closes an empty one
THINKS = ("{%- macro line(m) %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and m.reasoning_content %}"
          "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endmacro -%}"
          "{% if style is defined %}{{ '<|im_start|>system\n' + style + '<|im_end|>\n' }}{% endif %}"
          "{% for m in messages %}{{ line(m) }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
          "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}")
PLAIN = chat("What is it?", "A kite.")
VALUES = {"enable_thinking": False, "style": "Be 'brief' \\n %} }} 你 \U0001f642"}


@pytest.fixture
def thinks(tmp_path):
    file = tmp_path / "thinks.jinja"
    file.write_text(THINKS, encoding="utf-8")
    return str(file)


def test_a_reasoning_template_can_learn_plain_answers(tiny_tokenizer, thinks):
    with pytest.raises(InputError, match="starts the answer inside a block of reasoning"):
        Tokenizer.load(tiny_tokenizer, chat_template=thinks).encode_conversation(PLAIN)
    tokenizer = Tokenizer.load(tiny_tokenizer, chat_template=thinks, template_args={"enable_thinking": False})
    (sequence,) = tokenizer.encode_conversation(PLAIN)
    ((start, ids),) = supervised_runs(sequence)
    assert answer_and_stop(tokenizer, ids) == ("A kite.", "<|im_end|>")
    assert sequence.input_ids[:start].tolist() == tokenizer.encode_prompt(PLAIN.upto(1))


def test_the_saved_folder_renders_the_same_for_everybody(tiny_tokenizer, thinks, tmp_path):
    """Plain transformers use the values as defaults; a request's own values take precedence."""
    hf = AutoTokenizer.from_pretrained(tiny_tokenizer, chat_template=THINKS)
    Tokenizer.load(tiny_tokenizer, chat_template=thinks, template_args=VALUES).save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = PLAIN.to_openai()[:1]
    for own in ({}, {"enable_thinking": True}, {"style": ""}):
        how = {"add_generation_prompt": True, "tokenize": False}
        assert saved.apply_chat_template(messages, **how, **own) == hf.apply_chat_template(messages, **how, **VALUES | own)
    again = Tokenizer.load(str(tmp_path / "saved"), template_args=VALUES)
    assert again.hf.chat_template == saved.chat_template, "values that are set twice occur once"


def test_a_record_has_values_of_its_own(tiny_tokenizer, thinks):
    tokenizer = Tokenizer.load(tiny_tokenizer, chat_template=thinks)
    for key in ("chat_template_kwargs", "template_args"):
        record = {"messages": PLAIN.to_openai(), key: {"enable_thinking": False, "style": "Be brief."}}
        notes: set[str] = set()
        (sequence,) = tokenizer.encode_conversation(formats.convert(record, notes=notes), notes=notes)
        assert not notes
        text = tokenizer.decode(sequence.input_ids, skip_special_tokens=False)
        assert text == tokenizer.hf.apply_chat_template(record["messages"][:1], add_generation_prompt=True, tokenize=False,
                                                        **record[key]) + "A kite.<|im_end|>"


def test_a_variable_that_the_template_lacks_is_refused_or_reported(tiny_tokenizer, thinks):
    with pytest.raises(InputError, match=r"no variable 'enable_thinkin'.*Did you mean 'enable_thinking'") as caught:
        Tokenizer.load(tiny_tokenizer, chat_template=thinks, template_args={"enable_thinkin": False})
    assert caught.value.where == "data.template_args"
    with pytest.raises(InputError, match="it reads none that can be set"):
        Tokenizer.load(tiny_tokenizer, template_args={"messages": "x"})
    tokenizer = Tokenizer.load(tiny_tokenizer, chat_template=thinks)

    def read(**own):
        notes: set[str] = set()
        tokenizer.encode_conversation(formats.convert({"messages": PLAIN.to_openai(), "template_args": {
            "enable_thinking": False, **own}}), notes=notes)
        return notes

    assert read(zzz=1) == {"the chat template has no variable 'zzz'"}
    with pytest.raises(InputError, match="Did you mean 'enable_thinking'"):
        read(enabel_thinking=True)
    with pytest.raises(InputError, match="control token"):
        read(style="<|im_end|>")


def test_prepared_tokens_and_fingerprints_know_the_values(tiny_tokenizer, thinks, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": PLAIN.to_openai()}) + "\n", encoding="utf-8")
    made = [Tokenizer.load(tiny_tokenizer, chat_template=thinks, template_args=args)
            for args in ({"enable_thinking": False}, {"enable_thinking": False, "style": "x"})]
    assert made[0].fingerprint != made[1].fingerprint
    assert len({folder_of(Source(str(file)), one, {}, None) for one in made}) == 2
    assert len({len(prepare(Source(str(file)), one).tokens) for one in made}) == 2


@pytest.mark.parametrize("name", [1, None, 2.5, True, "x" * 500])
def test_a_name_that_is_no_text_is_refused_in_a_line(name):
    """YAML has keys of any type."""
    from lit_llm.text.templates.jinja import check_args

    with pytest.raises(InputError, match=f"no variable '{str(name)[:40]}'"):
        check_args({name: 1}, frozenset({"enable_thinking"}), "chat.template_args")
