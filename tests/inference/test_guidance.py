"""If this breaks: an answer that must be JSON by a schema, or a call of a function, does not parse or is refused by the schema.

Oracles: the `json` and `jsonschema` packages, and Python's own decoding of token bytes. A random model is drawn from: every choice
among the allowed tokens must lead to a valid answer.
"""

import json
import pickle
import random

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.errors import InputError
from lit_llm.inference.constraint import Grammar
from lit_llm.inference.engine import Engine
from lit_llm.inference.guidance import Guidance, Vocabulary
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.replies import learning
from lit_llm.text.replies.grammar import TEXT, Function, GrammarWriter
from lit_llm.text.replies.source import ID
from lit_llm.text.replies.syntax import parameters_of
from lit_llm.text.tokenizer import Tokenizer
from tests.conversations import quick
from tests.template_cases import fitted
from tests.template_styles import STYLES

names = st.sampled_from(["a", "bc", "naïve", "名", "x y", "q\"q"])
leaves = (st.just({"type": "boolean"}) | st.just({"type": "null"}) | st.just({"type": "integer", "minimum": -5, "maximum": 120})
          | st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6))
          | st.builds(lambda values: {"enum": values}, st.lists(st.none() | st.integers(-9, 9) | st.text("aé\n\"\\", max_size=3), min_size=1, max_size=3))
          | st.just({"type": "string", "pattern": "^[A-C]{2}(-\\d{1,3})?$"}))


def objects(inner):
    def build(properties, required):
        return {"type": "object", "properties": properties, "required": [name for name in properties if name in required],
                "additionalProperties": False}
    return st.builds(build, st.dictionaries(names, inner, max_size=3), st.sets(names))


schemas = st.recursive(leaves, lambda inner: objects(inner) | st.builds(lambda one: {"type": "array", "items": one, "maxItems": 3}, inner)
                       | st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2)), max_leaves=5)


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return Tokenizer.load(tiny_tokenizer)


def drawn(tokenizer, guidance, text, seed, most=3000):
    """The text of an answer, each token drawn uniformly from the allowed ones."""
    size = tokenizer.vocab_size + 7                     # models have more rows than their tokenizer has tokens
    guide, ids, draw = guidance(Grammar("lark", text), size), [], random.Random(seed)
    while len(ids) < most:
        mask = guide.allowed()
        assert mask.shape == (size,)
        assert not mask[tokenizer.vocab_size:].any()
        id_ = draw.choice(mask.nonzero().flatten().tolist())
        if id_ in tokenizer.stop_ids:
            break
        guide.accept(id_)
        ids.append(id_)
    assert len(ids) < most
    return ids


def faults(text, schema):
    """What jsonschema finds wrong with a JSON text."""
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(json.loads(text))]


@quick
@given(schemas, st.integers(0, 99))
def test_every_answer_is_valid(tiny, schema, seed):
    guidance = Guidance(Vocabulary.of(tiny))
    ids = drawn(tiny, guidance, GrammarWriter({}).json(schema, strict=True), seed)
    assert faults(tiny.decode(ids), schema) == []


@pytest.mark.parametrize("kind", ["stories260K-hf", "qwen2"])
def test_real_tokenizers(kind, shared_data):
    """Sentencepiece with bytes, and byte-level."""
    tokenizer = Tokenizer.load(str(shared_data / ("models" if "stories" in kind else "tokenizers") / kind))
    guidance = pickle.loads(pickle.dumps(Guidance(Vocabulary.of(tokenizer))))
    schema = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 9}, "kind": {"enum": ["东", "é", " b"]}},
              "required": ["text", "kind"], "additionalProperties": False}
    for seed in range(8):
        ids = drawn(tokenizer, guidance, GrammarWriter({}).json(schema, strict=True), seed)
        assert not set(ids) & tokenizer.special_ids
        assert faults(tokenizer.decode(ids), schema) == []


def test_bytes_of_tokens_join_to_the_text(tiny):
    vocabulary = Vocabulary.of(tiny)
    for text in ("Tom has 3 kites. 风筝 🙂\n\t\"x\"", "a  b"):
        assert b"".join(vocabulary.tokens[id_] for id_ in tiny.encode_text(text)) == text.encode()


def test_other_tokenizers_are_refused_with_the_reason(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    hf.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="neither byte-level nor sentencepiece"):
        Vocabulary.of(Tokenizer(hf))


