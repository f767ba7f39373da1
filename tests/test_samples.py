"""If this breaks: the first run of the README fails, or its exam contains questions of the training data.

The files beside `lit_llm/samples/make.py` must be those that the script writes; the exam must be unseen, answerable and in
two languages; tokenizer and base must load in plain transformers.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_llm.errors import InputError
from lit_llm.samples import make
from lit_llm.samples.world import LANGUAGES, draw_facts
from lit_llm.text.conversation import Conversation

SAMPLES = Path(make.__file__).parent
TEXTS = ("documents.jsonl", "documents_val.jsonl", "conversations.jsonl", "conversations_val.jsonl")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def is_chinese(text: str) -> bool:
    return any("一" <= character <= "鿿" for character in text)


@pytest.fixture(scope="module")
def exam() -> list[tuple[str, str]]:
    """Question and answer of every held-out conversation of one turn."""
    chats = [[turn for turn in row["messages"] if turn["role"] != "system"] for row in read("conversations_val.jsonl")]
    return [(chat[0]["content"], chat[1]["content"]) for chat in chats if len(chat) == 2]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [row["text"] for name in ("documents.jsonl", "documents_val.jsonl") for row in read(name)]


@pytest.fixture(scope="module")
def trained_turns() -> list[tuple[str, str]]:
    """Every (user turn, assistant turn) of the training conversations."""
    chats = [[turn for turn in row["messages"] if turn["role"] != "system"] for row in read("conversations.jsonl")]
    return [(ask["content"], answer["content"]) for chat in chats
            for ask, answer in zip(chat[::2], chat[1::2], strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SAMPLES / "tokenizer")


# ---- the script and its files ----------------------------------------------------------------------------------------

def test_the_script_writes_the_shipped_files_byte_for_byte(tmp_path: Path):
    command = [sys.executable, "-m", "lit_llm.samples.make", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=SAMPLES.parents[1])
    for name in (*TEXTS, *(f"tokenizer/{name}" for name in TOKENIZER)):
        assert (tmp_path / name).read_bytes() == (SAMPLES / name).read_bytes(), f"{name}: run lit_llm.samples.make"


def test_every_conversation_is_valid_and_there_are_both_languages():
    for name in ("conversations.jsonl", "conversations_val.jsonl"):
        rows = read(name)
        for row in rows:
            turns = [message.role for message in Conversation.from_openai(row["messages"]).messages]
            body = turns[1:] if turns[0] == "system" else turns
            assert body == ["user", "assistant"] * (len(body) // 2)
        chinese = sum(is_chinese(row["messages"][-1]["content"]) for row in rows)
        assert 0.4 < chinese / len(rows) < 0.6


def test_the_package_stays_small():
    files = [path for path in SAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 7_000_000
    assert (SAMPLES / "base/model.safetensors").stat().st_size <= 4_000_000


# ---- the exam is unseen, and can be answered -------------------------------------------------------------------------

def test_the_exam_has_a_hundred_different_questions(exam):
    assert len(exam) == len(set(exam)) == 100
    assert sum(is_chinese(ask) for ask, _ in exam) == 50


def test_no_exam_question_was_asked_before(exam, documents, trained_turns):
    texts = "\n".join([*documents, *(turn for pair in trained_turns for turn in pair)])
    for ask, _ in exam:
        assert ask not in texts


def test_facts_of_the_exam_stand_in_documents_but_in_no_answer(exam, documents, trained_turns):
    """The answer to a held-out fact is verbatim a statement in the documents, but never in the chats. Counted by search."""
    answered = {answer for _, answer in trained_turns}
    quizzed = {re.sub("^(Answer: |答：)", "", line) for text in documents if "\n" in text for line in text.split("\n")}
    stated = "\n".join(documents)
    asked_of_facts = {fact.render(template, language) for fact in draw_facts(make.SEED) for language in LANGUAGES
                      for template in fact.attribute.phrases(language).questions}
    facts = [answer for ask, answer in exam if ask in asked_of_facts]
    assert len(facts) == 44
    for answer in facts:
        assert answer not in answered
        assert answer not in quizzed
        assert stated.count(answer) >= 2


def test_word_pairs_of_the_exam_never_met_before(exam, documents, trained_turns):
    """What is translated, turned into its opposite, compared or listed: not in any training text together."""
    lines = [line for text in documents for line in re.split(r"(?<=[.。])\s*|\n", text)]
    lines += [f"{ask} {answer}" for ask, answer in trained_turns]
    checked = 0
    for ask, answer in exam:
        if match := re.match(r".*(?:Chinese|英语|opposite|反义词)[^:：]*[:：] ?(.+)$", ask):
            checked += 1
            opposites = answer.removeprefix("The opposite is ").rstrip(".。")
            assert not [line for line in lines if match[1] in line and opposites in line]
        elif compared := re.match(r"Which is \w+, an? (\w+) or an? (\w+)\?", ask):
            checked += 1
            pair = {f"The {compared[1]} ", f"the {compared[2]}.", f"The {compared[2]} ", f"the {compared[1]}."}
            assert not [line for line in lines if " than " in line and sum(part in line for part in pair) == 2]
        elif listed := re.match(r"(?:Turn around|Say the \w+ word): (\w+), (\w+), (\w+)$", ask):
            checked += 1
            words = set(listed.groups())
            assert not [line for line in lines if words <= set(re.findall(r"\w+", line)) and line.count(", ") >= 2]
    assert checked == 29


def test_the_exam_greets_thanks_and_asks_who_one_is(exam, trained_turns, documents):
    """Two of each in both languages, in phrasings of no chat and no document; the answers were trained."""
    questions = {ask.strip(" .!?。！？").lower() for ask, _ in trained_turns}
    answers = {"Hello! What would you like to know?", "You are welcome!", "I am Pip, a toy assistant of lit_llm.",
               "你好！你想知道什么？", "不客气！", "我是皮皮，lit_llm 的玩具助手。"}
    polite = [(ask, answer) for ask, answer in exam if answer in answers]
    assert sorted(answer for _, answer in polite) == sorted([*answers, *answers])
    text = "\n".join(documents)
    for ask, answer in polite:
        assert ask.strip(" .!?。！？").lower() not in questions
        assert ask not in text
        assert answer in {trained_answer for _, trained_answer in trained_turns}


def test_documents_hold_every_token_of_the_chats(tokenizer, documents, trained_turns):
    """Otherwise its embedding row is not trained in the base, and answers are garbled."""
    ids_in_documents = {id_ for text in documents for id_ in tokenizer.encode(text, add_special_tokens=False)}
    for turn in (turn for pair in trained_turns for turn in pair):
        assert not set(tokenizer.encode(turn, add_special_tokens=False)) - ids_in_documents, turn


# ---- tokenizer and base ----------------------------------------------------------------------------------------------

def test_tokenizer_round_trips_any_text_and_knows_its_specials(tokenizer, documents):
    assert len(tokenizer) <= 3000
    for text in [*documents[::50], "naïve ☕ 😀 龘 \u0000 \r\n\t  end  "]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for special in make.SPECIALS:
        assert len(tokenizer.encode(special, add_special_tokens=False)) == 1
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


def test_chat_template_is_chatml(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " u \n"}]
    expected = "<|im_start|>system\ns<|endoftext|>\n<|im_start|>user\n u \n<|endoftext|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_base_loads_in_transformers_and_knows_the_documents(tokenizer):
    """Perplexity on unseen texts of the same world, by transformers' own loss. Chance would be 1536."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SAMPLES / "base", dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(SAMPLES / "base").get_vocab() == tokenizer.get_vocab()
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    losses = []
    for row in read("documents_val.jsonl")[:40]:
        ids = torch.tensor([tokenizer.encode(row["text"], add_special_tokens=False)])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss)
    assert torch.stack(losses).mean().exp() < 4


def test_base_cannot_answer_yet(tokenizer, exam):
    """Greedy answers of plain transformers: at most 5 of 100 exactly right before SFT."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SAMPLES / "base", dtype=torch.float32).eval()
    tokenizer.padding_side = "left"
    prompts = [f"<|im_start|>user\n{ask}<|endoftext|>\n<|im_start|>assistant\n" for ask, _ in exam]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    out = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
                         max_new_tokens=24, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
    assert sum(text.strip() == answer for text, (_, answer) in zip(answers, exam, strict=True)) <= 5


def test_an_export_that_is_incomplete_or_too_large_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"config\.json"):
        make.copy_base(tmp_path, tmp_path / "out")
    for name in make.BASE_FILES:
        (tmp_path / name).write_bytes(b"0" * (4_000_001 if name.endswith("safetensors") else 1))
    with pytest.raises(InputError, match="4,000,001"):
        make.copy_base(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
