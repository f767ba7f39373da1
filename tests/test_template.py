"""If this breaks: with a real chat template, text of other roles is supervised, or the served prompt differs from the trained one.

`tests/template_cases.py` finds the expected answers, rendering with transformers only.
"""

import pytest
from transformers import AutoTokenizer

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation, Message
from lit_llm.text.templates import jinja
from lit_llm.text.tokenizer import Tokenizer
from tests.conversations import FORGED, answer_and_stop, chat, supervised_runs, with_template
from tests.template_cases import BATTERY, CALL, TOOLS, check, fitted, of

GEMMA, NEMO, HERMES = ("google-gemma-2-2b-it", "mistralai-Mistral-Nemo-Instruct-2407",
                       "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use")
LLAMA, LLAMA32, PHI = ("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
                       "microsoft-Phi-3.5-mini-instruct")
QWEN25, QWEN3, SMOL, R1 = ("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B",
                           "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B")
REAL = [*(f"llamacpp/{name}" for name in (GEMMA, NEMO, HERMES, LLAMA, LLAMA32, PHI, QWEN25, QWEN3, SMOL, R1)),
        *(f"chujie/{name}" for name in ("alpaca", "chatml", "llama-2-chat", "vicuna"))]


@pytest.fixture(scope="session")
def real(shared_data, tiny_tokenizer):
    """`real(name)`: a real template, with the tiny vocabulary and the control tokens that the template writes."""
    made: dict[str, Tokenizer] = {}
    hf = AutoTokenizer.from_pretrained(tiny_tokenizer)

    def get(name):
        if name not in made:
            file = shared_data / "templates" / f"{name if '/' in name else 'llamacpp/' + name}.jinja"
            made[name] = fitted(hf, file.read_text(encoding="utf-8"))
        return made[name]

    return get


def supervised_texts(tokenizer, conversation, **how):
    return [answer_and_stop(tokenizer, ids) for sequence in tokenizer.encode_conversation(conversation, **how)
            for _, ids in supervised_runs(sequence)]


# ---- every real template ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REAL)
def test_answers_are_supervised_after_the_served_prompt(real, name):
    """Each kind of conversation is encoded exactly or refused; kinds that every template supports are never refused."""
    refused = {}
    for kind, conversation in BATTERY.items():
        try:
            check(real(name), conversation)
        except InputError as error:
            refused[kind] = str(error)
    plain = {"one turn", "turns", "user last", "spaces", "unicode"} | ({"<think>"} if name != f"llamacpp/{R1}" else set())
    assert not refused.keys() & ({"a call", "two calls"} if HERMES in name else plain)      # a template for tools only
    for reason in refused.values():
        assert reason.startswith(("the chat template refuses", "the chat template does not show",
                                  "the generation prompt ", "message ")), reason


# ---- what templates do -----------------------------------------------------------------------------------------------

def test_thinking_is_learned_behind_the_prompt_that_lacks_older_thinking(real):
    first, second = real(QWEN3).encode_conversation(BATTERY["thinking"])
    assert supervised_texts(real(QWEN3), BATTERY["thinking"]) == [
        ("<think>\nOne more.\n</think>\n\nTwo.", "<|im_end|>"), ("<think>\nAgain one.\n</think>\n\nThree.", "<|im_end|>")]
    assert "One more" in real(QWEN3).decode(first.input_ids)
    assert "One more" not in real(QWEN3).decode(second.input_ids)


def test_a_system_turn_that_the_template_knows_not_is_refused(real):
    for encode in (real(GEMMA).encode_conversation, real(GEMMA).encode_prompt):
        with pytest.raises(InputError, match="System role not supported"):
            encode(chat("q", "a", system="Be brief."))


@pytest.mark.parametrize("name", [GEMMA, NEMO, "chujie/vicuna"])
@pytest.mark.parametrize("kind", ["two users", "two answers", "greeting"])
def test_roles_that_do_not_alternate_are_refused(real, name, kind):
    with pytest.raises(InputError, match="must alternate"):
        real(name).encode_conversation(BATTERY[kind])


def test_a_system_message_that_only_a_prompt_shows_is_in_the_trained_prompt(real):
    """Mistral-Nemo shows it before the last question, while that is the last message."""
    conversation = chat("q", "a", "r", "b", system="Be brief.")
    first, second = real(NEMO).encode_conversation(conversation)
    for sequence, answer in ((first, "a"), (second, "b")):
        ((_, ids),) = supervised_runs(sequence)
        assert answer_and_stop(real(NEMO), ids) == (answer, "</s>")
        assert "Be brief." in real(NEMO).decode(sequence.input_ids)


