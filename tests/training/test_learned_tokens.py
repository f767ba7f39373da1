"""If this breaks: a tuned model never stops because its stop token cannot be learned, or token rows are trained unnecessarily."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_llm import CausalLMModule, InputError, LoRA, Source, TextDataModule, Tokenizer, Trainer
from lit_llm.exports.command import export
from lit_llm.inference.completion import TextEngine
from lit_llm.models.adapters.adapter import is_peft
from lit_llm.models.load import load_causal_lm
from lit_llm.models.untrained import untrained
from lit_llm.names import resolve
from lit_llm.text.conversation import Conversation, Message
from lit_llm.text.templates.template import chatml
from lit_llm.training import learned_tokens

START, END = "<|im_start|>", "<|im_end|>"           # in the sample tokenizer, and never in its base's corpus
ANIMALS = ["cat", "dog", "fox", "hen", "owl", "cow", "pig", "bee", "ant", "bat", "elk", "ram"]


@pytest.fixture(scope="module")
def embedding():
    return load_causal_lm("sample:base").get_input_embeddings().weight.detach()


@pytest.fixture(scope="module")
def token_counts():
    """How often each token occurs in the documents that the sample's base was trained on."""
    from tokenizers import Tokenizer as Plain

    plain = Plain.from_file(resolve("sample:base/tokenizer.json"))
    lines = Path(resolve("sample:documents.jsonl")).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return Counter(id_ for read in plain.encode_batch(texts, add_special_tokens=False) for id_ in (*read.ids, 0))


def test_rows_that_no_corpus_moved_are_found(embedding, token_counts):
    """In the sample's real base, of which it is known what it has read: all of them, and none besides."""
    never = [id_ for id_ in range(len(embedding)) if not token_counts[id_]]
    assert 300 < len(never) < 1000
    assert untrained(embedding, range(len(embedding))) == never
    assert untrained(embedding.bfloat16(), range(len(embedding))) == never
    assert untrained(embedding, []) == []


def test_torchs_default_type_changes_nothing(embedding):
    """Lightning builds models under another one where a run is in half precision."""
    ids, before = range(0, len(embedding), 7), torch.get_default_dtype()
    expected = untrained(embedding.bfloat16(), ids)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert untrained(embedding.bfloat16(), ids) == expected
    finally:
        torch.set_default_dtype(before)


def test_a_second_real_model(stories, shared_data):
    """<unk> and </s>, but not <s>; and of the tokens that its corpus is full of, none."""
    weight = load_causal_lm(stories).get_output_embeddings().weight
    assert untrained(weight, [0, 1, 2]) == [0, 2]
    text = (shared_data / "pretrain/tinystories.txt").read_text(encoding="utf-8")[:300_000]
    tokenizer = Tokenizer.load(stories)                  # characters of other scripts are broken in this text
    often = [id_ for id_, count in Counter(tokenizer.encode_text(text)).items()
             if count > 100 and re.fullmatch("▁?[A-Za-z]+", tokenizer.hf.convert_ids_to_tokens(id_))]
    assert len(often) > 100
    assert untrained(weight, often) == []


def test_a_heap_among_many_rows_is_found_without_all_distances():
    """Compared with an exact search in float64: a large vocabulary, wide rows, groups of two and of many."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(3000, 200, generator=generator)
    rows[100:130] = rows[100] + 0.02 * torch.randn(30, 200, generator=generator)
    rows[2900] = rows[17] + 0.01
    away = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    usual = away.quantile(0.99, dim=1)
    away.fill_diagonal_(torch.inf)
    expected = (away.amin(1) < 0.1 * usual).nonzero()[:, 0].tolist()
    assert expected == sorted([17, 2900, *range(100, 130)])
    assert untrained(rows, range(len(rows))) == expected


def test_rows_added_to_a_trained_model_are_found(embedding):
    """Rows at the mean of all rows, where transformers initialises them, and zeros; random models have no near-duplicates."""
    model = load_causal_lm("sample:base")
    count = len(embedding)
    model.resize_token_embeddings(count + 1)
    assert untrained(model.get_input_embeddings().weight, [0, count]) == [count]
    assert untrained(torch.cat([embedding, embedding[:1] * 0]), [0, count]) == [count]
    for shape in ((320, 32), (1536, 128)):
        assert untrained(torch.randn(shape, generator=torch.Generator().manual_seed(0)), list(range(320))) == []


@pytest.fixture
def chats(tmp_path):
    """A dozen short conversations, and ChatML with the control tokens that the sample's base does not know."""
    rows = [{"messages": [{"role": "user", "content": f"The {animal}?"}, {"role": "assistant", "content": f"{animal}."}]}
            for animal in ANIMALS]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chatml.jinja").write_text(chatml(START, END))
    return tmp_path


