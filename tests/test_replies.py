"""If this breaks: a call that a model writes as its chat template taught it is shown to the user as text, or is called with other
arguments; reasoning is shown as the answer; text is lost from an answer, or doubled.

Oracle: the calls that were rendered, by plain transformers' template code, are those that are read.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Message
from lit_llm.text.replies import learning
from lit_llm.text.replies.parser import ReplyParser
from lit_llm.text.replies.syntax import CallSyntax, Reasoning, parameters_of
from tests.conversations import quick
from tests.template_cases import fitted
from tests.template_styles import STYLES

NO_TOOLS = "does not show the tools"
PUBLISHED = {                                           # whether calls read back, and how many a message may have; or the reason
    "Qwen-Qwen2.5-7B-Instruct": "several", "Qwen-Qwen3-0.6B": "several", "meta-llama-Llama-3.1-8B-Instruct": "single",
    "meta-llama-Llama-3.2-3B-Instruct": "single", "mistralai-Mistral-Nemo-Instruct-2407": "several",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "several", "HuggingFaceTB-SmolLM3-3B": NO_TOOLS,
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": NO_TOOLS, "google-gemma-2-2b-it": NO_TOOLS, "microsoft-Phi-3.5-mini-instruct": NO_TOOLS,
}
FORMS = {                                               # other ways in which published templates write calls, made for this test
    "pythonic": (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if loop.first and tools %}{{ tools|tojson }}\n{% endif %}{{ m.content }}"
        "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}="
        "{{ v|tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"),
    "keys and values": (
        "{% if tools %}<|system|>\n{% for t in tools %}{{ t|tojson }}\n{% endfor %}{% endif %}{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{% if m.content %}\n{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}"
        "</arg_key>\n<arg_value>{{ v if v is string else v|tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"),
    "sections": (
        "{% for t in tools or [] %}{{ t|tojson }}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name }}\n```json\n{{ c.function.arguments|tojson }}\n```<｜tool▁call▁end｜>"
        "{% endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"),
    "text within JSON": (
        "{% for t in tools or [] %}{{ t|tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ {'arguments': c.function.arguments|tojson, 'name': c.function.name, 'id': c.id}|tojson }}"
        "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
}
READ = ["hermes", "by hand", "functionary", "xml", "mistral v3", "mistral v7", "llama 3.1", "glm 4", "granite"]
QWEN = CallSyntax("", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", object_keys=("name", "arguments"), several=True)
LLAMA = CallSyntax("", '{"name": "', '", "parameters": ', "}", object_keys=("name", "parameters"))
FUNCTIONS = parameters_of(learning.TOOLS)
ALPHA = '<tool_call>\n{"name": "probe_alpha", "arguments": {"text": "a"}}\n</tool_call>'


@pytest.fixture(scope="module")
def hf(tiny_tokenizer):
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def learned(hf, source):
    tokenizer = fitted(hf, source)
    tags = learning.reasoning(tokenizer.template, source)
    return tokenizer, tags, learning.call_syntax(tokenizer.template, tags)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_read_back_or_are_refused_with_the_reason(name, hf, shared_data):
    source = (shared_data / "templates/llamacpp" / f"{name}.jinja").read_text(encoding="utf-8")
    if PUBLISHED[name] in ("several", "single"):
        assert learned(hf, source)[2].several == (PUBLISHED[name] == "several")
    else:
        with pytest.raises(InputError, match=PUBLISHED[name]):
            learned(hf, source)


def test_community_templates_have_no_tools(hf, shared_data):
    for file in (shared_data / "templates/chujie").glob("*.jinja"):
        with pytest.raises(InputError, match="tools"):
            learned(hf, file.read_text(encoding="utf-8"))


leaves = st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.text(st.characters(exclude_categories=["Cs", "Cc", "Co"]), max_size=8)
nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1, max_size=4), inner, max_size=3),
                      max_leaves=6)
words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co"]), max_size=12)
kinds = {"text": words, "more": words, "count": st.integers(-99, 99), "flag": st.booleans(), "ratio": st.floats(-9, 9),
         "place": st.dictionaries(st.text("abc_", min_size=1, max_size=4), nested, max_size=3), "names": st.lists(nested, max_size=3)}
made = st.fixed_dictionaries({}, optional=kinds)


@pytest.mark.parametrize("name", [*READ, *FORMS])
def test_what_a_template_renders_is_read(name, hf):
    """Random calls and contents, whole and character by character; text that no template could write clearly is left out."""
    source = STYLES.get(name) or FORMS[name]
    tokenizer, tags, syntax = learned(hf, source)
    probe = learning.Probe(tokenizer.template, tags)
    count = 3 if syntax.several else 1

    @quick
    @given(st.lists(made, min_size=1, max_size=count), st.sampled_from(["", "Let me see.", "多远？ {\"a\": 1} <b>"]))
    def check(arguments, content):
        calls = list(zip(learning.NAMES, arguments, strict=False))
        if syntax.keyed and any(mark in json.dumps(arguments) for mark in "<>"):
            return
        try:
            text = probe.text(calls, content if syntax.after_content else "")
        except InputError:
            return
        for size in (0, 1):
            assert learning.read(syntax, text, learning.TOOLS, size) == (content if syntax.after_content else "", calls)

    check()


def test_calls_that_do_not_read_back_are_refused(hf):
    lossy = STYLES["hermes"].replace("c.function.arguments|tojson", "c.function.arguments|tojson|upper")
    with pytest.raises(InputError, match=r"does not show the tool calls|cannot be read back"):
        learned(hf, lossy)


# ---- what models write, and templates do not ---------------------------------------------------------------------------

def parts(text, syntax=QWEN, size=0, **options):
    """(content, reasoning, calls) of an answer that arrives in pieces."""
    reply = ReplyParser(syntax=syntax, functions=FUNCTIONS, **options).whole(text, size)
    return reply.content, reply.reasoning, reply.calls


CALL = ("probe_alpha", '{"text": "a"}')
WRITTEN = {
    "other white space": ('<tool_call>{ "name":"probe_alpha" , "arguments":{"text": "a"} }</tool_call>', "", [CALL]),
    "other order": ('<tool_call>\n{"arguments": {"text": "a"}, "name": "probe_alpha"}\n</tool_call>', "", [CALL]),
    "more keys": ('<tool_call>\n{"id": 7, "name": "probe_alpha", "arguments": {"text": "a"}, "x": [{}]}\n</tool_call>', "", [CALL]),
    "no end tag": ('<tool_call>\n{"name": "probe_alpha", "arguments": {"text": "a"}}', "", [CALL]),
    "text around": (f"One \n\n{ALPHA}\n two", "One" + "two", [CALL]),
    "text between": (f"{ALPHA} and {ALPHA}", "and", [CALL, CALL]),
    "an unknown function": ('Now <tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', None, []),
    "the tag as text": ("The tag <tool_call> begins a call.", None, []),
    "the tag at the end": ("The tag is <tool_call>", None, []),
    "part of the tag": ("a <tool_ca", None, []),
    "not JSON": ("<tool_call>\nprobe_alpha(text='a')\n</tool_call>", None, []),
    "cut in the name": ('See. <tool_call>\n{"name": "probe', "See.", []),
    "cut in the arguments": ('<tool_call>\n{"name": "probe_alpha", "arguments": {"text": "a', "", [("probe_alpha", '{"text": "a')]),
    "brackets in strings": ('<tool_call>\n{"name": "probe_alpha", "arguments": {"text": "}{]\\"\\\\"}}\n</tool_call>', "",
                            [("probe_alpha", '{"text": "}{]\\"\\\\"}')]),
    "nothing": ("", "", []), "white space": (" \n ", None, []),
}


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("kind", WRITTEN)
def test_answers_of_models(kind, size):
    text, content, calls = WRITTEN[kind]
    assert parts(text, size=size) == (text if content is None else content, "", calls)


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("text", ['{"name": "Tom", "age": 3}', '{"name": "probe_al', "{}", "{x", '{"a": {"name": "probe_alpha"}}', "Hi {"])
def test_json_that_is_no_call_stays_content(text, size):
    """Llama 3.1's calls have no tag."""
    assert parts(text, LLAMA, size) == (text, "", [])
    call = '{"name": "probe_alpha", "parameters": {"count": 3}}'
    assert parts(call, LLAMA, size) == ("", "", [("probe_alpha", '{"count": 3}')])


