"""If this breaks: a tuned model knows when to stop and does not, or rows are trained that nobody asked for."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_llm import CausalLMModule, InputError, LoRA, Source, TextDataModule, Tokenizer, Trainer
from lit_llm.adapter import is_peft
from lit_llm.conversation import Conversation, Message
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.export import export
from lit_llm.model import load_causal_lm
from lit_llm.samples import resolve
from lit_llm.template import chatml
from lit_llm.training import control_tokens
from lit_llm.training.control_tokens import untrained

START, END = "<|im_start|>", "<|im_end|>"           # in the sample tokenizer, and never in its base's corpus
ANIMALS = ["cat", "dog", "fox", "hen", "owl", "cow", "pig", "bee", "ant", "bat", "elk", "ram"]


@pytest.fixture(scope="module")
def embedding():
    return load_causal_lm("sample:base").get_input_embeddings().weight.detach()


def test_rows_that_no_corpus_moved_are_found(embedding):
    """In the sample's real base: control tokens and bytes that UTF-8 has not, but nothing that its corpus often says."""
    tokenizer = Tokenizer.load("sample:base")
    lines = Path(resolve("sample:documents.jsonl")).read_text(encoding="utf-8").splitlines()[:300]
    said = Counter(id_ for line in lines for id_ in tokenizer.encode_text(json.loads(line)["text"]))
    never = tokenizer.hf.convert_tokens_to_ids([START, END, "À", "õ", "þ", "ÿ"])        # bytes C0, F5, FE, FF
    often = [tokenizer.eos_id, *(id_ for id_, count in said.items() if count > 20)]
    assert len(often) > 50
    assert untrained(embedding, [*often, *never]) == never
    assert untrained(embedding.bfloat16(), [*often, *never]) == never
    assert untrained(embedding, []) == []


def test_a_second_real_model(stories):
    weight = load_causal_lm(stories).get_output_embeddings().weight
    assert untrained(weight, [0, 1, 2]) == [0, 2]                                        # <unk> </s>, but not <s>


def test_rows_added_to_a_trained_model_are_found(embedding):
    """Where transformers puts them (the mean of all rows), and as zeros; rows of random models have no twins."""
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
    """Train the sample's base in this process, on records that are drawn often enough for one epoch."""
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
    rows = [tokenizer.encode_prompt(asked(animal)) + tokenizer.encode_text(f"{animal}.") for animal in ANIMALS]
    with torch.no_grad():
        last = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in rows])
    stop = tokenizer.hf.convert_tokens_to_ids(END)
    return last[:, stop].min().item(), bool((last.argmax(-1) == stop).all())


def asked(animal):
    return Conversation((Message("user", f"The {animal}?"),))


def test_a_stop_token_that_was_never_trained_is_learned(chats, caplog):
    """Trained rows make it sure; frozen ones leave it among its twins, however right the greedy choice looks.

    And what learned to stop does stop: in plain transformers on the exported folder, and in our engine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ends = {}
    with caplog.at_level("INFO", logger="lit_llm"):
        for name, tokens in (("auto", "auto"), ("frozen", None)):
            fit(chats, name=name, steps=40, lr=8e-3, lora=LoRA(r=8, train_tokens=tokens))
            ends[name] = at_the_end(export(str(chats / name)))
    assert caplog.text.count(f"{START} and {END} were never trained in this base: their rows are trained") == 1
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


def rows_of(module):
    """Ids whose rows learn."""
    assert is_peft(module.model)
    indices = getattr(module.model.active_peft_config, "trainable_token_indices", None) or {}
    return sorted({id_ for ids in indices.values() for id_ in ids})


def test_what_learns_is_what_was_asked_for(chats, caplog):
    """Spelled tokens, none, the long form's own; nothing for documents, nor where the method cannot; and resume."""
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}
    assert rows_of(fit(chats, lora=LoRA(r=4, train_tokens=[END, "a"]), name="1")) == sorted(
        Tokenizer.load("sample:base").hf.convert_tokens_to_ids([END, "a"]))
    assert rows_of(fit(chats, peft=lora, name="2")) == [1, 2]
    own = lora | {"init_args": {"r": 4, "trainable_token_indices": [5]}}
    module = fit(chats, peft=own, name="3")
    assert module.model.active_peft_config.trainable_token_indices == [5]
    (chats / "text.jsonl").write_text(json.dumps({"text": "Tom has a red kite. " * 9}))
    assert rows_of(fit(chats, lora=LoRA(r=4), name="4", source="text.jsonl")) == []
    caplog.clear()
    fit(chats, peft={"class_path": "LoHaConfig", "init_args": {"r": 4}}, name="5")
    assert "their rows are frozen, since LoHaConfig trains no single rows" in caplog.text
    with pytest.raises(InputError, match=r"Did you mean '<\|im_end\|>'") as caught:
        fit(chats, lora=LoRA(r=4, train_tokens="<|im_emd|>"), name="6")
    assert "train_tokens" in str(caught.value)


def test_a_resumed_run_trains_the_same_rows(chats):
    """And goes on as if it had not stopped; one that would lose rows is refused."""
    keys = {"weight": 4, "lr": 1e-2, "lora": LoRA(r=4)}
    whole = fit(chats, steps=4, name="whole", **keys)
    fit(chats, steps=2, name="cut", **keys)
    with pytest.raises(InputError, match="trains the rows of tokens"):
        fit(chats, steps=4, name="cut", ckpt_path="last", **keys | {"lora": LoRA(r=4, train_tokens=None)})
    ours = dict(fit(chats, steps=4, name="cut", ckpt_path="last", **keys).model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(ours[name], weight), name


def test_a_tokenizer_without_a_template_says_so(stories, chats, capsys):
    """Once, before training, with the tokens that ChatML is written with."""
    data = TextDataModule(sources=[Source(str(chats / "chats.jsonl"))], tokenizer=stories, seq_len=128)
    data.prepare_data()
    data.setup("fit")
    said = capsys.readouterr().err
    assert said.count("has no chat template: ChatML is used, written with its own <s> and </s>") == 1
    assert "LoRA trains their rows too" in said


def test_what_is_said_must_be_learnable_and_what_is_read_known():
    """Apart matrices: the head matters for what is a target, the embedding for all that is read."""
    tokenizer = Tokenizer.load("sample:base")           # its own template: <|im_start|> before, <|endoftext|> behind
    known = torch.randn(len(tokenizer.hf), 64, generator=torch.Generator().manual_seed(1))
    heap = known.clone()
    heap[:2] = heap[2]                                   # <|endoftext|> and <|im_start|> like <|im_end|>
    assert control_tokens.to_train(tokenizer, known, known) == []
    assert control_tokens.to_train(tokenizer, known, heap) == [0]
    assert control_tokens.to_train(tokenizer, known, heap, every_token=True) == [0, 1]
    assert control_tokens.to_train(tokenizer, heap, known) == [0, 1]
