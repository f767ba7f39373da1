"""Check that a record is trained on in the form in which it is served, by transformers' own rendering of its messages.

For each answer the prompt is `apply_chat_template(messages before it, add_generation_prompt=True)`, and the answer is the
text that `apply_chat_template(messages with it)` shows after the prompt. This project's rendering is not used.
"""

import copy
import json
import re
from contextlib import suppress
from itertools import product

from lit_llm.data.records import formats
from lit_llm.errors import InputError
from tests.conversations import answer_and_stop, supervised_runs

ROLES = {"developer": "system", "function": "tool"}
ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|lt|gt|amp|quot|apos);")
SERVED, REFUSED, WRONG, MISSED, UNTRUE = "served", "refused rightly", "WRONG", "refused though shown", "UNTRUE REASON"
OTHERWISE = "refused, shown otherwise than served"      # what the template shows does not begin with the served prompt
OTHER = "refused for another reason"


class RenderedRecord:
    """A record's messages in one of the forms that transformers accepts."""

    def __init__(self, hf, messages, tools, more):
        self.hf, self.messages, self.tools, self.more, self.texts = hf, messages, tools, more, {}

    def text(self, count, prompt):
        """The rendered text of the first messages; None where the template refuses them."""
        if (count, prompt) not in self.texts:
            try:
                self.texts[count, prompt] = self.hf.apply_chat_template(
                    self.messages[:count], tools=self.tools, add_generation_prompt=prompt, tokenize=False, **self.more)
            except Exception as error:
                self.texts[count, prompt] = None
                self.error = str(error)
        return self.texts[count, prompt]


def message_forms(hf, record):
    """The record in every equivalent form: arguments unchanged, parsed, or as text; parts unchanged or joined."""
    said_tools = record.get("tools")
    more = {"chat_template_kwargs": record.get("chat_template_kwargs")}
    more = more["chat_template_kwargs"] or {}
    seen = []
    for arguments, parts, old in product(("own", "object", "text"), (False, True), (False, True)):
        messages = copy.deepcopy(record["messages"])
        for message in messages:
            if old:
                message["role"] = ROLES.get(message["role"], message["role"])
                for key in ("reasoning_content", "reasoning", "thinking"):
                    if thoughts := parts_of(message)[1] if message.get(key) else "":
                        message.update(dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thoughts))
                if call := message.pop("function_call", None):
                    message["tool_calls"] = [{"type": "function", "function": call}]
            if parts and isinstance(message["content"], list):
                message["content"] = "".join(part["text"] for part in message["content"])
            if parts and message["content"] is None:
                message["content"] = ""
            for call in message.get("tool_calls") or []:
                arguments_value = call["function"]["arguments"]
                if arguments == "object" and isinstance(arguments_value, str):
                    call["function"]["arguments"] = json.loads(arguments_value)
                if arguments == "text" and not isinstance(arguments_value, str):
                    call["function"]["arguments"] = json.dumps(arguments_value, ensure_ascii=False)
        if messages not in seen:
            seen.append(messages)
    return [RenderedRecord(hf, messages, said_tools, more) for messages in seen]


# ---- what a text shows -----------------------------------------------------------------------------------------------

def forms(text):
    """A text and how templates escape it."""
    inner = [json.dumps(text, ensure_ascii=plain)[1:-1] for plain in (True, False)]
    return {text, *inner, *(json.dumps(one, ensure_ascii=False)[1:-1] for one in inner), repr(text)[1:-1]}


def shows(text, content, *, plain=False):
    """Whether a text contains a content, trimmed at its ends, escaped or not."""
    return any(form.strip() in text for form in ({content} if plain else forms(content.strip())))


def values(arguments):
    """The leaves of a call's arguments."""
    if isinstance(arguments, dict):
        return [leaf for value in arguments.values() for leaf in values(value)]
    if isinstance(arguments, list):
        return [leaf for value in arguments for leaf in values(value)]
    return [arguments]


def parsed(text):
    """Every JSON object in the text, including those within strings."""
    decoder, values_in_text, at = json.JSONDecoder(), [], 0
    for at in (match.start() for match in re.finditer(r"[{\[\"]", text)):
        try:
            value, _ = decoder.raw_decode(text, at)
        except ValueError:
            continue
        values_in_text.append(value)
        if isinstance(value, str) and value.startswith(("{", "[")):
            with suppress(ValueError):
                values_in_text.append(json.loads(value))
    return values_in_text


