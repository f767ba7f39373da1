"""If this breaks: word-level perplexities on WikiText cannot be compared with those that others publish."""

import json
import math
import re

import pytest
import torch

from lit_llm import InputError
from lit_llm.evaluation.command import evaluate
from lit_llm.evaluation.rolling import articles, windows

WIKI = (" = Red Kite = \n \n Tom 's kite cost 2 @,@ 000 ( or so ) pounds . \n \n = = Flight = = \n \n It flies high @-@ up . \n"
        " = Hill = \n \n A hill , and a \" big \" one . It is 12 @.@ 5 ° N of the kite . " + "The kite flies high over the hill . " * 9)


@pytest.fixture
def wiki(tmp_path):
    (tmp_path / "wiki.test.raw.txt").write_text(WIKI)
    return tmp_path / "wiki.test.raw.txt"


def rolled(model, ids, begins, context):
    """The NLL of all tokens in lm-evaluation-harness's windows: full ones that end where their predictions do."""
    total, done = 0.0, 0
    while done < len(ids):
        stop = min(done + context, len(ids))
        before = ([begins, *ids])[max(0, stop - context):stop]
        with torch.no_grad():
            logp = model(torch.tensor([before])).logits[0].log_softmax(-1)
        for place in range(done, stop):
            total -= float(logp[place - stop][ids[place]])
        done = stop
    return total


@pytest.mark.parametrize("context", [256, 16])
def test_word_perplexity_is_that_of_rolling_windows(tiny_model, wiki, tmp_path, context):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    evaluate([tiny_model("gpt2")], [str(wiki)], rolling="wikitext", seq_len=context, dtype="float64", out=str(tmp_path / "r.json"))
    figures = json.loads((tmp_path / "r.json").read_text())["models"][0]
    model, hf = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2")).double(), AutoTokenizer.from_pretrained(tiny_model("gpt2"))
    pages = [" = Red Kite = \n \n Tom 's kite cost 2 @,@ 000 ( or so ) pounds . \n \n = = Flight = = \n \n It flies high @-@ up . ",
             WIKI[WIKI.index(" = Hill"):]]
    plain = ["= Red Kite =\n\nTom's kite cost 2,000 (or so) pounds.\n\n== Flight ==\n\nIt flies high-up. ",
             "= Hill =\n\nA hill, and a \"big\" one. It is 12.5°N of the kite. " + "The kite flies high over the hill. " * 9]
    nll = sum(rolled(model, hf.encode(f" {text}"), hf.eos_token_id, context) for text in plain)
    words, size = sum(len(re.split(r"\s+", page)) for page in pages), sum(len(page.encode()) for page in pages)
    assert figures["documents"] == 2
    assert figures["word_perplexity"]["value"] == pytest.approx(math.exp(nll / words), rel=1e-9)
    assert figures["word_perplexity"]["words"] == words
    assert figures["byte_perplexity"]["value"] == pytest.approx(math.exp(nll / size), rel=1e-9)
    assert figures["bits_per_byte"]["value"] == pytest.approx(nll / size / math.log(2), rel=1e-9)


def test_every_token_is_predicted_once():
    for count in range(2, 40):
        for context in range(1, 12):
            parts = windows(count, context)
            scored = [place for _, stop, first in parts for place in range(first, stop)]
            assert scored == list(range(1, count))
            assert all(stop - start <= context + 1 and start < first for start, stop, first in parts)


def test_wikitext_is_split_at_titles_of_articles():
    assert len(list(articles(WIKI))) == 2
    assert "\n".join(articles(WIKI)) == WIKI
    with pytest.raises(InputError, match="title of an article"):
        list(articles("The kite flies."))
