"""If this breaks: chat and the API say something else than the model, requests disturb each other, an answer shows half a
character or part of its stop string, or never ends. Oracle: `model.generate` of plain transformers.
"""

import hashlib
import json
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lit_llm.errors import InputError
from lit_llm.inference.completion import Detokenizer, TextEngine
from lit_llm.inference.engine import Engine, budget
from lit_llm.inference.loading import model_folder
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation, Document
from lit_llm.text.tokenizer import Tokenizer

KINDS = ["llama", "qwen3", "gpt2"]
QUESTION = Conversation.from_openai([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "风筝? a kite"}])


def oracle(folder, ids, stop_ids, new, **sampling):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=new,
                         eos_token_id=sorted(stop_ids), pad_token_id=0, **({"do_sample": False} | sampling))
    return out[0, len(ids):].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate_token_for_token(kind, tiny_model):
    engine = TextEngine.load(tiny_model(kind))
    for prompt in (QUESTION, Document("The kite"), [7, 8, 9]):
        ids = engine.encode(prompt)
        got = engine.generate(ids, SamplingParams(max_tokens=50, temperature=0))
        expected = oracle(tiny_model(kind), ids, engine.engine.stop_ids, 50)
        assert list(got.token_ids) == expected
        assert got.finish_reason == ("stop" if expected[-1] in engine.engine.stop_ids else "length")
        assert (got.prompt_tokens, got.completion_tokens) == (len(ids), len(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_draw_is_generate_with_that_seed(kind, tiny_model):
    engine = TextEngine.load(tiny_model(kind))
    ids = engine.encode(QUESTION)
    got = engine.generate(ids, SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, top_k=50, seed=11))
    torch.manual_seed(11)
    expected = oracle(tiny_model(kind), ids, engine.engine.stop_ids, 40, do_sample=True, temperature=0.9, top_p=0.9, top_k=50)
    assert list(got.token_ids) == expected


def test_a_real_model_says_what_generate_says(stories):
    engine = TextEngine.load(stories)
    ids = engine.encode(Document("Once upon a time"))
    assert ids[0] == 1                              # <s>, as its documents began in training
    got = engine.generate(ids, SamplingParams(max_tokens=120, temperature=0))
    expected = oracle(stories, ids, engine.engine.stop_ids, 120)
    assert list(got.token_ids) == expected
    assert got.text == engine.tokenizer.decode(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_interleaved_requests_are_those_alone(kind, tiny_model):
    """Twelve requests of all lengths join and leave, three running at a time; none sees another."""
    folder, draw = tiny_model(kind), random.Random(0)
    requests = {f"r{n}": ([draw.randrange(3, 300) for _ in range(draw.randrange(1, 60))],
                       SamplingParams(max_tokens=draw.randrange(1, 25), temperature=draw.choice([0, 1.0]), seed=n))
             for n in range(12)}
    single = TextEngine.load(folder)
    alone = {name: list(single.generate(*request).token_ids) for name, request in requests.items()}
    engine = Engine.load(folder, stop_ids=Tokenizer.load(folder).stop_ids, max_running=3)
    got: dict[str, list[int]] = {name: [] for name in requests}
    ends, waiting, most, turns = {}, list(requests), 0, 0
    while waiting or engine.has_work:
        if waiting and turns % 2 == 0:
            engine.add(waiting[0], *requests[waiting.pop(0)])
        events = engine.step()
        most, turns = max(most, len(events)), turns + 1
        for event in events:
            assert event.request_id not in ends
            got[event.request_id].append(event.token_id)
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
    assert most == 3
    assert set(ends) == set(requests)
    assert got == alone
    for name, (prompt, params) in requests.items():
        if params.greedy:
            assert got[name] == oracle(folder, prompt, engine.stop_ids, params.max_tokens)
    assert engine.stats.generated_tokens == sum(map(len, got.values()))
    assert engine.stats.prompt_tokens == sum(len(prompt) for prompt, _ in requests.values())


def test_cancel_frees_and_disturbs_nobody(tiny_model):
    engine = Engine.load(tiny_model("llama"), max_running=1)
    params = SamplingParams(max_tokens=30, temperature=0)
    engine.add("a", [5, 6], params)
    engine.add("b", [7, 8], params)
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (1, 1)
    assert engine.cancel("a")
    assert not engine.cancel("a")
    token_ids = []
    while engine.has_work:
        token_ids += [event.token_id for event in engine.step()]
    assert token_ids == oracle(tiny_model("llama"), [7, 8], engine.stop_ids, 30)
    engine.add("c", [1], params)
    assert engine.cancel("c")                       # still waiting
    assert not engine.has_work
    assert engine.step() == []


def test_one_poisoned_request_ends_alone(tiny_model):
    """Logits that are not numbers cannot be drawn from: that request fails, and the others continue."""
    engine = Engine.load(tiny_model("llama"))
    poisoned = 9
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[poisoned] = torch.nan
    engine.add("bad", [poisoned], SamplingParams(max_tokens=5))
    engine.add("good", [5], SamplingParams(max_tokens=5, temperature=0))
    first = {event.request_id: event for event in engine.step()}
    assert first["bad"].error is not None
    assert first["good"].error is None
    assert [event.request_id for event in engine.step()] == ["good"]


@pytest.mark.parametrize(("ids", "params", "numbers"), [
    ([], SamplingParams(max_tokens=1), "empty"), ([-1], SamplingParams(max_tokens=1), "token ids"),
    ([10**6], SamplingParams(max_tokens=1), "token ids"), ([1] * 256, SamplingParams(), "256"),
    ([1] * 300, SamplingParams(max_tokens=1), "300"), ([1] * 200, SamplingParams(max_tokens=57), "257"),
])
def test_what_cannot_be_computed_is_refused_before(ids, params, numbers, tiny_model):
    engine = Engine.load(tiny_model("llama"))
    with pytest.raises(InputError, match=numbers):
        engine.add("r", ids, params)
    assert not engine.has_work


def test_a_context_can_be_filled_to_its_last_token(tiny_model):
    engine = TextEngine.load(tiny_model("gpt2"))    # learned positions: one more would be an index error
    engine.engine.stop_ids = frozenset()
    assert budget(200, SamplingParams(), 256) == 56
    got = engine.generate([5] * 200, SamplingParams(temperature=0))
    assert (got.completion_tokens, got.finish_reason) == (56, "length")


# ---- text ------------------------------------------------------------------------------------------------------------

def pieces_of(tokenizer, ids, stop=(), *, last="length"):
    """Push ids until the answer ends; the pieces' texts and the last piece."""
    detokenizer, texts = Detokenizer(tokenizer, 1, stop), []
    for place, id_ in enumerate(ids):
        piece = detokenizer.push(id_, last if place == len(ids) - 1 else None)
        texts.append(piece.text)
        if piece.finish_reason:
            return texts, piece
    raise AssertionError("no end")


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=60), stops=st.lists(st.text(min_size=1, max_size=4), max_size=4), at=st.data())
def test_pieces_are_the_text_up_to_the_first_stop(text, stops, at, tiny_tokenizer):
    """For any text and stop strings, some of them in the text. Oracle: the text read one character at a time, until a stop string is
    complete."""
    tokenizer = Tokenizer.load(tiny_tokenizer)
    start = at.draw(st.integers(0, len(text) - 1))
    stops = (*stops, text[start : start + at.draw(st.integers(1, 5))])
    texts, last = pieces_of(tokenizer, tokenizer.encode_text(text), stops)
    cut = next(min(end - len(stop) for stop in stops if text[:end].endswith(stop))
               for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops))
    assert "".join(texts) == text[:cut]
    assert last.finish_reason == "stop"
    whole, last = pieces_of(tokenizer, tokenizer.encode_text(text))
    assert ("".join(whole), last.finish_reason) == (text.removesuffix("\ufffd"), "length")


