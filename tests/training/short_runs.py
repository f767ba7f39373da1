"""Short runs on a file of chats, and the NLL of their export by plain transformers."""

import torch

from lit_llm import CausalLMModule, Source, TextDataModule, Trainer


def fit(folder, name="run", *, tokenizer, passes, steps=2, ckpt_path=None, **options):
    """A short run on `folder/chats.jsonl` in `folder/name`; its module, trainer and data."""
    source = str(folder / "chats.jsonl")
    data = TextDataModule(sources=[Source(source, weight=passes)], val_sources=[Source(source)], tokenizer=tokenizer,
                          seq_len=64, batch_size=2)
    module = CausalLMModule(**{"base": "sample:base", "lr": 1e-2, "schedule": "constant", "warmup": 0} | options)
    torch.manual_seed(0)
    trainer = Trainer(default_root_dir=str(folder / name), max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1,
                      enable_progress_bar=False)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer, data


def plain_nll(folder, data):
    """Of the chats' supervised tokens, by plain transformers in float64 on an exported folder; and its model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    corpus, total, count = data.plans["val"].corpus, 0.0, 0
    for sequence in range(len(corpus)):
        ids, supervised = corpus.read(sequence, 0, int(corpus.lengths[sequence]))
        row, where = torch.tensor(ids.astype(int)), torch.tensor(supervised[1:])
        with torch.no_grad():
            logp = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        total -= logp.gather(1, row[1:, None])[where].sum().item()
        count += int(where.sum())
    return total / count, model