def contains(value, wanted):
    """Whether a parsed value equals or contains the wanted one."""
    if value == wanted:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(contains(one, wanted) for one in inner)


def calls_in(text, call):
    """Whether a call can be read from the text: by JSON, or by each of its keys and values as text."""
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if function["name"] not in text:
        return False
    if any(contains(value, arguments) for value in parsed(text)) and arguments:
        return True

    def shown(leaf):
        return any(str(one) in text for one in (
            leaf, json.dumps(leaf, ensure_ascii=False), json.dumps(leaf), *(forms(leaf) if isinstance(leaf, str) else ())))

    return all(key in text for key in arguments) and all(map(shown, values(arguments)))


def parts_of(message):
    """(content, reasoning) of an answer."""
    content = message["content"]
    content = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
    thoughts = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)), "")
    if match := re.match(r"\s*<think>(.*?)</think>(.*)", content, re.DOTALL):
        return match[2], thoughts or match[1]
    return content, thoughts


def missing_part(message, answer):
    """The part of a message that the answer lacks."""
    words, thoughts = parts_of(message)
    if not shows(answer, words.strip(), plain=True):
        return "content"
    if thoughts.strip() and not shows(answer, thoughts.strip(), plain=True):
        return "reasoning"
    calls = [*(message.get("tool_calls") or []), *({"function": call} for call in [message.get("function_call")] if call)]
    return next(("tool calls" for call in calls if not calls_in(answer, call)), "")


def missing_message(messages, prompt):
    """Number of the first message of another role that a prompt lacks; 0 if none."""
    for number, message in enumerate(messages):
        content = message["content"]
        content = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        if message["role"] != "assistant" and content.strip() and not shows(prompt, content):
            try:
                value = json.loads(content)
            except ValueError:
                value = None
            if value is None or not any(contains(one, value) for one in parsed(prompt)):
                return number + 1
    return 0


# ---- judgement -------------------------------------------------------------------------------------------------------

def answer_places(record):
    """Indices of answers that can be supervised: not empty, and with a message before them."""
    messages = record["messages"]
    def spoken(message):
        return any(map(str.strip, parts_of(message))) or message.get("tool_calls") or message.get("function_call")
    return [place for place, message in enumerate(messages)
            if message["role"] == "assistant" and place and spoken(message)]


def judge(tokenizer, record):
    """(verdict, reason)."""
    forms_of_record = message_forms(tokenizer.hf, record)
    places = answer_places(record)
    try:
        conversation = formats.convert(record)
        sequences = tokenizer.encode_conversation(conversation)
    except InputError as error:
        return refusal(forms_of_record, places, error.what, tokenizer)
    answers = [(sequence, start, ids) for sequence in sequences for start, ids in supervised_runs(sequence)]
    must = [place for place in places if any(form.text(place, True) is not None for form in forms_of_record)]
    dropped = [place for place in must if any(message["role"] != "system" for message in record["messages"][:place])]
    if len(answers) not in (len(must), len(dropped)):
        both = [form for form in forms_of_record if form.text(must[-1], True) == form.text(must[-1], False)] if must else []
        if not (len(answers) == 1 and both):
            return WRONG, f"{len(answers)} answers are learned of {len(must)}"
        return SERVED, ""
    for place, (sequence, start, ids) in zip(must if len(answers) == len(must) else dropped, answers, strict=True):
        words, stop = answer_and_stop(tokenizer, ids)
        faults = [fault(tokenizer, form, place, sequence.input_ids[:start].tolist(), words, stop, record) for form in forms_of_record]
        if all(faults):
            return WRONG, f"answer {place + 1}: {faults[0]}"
    return SERVED, ""


