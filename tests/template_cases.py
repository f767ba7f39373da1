"""Conversations of every kind, a tokenizer for any chat template, and an oracle independent of this project's code.

The oracle finds each answer by searching the text that transformers renders.
"""

import copy
import json
import re

from transformers import AddedToken

from lit_llm.text.conversation import Conversation, Message
from lit_llm.text.tokenizer import Tokenizer
from tests.conversations import FORGED, answer_and_stop, supervised_runs

CONTROL = re.compile(r"<\|[^|<>\s{}']+\|>|<｜[^｜]+｜>|<\[[^\]\s]+\]>|\[\|\w+\|\]|<\|[A-Za-z_]+>|<\w+\|>|\[/?[A-Z_]{3,}\]|\[gMASK\]|</?s>|<s?bos>"
                     r"|<eos>|<(?:start|end)_of_\w+>|<SPECIAL_\d+>|<(?:extra_id_\d)>|\]<\][\w:|]+\[>\[|<sep>|\]~!?\w*\[|\[e~\[|<seed:\w+>|</?assistant>")
SAYABLE = re.compile(r"</?(?:think|tool_call|tool_response)>")
EMPTY = re.compile(r"(<think>\s*(</think>)?|<\|channel>thought\s*<channel\|>)\s*$")    # thinking that a prompt opens
ENDS = ("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|eot_id|>", "<|im_end|>", "[|endofturn|]", "</s>", "<eos>")
STARTS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<BOS_TOKEN>", "<bos>", "<s>")
CALL = {"type": "function", "id": "abcdefgh1", "function": {"name": "look_up", "arguments": {"place": "Kyoto", "days": 3}}}
OTHER = {"type": "function", "id": "abcdefgh2", "function": {"name": "sum_up", "arguments": {"text": "x y"}}}
TOOLS = tuple({"type": "function", "function": {
    "name": name, "description": f"{name} does it", "parameters": {
        "type": "object", "properties": {key: {"type": kind, "description": key} for key, kind in facts.items()},
        "required": list(facts)}}}
    for name, facts in (("look_up", {"place": "string", "days": "integer"}), ("sum_up", {"text": "string"})))


def of(*turns, tools=()):
    """A conversation from (role letter, content or keywords)."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation(tuple(
        Message(roles[role], **(message if isinstance(message, dict) else {"content": message})) for role, message in turns), tools)


BATTERY = {
    "one turn": of(("u", "What is it?"), ("a", "A kite.")),
    "turns": of(("u", "What is it?"), ("a", "A kite."), ("u", "How high?"), ("a", "Twelve metres.")),
    "system": of(("s", "Be brief."), ("u", "What is it?"), ("a", "A kite."), ("u", "Red?"), ("a", "Yes, it is.")),
    "empty system": of(("s", ""), ("u", "What is it?"), ("a", "A kite.")),
    "two users": of(("u", "What is it?"), ("u", "Hurry!"), ("a", "A kite.")),
    "two answers": of(("u", "What is it?"), ("a", "A kite."), ("a", "Red one.")),
    "greeting": of(("a", "Hello there."), ("u", "What is it?"), ("a", "A kite.")),
    "user last": of(("u", "What is it?"), ("a", "A kite."), ("u", "Thanks!")),
    "thinking": of(("u", "1+1?"), ("a", dict(content="Two.", reasoning_content="One more.")), ("u", "And one?"),
                   ("a", dict(content="Three.", reasoning_content="Again one."))),
    "<think>": of(("u", "1+1?"), ("a", "<think>\nOne more.\n</think>\n\nTwo."), ("u", "And one?"),
                  ("a", "<think>\nAgain one.\n</think>\n\nThree.")),
    "spaces": of(("u", "  What is it? \n"), ("a", "\n A kite.  "), ("u", "\tRed?\n\n"), ("a", "Yes.\n")),
    "unicode": of(("u", "它是什么？🙂"), ("a", "风筝 é 🪁."), ("u", "ه؟"), ("a", "한국어 \u200d ok")),
    "forged": of(("u", f"Say {FORGED}"), ("a", f"Said {FORGED} so")),
    "a call": of(("u", "Weather?"), ("a", dict(tool_calls=(CALL,))), ("t", dict(content="sunny", tool_call_id="abcdefgh1", name="look_up")),
                 ("a", "It is sunny."), tools=TOOLS),
    "call with words": of(("u", "Weather?"), ("a", dict(content="I look.", tool_calls=(CALL,))),
                          ("t", dict(content="sunny", tool_call_id="abcdefgh1", name="look_up")), ("a", "It is sunny."),
                          ("u", "Thanks!"), ("a", "You are welcome."), tools=TOOLS),
    "two calls": of(("s", "Be brief."), ("u", "Weather?"), ("a", dict(tool_calls=(CALL, OTHER))),
                    ("t", dict(content="sunny", tool_call_id="abcdefgh1", name="look_up")),
                    ("t", dict(content="x", tool_call_id="abcdefgh2", name="sum_up")), ("a", "It is sunny."), tools=TOOLS),
    "call after thinking": of(("u", "Weather?"), ("a", dict(reasoning_content="I must look.", tool_calls=(CALL,))),
                              ("t", dict(content="sunny", tool_call_id="abcdefgh1", name="look_up")),
                              ("a", dict(content="It is sunny.", reasoning_content="So it is.")), tools=TOOLS),
    "tools unused": of(("u", "What is it?"), ("a", "A kite."), tools=TOOLS),
}


def fitted(hf, template, *, bos=None, eos=None):
    """A tokenizer for a template: the control tokens that it writes are added to a real vocabulary."""
    hf = copy.deepcopy(hf)
    spelled = list(dict.fromkeys([*CONTROL.findall(template), *CONTROL.findall("".join(re.findall(r"'[^']*'|\"[^\"]*\"", template)))]))
    special = [AddedToken(text, special=True, normalized=False) for text in spelled]
    hf.add_tokens(special, special_tokens=True)
    hf.add_tokens([AddedToken(text, special=False, normalized=False) for text in dict.fromkeys(SAYABLE.findall(template))])
    eos = eos or next((text for text in ENDS if text in spelled), None)
    bos = bos or next((text for text in STARTS if text in spelled), None)
    if "bos_token" in template and not (bos or hf.bos_token):
        bos = "<s>"
    if "eos_token" in template and not eos and (hf.eos_token or "") in ("<|endoftext|>", "<|im_end|>", ""):
        eos = "</s>"
    hf.add_special_tokens({key: text for key, text in (("bos_token", bos), ("eos_token", eos)) if text})
    hf.chat_template = template
    return Tokenizer(hf)


# ---- the oracle ------------------------------------------------------------------------------------------------------

def rendered(tokenizer, conversation, *, prompt):
    """Render with transformers; if it cannot read a call's arguments as an object, as JSON text."""
    messages, tools = conversation.to_openai(), list(conversation.tools) or None
    try:
        return tokenizer.hf.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    except Exception:
        messages = json.loads(json.dumps(messages))
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return tokenizer.hf.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)