def fit(folder, *, steps=1, name="run", source="chats.jsonl", weight=None, ckpt_path=None, **options):
    """Train the sample's base in this process, on records with a weight that suffices for one epoch."""
    data = TextDataModule(sources=[Source(str(folder / source), weight=weight or steps)], tokenizer="sample:base",
                          chat_template=str(folder / "chatml.jinja"), seq_len=64, batch_size=2)
    module = CausalLMModule(base="sample:base", schedule="constant", warmup=0, **options)
    torch.manual_seed(0)
    Trainer(default_root_dir=str(folder / name), max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1,
            enable_progress_bar=False).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def at_the_end(folder):
    """(smallest probability of the stop token at the end of an answer, whether it is always the likeliest)."""
    tokenizer, model = Tokenizer.load(str(folder)), load_causal_lm(str(folder))
    rows = [tokenizer.encode_prompt(question(animal)) + tokenizer.encode_text(f"{animal}.") for animal in ANIMALS]
    with torch.no_grad():
        last = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in rows])
    stop = tokenizer.hf.convert_tokens_to_ids(END)
    return last[:, stop].min().item(), bool((last.argmax(-1) == stop).all())


def question(animal):
    return Conversation((Message("user", f"The {animal}?"),))


def test_a_stop_token_that_was_never_trained_is_learned(chats, caplog):
    """With trained rows the stop token is certain; with frozen ones it shares its probability with near-duplicates.

    The trained model stops in plain transformers on the exported folder, and in this project's engine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ends = {}
    with caplog.at_level("INFO", logger="lit_llm"):
        for name, tokens in (("auto", "auto"), ("frozen", None)):
            fit(chats, name=name, steps=40, lr=8e-3, lora=LoRA(r=8, train_tokens=tokens))
            ends[name] = at_the_end(export(str(chats / name)))
    assert len(re.findall(rf"{re.escape(START)}, {re.escape(END)}, .* other tokens \(\d+\.\d% of the supervised "
                          r"tokens\) were never trained in this base: their rows are trained", caplog.text)) == 1
    assert ends["auto"] > (0.9, True)
    assert ends["frozen"][0] < 0.1
    folder = chats / "auto" / "export"
    model, hf = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stops = hf.convert_tokens_to_ids([END, "<|endoftext|>"])
    assert model.generation_config.eos_token_id == stops
    (step,) = (chats / "auto" / "checkpoints").glob("step_*")
    assert json.loads((step / "adapter" / "generation_config.json").read_text())["eos_token_id"] == stops
    ids = hf.apply_chat_template([{"role": "user", "content": "The owl?"}], add_generation_prompt=True,
                                 return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=20)[0, ids["input_ids"].shape[1]:].tolist()
    assert out[-1] == stops[0]
    assert 2 <= len(out) < 20
    for engine in (TextEngine.load(folder), TextEngine.load(resolve("sample:base"), adapter=step / "adapter")):
        answer = engine.generate(ids["input_ids"][0].tolist())
        assert (answer.token_ids, answer.finish_reason) == (tuple(out), "stop")


def test_all_weights_learn_to_stop_too(chats):
    """Full training needs no choice; its checkpoints and export name the stop ids as well."""
    fit(chats, lr=1e-4)
    for folder in ((chats / "run/checkpoints/step_1/model"), export(str(chats / "run"))):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def trained_rows(module):
    """Ids whose rows are trained."""
    assert is_peft(module.model)
    indices = getattr(module.model.active_peft_config, "trainable_token_indices", None) or {}
    return sorted({id_ for ids in indices.values() for id_ in ids})


def unseen_tokens(folder, token_counts):
    """Tokens of the rendered chats that are not in the base's documents, by plain transformers."""
    hf = Tokenizer.load("sample:base", chat_template=str(folder / "chatml.jinja")).hf
    chats = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    read = {id_ for chat in chats for id_ in hf.apply_chat_template(chat, return_dict=True)["input_ids"]}
    return sorted(id_ for id_ in read if not token_counts[id_])


def test_what_learns_is_what_was_asked_for(chats, caplog, token_counts):
    """A list of tokens, null, and `peft`'s own option; none for documents of known tokens or unsupported methods."""
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}
    assert trained_rows(fit(chats, lora=LoRA(r=4, train_tokens=[END, "a"]), name="1")) == sorted(
        Tokenizer.load("sample:base").hf.convert_tokens_to_ids([END, "a"]))
    assert trained_rows(fit(chats, peft=lora, name="2")) == unseen_tokens(chats, token_counts)
    own = lora | {"init_args": {"r": 4, "trainable_token_indices": [5]}}
    module = fit(chats, peft=own, name="3")
    assert module.model.active_peft_config.trainable_token_indices == [5]
    (chats / "text.jsonl").write_text(json.dumps({"text": "Mia has a red kite. " * 9}))
    assert trained_rows(fit(chats, lora=LoRA(r=4), name="4", source="text.jsonl")) == []
    caplog.clear()
    fit(chats, peft={"class_path": "LoHaConfig", "init_args": {"r": 4}}, name="5")
    assert "their rows are frozen, because LoHaConfig cannot train single rows" in caplog.text
    with pytest.raises(InputError, match=r"Did you mean '<\|im_end\|>'") as caught:
        fit(chats, lora=LoRA(r=4, train_tokens="<|im_emd|>"), name="6")
    assert "train_tokens" in str(caught.value)