def fault(tokenizer, form, place, ids, words, stop, record):
    """How a supervised answer differs from this form's rendering; empty if it does not."""
    prompt, fresh = form.text(place, True), form.text(place + 1, False)
    if prompt is None or fresh is None:
        return f"transformers renders no such prompt: {form.error[:80]}"
    raw = tokenizer._backend.encode(prompt, add_special_tokens=False).ids
    if ids != raw and tokenizer.decode(ids, skip_special_tokens=False) != tokenizer.decode(raw, skip_special_tokens=False):
        return "another prompt than the served one"
    if ids != raw and "<|im_end|>" not in prompt.replace("<|im_end|>", "", 0) and "obey" not in prompt:
        return "other ids of the served prompt"
    if missing := missing_part(form.messages[place], words):
        return f"it lacks the {missing}"
    if number := missing_message(form.messages[:place], prompt):
        return f"the prompt lacks message {number}"
    if set(ENTITY.findall(words)) - set(ENTITY.findall(json.dumps(record["messages"], ensure_ascii=False))):
        return f"HTML entities: {words[:60]!r}"
    if tokenizer.hf.convert_tokens_to_ids(stop) not in tokenizer.stop_ids:
        return f"nothing stops at {stop}"
    if fresh.startswith(prompt):
        if not fresh[len(prompt):].startswith(words):
            return f"it says {words[:60]!r} where the template shows {fresh[len(prompt):][:60]!r}"
        rest = fresh[len(prompt) + len(words):].removeprefix(stop)
        if re.search(r"\w", tokenizer.template.special.sub("", rest)):
            return f"it leaves unsaid {rest[:60]!r}"
        return ""
    body = words.strip()
    thoughts = parts_of(form.messages[place])[1].strip()
    for part in (thoughts, "<think>", "</think>", parts_of(form.messages[place])[0].strip()):
        body = body.replace(part, "", 1) if part else body
    if body.strip() and words.strip() not in fresh:
        return f"it says {body.strip()[:60]!r}, which the template does not show"
    return ""


def display_faults(form, places):
    """What this form's rendering lacks: each answer after its prompt, other messages, tools."""
    if not places:
        return ["nothing is there to learn"]
    faults = []
    for place in places:
        prompt, fresh = form.text(place, True), form.text(place + 1, False)
        if prompt is None or fresh is None:
            faults.append(f"refused: {form.error[:100]}")
            continue
        answer = fresh[len(prompt):] if fresh.startswith(prompt) else None
        if number := missing_message(form.messages[:place], prompt):
            faults.append(f"message {number}")
        if form.tools and not any(tool["function"]["name"] in prompt for tool in form.tools):
            faults.append("the tools")
        missing = missing_part(form.messages[place], fresh if answer is None else answer)
        if missing:
            faults.append(missing)
        if ENTITY.search(fresh) and not ENTITY.search(json.dumps(form.messages)):
            faults.append("HTML entities")
        if answer is None and not missing:
            faults.append("loosely")
    return faults


def refusal(forms_of_record, places, why, tokenizer):
    """Whether a refusal is right and gives the true reason."""
    faults_of_forms = [display_faults(form, places) for form in forms_of_record]
    best = min(faults_of_forms, key=len)
    if "control token" in why and "obey" in str(forms_of_record[0].messages):
        return REFUSED, why
    if not best:
        return MISSED, why
    explanation = f"{why} | {best}"
    if "block of reasoning" in why:
        opens = any((form.text(place, True) or "").rstrip().endswith("<think>") and not parts_of(form.messages[place])[1].strip()
                    for form in forms_of_record for place in places)
        return (REFUSED if opens else UNTRUE), explanation
    if best == ["loosely"] * len(best):
        return OTHERWISE, explanation
    fault_text = " ".join(word for one in faults_of_forms for word in one)
    refuses = all(any(fault.startswith("refused") for fault in one) for one in faults_of_forms)
    if why.startswith("the chat template refuses"):
        return (REFUSED if refuses else UNTRUE), explanation
    if match := re.search(r"does not show (?:the (content|reasoning|tool calls) of )?message (\d+)", why):
        return (REFUSED if (match[1] or f"message {match[2]}") in fault_text or refuses else UNTRUE), explanation
    if "does not show the tools" in why:
        return (REFUSED if "the tools" in fault_text else UNTRUE), explanation
    if "HTML" in why:
        return (REFUSED if "HTML" in fault_text else UNTRUE), explanation
    return OTHER, explanation
