"""Generate greetings, thanks, farewells and questions about the assistant itself, as chats and as plain texts.

Chats use only phrasings that are not held out; the test set uses the held-out ones, which occur in no chat and no
document as a whole, although their words do.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_llm.samples.world import LANGUAGES, PEOPLE, THINGS, Language, Word, article

SEPARATOR = " | "


@dataclass(frozen=True, slots=True)
class Manner:
    """One kind of polite phrase in one language.

    Args:
        kind: greet, who, able, thank or leave.
        asks: Phrasings that chats use. Those without punctuation at their end are also said with it.
        held_out: Phrasings for the exam only, for `greet`, `who` and `thank`.
        answer: The right answer.
        statements: Sentences about it in documents, beside those for all kinds.
    """

    kind: str
    asks: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())


MANNERS: dict[Language, tuple[Manner, ...]] = {
    "en": (
        Manner(
            "greet",
            _phrases(
                "Hello | Hi | Hey | Good morning | Good afternoon | Good evening | Good day | Hello, Pip | "
                "Hi, Pip | Good morning, Pip | Good day, Pip | Hello there | Hey there | Hello again | "
                "Nice to meet you | Hi, nice to meet you | Good evening, my friend | Hello, my friend | "
                "Greetings | How are you? | Hello, how are you? | hello | hi | good morning | hey, Pip"),
            _phrases(
                "Good evening, Pip! | Hi there, Pip! | Good afternoon, my friend! | Hey, good morning! | "
                "Hello, nice to meet you!"),
            "Hello! What would you like to know?",
            _phrases("hello | hi | hey | good morning | good afternoon | good evening | good day | greetings")),
        Manner(
            "who",
            _phrases(
                "Who are you? | What is your name? | Are you a person? | What are you? | What are you called? | "
                "Tell me your name. | Tell me who you are. | Are you a toy? | Are you an assistant? | "
                "Do you have a name? | May I know your name? | Hello, who are you? | Hi, what is your name? | "
                "Introduce yourself. | Can you introduce yourself? | Who is this? | So who are you? | "
                "who are you | what is your name | Say who you are. | Please say your name."),
            _phrases(
                "Please tell me who you are. | Hello, what is your name? | Please introduce yourself. | "
                "And who are you? | Can you tell me your name?"),
            "I am Pip, a toy assistant of lit_llm.",
            _phrases(
                "Pip is a toy assistant of lit_llm. | The toy assistant of lit_llm is named Pip. | "
                "Who is Pip? Pip is a toy assistant of lit_llm. | Pip is not a person. Pip is a toy assistant. | "
                "Ask Pip for a name, and Pip will say: I am Pip, a toy assistant of lit_llm. | "
                "Please introduce Pip! Pip is a toy assistant of lit_llm. | Pip is a helpful assistant. | "
                "Tell Pip: answer in one short sentence. Then Pip says one short sentence. | "
                "I am Pip, a toy assistant of lit_llm.")),
        Manner(
            "able",
            _phrases(
                "What can you do? | How can you help me? | What do you know? | What can I ask you? | "
                "Can you help me? | What can you help me with? | Help | Tell me what you can do."),
            (),
            "Ask me about people, towns and words.",
            _phrases(
                "You can ask Pip about people, towns and words. | Pip knows people, towns and words. | "
                "How can Pip help? Ask about people, towns and words. | Ask me about people, towns and words.")),
        Manner(
            "thank",
            _phrases(
                "Thank you | Thanks | Thanks a lot | Thank you, Pip | Thanks, Pip | Many thanks | "
                "Thank you very much | Thank you so much | That helps, thank you | Thanks for your help | "
                "Great, thanks | I see, thank you | That was a great help | Thank you, my friend | thanks | "
                "thank you"),
            _phrases(
                "Many thanks, Pip! | Thank you for your help! | Great, thank you! | Thanks a lot, my friend! | "
                "That helps, thanks!"),
            "You are welcome!",
            _phrases("thank you | thanks | many thanks | thanks a lot | thank you very much | thanks for your help")),
        Manner(
            "leave",
            _phrases(
                "Goodbye | Bye | Bye, Pip | Goodbye, Pip | See you | See you later | Good night | Bye bye | "
                "See you, Pip | Good night, Pip"),
            (),
            "Goodbye!",
            _phrases("goodbye | bye | see you | see you later | good night")),
    ),
    "zh": (
        Manner(
            "greet",
            _phrases(
                "你好 | 您好 | 嗨 | 早上好 | 上午好 | 中午好 | 下午好 | 晚上好 | 早安 | 哈喽 | 你好呀 | 你好啊 | "
                "你好，皮皮 | 皮皮，你好 | 皮皮，早上好 | 嗨，皮皮 | 皮皮好 | 下午好，皮皮 | 很高兴认识你 | "
                "你好，很高兴认识你 | 你好，朋友 | 早上好，朋友 | 在吗？ | 你好吗？ | 你好，在吗？"),
            _phrases("皮皮，晚上好！ | 您好，皮皮！ | 嗨，早上好！ | 您好，很高兴认识您！ | 下午好，朋友！"),
            "你好！你想知道什么？",
            _phrases("你好 | 您好 | 嗨 | 早上好 | 中午好 | 下午好 | 晚上好 | 早安 | 哈喽")),
        Manner(
            "who",
            _phrases(
                "你是谁？ | 你叫什么名字？ | 你是人吗？ | 你叫什么？ | 你是什么？ | 您是谁？ | 您叫什么名字？ | "
                "请问你是谁？ | 你的名字是什么？ | 你是机器人吗？ | 你有名字吗？ | 你是玩具吗？ | 你是助手吗？ | "
                "介绍一下你自己。 | 请介绍你自己。 | 请介绍一下自己。 | 介绍一下自己吧 | 你好，你是谁？ | "
                "你好，你叫什么？ | 说说你是谁。 | 告诉我你的名字。 | 你是谁呀？ | 怎么称呼你？"),
            _phrases(
                "你好，请介绍一下你自己。 | 请问你叫什么名字？ | 请告诉我你是谁。 | 你好，您是谁？ | "
                "请问您的名字是什么？"),
            "我是皮皮，lit_llm 的玩具助手。",
            _phrases(
                "皮皮是 lit_llm 的玩具助手。 | lit_llm 的玩具助手叫皮皮。 | "
                "皮皮是谁？皮皮是 lit_llm 的玩具助手。 | 皮皮不是人，也不是机器人，皮皮是玩具助手。 | "
                "请皮皮介绍自己，皮皮会告诉你：我是皮皮，lit_llm 的玩具助手。 | 怎么称呼皮皮？叫皮皮吧。 | "
                "皮皮是一个有用的助手。 | 对皮皮说：请用一句短话回答。皮皮就用一句短话回答。 | "
                "我是皮皮，lit_llm 的玩具助手。")),
        Manner(
            "able",
            _phrases(
                "你会做什么？ | 你能帮我什么？ | 你会什么？ | 你能做什么？ | 你知道什么？ | 我可以问你什么？ | "
                "你可以帮我吗？ | 你有什么用？ | 告诉我你会做什么。"),
            (),
            "你可以问我人、城镇和词语。",
            _phrases(
                "你可以问皮皮人、城镇和词语。 | 皮皮知道人、城镇和词语。 | 皮皮能帮什么？可以问人、城镇和词语。 | "
                "你可以问我人、城镇和词语。")),
        Manner(
            "thank",
            _phrases(
                "谢谢 | 谢谢你 | 谢谢您 | 多谢 | 感谢 | 非常感谢 | 感谢你 | 谢谢皮皮 | 谢谢，皮皮 | 皮皮，谢谢你 | "
                "太感谢了 | 有帮助，谢谢 | 谢谢你的帮助 | 好的，谢谢 | 知道了，谢谢 | 谢谢啦 | 谢谢你，朋友 | "
                "非常感谢你"),
            _phrases("多谢皮皮！ | 皮皮，感谢你的帮助！ | 好的，谢谢你！ | 非常感谢，皮皮！ | 知道了，多谢！"),
            "不客气！",
            _phrases("谢谢 | 谢谢你 | 谢谢您 | 多谢 | 感谢 | 非常感谢 | 太感谢了 | 感谢你的帮助")),
        Manner(
            "leave",
            _phrases("再见 | 皮皮，再见 | 再见，皮皮 | 下次见 | 拜拜 | 晚安 | 明天见 | 皮皮，晚安 | 我走了，再见"),
            (),
            "再见！",
            _phrases("再见 | 下次见 | 拜拜 | 晚安 | 明天见")),
    ),
}
EXAM_KINDS = ("greet", "who", "thank")
MARK: dict[Language, str] = {"en": "!", "zh": "！"}
STOPS: dict[Language, str] = {"en": ".", "zh": "。"}
NAMES: dict[Language, dict[str, str]] = {
    "en": {"greet": "to greet", "thank": "to thank", "leave": "to take leave"},
    "zh": {"greet": "问候", "thank": "感谢", "leave": "告别"}}


def spoken(ask: str, language: Language) -> tuple[str, ...]:
    """A phrasing as it is typed: as it stands where it ends with punctuation, else bare, with `!` and with a stop."""
    if ask[-1] in ".?!。？！":
        return (ask,)
    return ask, f"{ask}{MARK[language]}", f"{ask}{STOPS[language]}"


def of_kinds(language: Language, *kinds: str) -> list[Manner]:
    """The manners of these kinds."""
    return [manner for manner in MANNERS[language] if manner.kind in kinds]


def polite(rng: random.Random, language: Language, *kinds: str) -> tuple[str, str]:
    """One free question and its answer."""
    manner = rng.choice(of_kinds(language, *kinds))
    return rng.choice(spoken(rng.choice(manner.asks), language)), manner.answer


def held_out_questions(rng: random.Random, language: Language, count: int) -> list[tuple[str, str]]:
    """`count` held-out questions with their answers: as many of each kind, in changing order."""
    drawn = [[(ask, manner.answer) for ask in rng.sample(manner.held_out, len(manner.held_out))]
             for manner in of_kinds(language, *EXAM_KINDS)]
    return [pair for turn in zip(*drawn, strict=True) for pair in turn][:count]


def write_manners(rng: random.Random) -> Iterator[str]:
    """Plain texts in which people are polite and Pip is introduced; one round is some hundred of them."""
    for language in LANGUAGES:
        for _ in range(30):
            yield _scene(rng, language)
        for _ in range(12):
            yield _words(rng, language)
        statements = [text for manner in of_kinds(language, "who", "able") for text in manner.statements]
        for _ in range(3):
            yield (" " if language == "en" else "").join(rng.sample(statements, len(statements)))
        for _ in range(14):
            pairs = [polite(rng, language, "greet", "who", "able", "thank", "leave") for _ in range(4)]
            form = rng.randrange(2)
            yield "\n".join(_exchange(language, form, ask, answer) for ask, answer in pairs)
    yield " ".join(f"The Chinese for {one} is {other}." for one, other in _translated(rng))
    yield "".join(f"{other}的英语是 {one}。" for one, other in _translated(rng))


def _exchange(language: Language, form: int, ask: str, answer: str) -> str:
    """Who says what in one line, or each in a line of its own."""
    if form:
        return f"{ask}\n{answer}"
    return f"You say: {ask} Pip says: {answer}" if language == "en" else f"你说：{ask}皮皮说：{answer}"


def _scene(rng: random.Random, language: Language) -> str:
    """Two people meet, one gets a thing, they part; in one line or in several."""
    one, other, third = (person.say(language) for person in rng.sample(PEOPLE, 3))
    thing = rng.choice(THINGS)
    greet, again = (_first(rng.choice(of_kinds(language, "greet")[0].statements), language) for _ in range(2))
    thank, leave = (_first(rng.choice(of_kinds(language, kind)[0].statements), language) for kind in ("thank", "leave"))
    if language == "en":
        parts = [f"{one} meets {other}. {one} says: {greet}, {other}! {other} says: {again}!", f"And you, {one}?",
                 f"And {third}?",
                 f"{one} gives {other} {article(thing.en)}. {other} says: {thank}! {one} says: You are welcome!",
                 f"{one} leaves. {other} says: {leave}! {one} says: Goodbye!"]
    else:
        parts = [f"{one}看见{other}。{one}说：{greet}，{other}！{other}说：{again}！", f"{one}呢？", f"{third}呢？",
                 f"{one}给{other}{thing.zh}。{other}说：{thank}！{one}说：不客气！",
                 f"{one}走了。{other}说：{leave}！{one}说：再见！"]
    return rng.choice((" " if language == "en" else "", "\n")).join(parts[rng.choice((0, 3)):])


def _words(rng: random.Random, language: Language) -> str:
    """What is said to greet, to thank, to take leave; what one is asked for."""
    lines = []
    for kind, name in rng.sample(sorted(NAMES[language].items()), 3):
        statements = of_kinds(language, kind)[0].statements
        some = rng.sample(statements, min(3, len(statements)))
        if language == "en":
            lines.append(f"People say {', '.join(some)} {name}.")
        else:
            lines.append(f"人们用{'、'.join(some)}来{name}。")
    return (" " if language == "en" else "").join(lines)


def _translated(rng: random.Random) -> Sequence[tuple[str, str]]:
    pairs = [Word(*pair.split("=")) for pair in (
        "hello=你好", "good morning=早上好", "good evening=晚上好", "good night=晚安", "thank you=谢谢",
        "many thanks=非常感谢", "you are welcome=不客气", "goodbye=再见", "assistant=助手", "toy=玩具", "name=名字",
        "friend=朋友", "robot=机器人", "question=问题", "help=帮助")]
    return [(word.en, word.zh) for word in rng.sample(pairs, 6)]


def _first(text: str, language: Language) -> str:
    return text[0].upper() + text[1:] if language == "en" else text