@pytest.mark.parametrize("name", [LLAMA, GEMMA, "chujie/chatml"])
def test_what_a_template_trims_is_not_learned(real, name):
    (answer, _), *_ = supervised_texts(real(name), chat(" q\n", "\n A kite. \n"))
    assert answer == "A kite."


def test_a_template_that_writes_bos_for_a_tokenizer_that_adds_it_gets_one(stories, tmp_path):
    tokenizer = with_template(stories, tmp_path, "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + "
                              "eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    conversation = chat("Tom has", "a kite", "where?")
    assert tokenizer.hf("Tom")["input_ids"][0] == tokenizer.bos_id
    ids = tokenizer.encode_prompt(conversation)
    assert ids == tokenizer.hf.apply_chat_template(conversation.to_openai(), add_generation_prompt=True,
                                                   return_dict=False)
    assert ids[0] == tokenizer.bos_id != ids[1]
    (sequence,) = tokenizer.encode_conversation(chat("Tom has", "a kite"))
    assert sequence.input_ids.tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(("name", "stop"), [(LLAMA, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (PHI, "<|end|>")])
def test_an_end_of_turn_that_is_not_eos_is_learned_and_served(shared_data, tiny_tokenizer, name, stop):
    text = (shared_data / "templates/llamacpp" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), text, eos="<|endoftext|>")
    assert supervised_texts(tokenizer, chat("q", "A kite.")) == [("A kite.", stop)]
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.stop_ids)[0] == stop
    assert tokenizer.stop_ids[-1] == tokenizer.eos_id


def test_phi_learns_the_end_of_turn_and_not_the_end_of_text_behind_it(real):
    """Phi-3.5 ends the whole text, not the turn, with eos."""
    tokenizer = real(PHI)
    assert supervised_texts(tokenizer, BATTERY["turns"]) == [("A kite.", "<|end|>"), ("Twelve metres.", "<|end|>")]
    (sequence,) = tokenizer.encode_conversation(BATTERY["turns"])
    assert sequence.input_ids[-1] == tokenizer.eos_id
    assert sequence.labels[-1] == -100


def test_smollm_learns_its_empty_thinking_only_where_the_prompt_lacks_it(real):
    tokenizer = real(SMOL)
    (sequence,) = tokenizer.encode_conversation(BATTERY["turns"])
    for answer, words in zip(supervised_texts(tokenizer, BATTERY["turns"]), ("A kite.", "Twelve metres."), strict=True):
        assert answer[0].endswith(words)
    spelled = tokenizer.decode(sequence.input_ids, skip_special_tokens=False)
    assert spelled.count("A kite.") == spelled.count("Twelve metres.") == 1


# ---- calls -----------------------------------------------------------------------------------------------------------

def test_calls_are_learned_as_each_template_writes_them(real):
    (call, stop), (answer, end) = supervised_texts(real(HERMES), BATTERY["a call"])
    assert call.strip().startswith("<tool_call>")
    assert call.strip().endswith("</tool_call>")
    assert (stop, answer.strip(), end) == ("<|im_end|>", "It is sunny.", "<|im_end|>")
    (call, stop), (answer, _) = supervised_texts(real(NEMO), BATTERY["a call"])
    assert call.startswith('[TOOL_CALLS][{"name": "look_up"')
    assert (stop, answer) == ("</s>", "It is sunny.")
    (call, stop), (answer, _) = supervised_texts(real(LLAMA), BATTERY["a call"])
    assert call == '{"name": "look_up", "parameters": {"place": "Kyoto", "days": 3}}'
    assert (stop, answer) == ("<|eot_id|>", "It is sunny.")


CALLS_STOP = ("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
              "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
              "{% for c in m.tool_calls or [] %}{{ '<|python_tag|>' + c.function.name + c.function.arguments|tojson }}{% endfor %}"
              "{{ '<|eom_id|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def test_a_stop_token_used_only_for_calls_is_trained_and_served(tiny_tokenizer):
    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), CALLS_STOP, eos="<|endoftext|>")
    assert supervised_texts(tokenizer, BATTERY["a call"]) == [('<|python_tag|>look_up{"place": "Kyoto", "days": 3}', "<|eom_id|>"), ("It is sunny.", "<|im_end|>")]
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.stop_ids) == ["<|im_end|>", "<|eom_id|>", "<|endoftext|>"]


