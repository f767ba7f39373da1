"""If this breaks: scores of answers differ from those of the libraries that papers cite, Chinese answers score zero, or a model
that repeats itself looks fluent. Oracles: rouge-score and sacrebleu called directly, and counting by hand.
"""

import random

import pytest

from lit_llm.evaluation.answers import scores
from lit_llm.evaluation.answers.repetition import distinct, ends_in_loop
from lit_llm.evaluation.answers.scores import Scorer

WORDS = ["The", "cat's", "sat_on", "mat,", "2.5", "Mat!", "a", "-", "cat"]


def texts(count, words=WORDS):
    draw = random.Random(1)
    return [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(count)]


def test_rouge_of_english_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    every = texts(60)
    for answer, reference in zip(every, reversed(every), strict=True):
        assert scores.rouge_l(answer, reference) == scorer.score(reference, answer)["rougeL"].fmeasure


def test_rouge_of_chinese_compares_characters():
    """Oracle: each character spelled as an English word of its own, for rouge-score as it is."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    characters = "猫坐在垫子上的鱼"
    every = [text.replace(" ", "") for text in texts(40, characters)]
    for answer, reference in zip(every, reversed(every), strict=True):
        spelled = [" ".join(f"w{characters.index(character)}" for character in text) for text in (reference, answer)]
        assert scores.rouge_l(answer, reference) == scorer.score(*spelled)["rougeL"].fmeasure
    assert scores.rouge_l("猫坐在垫子上。", "猫坐在垫子上") == 1
    assert scores.words("用GPT-4写，わかった") == ["用", "gpt", "4", "写", "わ", "か", "っ", "た"]


def test_chrf_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    every = [*texts(30), "猫坐在垫子上", "猫在垫子上坐"]
    for answer, reference in zip(every, reversed(every), strict=True):
        assert scores.chrf(answer, reference) == sacrebleu.sentence_chrf(answer, [reference]).score


@pytest.mark.parametrize(("answer", "reference", "right"), [
    ("5 + 1 = 6, so she has 1,234 apples.", "She has them.\n#### 1234", 1), ("It is 12.", "#### 12.0", 1), ("$12", "#### 12", 1),
    ("12 or 13", "#### 12", 0), ("none", "#### 12", 0), ("-5", "#### 5", 0),
])
def test_numbers_are_compared_as_numbers(answer, reference, right):
    assert Scorer(["extract"], r"-?\d[\d,]*(?:\.\d+)?")(answer, reference) == {"extract": right}


def test_a_group_of_the_expression_is_compared():
    scorer = Scorer(["exact", "contains", "extract"], r"answer is \(?([A-D])\)?")
    assert scorer("I think the answer is (B).", "The answer is B") == {"exact": 0, "contains": 0, "extract": 1}
    assert scorer(" The answer is B\n", "The answer is B") == {"exact": 1, "contains": 1, "extract": 1}


def test_distinct_counts_ngrams_of_all_answers():
    answers = [scores.words(text) for text in texts(20)]
    for order in (1, 2, 3):
        grams = ["|".join(words[at:at + order]) for words in answers for at in range(len(words)) if at + order <= len(words)]
        assert distinct(answers, order) == len(set(grams)) / len(grams)
    assert distinct([["a"]], 2) is None


@pytest.mark.parametrize(("text", "loop"), [
    ("The dog. " * 5, True), ("It began well, and then " + "我不知道。" * 8 + "我不", True), ("!" * 30, True), ("a b " * 3, False),
    ("One, two, three, four, five, six, seven, eight, nine, ten.", False), ("", False), ("ha ha ha ha", False),
    (("A long paragraph that says a lot about a dog and about a cat, and then begins anew. " * 4), True),
    ("The dog. " * 5 + "And then it ended in another way.", False),
])
def test_an_end_that_repeats_is_a_loop(text, loop):
    assert ends_in_loop(text) == loop
