"""Generate questions with exactly one right answer from facts and word rules.

Documents quote some of them as plain text, conversations ask them as chats, and the test set asks the held-out ones. A
question is held out by its content (`world.held_out`), never by the order of drawing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from lit_llm.samples.world import (
    ANIMALS,
    COLOURS,
    OPPOSITES,
    PEOPLE,
    THINGS,
    Fact,
    Language,
    Word,
    article,
    held_out,
)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, its one right answer, and the same said as a plain statement.

    Args:
        kind: fact, translate, opposite, heavier, story or list.
        language: Of the question; the answer to `translate` is in the other one.
        ask: The question's text.
        answer: The only answer that counts as right.
        statement: A sentence of a document that says so; empty for facts, whose statements have many wordings.
        held_out: Kept for the exam.
    """

    kind: str
    language: Language
    ask: str
    answer: str
    statement: str
    held_out: bool


Writer = Callable[[random.Random, Language], Question]
SIZES: tuple[Word, ...] = tuple(word for pair in OPPOSITES[:4] for word in pair)


def ask_fact(fact: Fact, template: str, language: Language) -> Question:
    """A question after one fact of the world."""
    phrases = fact.attribute.phrases(language)
    return Question("fact", language, fact.render(template, language), fact.render(phrases.answer, language), "",
                    fact.held_out)


def ask_translation(rng: random.Random, language: Language) -> Question:
    """`red fox` into the other language: every word is known from documents, a held-out pair of words is not."""
    adjective, noun = rng.choice(COLOURS + SIZES), rng.choice(THINGS + ANIMALS)
    english, chinese = f"{adjective.en} {noun.en}", f"{adjective.zh}的{noun.zh}"
    if language == "en":
        ask = rng.choice(("Translate into Chinese: {}", "What is the Chinese for: {}")).format(english)
        answer, statement = chinese, f"The Chinese for {english} is {chinese}."
    else:
        ask = rng.choice(("翻译成英语：{}", "用英语怎么说：{}")).format(chinese)
        answer, statement = english, f"{chinese}的英语是 {english}。"
    return Question("translate", language, ask, answer, statement, held_out("translate", adjective.en, noun.en))


def ask_opposite(rng: random.Random, language: Language) -> Question:
    """The opposite of two adjectives, one by one."""
    (one, other), (two, another) = (rng.sample(pair, 2) for pair in rng.sample(OPPOSITES, 2))
    if language == "en":
        words, answer = f"{one.en} and {two.en}", f"The opposite is {other.en} and {another.en}."
        ask = rng.choice(("Say the opposite of: {}", "What is the opposite of: {}")).format(words)
        statement = f"The opposite of {words} is {other.en} and {another.en}."
    else:
        words, answer = f"又{one.zh}又{two.zh}", f"又{other.zh}又{another.zh}。"
        ask = rng.choice(("说反义词：{}", "反义词是什么：{}")).format(words)
        statement = f"{words}的反义词是{answer}"
    return Question("opposite", language, ask, answer, statement,
                    held_out("opposite", *min(sorted((one.en, two.en)), sorted((other.en, another.en)))))


def ask_heavier(rng: random.Random, language: Language) -> Question:
    """Two animals compared. A held-out pair is three or more ranks apart, so that other pairs imply the answer."""
    light, heavy = sorted(rng.sample(range(len(ANIMALS)), 2))
    pair = [ANIMALS[light], ANIMALS[heavy]]
    is_held_out = heavy - light >= 3 and held_out("heavier", pair[0].en, pair[1].en)
    wins = rng.random() < 0.5                       # asks for the heavier, or for the lighter
    right, wrong = (pair[1], pair[0]) if wins else (pair[0], pair[1])
    first, second = rng.sample(pair, 2)
    if language == "en":
        word = "heavier" if wins else "lighter"
        ask = f"Which is {word}, {article(first.en)} or {article(second.en)}?"
        answer = f"The {right.en} is {word}."
        statement = f"The {right.en} is {word} than the {wrong.en}."
    else:
        word = "重" if wins else "轻"
        ask = f"{first.zh}和{second.zh}哪个更{word}？"
        answer, statement = f"{right.zh}更{word}。", f"{right.zh}比{wrong.zh}更{word}。"
    return Question("heavier", language, ask, answer, statement, is_held_out)


def ask_story(rng: random.Random, language: Language) -> Question:
    """Two people, two things: the answer stands in the question. Who holds which thing together is held out."""
    people, things, colours = rng.sample(PEOPLE, 2), rng.sample(THINGS, 2), rng.sample(COLOURS, 2)
    is_held_out = any(held_out("story", who.en, what.en) for who, what in zip(people, things, strict=True))
    place, form = rng.randrange(2), rng.randrange(3)
    who, what, colour = (group[place].say(language) for group in (people, things, colours))
    if language == "en":
        listing = " and ".join(f"{a.en} has a {c.en} {b.en}" for a, b, c in zip(people, things, colours, strict=True))
        ask, answer = (
            (f"Who has the {what}?", f"The {what} belongs to {who}."),
            (f"What colour is the {what}?", f"The {what} is {colour}."),
            (f"What does {who} have?", f"The {colour} {what} belongs to {who}."),
        )[form]
        ask, statement = f"Here {listing}. {ask}", f"Here {listing}. {answer}"
    else:
        listing = "，".join(f"{a.zh}有{c.zh}的{b.zh}" for a, b, c in zip(people, things, colours, strict=True))
        ask, answer = (
            (f"谁有{what}？", f"{who}有{what}。"),
            (f"{what}是什么颜色的？", f"{what}是{colour}的。"),
            (f"{who}有什么？", f"{who}有{colour}的{what}。"),
        )[form]
        ask, statement = f"{listing}。{ask}", f"{listing}。{answer}"
    return Question("story", language, ask, answer, statement, is_held_out)


def ask_list(rng: random.Random, language: Language) -> Question:
    """Three words, taken from the end or turned around. A held-out set of words never stands together before."""
    chosen = rng.sample(THINGS + ANIMALS, 3)
    comma = ", " if language == "en" else "、"
    words = comma.join(word.say(language) for word in chosen)
    turned = comma.join(word.say(language) for word in reversed(chosen))
    first, last = chosen[0].say(language), chosen[-1].say(language)
    form = rng.randrange(3)
    if language == "en":
        ask, answer = (
            (f"Turn around: {words}", f"The words are {turned}."),
            (f"Say the last word: {words}", f"The last word is {last}."),
            (f"Say the first word: {words}", f"The first word is {first}."),
        )[form]
        statement = f"From {words}: {answer}"
    else:
        ask, answer = (
            (f"倒过来说：{words}", f"词语是{turned}。"),
            (f"说最后一个词：{words}", f"最后一个词是{last}。"),
            (f"说第一个词：{words}", f"第一个词是{first}。"),
        )[form]
        statement = f"从{words}：{answer}"
    return Question("list", language, ask, answer, statement, held_out("list", *sorted(word.en for word in chosen)))


SKILLS: dict[str, Writer] = {"translate": ask_translation, "opposite": ask_opposite, "heavier": ask_heavier,
                             "story": ask_story, "list": ask_list}


def draw(writer: Writer, rng: random.Random, language: Language, *, held_out: bool) -> Question:
    """One question that is held out (if `held_out`) or not, drawn until it is."""
    while (question := writer(rng, language)).held_out != held_out:
        pass
    return question
