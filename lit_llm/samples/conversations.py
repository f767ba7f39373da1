"""Questions flow in, conversations in OpenAI's form flow out: what SFT learns from, and the exam.

Training conversations ask free facts and free word rules only. The exam asks what is held out: 50 questions in each
language, each a conversation of one question. Knows nothing of tokens or files.
"""

import random
from collections.abc import Sequence

from lit_llm.samples.questions import SKILLS, Question, ask_fact, draw
from lit_llm.samples.world import LANGUAGES, PEOPLE, Fact, Language

Messages = list[dict[str, str]]
EXAM = {"fact": 25, "translate": 7, "opposite": 6, "heavier": 5, "story": 4, "list": 3}     # 50 for each language

SYSTEM = {
    "en": ("You are Pip, a toy assistant.", "You are a helpful assistant.", "Answer in one short sentence."),
    "zh": ("你是皮皮，一个玩具助手。", "你是一个有用的助手。", "请用一句短话回答。"),
}
SMALL_TALK: dict[Language, tuple[tuple[tuple[str, ...], str], ...]] = {
    "en": (
        (("Hello!", "Hi!", "Good morning!", "Hello, Pip!"), "Hello! What would you like to know?"),
        (("Who are you?", "What is your name?", "Are you a person?"), "I am Pip, a toy assistant of lit_llm."),
        (("What can you do?", "How can you help me?"), "Ask me about people, towns and words."),
        (("Thank you!", "Thanks a lot!", "That helps, thank you."), "You are welcome!"),
        (("Goodbye!", "Bye, Pip!", "See you!"), "Goodbye!"),
    ),
    "zh": (
        (("你好！", "早上好！", "皮皮，你好！", "嗨！"), "你好！你想知道什么？"),
        (("你是谁？", "你叫什么名字？", "你是人吗？"), "我是皮皮，lit_llm 的玩具助手。"),
        (("你会做什么？", "你能帮我什么？"), "你可以问我人、城镇和词语。"),
        (("谢谢你！", "多谢！", "有帮助，谢谢。"), "不客气！"),
        (("再见！", "皮皮，再见！", "下次见！"), "再见！"),
    ),
}
FOLLOW_UP = {"en": "And {}?", "zh": "{}呢？"}


def write_conversations(facts: Sequence[Fact], seed: str, *, drills: int) -> list[Messages]:
    """Training conversations: small talk, each free fact in three wordings, and `drills` of each word rule.

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
                out.append(_dialogue([draw(writer, rng, language, kept=False)], rng, language, small_talk=0.05))
        for _ in range(drills):
            out.append(_dialogue(_several(free, rng, language, kept=False), rng, language, small_talk=0.3))
            out.append(_follow_up(free, rng, language))
        for asks, answer in SMALL_TALK[language]:
            for ask in asks:
                out += [[*head, _user(ask), _assistant(answer)] for head in
                        ([], *([{"role": "system", "content": text}] for text in SYSTEM[language]))]
    unique = {str(conversation): conversation for conversation in out}
    out = list(unique.values())
    rng.shuffle(out)
    return out


def write_exam(facts: Sequence[Fact], seed: str, *, scale: int = 1) -> list[Messages]:
    """Held-out questions, each alone in its conversation: `50 * scale` for each language."""
    rng = random.Random(f"exam {seed}")
    kept = [fact for fact in facts if fact.held_out]
    out: list[Messages] = []
    for language in LANGUAGES:
        asked: dict[str, Question] = {}
        for kind, count in EXAM.items():
            start = len(asked)
            while len(asked) < start + count * scale:
                question = _one(kind, kept, rng, language, kept=True)
                asked[question.ask] = question
        out += [_dialogue([question], rng, language, small_talk=0.0) for question in asked.values()]
    rng.shuffle(out)
    return out


def write_held_out_dialogues(facts: Sequence[Fact], seed: str, *, count: int) -> list[Messages]:
    """Conversations of two and three held-out questions: for perplexity, not for the exam."""
    rng = random.Random(f"dialogues {seed}")
    kept = [fact for fact in facts if fact.held_out]
    return [_dialogue(_several(kept, rng, language, kept=True), rng, language, small_talk=0.0)
            for _ in range(count) for language in LANGUAGES]


def _one(kind: str, facts: Sequence[Fact], rng: random.Random, language: Language, *, kept: bool) -> Question:
    if kind == "fact":
        fact = rng.choice(facts)
        return ask_fact(fact, rng.choice(fact.attribute.phrases(language).questions), language)
    return draw(SKILLS[kind], rng, language, kept=kept)


def _several(facts: Sequence[Fact], rng: random.Random, language: Language, *, kept: bool) -> list[Question]:
    kinds = rng.choices(("fact", *SKILLS), weights=(5, 1, 1, 1, 1, 1), k=rng.choice((2, 3)))
    return [_one(kind, facts, rng, language, kept=kept) for kind in kinds]


def _dialogue(questions: Sequence[Question], rng: random.Random, language: Language, *,
              small_talk: float) -> Messages:
    """A system message before every fourth conversation, a greeting before or thanks after a share of them."""
    messages: Messages = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEM[language])})
    if rng.random() < small_talk:
        messages += _small_talk(SMALL_TALK[language][rng.choice((0, 1, 2))], rng)
    for question in questions:
        messages += [_user(question.ask), _assistant(question.answer)]
    if rng.random() < small_talk:
        messages += _small_talk(SMALL_TALK[language][rng.choice((3, 4))], rng)
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


def _small_talk(pair: tuple[tuple[str, ...], str], rng: random.Random) -> Messages:
    return [_user(rng.choice(pair[0])), _assistant(pair[1])]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
