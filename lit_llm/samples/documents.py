"""Generate the embedded texts from facts and word rules, for pretraining.

Every fact is stated in every wording, in varying contexts, because a model that has seen a fact in only one wording
cannot answer questions about it (arXiv:2309.14316, section 4). Held-out questions never occur.
"""

import random
from collections.abc import Iterator, Sequence

from lit_llm.samples.manners import write_manners
from lit_llm.samples.questions import SKILLS, ask_fact, draw
from lit_llm.samples.world import ANIMALS, COLOURS, LANGUAGES, OPPOSITES, THINGS, Fact, Language, Word

JOIN = {"en": " ", "zh": ""}
QUIZ_MARKS = {"en": (("Question: ", "Answer: "), ("", "")), "zh": (("问：", "答："), ("", ""))}
Lines = list[str]


def write_documents(facts: Sequence[Fact], seed: str, *, rounds: int) -> list[str]:
    """Texts in both languages, shuffled.

    Args:
        facts: The world.
        seed: Another seed writes other texts about the same world.
        rounds: How many portraits, registers and quizzes mention each fact; one round is some 700 texts.
    """
    rng = random.Random(f"documents {seed}")
    tell = _Teller(rng)
    texts: Lines = []
    for _ in range(rounds):
        for language in LANGUAGES:
            texts += _portraits(facts, tell, language)
            texts += _registers(facts, tell, language)
            texts += _quizzes(facts, rng, language)
            texts += _rules(rng, language)
            texts += _dictionary(rng, language)
        texts += write_manners(rng)
    texts = list(dict.fromkeys(texts))
    rng.shuffle(texts)
    return texts


class _Teller:
    """States facts, each in all its wordings before one comes again."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.unused: dict[tuple[str, str, Language], Lines] = {}

    def state(self, fact: Fact, language: Language) -> str:
        left = self.unused.setdefault((fact.entity.en, fact.attribute.key, language), [])
        if not left:
            wordings = fact.attribute.phrases(language).statements
            left += self.rng.sample(wordings, len(wordings))
        return fact.render(left.pop(), language)


def _portraits(facts: Sequence[Fact], tell: _Teller, language: Language) -> Iterator[str]:
    """All that is true of one person or town, in changing order."""
    by_entity: dict[Word, list[Fact]] = {}
    for fact in facts:
        by_entity.setdefault(fact.entity, []).append(fact)
    for facts_of_entity in by_entity.values():
        shuffled = tell.rng.sample(facts_of_entity, len(facts_of_entity))
        yield JOIN[language].join(tell.state(fact, language) for fact in shuffled)


def _registers(facts: Sequence[Fact], tell: _Teller, language: Language) -> Iterator[str]:
    """One attribute of six entities."""
    for key in sorted({fact.attribute.key for fact in facts}):
        chosen = [fact for fact in facts if fact.attribute.key == key]
        tell.rng.shuffle(chosen)
        for group in _groups(chosen, 6):
            yield JOIN[language].join(tell.state(fact, language) for fact in group)


def _quizzes(facts: Sequence[Fact], rng: random.Random, language: Language) -> Iterator[str]:
    """Questions and answers as plain lines: free facts and free word rules mixed."""
    questions = [ask_fact(fact, rng.choice(fact.attribute.phrases(language).questions), language)
                 for fact in facts if not fact.held_out]
    questions += [draw(writer, rng, language, held_out=False) for writer in SKILLS.values() for _ in range(80)]
    rng.shuffle(questions)
    for group in _groups(questions, 5):
        ask, answer = rng.choice(QUIZ_MARKS[language])
        yield "\n".join(f"{ask}{question.ask}\n{answer}{question.answer}" for question in group)


def _rules(rng: random.Random, language: Language) -> Iterator[str]:
    """Five statements of one word rule."""
    for writer in SKILLS.values():
        for _ in range(32):
            yield JOIN[language].join(draw(writer, rng, language, held_out=False).statement for _ in range(5))


def _dictionary(rng: random.Random, language: Language) -> Iterator[str]:
    """Single words: their translation, their opposite."""
    adjectives = [word for pair in OPPOSITES for word in pair]
    entries = [f"The Chinese for {word.en} is {word.zh}." if language == "en" else f"{word.zh}的英语是 {word.en}。"
               for word in (*COLOURS, *THINGS, *ANIMALS, *adjectives)]
    for one, other in (rng.sample(pair, 2) for pair in OPPOSITES):
        entries.append(f"The opposite of {one.en} is {other.en}." if language == "en"
                       else f"{one.zh}的反义词是{other.zh}。")
    rng.shuffle(entries)
    for group in _groups(entries, 6):
        yield JOIN[language].join(group)


def _groups(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start:start + size]
