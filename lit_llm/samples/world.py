"""A small invented world in two languages: people, towns, facts about them, and their wordings.

Facts are a function of a seed. The words are fixed; only the assignment of values is random.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Word:
    """One meaning, two languages."""

    en: str
    zh: str

    def say(self, language: Language) -> str:
        """The word in that language."""
        return self.en if language == "en" else self.zh


@dataclass(frozen=True, slots=True)
class Phrases:
    """How one attribute is stated, asked and answered in one language.

    Templates hold `{n}` (the entity), `{v}` (the value) and, in English, `{a}` (the value with its article).
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """Something that is true of every entity of a kind."""

    key: str
    values: tuple[Word, ...]
    en: Phrases
    zh: Phrases

    def phrases(self, language: Language) -> Phrases:
        """The templates of that language."""
        return self.en if language == "en" else self.zh


@dataclass(frozen=True, slots=True)
class Fact:
    """One value of one attribute of one entity: what documents state and questions ask for."""

    entity: Word
    attribute: Attribute
    value: Word

    def render(self, template: str, language: Language) -> str:
        """The template filled with this fact."""
        value = self.value.say(language)
        return template.format(n=self.entity.say(language), v=value, a=article(value))

    @property
    def held_out(self) -> bool:
        """Whether this fact is stated in documents only, never asked before the exam (in either language)."""
        return held_out("fact", self.entity.en, self.attribute.key)


