"""Select prompts with their expected answers from the data of a run, to show what the model answers to them."""

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["trained", "held out"]
ANSWER_TOKENS = 48                                  # most tokens of an answer
DOCUMENT_PROMPT = 16                                # tokens of a document that are its prompt
TRIED = 50                                          # sequences that are tried for one that is short enough


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence of the data, split at its first answer; a document is split near its beginning.

    Args:
        kind: Whether it was trained on or held out.
        prompt: Token ids before the answer.
        expected: Token ids of the answer, or of a document's continuation.
    """

    kind: Kind
    prompt: list[int]
    expected: list[int]


def choose(datamodule: Any, stage: Literal["train", "val"], count: int, longest: int | None = None) -> list[Example]:
    """Select examples at equal distances; none from a stream, which is not stored.

    Args:
        datamodule: The data, set up.
        stage: Whose sequences.
        count: Number of examples.
        longest: Most tokens of a prompt; longer ones are replaced by the next that is short enough. Null is no limit.
    """
    plan = getattr(datamodule, "plans", {}).get(stage)
    if plan is None or not count:
        return []
    corpus = plan.corpus
    step = max(1, len(corpus) // count)
    examples = []
    for begin in range(0, min(len(corpus), step * count), step):
        for sequence in range(begin, min(begin + min(step, TRIED), len(corpus))):
            example = _split(corpus, sequence, "held out" if stage == "val" else "trained")
            if longest is None or len(example.prompt) <= longest:
                examples.append(example)
                break
    return examples


def _split(corpus: Any, sequence: int, kind: Kind) -> Example:
    ids, supervised = corpus.read(sequence, 0, int(corpus.lengths[sequence]))
    supervised_at = supervised.nonzero()[0]
    has_prompt = len(supervised_at) > 0 and supervised_at[0] > 1
    first = int(supervised_at[0]) if has_prompt else min(DOCUMENT_PROMPT, max(1, len(ids) // 2))
    rest = (~supervised[first:]).nonzero()[0]
    last = first + int(rest[0]) if has_prompt and len(rest) else len(ids)
    return Example(kind, [int(id_) for id_ in ids[:first]], [int(id_) for id_ in ids[first:last][:ANSWER_TOKENS]])
