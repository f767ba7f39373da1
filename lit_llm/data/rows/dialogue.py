"""Collect facts about conversations for the model card: some questions, and how many a conversation has."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lit_llm.data.rows.corpus import Corpus
from lit_llm.data.rows.plan import Plan
from lit_llm.text.tokenizer import SPEAKERS, Tokenizer

USER = SPEAKERS.index("user")
SEQUENCES = 1000                                    # of a corpus, at equal distances
LONGEST = 2**16                                     # tokens that are read of a sequence
QUESTIONS, CHARACTERS = 4, 80                       # questions, and characters of each at most


def conversations(plans: Mapping[Any, Plan], tokenizer: Tokenizer) -> dict[str, Any]:
    """Short first questions of the data, and the largest number of questions in a conversation.

    Args:
        plans: Stage -> plan; questions are those of the validation data, if there are any.
        tokenizer: The tokenizer of the plans' corpora.

    Returns:
        `questions`, and `turns` of the training data; empty without conversations.
    """
    messages_of_stage = {
        stage: list(_user_messages(plans[stage].corpus)) for stage in ("val", "train") if stage in plans}
    if not any(messages_of_stage.values()):
        return {}
    questions: dict[str, None] = {}
    for messages in messages_of_stage.values():
        step = max(1, len(messages) // (4 * QUESTIONS))
        for first, *_ in messages[::step]:
            text = tokenizer.decode(first).strip()
            if 0 < len(text) <= CHARACTERS and text.isprintable() and len(questions) < QUESTIONS:
                questions[text] = None
    trained = messages_of_stage.get("train") or messages_of_stage.get("val") or []
    return {"questions": list(questions), "turns": max(map(len, trained), default=0)}


def _user_messages(corpus: Corpus) -> Iterator[list[np.ndarray]]:
    """The token ids of each user message, for some conversations of a corpus."""
    sequences = np.flatnonzero(~corpus.is_document)
    for sequence in sequences[:: max(1, len(sequences) // SEQUENCES)][:SEQUENCES].tolist():
        tokens, marks = corpus.marked(sequence, 0, min(LONGEST, int(corpus.lengths[sequence])))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], marks >> 1 == USER, [0]]).astype(np.int8)))
        if len(edges):
            yield [tokens[start:stop] for start, stop in edges.reshape(-1, 2).tolist()]