@pytest.mark.parametrize("style", ["hermes", "xml", "functionary", "mistral v3", "mistral v7", "llama 3.1", "glm 4", "granite"])
def test_calls_by_a_grammar_are_read_and_valid(style, tiny_tokenizer):
    """Whatever the grammar allows, the parser reads: both are made of the same syntax."""
    from transformers import AutoTokenizer

    tokenizer = fitted(AutoTokenizer.from_pretrained(tiny_tokenizer), STYLES[style])
    syntax = learning.call_syntax(tokenizer.template, None)
    added = {token.content: id_ for id_, token in tokenizer.hf.backend_tokenizer.get_added_tokens_decoder().items()}
    tools = [{"function": {"name": name, "parameters": {
        "type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 50},
                                         "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
        "required": ["kind", "flags"], "additionalProperties": False}}} for name in ("one", "two")]
    functions = [Function(name, schema) for name, schema in parameters_of(tools).items()]
    guidance, writer = Guidance(Vocabulary.of(tokenizer)), GrammarWriter(added)
    for seed in range(6):
        for chosen, more in ((functions, True), (functions[1:], False)):
            ids = drawn(tokenizer, guidance, writer.calls(syntax, chosen, several=more), seed)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            content, calls = learning.read(syntax, text, tools, 1)
            assert (content, bool(calls)) == ("", True)
            assert more or len(calls) == 1
            for name, arguments in calls:
                assert name in [function.name for function in chosen]
                jsonschema.validate(arguments, parameters_of(tools)[name])
    # What the template renders is an answer by the grammar.
    calls = list(zip(learning.NAMES, [{"text": "é \"x\"", "count": 3}, {"text": "b", "flag": True}], strict=False))[:1 + syntax.several]
    text = learning.Probe(tokenizer.template, None).text(calls).lstrip().replace(ID, "abcdefgh1")
    functions = [Function(name, schema) for name, schema in parameters_of(learning.TOOLS).items()]
    for otherwise in (None, TEXT):
        guide = guidance(Grammar("lark", writer.calls(syntax, functions, several=True, otherwise=otherwise)), tokenizer.vocab_size)
        for id_ in tokenizer.hf.encode(text, add_special_tokens=False):
            guide.accept(id_)
        assert guide.allowed()[list(tokenizer.stop_ids)].all()


def test_the_engine_draws_valid_answers_beside_others(tiny_model, tiny):
    """Constrained and free requests share the passes of a real model; the free ones are as without the others."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}, "b": {"enum": [1, None]}}, "required": ["a", "b"],
              "additionalProperties": False}
    engine = Engine.load(tiny_model("llama"), stop_ids=tiny.stop_ids, constraints=Guidance(Vocabulary.of(tiny)))
    grammar = Grammar("lark", GrammarWriter({}).json(schema, strict=True))
    free, prompt = SamplingParams(max_tokens=20, temperature=0), tiny.encode_text("Tom has")

    def answers(requests):
        for name, params in requests.items():
            engine.add(name, prompt, params)
        token_ids = {name: [] for name in requests}
        while engine.has_work:
            for event in engine.step():
                assert event.error is None
                token_ids[event.request_id].append(event.token_id)
        return token_ids

    alone = answers({"free": free})["free"]
    requests = {f"bound {seed}": SamplingParams(max_tokens=100, temperature=1.5, seed=seed, grammar=grammar) for seed in range(4)}
    token_ids = answers({"free": free, **requests})
    assert token_ids["free"] == alone
    for name in requests:
        assert token_ids[name][-1] in tiny.stop_ids
        jsonschema.validate(json.loads(tiny.decode(token_ids[name])), schema)


def test_a_grammar_that_is_wrong_is_an_input_error(tiny):
    guidance = Guidance(Vocabulary.of(tiny))
    for text in ("start: (", "start: other", 'start: %json {"$ref": "#"}', "start: /(a/"):
        with pytest.raises(InputError):
            guidance.check(Grammar("lark", text))
    with pytest.raises(InputError, match="no kind of grammar"):
        guidance(Grammar("other", ""), 9)
    guide = guidance(Grammar("lark", 'start: "a"'), tiny.vocab_size)
    with pytest.raises(RuntimeError):
        guide.accept(tiny.encode_text("b")[0])
    assert torch.is_tensor(guidance(Grammar("lark", 'start: "a"'), 9).allowed())
