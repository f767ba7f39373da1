"""Recognise the format of a record by its keys, or explain why none fits and which setting would decide.

A record is accepted if there is exactly one way to interpret its keys and no key that belongs to it is left out.
`formats.py` interprets the values.
"""

import json
from collections.abc import Mapping
from typing import Any

from lit_llm.data.records.record import shown
from lit_llm.errors import InputError

TURNS = ("messages", "conversations", "conversation", "data")   # the last only with strings (UltraChat)
PAIRS = (("human", "assistant"), ("input", "output"))   # a turn with a question and its answer
NAMED = (("instruction", "output"), ("prompt", "completion"))
ASKS = ("instruction", "prompt", "question", "query", "problem")
BELOW = ("input", "context")                            # appended to the question; `input` may also be a question
ANSWERS = ("output", "completion", "response", "answer", "solution", "target", "instances")
BESIDE = ("text", "choices", "options", "A", "documents", "passage")    # a question is incomplete without these
PREFERENCES = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("response_j", "response_k"))
NAMES = 200                                             # keys of a record that a misspelt one is compared with


def recognise(record: Mapping[str, object]) -> str:
    """The format of a record, by its keys.

    Raises:
        InputError: None or several fit; the error names the keys and the `columns` that would decide.

    >>> recognise({"instruction": "hi", "output": "hello"})
    'alpaca'
    """
    for good, bad in PREFERENCES:
        if good in record and bad in record:
            raise _preference(record, good, bad)
    if "message_tree_id" in record:
        raise InputError("this is a tree of messages, or a message of one, as in OASST; a record must be one "
                         "conversation",
                         fix='Write a line {"messages": [...]} for each path through the tree to train on.')
    if key := turns_key(record):
        turns = listed(record[key])
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        return "sharegpt" if "from" in first else "firefly" if PAIRS[0][0] in first else "messages"
    if pair := pair_keys(record):
        return "prompt" if pair == NAMED[1] else "alpaca"
    if "text" in record and not (_first(record, ASKS) and _first(record, ANSWERS)):
        return "text"
    raise _unknown(record)


def turns_key(record: Mapping[str, object]) -> str | None:
    """The key with the list of turns."""
    for key in TURNS:
        turns = listed(record.get(key))
        if isinstance(turns, list) and (key != "data" or (len(turns) > 1 and _is_text(turns))):
            return key
    return None


def pair_keys(record: Mapping[str, object]) -> tuple[str, str] | None:
    """The keys of question and answer, if there is exactly one of each and nothing else belongs to them."""
    for pair in NAMED:
        if all(key in record for key in pair):
            return pair
    asks = [key for key in ASKS if record.get(key) is not None]
    answers = [key for key in ANSWERS if record.get(key) is not None]
    asks = asks or [key for key in BELOW[:1] if record.get(key) is not None]
    if len(asks) == len(answers) == 1 and not any(record.get(key) for key in BESIDE):
        return asks[0], answers[0]
    return None


def listed(value: object) -> Any:
    """A list, also if it is JSON text in a table's cell; any other value is unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---- errors ----------------------------------------------------------------------------------------------------------

def _preference(record: Mapping[str, object], good: str, bad: str) -> InputError:
    """The error for a preference record, with the `columns` that select the better answer."""
    asks, answer = _first(record, (*TURNS, *ASKS)), record[good]
    if isinstance(answer, list) and (asks is None or len(answer) > 1):
        columns = f"messages: {good}"
    else:
        columns = f"prompt: {asks}, completion: {good}" if asks else f"text: {good}"
    how = ", as plain text" if columns.startswith("text") else ""
    return InputError(f"this is a preference record ({good}, {bad}); fine-tuning here trains on one answer",
                      fix=f"To train on the better one{how}: `columns: {{{columns}}}`.")


def _unknown(record: Mapping[str, object]) -> InputError:
    if wrong := [key for key in TURNS[:3] if record.get(key) is not None]:
        return InputError(f"{wrong[0]} must be a list, not {shown(record[wrong[0]])}")
    what = f"no known format has the keys {keys(record)}"
    if "input_ids" in record:
        return InputError(f"{what}; input_ids are already tokenized, but text is needed")
    if record and all(isinstance(value, Mapping) for value in record.values()):
        return InputError(f"{what}; this is an object of objects, not a record",
                          fix="If it describes a data set, name the files with the data; if it contains the records: "
                              "jq -c '.[]' FILE > records.jsonl")
    asks, answers = _first(record, (*ASKS, *BELOW)), _first(record, ANSWERS)
    if asks and answers:
        beside = [key for key in BESIDE if record.get(key)]
        sure = asks in (*ASKS, *BELOW) and answers in ANSWERS
        why = (f"'{beside[0]}' belongs to the question but would be left out" if beside else
               "several keys could be the question or the answer" if sure else
               f"'{asks}' may be a question, '{answers}' its answer")
        return InputError(f"{what}; {why}",
                          fix=f"If these are meant: `columns: {{prompt: {asks}, completion: {answers}}}`; "
                              "else write prompt and completion as the model should see them.")
    if asks:
        return InputError(f"{what}; '{asks}' is a question without an answer",
                          fix=f"If an answer has another name: `columns: {{prompt: {asks}, completion: NAME}}`.")
    if containers := [str(key) for key, value in record.items() if isinstance(value, list) and value
                      and all(isinstance(part, Mapping) for part in value)]:
        return InputError(f"{what}; the records may be within '{containers[0][:40]}'",
                          fix=f"If so: jq -c '.[\"{containers[0][:40]}\"][]' FILE > records.jsonl")
    fix = f"Map yours: `columns: {{prompt: question, completion: answer}}`{_plain(record)}."
    return InputError(what, fix=f"{fix} Known keys are text; instruction, input, output; prompt, completion; messages.")


def _plain(record: Mapping[str, Any]) -> str:
    """The key that looks most like plain text: a list of verses or paragraphs, or the longest string."""
    lists = [key for key, value in record.items() if isinstance(value, list) and _is_text(value)]
    texts = lists or [key for key, value in record.items() if _is_text(value)]
    longest = max(texts, default="", key=lambda key: sum(map(len, record[key])) if key in lists else len(record[key]))
    return f", or `{{text: {str(longest)[:40]}}}` for plain text" if longest else ""


def _first(record: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    """The first of these keys in the record, in the record's spelling."""
    own = {str(key).lower(): str(key) for key, value in record.items() if value is not None}
    return next((own[name] for name in names if name in own), None)


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def keys(record: Mapping[str, object]) -> str:
    """The first keys of a record, for messages."""
    shown = ", ".join(str(key)[:30] for key in list(record)[:8])
    return (shown + (", ..." if len(record) > 8 else "")) or "none"


def names(record: Mapping[str, object]) -> list[str]:
    """Keys of a record for spelling suggestions, limited because a comparison takes about 20 us."""
    return [str(key)[:40] for key in list(record)[:NAMES]]
