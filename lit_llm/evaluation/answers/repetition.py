"""Repetition in answers: distinct n-grams, and ends that repeat one text again and again."""

from collections.abc import Iterable, Sequence

PERIOD, TIMES, LEAST = 200, 4, 24       # characters of a repeated text at most; repetitions; characters in all


def distinct(answers: Iterable[Sequence[str]], n: int) -> float | None:
    """distinct-n (arXiv:1510.03055): different n-grams of all answers over their number; null if there are none.

    It falls with the number of answers, so only sets of equally many answers are comparable.

    >>> distinct([["a", "b", "a", "b"]], 2)
    0.6666666666666666
    """
    total, different = 0, set[tuple[str, ...]]()
    for words in answers:
        grams = [tuple(words[at:at + n]) for at in range(len(words) - n + 1)]
        total += len(grams)
        different.update(grams)
    return len(different) / total if total else None


def ends_in_loop(text: str) -> bool:
    """Whether a text ends with the same text of at most 200 characters, at least four times and 24 characters in all.

    The last repetition may be incomplete, as where max_tokens ended the answer.

    >>> ends_in_loop("It is " + "very, very " * 6 + "ve"), ends_in_loop("a very, very long text. It ends here.")
    (True, False)
    """
    return any(_repeats(whole) for whole in {text, text.rstrip()})


def _repeats(text: str) -> bool:
    for period in range(1, min(PERIOD, len(text) // TIMES) + 1):
        needed = max(TIMES * period, LEAST)
        tail = text[-needed:]
        if len(tail) == needed and tail[period:] == tail[:-period]:
            return True
    return False
