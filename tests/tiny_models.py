"""Helpers for tiny models: logits for fixed ids, and adapters with random weights."""

import torch

IDS = torch.tensor([[5, 9, 200, 31, 31, 7, 300, 12]])
NAN, MEMORY = 9, 10                                 # tokens that break a forward pass of a poisoned model
KINDS = ["llama", "qwen3", "gpt2"]


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1]:]


def disturb(model, seed=0):
    """Make adapters do something: a step of training in a random direction."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=draw)


def poison(model):
    """Let the model compute nan after the token NAN, and run out of memory with the token MEMORY."""
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN] = torch.nan

    def too_much(module, args, kwargs):
        if (kwargs["input_ids"] == MEMORY).any():
            raise torch.OutOfMemoryError("too much")

    model.register_forward_pre_hook(too_much, with_kwargs=True)