def test_an_answer_that_serving_would_cut_is_refused(tiny_tokenizer):
    """A stop token between content and calls: the text after it would be supervised but never generated."""
    template = CALLS_STOP.replace("<|python_tag|>", "<|im_end|>").replace("<|eom_id|>", "<|im_end|>")
    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), template, eos="<|endoftext|>")
    with pytest.raises(InputError, match="this answer would not stop when served"):
        tokenizer.encode_conversation(BATTERY["a call"])


@pytest.mark.parametrize(("name", "message", "lacks"), [
    (LLAMA, Message("assistant", "I look.", tool_calls=(CALL,)), "content"),
    (QWEN25, Message("assistant", "It is.", reasoning_content="Hm."), "reasoning"),
    (SMOL, Message("assistant", tool_calls=(CALL,)), "tool calls"),
], ids=["words beside calls", "thinking", "calls"])
def test_what_the_template_drops_is_never_dropped_in_silence(real, name, message, lacks):
    with pytest.raises(InputError, match=f"does not show the {lacks} of message 2"):
        real(name).encode_conversation(Conversation((Message("user", "q"), message), TOOLS if name == LLAMA else ()))


def test_tools_and_questions_that_the_template_drops_are_refused(real, tiny_tokenizer):
    with pytest.raises(InputError, match="does not show the tools"):
        real(GEMMA).encode_conversation(BATTERY["tools unused"])
    deaf = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), "{% for m in messages if m.role != 'system' %}"
                  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    with pytest.raises(InputError, match=r"does not show message 1 \(system\)"):
        deaf.encode_conversation(BATTERY["system"])


def test_a_stop_token_behind_others_that_open_turns_too(tiny_tokenizer):
    """Kimi-K3 closes each message with tokens that also occur within it, followed by its end token."""
    template = ("{% for m in messages %}{{ '<|open|>' + m.role + '<|sep|>' + m.content + '<|close|>' + m.role + "
                "'<|sep|><|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|open|>assistant<|sep|>{% endif %}")
    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), template)
    check(tokenizer, BATTERY["turns"])
    assert supervised_texts(tokenizer, BATTERY["one turn"]) == [("A kite.<|close|>assistant<|sep|>", "<|im_end|>")]


# ---- prompts that open thinking --------------------------------------------------------------------------------------

OPENS = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
         "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}")     # as R1's distilled models do


@pytest.mark.parametrize("kind", ["thinking", "<think>"])
def test_thinking_behind_a_prompt_that_opens_it(tiny_tokenizer, kind):
    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), OPENS)
    check(tokenizer, BATTERY[kind])
    assert supervised_texts(tokenizer, BATTERY[kind])[1] == ("Again one.\n</think>\n\nThree.", "</s>")
    last = tokenizer.encode_conversation(BATTERY[kind])[1]
    assert tokenizer.decode(last.input_ids, skip_special_tokens=False).count("<think>") == 1


def test_an_answer_without_thinking_is_refused_there(tiny_tokenizer):
    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), OPENS)
    with pytest.raises(InputError, match="reasoning_content"):
        tokenizer.encode_conversation(BATTERY["one turn"])


# ---- templates that lack something -----------------------------------------------------------------------------------

@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}",
], ids=["a line", "nothing"])
def test_without_a_stop_token_the_answer_ends_with_eos(tiny_tokenizer, tmp_path, template):
    tokenizer = with_template(tiny_tokenizer, tmp_path, template)
    first, second = supervised_texts(tokenizer, chat("q", "a", "r", "b"))
    assert (first, second) == ((" a", "<|endoftext|>"), (" b", "<|endoftext|>"))
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


@pytest.mark.parametrize(("template", "why"), [
    ("{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}",
     "no generation prompt"),
    ("{% for m in messages %}{{ m.role + ': ' + m.content + ' END ' }}{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% endif %}", "'END', which is not a control token"),
    ("{% for m in messages %}{{ m.role + ': ' + m.content|upper + '<|im_end|>' }}{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% endif %}", "does not show message 1"),
], ids=["no generation prompt", "text that stops nothing", "content rewritten"])
def test_a_template_that_hides_the_answer_is_refused_with_the_reason(tiny_tokenizer, tmp_path, template, why):
    tokenizer = with_template(tiny_tokenizer, tmp_path, template)
    with pytest.raises(InputError, match=why):
        tokenizer.encode_conversation(chat("q", "a", "r", "b"))


