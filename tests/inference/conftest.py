"""A model that does not stop by itself, to be stopped."""

import json
import shutil

import pytest


@pytest.fixture(scope="session")
def endless_model(tiny_model, tmp_path_factory):
    """A folder with a tiny Llama of 20,000 tokens of context that never draws a stop token greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    from lit_llm.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("endless") / "endless"
    shutil.copytree(tiny_model("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[list(Tokenizer.load(str(folder)).stop_ids)] = 0.0      # some other logit is above 0
    model.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 20_000}
    (folder / "config.json").write_text(json.dumps(facts))
    return str(folder)