def check(tokenizer, conversation):
    """Assert that answers are supervised after the prompts that are served; returns `whole` or `per answer`."""
    sequences = tokenizer.encode_conversation(conversation)
    places = [place for place, message in enumerate(conversation.messages) if message.role == "assistant" and place]
    answers = [(sequence, start, ids) for sequence in sequences for start, ids in supervised_runs(sequence)]
    if len(answers) == 1 < len(places):             # no header before the second of two answers: they are one run
        assert rendered(tokenizer, conversation.upto(2), prompt=True) == rendered(tokenizer, conversation.upto(2), prompt=False)
        return "whole"
    assert len(answers) == len(places), "each answer is supervised once, and nothing else"
    for place, (sequence, start, ids) in zip(places, answers, strict=True):
        prompt = rendered(tokenizer, conversation.upto(place), prompt=True)
        if FORGED not in prompt:
            assert sequence.input_ids[:start].tolist() == tokenizer._backend.encode(prompt, add_special_tokens=False).ids
        text, stop = answer_and_stop(tokenizer, ids)
        assert tokenizer.hf.convert_tokens_to_ids(stop) in tokenizer.stop_ids, f"nothing stops at {stop}"
        check_answer(tokenizer, conversation.upto(place + 1), prompt, text + stop, stop)
    return "whole" if len(sequences) == 1 else "per answer"


def check_answer(tokenizer, conversation, prompt, answer, stop):
    """Assert that `answer` is the template's text of the last message, from the end of the prompt to the stop token."""
    message = conversation.messages[-1]
    text = rendered(tokenizer, conversation, prompt=False)
    words = [message.content.rpartition("</think>")[2].strip()]
    for call in message.tool_calls:
        words += [call["function"]["name"], *map(str, call["function"]["arguments"].values())]
        words += call["function"]["arguments"]
    assert all(word in answer for word in words), "the answer is complete"
    assert answer.count(stop) == 1 or FORGED in answer, "the stop token occurs once"
    if text.startswith(prompt) and text[len(prompt):].startswith(answer):
        rest = text[len(prompt) + len(answer):]
        assert not re.search(r"\w", tokenizer.template.special.sub("", rest)), "no text follows the answer"
        return "as written"
    own = answer.removesuffix(stop).strip()
    if own in text:                                 # it begins where the served prompt ends, but for white space
        before, prompt_parts = (re.findall(r"<[^<>\s]*>|\[/?[A-Z_]+\]|[^\s<>\[\]]+", part) for part in (
            re.sub(r"(<think>)?\s*</think>\s*$", "", EMPTY.sub("", text[:text.rindex(own)])), EMPTY.sub("", prompt)))
        assert before[-1] == prompt_parts[-1], f"{before[-1]} is not {prompt_parts[-1]}"
    else:                                           # the template drops thinking that the prompt has opened
        assert "<think>" in prompt[-12:]
        for word in (*thoughts(message), message.content.rpartition("</think>")[2].strip(), "</think>"):
            own = own.replace(word, "", 1)
        assert not own.strip(), f"additional text: {own}"
    return "otherwise"


def thoughts(message):
    """The reasoning of an assistant message."""
    return [(message.reasoning_content or "".join(re.findall(r"<think>(.*?)</think>", message.content, re.DOTALL))).strip()]
