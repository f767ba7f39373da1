"""Scores of answers that have a reference.

ROUGE-L and chrF are computed by `rouge-score` and `sacrebleu` (`pip install 'lit_llm[metrics]'`).
"""

import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from lit_llm.errors import InputError

PACKAGES = {"rougeL": "rouge_score", "chrf": "sacrebleu"}
SCORES = ("exact", "contains", "extract", *PACKAGES)
# Scripts written without spaces, of which each character is a token: kana, Chinese, Thai, Lao, Myanmar, Khmer.
_SPACELESS = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
              "\U00020000-\U0003ffff")
_TOKENS = re.compile(f"[{_SPACELESS}]|(?:(?![{_SPACELESS}_])\\w)+")
_NUMBER = re.compile(r"[-+]?[$¥€£]?[\d,]*\.?\d+%?\.?")


def chosen(names: list[str] | None, extract: str | None) -> tuple[list[str], list[str]]:
    """Which scores are computed, and which are left out because a package is missing.

    Args:
        names: As the user asked; null is all that can be computed.
        extract: The regular expression, if there is one.

    Raises:
        InputError: An unknown score, a package that is missing, or `extract` without an expression.
    """
    if names is None:
        missing = [name for name, package in PACKAGES.items() if find_spec(package) is None]
        return [name for name in SCORES if name not in missing and (name != "extract" or extract)], missing
    for name in names:
        if name not in SCORES:
            raise InputError(f"unknown score '{name[:40]}'; use {', '.join(SCORES)}", where="scores")
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            raise InputError(f"{name} needs the package '{PACKAGES[name].replace('_', '-')}', which is not installed",
                             where="scores", fix="pip install 'lit_llm[metrics]'")
    if "extract" in names and not extract:
        raise InputError("the score 'extract' needs a regular expression", where="scores",
                         fix=r"give one: --extract '-?\d[\d,]*'")
    return [name for name in SCORES if name in names or (name == "extract" and extract)], []


class Scorer:
    """Computes the scores of an answer.

    Args:
        names: A selection of SCORES.
        extract: A regular expression whose last match in the answer is compared with its last match in the reference;
            a group of it, if it has one. Null without the score `extract`.

    Raises:
        InputError: It is no regular expression.
    """

    def __init__(self, names: list[str], extract: str | None = None) -> None:
        try:
            self._pattern = re.compile(extract) if extract else None
        except re.error as error:
            raise InputError(f"this is not a regular expression: {error}", where="extract") from None
        functions: dict[str, Callable[[str, str], float]] = {
            "exact": exact, "contains": contains, "extract": self._extract, "rougeL": rouge_l, "chrf": chrf}
        self._functions = {name: functions[name] for name in names}

    @property
    def names(self) -> list[str]:
        """The scores, in the order of SCORES."""
        return list(self._functions)

    def check_reference(self, reference: str, place: str) -> None:
        """Refuse a reference in which the regular expression matches nothing.

        Raises:
            InputError: Located at the reference.
        """
        if self._pattern is not None and self.extracted(reference) is None:
            raise InputError(f"the expression of --extract matches nothing in the reference {reference[:60]!r}",
                             where=place, fix="change the expression, or leave it out")

    def extracted(self, text: str) -> str | None:
        """The last match in a text, of its first group if it has one; null if there is none."""
        assert self._pattern is not None
        matches = deque(self._pattern.finditer(text), maxlen=1)
        if not matches:
            return None
        return (matches[0][1] if self._pattern.groups else matches[0][0]) or ""

    def __call__(self, answer: str, reference: str) -> dict[str, float]:
        """The scores of an answer: 0 or 1, ROUGE-L's F1 from 0 to 1, chrF from 0 to 100, as their libraries do."""
        return {name: function(answer, reference) for name, function in self._functions.items()}

    def _extract(self, answer: str, reference: str) -> float:
        have, want = self.extracted(answer), self.extracted(reference)
        return float(have is not None and want is not None and normal(have) == normal(want))


def exact(answer: str, reference: str) -> float:
    """1 if the texts are equal, apart from white space at their ends."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """1 if the answer contains the reference."""
    return float(reference.strip() in answer)


def normal(text: str) -> str:
    """A text for the comparison of what was extracted: numbers have one form, other texts keep theirs.

    >>> normal("1,000.0"), normal("$1000."), normal(" B ")
    ('1E+3', '1E+3', 'B')
    """
    text = text.strip()
    if _NUMBER.fullmatch(text):
        try:
            return str(Decimal(re.sub(r"[,$¥€£%]", "", text).removesuffix(".")).normalize())
        except InvalidOperation:
            pass
    return text


def words(text: str) -> list[str]:
    """Tokens for ROUGE-L and distinct-n: lower-case words, and single characters of scripts without spaces.

    ASCII texts have the tokens of `rouge-score` itself, without stemming.

    >>> words("The Cat_sat, 你好!")
    ['the', 'cat', 'sat', '你', '好']
    """
    return _TOKENS.findall(text.lower())


class _Words:
    """The tokenizer that `rouge-score` calls."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of tokens (`words`), by rouge-score."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def chrf(answer: str, reference: str) -> float:
    """The chrF of one answer (character n-grams up to 6, beta 2), by sacrebleu, from 0 to 100."""
    return float(_chrf().sentence_score(answer, [reference]).score)