def test_never_half_a_character_nor_part_of_a_stop_string(tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    ids = tokenizer.encode_text("🙂 é 龘 done. END")
    assert len(ids) > len("🙂 é 龘 done. END")                               # characters are split over tokens
    texts, _ = pieces_of(tokenizer, ids, ("END",))
    assert "\ufffd" not in "".join(texts)
    assert "".join(texts) == "🙂 é 龘 done. "
    assert texts.count("🙂") == 1
    assert not any("E" in text for text in texts)
    texts, _ = pieces_of(tokenizer, tokenizer.encode_text("龘")[:2])          # cut by max_tokens in mid-character
    assert texts == ["", ""]


def test_what_begins_like_a_stop_string_is_shown_when_it_is_none(tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    texts, last = pieces_of(tokenizer, tokenizer.encode_text("EN EN ENX EN"), ("END",))
    assert ("".join(texts), last.finish_reason) == ("EN EN ENX EN", "length")


def test_a_text_goes_on_behind_its_prompt(stories, tiny_tokenizer):
    """Sentencepiece leaves out the space of the first word of a text, which is not the first here."""
    for folder in (stories, tiny_tokenizer):
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode_text("Once upon a time there was 龘 a girl. é")
        for cut in range(1, len(ids)):
            before = tokenizer.decode(ids[:cut])
            detokenizer = Detokenizer(tokenizer, cut, context=ids[max(0, cut - 8):cut])
            texts = [detokenizer.push(id_, None).text for id_ in ids[cut:]]
            if not before.endswith("\ufffd"):
                assert before + "".join(texts) == tokenizer.decode(ids)


def test_the_stop_token_is_never_text(tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    ids = [*tokenizer.encode_text("yes"), tokenizer.stop_ids[0]]
    texts, last = pieces_of(tokenizer, ids, last="stop")
    assert ("".join(texts), last.completion_tokens) == ("yes", len(ids))


@pytest.mark.parametrize("seed", range(30))
def test_bytes_that_are_no_text_raise_nothing(seed, tiny_tokenizer, stories):
    """Random ids: byte-level pieces join to the whole decode; byte fallback, whose decode rewrites its past, just lives."""
    draw = random.Random(seed)
    for folder, exact in ((tiny_tokenizer, True), (stories, False)):
        tokenizer = Tokenizer.load(folder)
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(60)] + tokenizer.encode_text(" end")
        texts, _ = pieces_of(tokenizer, ids)
        assert "".join(texts).endswith("end")
        assert not exact or "".join(texts) == tokenizer.decode(ids)


# ---- folders ---------------------------------------------------------------------------------------------------------

def test_an_adapter_folder_answers_as_peft_does(tiny_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    torch.manual_seed(3)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": tiny_model("llama")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(facts))
    ids = [5, 6, 7]
    params = SamplingParams(max_tokens=20, temperature=0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), tmp_path / "adapter").eval()
    for engine in (TextEngine.load(tmp_path / "adapter"), TextEngine.load(tiny_model("llama"), adapter=tmp_path / "adapter")):
        expected = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0,
                                  eos_token_id=sorted(engine.engine.stop_ids))[0, 3:].tolist()
        assert list(engine.generate(ids, params).token_ids) == expected
    assert expected != oracle(tiny_model("llama"), ids, engine.engine.stop_ids, 20)


def test_a_run_stands_for_its_export(tiny_model, tmp_path):
    shutil.copytree(tiny_model("gpt2"), tmp_path / "run" / "export")
    assert model_folder(str(tmp_path / "run")) == str(tmp_path / "run" / "export")
    assert model_folder(str(tmp_path / "run" / "export")) == str(tmp_path / "run" / "export")


@pytest.mark.parametrize(("name", "message"), [("nowhere/at/all", "no folder"), ("./nowhere", "no folder"), (".", "no model")])
def test_no_model_is_said_in_one_message(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        model_folder(name)


def test_damaged_weights_are_no_model(tiny_model, tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="cannot load"):
        Engine.load(tmp_path / "bad")


def test_dtype_auto_is_the_checkpoints_own(tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert Engine.load(tmp_path).model.dtype == torch.bfloat16
    assert Engine.load(tmp_path, dtype="float32").model.dtype == torch.float32
    with pytest.raises(InputError, match="dtype"):
        Engine.load(tmp_path, dtype="float33")


def test_dtype_auto_of_a_hub_model_is_its_own(tiny_model, tmp_path, monkeypatch):
    """In the hub's cache, where no folder has its name."""
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "1"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).save_pretrained(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert Engine.load("someone/tiny").model.dtype == torch.bfloat16


@pytest.mark.parametrize(("file", "text"), [
    ("adapter_config.json", "{bad"), ("adapter_config.json", "[]"), ("adapter_config.json", "{}"),
    ("adapter_config.json", '{"base_model_name_or_path": null}'), ("config.json", "[]"), ("config.json", "{bad"),
    ("config.json", {"dtype": ["a"]}), ("config.json", {"dtype": "unheard-of"})])
def test_a_strange_config_is_said_in_one_message(file, text, tiny_model, tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "odd")
    if file == "adapter_config.json":
        (tmp_path / "odd" / "config.json").unlink()
        (tmp_path / "odd" / "tokenizer.json").unlink()
    if isinstance(text, dict):
        text = json.dumps(json.loads((tmp_path / "odd" / file).read_text()) | text)
    (tmp_path / "odd" / file).write_text(text)
    with pytest.raises(InputError):
        TextEngine.load(tmp_path / "odd")


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device, tiny_model):
    with pytest.raises(InputError) as caught:
        Engine.load(tiny_model("llama"), device=device)
    assert caught.value.where == "device"


@pytest.mark.parametrize("beside", [True, False], ids=["adapter folder", "--adapter"])
def test_an_adapter_of_a_run_is_asked_with_the_template_of_its_run(beside, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, folder = tiny_model("llama"), tmp_path / "run" / "checkpoints" / "step_1" / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    files = {str(file.relative_to(folder.parent)): {"bytes": file.stat().st_size,
                                                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in folder.rglob("*") if file.is_file()}
    (folder.parent / "manifest.json").write_text(json.dumps({"step": 1, "base": base, "files": files}))
    own = Tokenizer.load(base)
    own.hf.chat_template = own.hf.chat_template.replace("<|im_start|>", "<|im_start|>~")
    own.save(tmp_path / "run" / "tokenizer")
    engine = TextEngine.load(base, adapter=folder) if beside else TextEngine.load(folder)
    assert engine.tokenizer.hf.chat_template == own.hf.chat_template


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "lfm2", "openai-gpt", "falcon_h1"])
def test_architectures_with_another_memory_than_keys_and_values(kind):
    """Greedy tokens are those of reading everything anew, whether a model reads transformers' cache or leaves it."""
    from tests.benchmarks.architectures import SPECIAL, randomize, tiny

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny({"model_type": kind} | SPECIAL.get(kind, {}))).eval()
    randomize(model, 1)
    model.generation_config.eos_token_id = None
    engine, ids = Engine(model), [5, 9, 31, 7]
    engine.add("one", ids, SamplingParams(max_tokens=8, temperature=0))
    got = [event.token_id for _ in range(8) for event in engine.step()]
    for _ in range(8):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    assert got == ids[4:]


@pytest.mark.parametrize("keys", [{"model_type": "bert", "is_decoder": False}, {"model_type": "cpmant"}])
def test_a_model_that_looks_ahead_is_refused(keys):
    """Its answers would be others in each way of computing them."""
    from tests.benchmarks.architectures import tiny

    with pytest.raises(InputError, match="cannot generate text"):
        Engine(AutoModelForCausalLM.from_config(tiny(keys)).eval())