def test_a_resumed_run_trains_the_same_rows(chats):
    """The resumed run equals the uninterrupted one; a run that would lose trained rows is refused."""
    keys = {"weight": 4, "lr": 1e-2, "lora": LoRA(r=4)}
    whole = fit(chats, steps=4, name="whole", **keys)
    fit(chats, steps=2, name="cut", **keys)
    with pytest.raises(InputError, match="trains the rows of tokens"):
        fit(chats, steps=4, name="cut", ckpt_path="last", **keys | {"lora": LoRA(r=4, train_tokens=None)})
    resumed = dict(fit(chats, steps=4, name="cut", ckpt_path="last", **keys).model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed[name], weight), name


def test_a_tokenizer_without_a_template_says_so(stories, chats, capsys):
    """Once, before training, with the tokens that ChatML is written with."""
    data = TextDataModule(sources=[Source(str(chats / "chats.jsonl"))], tokenizer=stories, seq_len=128)
    data.prepare_data()
    data.setup("fit")
    stderr = capsys.readouterr().err
    assert stderr.count("has no chat template: ChatML is used with its own <s> and </s>") == 1
    assert "LoRA also trains their embeddings" in stderr


def test_of_too_many_the_most_frequent_learn(chats, caplog, monkeypatch, token_counts):
    """Control tokens first, then by number of supervised occurrences; the message has the number of the others."""
    monkeypatch.setattr(learned_tokens, "MOST", 5)
    with caplog.at_level("INFO", logger="lit_llm"):
        rows = trained_rows(fit(chats, lora=LoRA(r=4)))
    everything = unseen_tokens(chats, token_counts)
    assert len(rows) == 5 < len(everything)
    assert {1, 2} < set(rows) < set(everything)
    answers = [turn["content"] for line in (chats / "chats.jsonl").read_text().splitlines()
               for turn in json.loads(line)["messages"] if turn["role"] == "assistant"]
    times = Counter(id_ for text in answers for id_ in Tokenizer.load("sample:base").encode_text(text))
    assert min(times[id_] for id_ in set(rows) - {1, 2}) >= max(times[id_] for id_ in set(everything) - set(rows))
    assert f"{len(everything) - 5} rarer ones stay frozen, because at most 5 rows are trained" in caplog.text


def test_of_a_stream_its_beginning_is_counted(chats, caplog, token_counts):
    """The same tokens as of the file, where it is short."""
    data = TextDataModule(sources=[Source(str(chats / "chats.jsonl"))], tokenizer="sample:base", streaming=True, stream_buffer=20_000,
                          chat_template=str(chats / "chatml.jinja"), seq_len=64, batch_size=2)
    module = CausalLMModule(base="sample:base", lora=LoRA(r=4))
    with caplog.at_level("INFO", logger="lit_llm"):
        Trainer(default_root_dir=str(chats / "stream"), max_steps=1, max_epochs=-1, accelerator="cpu", devices=1,
                enable_progress_bar=False).fit(module, datamodule=data)
    assert trained_rows(module) == unseen_tokens(chats, token_counts)
    assert "in a part of the data" in caplog.text


def test_supervised_tokens_need_head_rows_and_read_tokens_embedding_rows():
    """Apart matrices: the head matters for what is a target, the embedding for all that is read."""
    tokenizer = Tokenizer.load("sample:base")           # its own template: <|im_start|> before, <|endoftext|> after
    trained_embedding = torch.randn(len(tokenizer.hf), 64, generator=torch.Generator().manual_seed(1))
    heap = trained_embedding.clone()
    heap[:2] = heap[2]                                   # <|endoftext|> and <|im_start|> like <|im_end|>
    assert learned_tokens.choose(tokenizer, trained_embedding, trained_embedding, None).ids == []
    assert learned_tokens.choose(tokenizer, trained_embedding, heap, None).ids == [0]
    assert learned_tokens.choose(tokenizer, trained_embedding, heap, None, every_token=True).ids == [0, 1]
    assert learned_tokens.choose(tokenizer, heap, trained_embedding, None).ids == [0, 1]
