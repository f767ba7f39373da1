"""If this breaks: with templates in the style of a published model, other text is supervised than is served, a valid
conversation is refused, or a refusal gives a wrong reason.

The oracle renders each record with plain transformers (`tests/rendering_oracle.py`).
"""

import json

import pytest
from transformers import AutoTokenizer

from lit_llm.data.records import formats
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import IGNORE_INDEX
from tests.conversation_records import KINDS, NASTY, PLACE
from tests.conversations import answer_and_stop, supervised_runs
from tests.rendering_oracle import OTHERWISE, REFUSED, SERVED, judge
from tests.template_cases import fitted
from tests.template_styles import STYLES

SLOW = {"very long", "many turns"}
PLAIN = {"one turn", "turns", "user last", "spaces", "unicode", "html", "code", "crlf", "names", "text parts", "same words"}
SYSTEM = {"system", "system late", "system twice", "system before each", "developer"}
TURNS = {"two users", "two users last", "empty user among many", "empty answer among many", "null content", "greeting"}
CALLS = {kind for kind in KINDS if kind.startswith(("call", "two calls", "two rounds", "result")) and kind != "call after reasoning"}
SERVES = {                                              # kinds that each style must support, beside PLAIN
    "hermes": SYSTEM | TURNS | CALLS, "by hand": SYSTEM | TURNS | CALLS, "functionary": SYSTEM | TURNS | CALLS, "glm 4": SYSTEM | TURNS | CALLS,
    "xml": SYSTEM | TURNS | CALLS - {"call without arguments"}, "granite": SYSTEM | TURNS | CALLS, "mistral v7": SYSTEM | TURNS | CALLS,
    "llama 3.1": SYSTEM | {"call by object", "call by text", "call and result in JSON", "result in nested JSON", "call last"},
    "mistral v3": {"system", "developer", "call by object", "call by text", "call and result in JSON", "two users last"},
    "phi 4": SYSTEM | TURNS, "zephyr": SYSTEM | TURNS, "macros": SYSTEM | TURNS, "command r": SYSTEM | TURNS,
    "deepseek v3": {"system", "empty answer among many"}, "deepseek r1": {"inline think"} | {"reasoning_content"},
    "qwen3": SYSTEM | {"inline think", "reasoning_content", "reasoning", "thinking off", "thinking on"}, "alpaca": SYSTEM,
    "reasoning": SYSTEM | TURNS | {"reasoning_content", "reasoning", "inline think"}, "generation": SYSTEM | TURNS,
    "gemma": {"two users last", "empty answer among many"}, "vicuna": {"system", "two users last"}, "not the last": SYSTEM, "internlm": TURNS,
    "parts": {"text parts"},
}


@pytest.fixture(scope="module")
def hf(tiny_tokenizer):
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_learned_as_served_or_refused_for_a_true_reason(style, hf):
    tokenizer = fitted(hf, STYLES[style])
    verdicts = {kind: judge(tokenizer, record) for kind, record in KINDS.items() if kind not in SLOW}
    odd = {kind: verdict for kind, verdict in verdicts.items() if verdict[0] not in (SERVED, REFUSED, OTHERWISE)}
    assert not odd
    must = SERVES[style] if style in ("deepseek r1", "parts") else SERVES[style] | PLAIN
    assert not {kind: verdicts[kind] for kind in must if verdicts[kind][0] != SERVED}


def supervised_texts(tokenizer, record):
    return [answer_and_stop(tokenizer, ids)[0] for sequence in tokenizer.encode_conversation(formats.convert(record))
            for _, ids in supervised_runs(sequence)]


@pytest.mark.parametrize("style", ["hermes", "by hand", "functionary", "mistral v7", "granite"])
@pytest.mark.parametrize("kind", ["call by object", "call by text", "call, nasty arguments"])
def test_a_call_reads_back_and_holds_no_html(style, kind, hf):
    """With arguments as an object or as text in the record, and whatever the template does with either."""
    call = supervised_texts(fitted(hf, STYLES[style]), KINDS[kind])[0]
    assert "&#" not in call
    assert "&quot;" not in call
    calls = []
    for at in (at for at, letter in enumerate(call) if letter == "{"):
        try:
            calls.append(json.JSONDecoder().raw_decode(call, at)[0])
        except ValueError:
            continue
    wanted = NASTY if "nasty" in kind else PLACE
    assert wanted in [*calls, *(one.get("arguments") for one in calls)]


def test_a_call_that_only_comes_out_as_html_is_refused(hf):
    template = STYLES["by hand"].replace("c.function.arguments if c.function.arguments is string else c.function.arguments|tojson|safe",
                                         "c.function.arguments|tojson|safe")
    with pytest.raises(InputError, match="HTML"):
        fitted(hf, template).encode_conversation(formats.convert(KINDS["call by text"]))


@pytest.mark.parametrize("kind", ["turns", "system late", "two users", "user last", "unicode", "spaces"])
def test_labels_are_those_of_the_templates_own_generation_tags(kind, hf):
    tokenizer = fitted(hf, STYLES["generation"])
    (sequence,) = tokenizer.encode_conversation(formats.convert(KINDS[kind]))
    own = tokenizer.hf.apply_chat_template(KINDS[kind]["messages"], return_dict=True, return_assistant_tokens_mask=True)
    assert sequence.input_ids.tolist() == own["input_ids"]
    assert (sequence.labels != IGNORE_INDEX).astype(int).tolist() == list(own["assistant_masks"])


def test_answers_that_are_left_out_are_reported(hf):
    tokenizer = fitted(hf, STYLES["phi 4"])
    for kind, note in (("empty answer among many", "an empty answer is not trained on"),
                       ("greeting", "an answer that opens the conversation is not trained on: there is no prompt for it")):
        notes: set[str] = set()
        tokenizer.encode_conversation(formats.convert(KINDS[kind]), notes=notes)
        assert notes == {note}
    with pytest.raises(InputError, match=r"no assistant message of this conversation is trained on.*an empty answer is not trained on"):
        tokenizer.encode_conversation(formats.convert({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}))