@quick
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "probe_alpha"', ', "arguments": ', "{", "}", '"',
                                 "\\", "\n", " ", "a", "é", ALPHA]), max_size=14).map("".join), st.integers(1, 7))
def test_pieces_do_not_matter_and_no_text_is_lost(text, size):
    tags = Reasoning("<think>", "</think>")
    for options in ({}, {"reasoning": tags}, {"reasoning": tags, "in_reasoning": True}):
        assert parts(text, size=size, **options) == parts(text, **options)
    assert parts(text, syntax=None, size=size)[0] == text


TAGS = Reasoning("<think>", "</think>")
THOUGHTS = {
    "<think>\nHm.\n</think>\n\nYes": (False, "Yes", "Hm."), "Hm.\n</think>\n\nYes": (True, "Yes", "Hm."), "Yes": (False, "Yes", ""),
    "<think>Hm": (False, "", "Hm"), "Hm. <thin": (True, "", "Hm. <thin"), "<think></think>Yes": (False, "Yes", ""),
    "a <think>b</think>": (False, "a <think>b</think>", ""), "<thin": (False, "<thin", ""), "Hm</think>Yes</think>": (True, "Yes</think>", "Hm"),
}


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("text", THOUGHTS)
def test_reasoning_is_split_off(text, size):
    is_open, content, thoughts = THOUGHTS[text]
    assert parts(text, None, size, reasoning=TAGS, in_reasoning=is_open) == (content, thoughts, [])


@pytest.mark.parametrize(("name", "is_open"), [("qwen3", False), ("deepseek r1", True), ("reasoning", False), ("hermes", None), ("gemma", None)])
def test_tags_of_reasoning_are_the_templates(name, is_open, hf):
    """What a template renders is split again; some templates open the block in the prompt."""
    tokenizer = fitted(hf, STYLES[name])
    tags = learning.reasoning(tokenizer.template, STYLES[name])
    if is_open is None:
        assert tags is None
        return
    question, message = Message("user", "x"), Message("assistant", "The answer.", reasoning_content="Some\nthoughts.")
    prompt = tokenizer.decode(tokenizer.encode_prompt(Conversation((question,))), skip_special_tokens=False)
    assert tags.is_open(prompt) == is_open
    answer = tokenizer.template.answer_text(Conversation((question, message)))
    stop = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.stop_ids))
    for end in stop:
        answer = answer.removesuffix(end)
    assert parts(answer, None, reasoning=tags, in_reasoning=is_open) == ("The answer.", "Some\nthoughts.", [])