def test_a_later_prompt_is_read_whole_where_an_answer_begins_inside_a_token(load):
    """Behind `assistant` and its line break an answer's own line break would make one token with it."""
    tokenizer = load(QWEN25)
    conversation = chat("q", "\n\n a", "r", "b")
    for sequence, place in zip(tokenizer.encode_conversation(conversation), (1, 3), strict=True):
        ((start, _),) = supervised_runs(sequence)
        want = tokenizer.hf.apply_chat_template(conversation.upto(place).to_openai(), add_generation_prompt=True,
                                                return_dict=False)
        assert sequence.input_ids[:start].tolist() == want


def test_forgery_where_a_template_rewrites_is_refused(real):
    """R1's template cuts an answer at `</think>`, so we cannot know what became of a control token in it."""
    tokenizer = real(R1)
    with pytest.raises(InputError, match="spells the control token"):
        tokenizer.encode_conversation(of(("u", "q"), ("a", f"<think>x</think>{FORGED}<｜User｜>"), ("u", "r"), ("a", "b")))


# ---- templates that mean harm ----------------------------------------------------------------------------------------

HARM = {
    "no exception": ("{{ raise_exception('no') }}", "refuses this conversation: no"),
    "division": ("{{ 1 / 0 }}", "division"),
    "undefined": ("{{ x.y.z }}", "undefined"),
    "attributes": ("{{ ().__class__.__mro__ }}", "unsafe"),
    "function": ("{{ messages.append(1) }}", "unsafe"),
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "too big|MAX_RANGE"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than"),
    "inline loops": ("{% for i in range(99999) if range(9999)|select|list|length %}{% endfor %}",
                     "takes longer than"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
               "takes longer than"),
    "depth": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion|takes longer than"),
    "doubling": ("{% set s = namespace(x='x') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}", "takes"),
    "adding": ("{% set s = namespace(x='x') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}", "takes"),
    "times": ("{{ 'x' * 10**12 }}", "takes more than 1 GiB of memory"),
    "power": ("{{ 10 ** (10 ** 10) }}", "takes longer than"),
    "output": ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "writes more than|takes longer than"),
    "syntax": ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "not valid Jinja: line 2"),
    "unclosed": ("hello\n{% for", "not valid Jinja: line 2"),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_broken_or_hostile_template_is_a_user_error_in_bounded_time(tiny_tokenizer, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 0.1)
    template, why = HARM[kind]
    tokenizer = with_template(tiny_tokenizer, tmp_path, template)
    with pytest.raises(InputError, match=why):
        tokenizer.encode_prompt(chat("q", "a", "r"))
    if kind in ("loops", "syntax"):
        with pytest.raises(InputError, match=why):
            tokenizer.encode_conversation(chat("q", "a"))


@pytest.mark.parametrize("template", ["{{ 1 }}", "{{ messages }}", "{{ none }}", "", "{{ messages[0] }}"])
def test_a_template_that_writes_no_talk_is_refused(tiny_tokenizer, tmp_path, template):
    with pytest.raises(InputError, match="chat template"):
        with_template(tiny_tokenizer, tmp_path, template).encode_conversation(chat("Who?", "Tom."))


def test_a_long_chat_is_rendered_a_few_times_however_long_it_is(tiny_tokenizer, monkeypatch):
    """Rendering a prompt for each of its turns would take a server seconds."""
    tokenizer, counted = Tokenizer.load(tiny_tokenizer), []
    kind = type(tokenizer.template)
    plain = kind.text
    monkeypatch.setattr(kind, "text", lambda self, *args, **keys: counted.append(1) or plain(self, *args, **keys))
    turns = [Message("user", "x"), *[Message("assistant", "y"), Message("user", "z")] * 40]
    ids = tokenizer.encode_prompt(Conversation(tuple(turns)))
    assert len(counted) < 6
    text = tokenizer.hf.apply_chat_template([{"role": turn.role, "content": turn.content} for turn in turns],
                                            add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer.hf(text, add_special_tokens=False).input_ids