def article(noun: str) -> str:
    """`a fox`, `an owl`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def held_out(*key: str) -> bool:
    """Whether what `key` names is kept for the exam: one in five, by a hash, so that every writer agrees."""
    return zlib.crc32("|".join(key).encode()) % 5 == 0


def words(text: str) -> tuple[Word, ...]:
    """`"red 红色, blue 蓝色"` as words."""
    return tuple(Word(*(part.strip() for part in pair.rsplit(" ", 1))) for pair in text.split(","))


# ---- the words -------------------------------------------------------------------------------------------------------

PEOPLE = words(
    "Mia 米娅, Anna 安娜, Toby 托比, Leo 里奥, Nora 诺拉, Hugo 雨果, Ida 艾达, Otto 奥托, Vera 薇拉, Finn 芬恩, "
    "Rosa 罗莎, Emil 埃米, Clara 克莱, Jonas 乔纳, Lena 莱娜, Max 麦斯, Zoe 佐伊, Karl 卡尔, Edith 伊迪, Bruno 布鲁, "
    "Greta 葛蕾, Felix 菲力, Hanna 汉娜, Oscar 欧斯, Paula 宝拉, Simon 西蒙, Tilda 提达, Ugo 于格, Wanda 旺达, "
    "Yuri 尤里, Agnes 阿格, Boris 鲍里, Celia 希丽, David 大卫, Ella 爱拉, Frank 法兰, Gina 吉娜, Henry 亨利, "
    "Irma 伊玛, Jacob 雅各, Kira 琪拉, Lukas 卢卡, Mona 莫娜, Noah 诺亚, Olga 奥佳, Peter 彼得, Ruth 露丝, "
    "Samuel 萨姆, Tina 蒂娜, Victor 维克, Willa 威洛, Adam 亚当, Berta 贝塔, Colin 柯林, Dora 朵拉, Erik 埃里, "
    "Flora 芙萝, Georg 乔治, Helga 海佳, Ivan 伊万")
TOWNS = words(
    "Tarn 塔恩镇, Velm 维姆镇, Orso 奥索镇, Kesh 克什镇, Lumo 鹿莫镇, Quill 羽毛镇, Marsh 沼泽镇, Stone 石头镇, "
    "Willow 柳树镇, Amber 琥珀镇, Cedar 雪松镇, Raven 乌鸦镇, Harrow 哈罗镇, Clover 三叶镇, Thistle 蓟花镇, "
    "Fennel 茴香镇")
TRADES = words(
    "baker 面包师, smith 铁匠, weaver 织工, potter 陶工, fisher 渔夫, tailor 裁缝, teacher 老师, doctor 医生, "
    "painter 画家, carpenter 木匠, gardener 园丁, singer 歌手, cook 厨师, sailor 水手")
PETS = words("cat 猫, dog 狗, goat 山羊, hen 母鸡, fox 狐狸, owl 猫头鹰, horse 马, duck 鸭子, rabbit 兔子, mouse 老鼠, "
             "frog 青蛙, snail 蜗牛")
COLOURS = words("red 红色, blue 蓝色, green 绿色, yellow 黄色, white 白色, black 黑色, brown 棕色, grey 灰色, "
                "pink 粉色, purple 紫色")
FOODS = words("bread 面包, soup 汤, honey 蜂蜜, cheese 奶酪, rice 米饭, cake 蛋糕, fish 鱼, jam 果酱, porridge 粥, "
              "noodles 面条, salad 沙拉, pie 馅饼")
GOODS = words("salt 盐, wool 羊毛, paper 纸, glass 玻璃, tea 茶, silk 丝绸, wine 酒, oil 油, iron 铁, soap 肥皂")
SIGHTS = words("tower 塔楼, bridge 大桥, mill 磨坊, castle 城堡, well 水井, temple 寺庙, harbour 港口, garden 花园, "
               "library 图书馆, theatre 剧院")
SIDES = words("north 北方, south 南方, east 东方, west 西方")
THINGS = words("cup 杯子, kite 风筝, hat 帽子, bell 铃铛, book 书, lamp 灯, drum 鼓, key 钥匙, boat 船, box 盒子, "
               "chair 椅子, clock 钟")
ANIMALS = words("ant 蚂蚁, bee 蜜蜂, mouse 老鼠, frog 青蛙, hen 母鸡, cat 猫, fox 狐狸, dog 狗, goat 山羊, wolf 狼, "
                "pig 猪, horse 马, bear 熊, whale 鲸鱼")          # from the lightest to the heaviest
OPPOSITES = tuple(zip(
    words("big 大, hot 热, old 旧, fast 快, long 长, wet 湿, heavy 重, hard 硬, dark 暗, full 满"),
    words("small 小, cold 冷, new 新, slow 慢, short 短, dry 干, light 轻, soft 软, bright 亮, empty 空"), strict=True))

# ---- what is true of whom, and its wordings --------------------------------------------------------------------------

PERSON_ATTRIBUTES = (
    Attribute("home", TOWNS, Phrases(
        ("{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}.", "You will find {n} in {v}.",
         "{n} comes from {v}.", "In the town of {v} lives {n}."),
        ("Where does {n} live?", "In which town does {n} live?", "Where is the home of {n}?", "Where can I find {n}?"),
        "The home of {n} is in {v}."), Phrases(
        ("{n}住在{v}。", "{n}的家在{v}。", "{n}在{v}有一座房子。", "在{v}可以找到{n}。", "{n}来自{v}。",
         "{v}住着{n}。"),
        ("{n}住在哪里？", "{n}住在哪个镇？", "{n}的家在哪里？", "在哪里可以找到{n}？"),
        "{n}住在{v}。")),
    Attribute("trade", TRADES, Phrases(
        ("{n} works as {a}.", "{n} is {a}.", "By trade, {n} is {a}.", "People know {n} as {a}.",
         "Every day {n} works as {a}.", "The job of {n} is to be {a}."),
        ("What does {n} work as?", "What is the job of {n}?", "What is the trade of {n}?", "What work does {n} do?"),
        "The job of {n} is to be {a}."), Phrases(
        ("{n}的工作是{v}。", "{n}是{v}。", "{n}当{v}。", "大家都知道{n}是{v}。", "{n}每天做{v}。", "{n}的职业是{v}。"),
        ("{n}做什么工作？", "{n}的工作是什么？", "{n}的职业是什么？", "{n}是做什么的？"),
        "{n}的工作是{v}。")),
    Attribute("pet", PETS, Phrases(
        ("{n} keeps {a}.", "{n} has {a} at home.", "The pet of {n} is {a}.", "{n} feeds {a} every morning.",
         "There is {a} in the house of {n}.", "{n} has a pet, and it is {a}."),
        ("What pet does {n} keep?", "Which animal does {n} keep?", "What is the pet of {n}?",
         "What animal does {n} have at home?"),
        "The pet of {n} is {a}."), Phrases(
        ("{n}养{v}。", "{n}家里有{v}。", "{n}的宠物是{v}。", "{n}每天早上喂{v}。", "{n}的房子里有{v}。",
         "{n}有宠物，是{v}。"),
        ("{n}养什么动物？", "{n}养什么宠物？", "{n}的宠物是什么？", "{n}家里有什么动物？"),
        "{n}养{v}。")),
    Attribute("door", COLOURS, Phrases(
        ("The door of {n} is {v}.", "{n} has a {v} door.", "{n} painted the door {v}.",
         "The house of {n} has a {v} door.", "{n} opens a {v} door.", "To visit {n}, knock at the {v} door."),
        ("What colour is the door of {n}?", "Which colour does the door of {n} have?",
         "In what colour did {n} paint the door?", "At which door do I knock to visit {n}?"),
        "The door of {n} is {v}."), Phrases(
        ("{n}家的门是{v}的。", "{n}有{v}的门。", "{n}把门刷成了{v}。", "{n}的房子有{v}的门。", "{n}打开{v}的门。",
         "要找{n}，就敲{v}的门。"),
        ("{n}家的门是什么颜色？", "{n}的门是什么颜色的？", "{n}把门刷成了什么颜色？", "要找{n}，敲什么颜色的门？"),
        "{n}家的门是{v}的。")),
    Attribute("food", FOODS, Phrases(
        ("{n} likes {v} best.", "The favourite food of {n} is {v}.", "{n} eats {v} every evening.",
         "Give {n} some {v}.", "{n} always asks for {v}.", "For {n} nothing is better than {v}."),
        ("What food does {n} like best?", "What is the favourite food of {n}?", "What does {n} like to eat?",
         "What does {n} eat every evening?"),
        "The favourite food of {n} is {v}."), Phrases(
        ("{n}最喜欢吃{v}。", "{n}最爱的食物是{v}。", "{n}每天晚上吃{v}。", "给{n}一些{v}。", "{n}总是要吃{v}。",
         "对{n}来说，没有什么比{v}更好吃。"),
        ("{n}最喜欢吃什么？", "{n}最爱的食物是什么？", "{n}喜欢吃什么？", "{n}每天晚上吃什么？"),
        "{n}最喜欢吃{v}。")),
)
TOWN_ATTRIBUTES = (
    Attribute("good", GOODS, Phrases(
        ("{n} is known for {v}.", "The people of {n} make {v}.", "Traders buy {v} in {n}.",
         "The market of {n} sells {v}.", "Carts full of {v} leave {n}."),
        ("What is {n} known for?", "What do the people of {n} make?", "What does the market of {n} sell?"),
        "The market of {n} sells {v}."), Phrases(
        ("{n}出产{v}。", "{n}的人做{v}。", "商人在{n}买{v}。", "{n}的市场卖{v}。", "装满{v}的车离开{n}。"),
        ("{n}出产什么？", "{n}的人做什么？", "{n}的市场卖什么？"),
        "{n}出产{v}。")),
    Attribute("sight", SIGHTS, Phrases(
        ("In the middle of {n} there is {a}.", "{n} has {a}.", "Visitors of {n} look for the {v}.",
         "The pride of {n} is the {v}.", "All roads of {n} lead to the {v}."),
        ("What is in the middle of {n}?", "What do visitors of {n} look for?", "What is the pride of {n}?"),
        "In the middle of {n} there is {a}."), Phrases(
        ("{n}的中间有{v}。", "{n}有{v}。", "游客在{n}找{v}。", "{n}的骄傲是{v}。", "{n}的路都通向{v}。"),
        ("{n}的中间有什么？", "游客在{n}找什么？", "{n}的骄傲是什么？"),
        "{n}的中间有{v}。")),
    Attribute("side", SIDES, Phrases(
        ("{n} lies in the {v}.", "The way to {n} goes {v}.", "{n} is a town in the {v}.",
         "Go {v} and you will see {n}.", "In the {v} there is a town named {n}."),
        ("Where does {n} lie?", "Which way goes to {n}?", "In which part of the land is {n}?"),
        "The way to {n} goes {v}."), Phrases(
        ("{n}在{v}。", "去{n}的路通向{v}。", "{n}是{v}的镇。", "往{v}走就能看到{n}。", "{v}有一个镇叫{n}。"),
        ("{n}在哪一方？", "去{n}的路通向哪一方？", "{n}是哪一方的镇？"),
        "{n}在{v}。")),
)


def draw_facts(seed: int) -> tuple[Fact, ...]:
    """Every fact of the world: 60 people with 5 attributes, 16 towns with 3."""
    rng = random.Random(f"facts {seed}")
    kinds = ((PEOPLE, PERSON_ATTRIBUTES), (TOWNS, TOWN_ATTRIBUTES))
    return tuple(Fact(entity, attribute, rng.choice(attribute.values))
                 for entities, attributes in kinds for entity in entities for attribute in attributes)
