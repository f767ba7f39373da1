"""Helpers for tiny models: logits for fixed ids, and adapters with random weights."""

import torch

IDS = torch.tensor([[5, 9, 200, 31, 31, 7, 300, 12]])
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
