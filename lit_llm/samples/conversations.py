"""Generate the packaged conversations from questions, for SFT and for the test set.

Training conversations ask only questions that are not held out. The test set has 50 held-out questions in each
language, each as a conversation of one question.
"""

import random
from collections.abc import Sequence

from lit_llm.samples.manners import MANNERS, held_out_questions, polite, spoken
from lit_llm.samples.questions import SKILLS, Question, ask_fact, draw
from lit_llm.samples.world import LANGUAGES, PEOPLE, Fact, Language

Messages = list[dict[str, str]]
EXAM = {"fact": 22, "translate": 6, "opposite": 5, "heavier": 4, "story": 4, "list": 3}     # with the next, 50 for
POLITE = 6                                          # each language: greetings, thanks, "who are you", two of each

SYSTEM = {
    "en": ("You are Pip, a toy assistant.", "You are a helpful assistant.", "Answer in one short sentence."),
    "zh": ("你是皮皮，一个玩具助手。", "你是一个有用的助手。", "请用一句短话回答。"),
}
FOLLOW_UP = {"en": "And {}?", "zh": "{}呢？"}


def write_conversations(facts: Sequence[Fact], seed: str, *, drills: int) -> list[Messages]:
    """Training conversations: greetings and their like, each free fact in three wordings, `drills` of each word rule.

    Two kinds of dialogue come on top, `drills` of each: several questions in a row, and a follow-up.
    """
    rng = random.Random(f"conversations {seed}")
    free = [fact for fact in facts if not fact.held_out]
    out: list[Messages] = []
    for language in LANGUAGES:
        for fact in free:
            for template in rng.sample(fact.attribute.phrases(language).questions, 3):
                out.append(_dialogue([ask_fact(fact, template, language)], rng, language, small_talk=0.05))
        for writer in SKILLS.values():
            for _ in range(drills):
                out.append(_dialogue([draw(writer, rng, language, held_out=False)], rng, language, small_talk=0.05))
        for _ in range(drills):
            out.append(_dialogue(_several(free, rng, language, held_out=False), rng, language, small_talk=0.3))
            out.append(_follow_up(free, rng, language))
        for manner in MANNERS[language]:
            for ask in (text for phrase in manner.asks for text in spoken(phrase, language)):
                out.append([_user(ask), _assistant(manner.answer)])
                out.append([_system(rng, language), _user(ask), _assistant(manner.answer)])
    unique = {str(conversation): conversation for conversation in out}
    out = list(unique.values())
    rng.shuffle(out)
    return out


def write_exam(facts: Sequence[Fact], seed: str, *, scale: int = 1) -> list[Messages]:
    """Held-out questions, each alone in its conversation: 50 for each language, or that many times `scale`.

    Of greetings and their like there are 15 in each language, and never more.
    """
    rng = random.Random(f"exam {seed}")
    held_out_facts = [fact for fact in facts if fact.held_out]
    out: list[Messages] = []
    for language in LANGUAGES:
        questions: dict[str, Question] = {}
        for kind, count in EXAM.items():
            start = len(questions)
            while len(questions) < start + count * scale:
                question = _one(kind, held_out_facts, rng, language, held_out=True)
                questions[question.ask] = question
        out += [_dialogue([question], rng, language, small_talk=0.0) for question in questions.values()]
        out += [[_user(ask), _assistant(answer)] for ask, answer in held_out_questions(rng, language, POLITE * scale)]
    rng.shuffle(out)
    return out


def write_held_out_dialogues(facts: Sequence[Fact], seed: str, *, count: int) -> list[Messages]:
    """Conversations of two and three held-out questions: for perplexity, not for the exam."""
    rng = random.Random(f"dialogues {seed}")
    held_out_facts = [fact for fact in facts if fact.held_out]
    return [_dialogue(_several(held_out_facts, rng, language, held_out=True), rng, language, small_talk=0.0)
            for _ in range(count) for language in LANGUAGES]


def _one(kind: str, facts: Sequence[Fact], rng: random.Random, language: Language, *, held_out: bool) -> Question:
    if kind == "fact":
        fact = rng.choice(facts)
        return ask_fact(fact, rng.choice(fact.attribute.phrases(language).questions), language)
    return draw(SKILLS[kind], rng, language, held_out=held_out)


def _several(facts: Sequence[Fact], rng: random.Random, language: Language, *, held_out: bool) -> list[Question]:
    kinds = rng.choices(("fact", *SKILLS), weights=(5, 1, 1, 1, 1, 1), k=rng.choice((2, 3)))
    return [_one(kind, facts, rng, language, held_out=held_out) for kind in kinds]


def _dialogue(questions: Sequence[Question], rng: random.Random, language: Language, *,
              small_talk: float) -> Messages:
    """A system message before every fourth conversation, a greeting before or thanks after a share of them."""
    messages: Messages = []
    if rng.random() < 0.25:
        messages.append(_system(rng, language))
    if rng.random() < small_talk:
        messages += _polite(rng, language, "greet", "who", "able")
    for question in questions:
        messages += [_user(question.ask), _assistant(question.answer)]
    if rng.random() < small_talk:
        messages += _polite(rng, language, "thank", "leave")
    return messages


def _follow_up(facts: Sequence[Fact], rng: random.Random, language: Language) -> Messages:
    """`Where does Mia live?` ... `And Leo?`: the second question is understood from the first."""
    people = set(PEOPLE)
    first = rng.choice([fact for fact in facts if fact.entity in people])
    second = rng.choice([fact for fact in facts
                         if fact.attribute == first.attribute and fact.entity not in (first.entity,)])
    phrases = first.attribute.phrases(language)
    question = ask_fact(first, rng.choice(phrases.questions), language)
    return [_user(question.ask), _assistant(question.answer),
            _user(FOLLOW_UP[language].format(second.entity.say(language))),
            _assistant(second.render(phrases.answer, language))]


def _polite(rng: random.Random, language: Language, *kinds: str) -> Messages:
    ask, answer = polite(rng, language, *kinds)
    return [_user(ask), _assistant(answer)]


def _system(rng: random.Random, language: Language) -> dict[str, str]:
    return {"role": "system", "content": rng.choice(SYSTEM[language])}


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
