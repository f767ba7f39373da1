"""Recognise the format of a record by its keys, or say why none fits and which setting would decide.

Tables of the names that the field's files use, and a question asked of them: is there one way to read this, and does it
leave nothing out that belongs to it? Knows keys and, to refuse well, the kinds of their values; what a record says is
`formats.py`.
"""

import json
from collections.abc import Mapping
from typing import Any

from lit_llm.data.records.record import shown
from lit_llm.errors import InputError

TURNS = ("messages", "conversations", "conversation", "data")   # the last only with strings in it: UltraChat's
PAIRS = (("human", "assistant"), ("input", "output"))   # a turn that holds a question and its answer
NAMED = (("instruction", "output"), ("prompt", "completion"))
ASKS = ("instruction", "prompt", "question", "query", "problem")
BELOW = ("input", "context")                            # stands below what is asked; `input` may also ask by itself
ANSWERS = ("output", "completion", "response", "answer", "solution", "target", "instances")
BESIDE = ("text", "choices", "options", "A", "documents", "passage")    # a question is not whole without these
PREFERENCES = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("response_j", "response_k"))
NAMES = 200                                             # keys of a record that a misspelled one is compared with


def recognise(record: Mapping[str, Any]) -> str:
    """The name of the format that a record's keys show.

    Raises:
        InputError: None fits, or several; it names the keys there are and the `columns` that would settle it.

    >>> recognise({"instruction": "hi", "output": "hello"})
    'alpaca'
    """
    for good, bad in PREFERENCES:
        if good in record and bad in record:
            raise _preference(record, good, bad)
    if "message_tree_id" in record:
        raise InputError("this is a tree of messages, or a message of one, as OASST has them; a record is one "
                         "conversation",
                         fix='Write a line {"messages": [...]} for each path through the tree that is to be learned.')
    if key := turns_key(record):
        turns = listed(record[key])
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        return "sharegpt" if "from" in first else "firefly" if PAIRS[0][0] in first else "messages"
    if pair := pair_keys(record):
        return "prompt" if pair == NAMED[1] else "alpaca"
    if "text" in record and not (_first(record, ASKS) and _first(record, ANSWERS)):
        return "text"
    raise _unknown(record)


def turns_key(record: Mapping[str, Any]) -> str | None:
    """The key that holds a list of turns."""
    for key in TURNS:
        turns = listed(record.get(key))
        if isinstance(turns, list) and (key != "data" or (len(turns) > 1 and _is_text(turns))):
            return key
    return None


def pair_keys(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys that ask and answer, where the record leaves no doubt: one of each, and no part of it elsewhere."""
    for pair in NAMED:
        if all(key in record for key in pair):
            return pair
    asks = [key for key in ASKS if record.get(key) is not None]
    answers = [key for key in ANSWERS if record.get(key) is not None]
    asks = asks or [key for key in BELOW[:1] if record.get(key) is not None]
    if len(asks) == len(answers) == 1 and not any(record.get(key) for key in BESIDE):
        return asks[0], answers[0]
    return None


def listed(value: Any) -> Any:
    """A list, also one that a table's cell holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---- what is wrong ---------------------------------------------------------------------------------------------------

def _preference(record: Mapping[str, Any], good: str, bad: str) -> InputError:
    """What would learn the better answer of a preference record."""
    asks, answer = _first(record, (*TURNS, *ASKS)), record[good]
    if isinstance(answer, list) and (asks is None or len(answer) > 1):
        columns = f"messages: {good}"
    else:
        columns = f"prompt: {asks}, completion: {good}" if asks else f"text: {good}"
    how = ", as plain text" if columns.startswith("text") else ""
    return InputError(f"this is a preference record ({good}, {bad}); fine-tuning here learns from one answer",
                      fix=f"To learn the better one{how}: `columns: {{{columns}}}`.")


def _unknown(record: Mapping[str, Any]) -> InputError:
    if wrong := [key for key in TURNS[:3] if record.get(key) is not None]:
        return InputError(f"{wrong[0]} must be a list, not {shown(record[wrong[0]])}")
    what = f"no known format has the keys {keys(record)}"
    if "input_ids" in record:
        return InputError(f"{what}; input_ids are tokens of some tokenizer already, and text is needed")
    if record and all(isinstance(value, Mapping) for value in record.values()):
        return InputError(f"{what}; this is an object of objects, not a record",
                          fix="If it describes a data set, name the files that hold the data; if it holds the records: "
                              "jq -c '.[]' FILE > records.jsonl")
    asks, answers = _first(record, (*ASKS, *BELOW)), _first(record, ANSWERS)
    if asks and answers:
        beside = [key for key in BESIDE if record.get(key)]
        sure = asks in (*ASKS, *BELOW) and answers in ANSWERS
        why = (f"'{beside[0]}' belongs to it and has no place" if beside else
               "more than one key asks or answers" if sure else f"'{asks}' may ask and '{answers}' answer")
        return InputError(f"{what}; {why}",
                          fix=f"If nothing else is meant: `columns: {{prompt: {asks}, completion: {answers}}}`; else "
                              "write prompt and completion as the model is to see them.")
    if asks:
        return InputError(f"{what}; '{asks}' asks and nothing answers, so there is nothing to learn",
                          fix=f"If an answer has another name: `columns: {{prompt: {asks}, completion: NAME}}`.")
    if held := [str(key) for key, value in record.items() if isinstance(value, list) and value
                and all(isinstance(part, Mapping) for part in value)]:
        return InputError(f"{what}; the records may lie inside '{held[0][:40]}'",
                          fix=f"If so: jq -c '.[\"{held[0][:40]}\"][]' FILE > records.jsonl")
    fix = f"Map yours: `columns: {{prompt: question, completion: answer}}`{_plain(record)}."
    return InputError(what, fix=f"{fix} Known are text; instruction, input, output; prompt, completion; messages.")


def _plain(record: Mapping[str, Any]) -> str:
    """The key that most looks like running text: a list of verses or paragraphs, else the longest string."""
    lists = [key for key, value in record.items() if isinstance(value, list) and _is_text(value)]
    texts = lists or [key for key, value in record.items() if _is_text(value)]
    longest = max(texts, default="", key=lambda key: sum(map(len, record[key])) if key in lists else len(record[key]))
    return f", or `{{text: {str(longest)[:40]}}}` for plain text" if longest else ""


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The record's own spelling of the first of these keys that it has."""
    own = {str(key).lower(): str(key) for key, value in record.items() if value is not None}
    return next((own[name] for name in names if name in own), None)


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def keys(record: Mapping[str, Any]) -> str:
    """The first keys of a record, to be shown."""
    shown = ", ".join(str(key)[:30] for key in list(record)[:8])
    return (shown + (", ..." if len(record) > 8 else "")) or "none"


def names(record: Mapping[str, Any]) -> list[str]:
    """The keys of a record that a misspelled one is compared with: a comparison takes some 20 us."""
    return [str(key)[:40] for key in list(record)[:NAMES]]
