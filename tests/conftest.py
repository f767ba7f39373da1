"""Common fixtures: no network, tiny models made in the process, and real data if they are available."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")       # two test processes on two cores; threads that spin are slow

import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORPUS = [
    "Tom has a red kite. The kite flies high over the hill.",
    "What colour is the kite? It is red.",
    "小明有一只红色的风筝。风筝飞得很高。",
    "风筝是什么颜色的？红色的。",
    "Say it again: one two three four five.",
]


LONGEST = ["test_readme", "test_strategy", "test_pipeline", "test_checkpoint", "test_survival", "test_lifecycle",
           "test_notebooks", "test_gradient", "test_perplexity", "test_chat"]


def pytest_configure(config):
    """Use only the CPU, set before torch is imported; `pytest -m gpu tests/gpu` uses a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """The longest files first, so that neither of the two test processes ends long before the other."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Give each test its own token cache."""
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _open_log():
    """DeepSpeed's log keeps the stdout of the test that imports it first, which pytest closes if it captured it."""
    for handler in logging.getLogger("DeepSpeed").handlers:
        if getattr(handler, "stream", sys.__stdout__).closed:
            handler.stream = sys.__stdout__


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora, tokenizers and a small real model, in a folder beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data) -> str:
    """A real trained Llama of 260,032 parameters."""
    return str(shared_data / "models" / "stories260K-hf")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> str:
    """A byte-level BPE of 320 tokens with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from lit_llm.text.templates.template import chatml

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": chatml("<|im_start|>", "<|im_end|>"),
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return str(folder)


@pytest.fixture(scope="session")
def load(request, tiny_tokenizer, tmp_path_factory):
    """`load(kind)`: a tokenizer of `tests.conversations.KINDS`."""
    from tests.conversations import loader

    return loader(request, tiny_tokenizer, tmp_path_factory)


NARROW = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
SHAPES = {
    "llama": NARROW | dict(model_type="llama"),
    "qwen3": NARROW | dict(model_type="qwen3", head_dim=8, tie_word_embeddings=True),
    "gemma2": NARROW | dict(model_type="gemma2", head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=0.5),
    "gpt2": dict(
        model_type="gpt2",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}


@pytest.fixture(params=["own", "plain"])
def kernels(request):
    """The test runs twice: with the kernels written here, and with torch's own operations in their place."""
    from lit_llm.kernels import switch

    with switch.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> Callable[[str], str]:
    """`tiny_model("llama")`: a folder with a random two-layer model and the tiny tokenizer."""
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            import torch

            from lit_llm.models.load import init_causal_lm
            from lit_llm.text.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(tiny_tokenizer)
            torch.manual_seed(7)
            model = init_causal_lm(
                SHAPES[kind] | {"initializer_range": 0.1},
                vocab_size=tokenizer.vocab_size,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.pad_id,
            )
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            tokenizer.save(folder)
            made[kind] = str(folder)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def endless_model(tiny_model, tmp_path_factory):
    """A folder with a tiny Llama of 20,000 tokens of context that never generates a stop token greedily.

    Its chat template reads one variable, `style`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_llm.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("endless") / "endless"
    shutil.copytree(tiny_model("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[list(Tokenizer.load(str(folder)).stop_ids)] = 0.0      # some other logit is above 0
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if style is defined %}{{ style }}{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 20_000}
    (folder / "config.json").write_text(json.dumps(facts))
    return str(folder)


class Finished:
    """A finished command: its exit code and output."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="session")
def fork_server():
    """Starts commands in processes that are forked from one, which saves each of them seconds of imports."""
    from tests.training.run_processes import ForkServer

    fork_server = ForkServer()
    yield fork_server
    fork_server.close()


@pytest.fixture
def lit_llm(tmp_path, tmp_path_factory, fork_server) -> Callable[..., Finished]:
    """`lit_llm("fit", "--config", ...)`: the real command in a process of its own, in an empty folder."""

    def call(*words: object, timeout: float = 500, stdin: str = "", env: dict[str, str] | None = None,
             warns: bool = False, ranks: int = 1) -> Finished:
        surroundings = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | (env or {})
        order = {"args": list(map(str, words)), "ranks": ranks, "cwd": str(tmp_path), "stdin": stdin, "limit": timeout,
                 "environ": surroundings, "logs": str(tmp_path_factory.mktemp("logs"))}
        answer = fork_server.answer(order)
        code = next((code for code in answer["codes"] if code), 0)
        assert code != -signal.SIGKILL, f"no end after {timeout} seconds"
        out, err = ("".join(printed[name] for printed in answer["outputs"]) for name in ("out", "err"))
        warned = [line for line in err.splitlines() if line.startswith("warning from")]
        assert warns or not warned, "an unexpected warning of a library"
        return Finished(code, out, err)

    return call
