"""Build the model of a module: load or initialise it, add adapters, and prepare it for its strategy.

It is called when Lightning configures the model. `compatible.py` refuses combinations that cannot work.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from lit_llm import names
from lit_llm.data.datamodule import TextDataModule
from lit_llm.errors import InputError
from lit_llm.kernels import rmsnorm
from lit_llm.models import anatomy, recompute, vocabulary
from lit_llm.models import load as model
from lit_llm.models.adapters import adapter, peft_method, starting, trained_rows, virtual_tokens
from lit_llm.models.quantize import stored_quantization
from lit_llm.system.private import lightning as private
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.training import balance, forward, learned_tokens
from lit_llm.training.checks import compatible, init_keys
from lit_llm.training.checks.interface import Module
from lit_llm.training.parallel import distribution, shards
from lit_llm.training.planning import footprint
from lit_llm.training.rules import table

log = logging.getLogger(__name__)
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}


def ask(module: Module, stage: str) -> None:
    """Determine and report the properties of a model before it is built, without weights."""
    module.choose_attention(module._tokenizer_facts() if module.init else {})
    if module.trainer.is_global_zero:
        forward.announce(module.way or forward.Way())
        if module.init is not None and stage == "fit":
            init_keys.warn(module.init, **module._tokenizer_facts())
    if module.gradient_checkpointing == "auto" and stage == "fit":
        module.recompute = footprint.agreed(module.trainer, module, text_data(module.trainer))


def build(module: Module) -> None:
    """Load or build the model of a module, add adapters, and prepare it for the trainer's strategy."""
    dtype = DTYPES.get(str(module.trainer.precision), torch.float32)
    kind = module.choose_attention(module._tokenizer_facts() if module.init else {})
    strategy = distribution.of(module.trainer.strategy)
    _check(module)
    if path := pretrained(module):
        if module.trainer.state.fn == "fit" and (stored := stored_quantization(path)):
            raise InputError(f"the weights in {path} are stored in {stored}, from which no model is trained",
                             where="model.base", fix="give the exact base; --model.quantize nf4 loads it in 4 bits")
        inner = model.load_causal_lm(path, dtype=dtype, attention=kind, quantize=module.quantize,
                                     half=str(module.trainer.precision).startswith("bf16"),
                                     device=module.trainer.strategy.root_device)
        if not any(map(shards.is_partitioned, inner.parameters())):
            check.check_weights(names.resolve(path), inner, quantize=module.quantize)
    else:
        assert module.init is not None
        inner = model.init_causal_lm(module.init, dtype=dtype, attention=kind, **module._tokenizer_facts())
    if dtype.itemsize < 4:                          # Lightning would also cast buffers, which breaks positions
        module.trainer.precision_plugin.convert_module = lambda module: module
    if module.base is not None and (tokenizer := tokenizer_of(module.trainer)) is not None:
        compatible.check_tokenizer(module.base, module.trainer.datamodule)
        module.vocabulary = tokenizer.vocab_size
    if module.base is not None and module.vocabulary:
        _grow(module, inner, module.vocabulary)
    compatible.check_data(inner, text_data(module.trainer))
    inner.config.use_cache = False
    module.model = module._adapted(inner)
    compatible.check_head(module)
    if not adapter.has_virtual_tokens(module.model):
        off = module.router_aux_loss is None and (module.init or {}).get("output_router_logits") is False
        module.balance_coefficient = balance.coefficient(module.model, 0.0 if off else module.router_aux_loss)
        _check(module)                              # now that the load-balancing coefficient is known
    module.half_adapters = _autocasts(module)
    if module.half_adapters:
        adapter.skip_input_copies(module.model)
    recompute.apply(inner, module.recompute)
    module.model.train()
    if module.compile_layers:
        for layer in anatomy.decoder_layers(module.model):
            layer.compile()                         # in place, which keeps the names of weights
    elif module.way is None or module.way.fast_norms:
        rmsnorm.use_fast_norms(module.model)           # compiled layers fuse them anyway
    if strategy.gathers_layers and module.trainer.state.fn == "fit":
        module.keep_masters()                       # before FSDP2 wraps the weights
    half = DTYPES.get(str(module.trainer.precision).replace("mixed", "true"))
    strategy.shard(module.model, anatomy.decoder_layers(module.model), dtype=half)
    if module.trainer.is_global_zero and module.trainer.training:
        log.info(str(anatomy.count_parameters(module.model, shards.elements_of)))


def _check(module: Module) -> None:
    """Refuse incompatible options, for a module with a trainer."""
    trainer = module.trainer
    compatible.check(module, trainer.strategy, trainer.world_size, precision=str(trainer.precision),
                     training=trainer.state.fn == "fit")


def _grow(module: Module, inner: Any, tokens: int) -> None:
    """Resize the vocabulary if the tokenizer has more tokens than the base."""
    before = vocabulary.rows(inner)
    new = vocabulary.grow(inner, tokens)
    if new and module.trainer.is_global_zero and module.trainer.training:
        log.info("the tokenizer has %s tokens and the base model %s rows: %s rows are added to embedding and head, "
                 "each the mean of the existing ones", f"{tokens:,}", f"{before:,}", f"{new:,}")


def pretrained(module: Module) -> str | None:
    """Source of complete weights: a checkpoint of a run that trained all of them, or the base."""
    if module.checkpoint is not None and (module.checkpoint / "model").is_dir():
        return str(module.checkpoint / "model")
    return module.base


def check_start(module: Module, folder: str) -> None:
    """Find the initial adapter and check that it fits the base; a continued adapter determines the PEFT method.

    Raises:
        InputError: There is none, or it was trained on another base.
    """
    folder_of_adapter = starting.find(folder)
    starting.check_base(folder_of_adapter, str(module.base))
    module.start = str(folder_of_adapter)
    if not module.merge_start:
        module.peft_spec, module.train_tokens = peft_method.spec_in(folder_of_adapter), "auto"


def adapted(module: Module, inner: Any) -> Any:
    """Add an adapter to the model: a checkpoint's, one to be continued, or a new one."""
    if module.checkpoint is not None and (module.checkpoint / "adapter").is_dir():
        folder = module.checkpoint / "adapter"
        return starting.load(inner, folder, trainable=not virtual_tokens.count_in(folder))  # PEFT would not load those
    if module.start is not None and not module.merge_start:
        module.trained_ids = trained_rows.stored_tokens(Path(module.start))
        return starting.load(inner, Path(module.start), trainable=True)
    if module.start is not None and (module.checkpoint is None or module.peft_spec is not None):
        inner = starting.merged(inner, Path(module.start))
    if module.peft_spec is None:
        return inner
    module.trained_ids = module._choose_tokens(inner)
    return adapter.wrap_peft(inner, module.peft_spec, tokens=module.trained_ids, elements=shards.elements_of)


def tokens_to_train(module: Module, inner: Any) -> list[int]:
    """Ids of `lora.train_tokens`: the given ones, or tokens of the data that the base was never trained on."""
    data = text_data(module.trainer)
    assert module.peft_spec is not None
    if module.saved_ids is not None:                # from the checkpoint that the module is loaded from
        return module.saved_ids
    if module.train_tokens is None or data is None:
        return []
    obstacle = trained_rows.row_obstacle(inner, module.peft_spec)
    if distribution.of(module.trainer.strategy).partitions_on_load:
        obstacle = table.NO_ROWS
    if module.train_tokens != "auto":
        if obstacle is not None:
            raise InputError(f"single token rows cannot be trained: {obstacle}", where="model.lora.train_tokens",
                             fix="set it to null")
        return learned_tokens.named(data.tokenizer, module.train_tokens)
    if trained_rows.chooses_rows(inner, module.peft_spec):
        return []
    before = getattr(getattr(module.trainer, "run", None), "resumed_from", None)
    if before is not None and (before / "adapter").is_dir():        # keep the previous choice
        return trained_rows.stored_tokens(before / "adapter")
    embedding, head = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    matrix = shards.whole(embedding)
    choice = learned_tokens.choose(
        data.tokenizer, matrix, matrix if head is embedding else shards.whole(head), data.occurrences(),
        every_token=data.train_on == "all", new=getattr(inner, "new_rows", 0),
        chats=any(not plan.corpus.is_document.all() for stage, plan in getattr(data, "plans", {}).items()
                  if stage != "guard"))
    if choice.ids and module.trainer.is_global_zero and module.trainer.training:
        learned_tokens.report(data.tokenizer, choice, obstacle)
    return choice.ids if obstacle is None else []


def _autocasts(module: Module) -> bool:
    """Whether adapters are float32 in a bfloat16 forward pass; DeepSpeed and FSDP2 cast them instead."""
    return (str(module.trainer.precision).startswith("bf16") and module.peft_spec is not None
            and not distribution.of(module.trainer.strategy).casts_weights)


# ---- settings from the data ------------------------------------------------------------------------------------------

def text_data(trainer: L.Trainer | None) -> TextDataModule | None:
    """The trainer's data module, if it is this project's."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, TextDataModule) else None


def tokenizer_of(trainer: L.Trainer | None) -> Tokenizer | None:
    """The tokenizer of the trainer's data module, if it is this project's."""
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None


def tokenizer_facts(module: Module) -> dict[str, Any]:
    """Config values of a new model from the tokenizer; empty if the data module has none.

    Raises:
        InputError: There is no tokenizer and the vocabulary size is not set.
    """
    tokenizer = tokenizer_of(private.trainer_of(module))
    if tokenizer is not None:
        return model.tokenizer_facts(tokenizer)
    if module.init is not None and "vocab_size" not in module.init:
        raise InputError("the vocabulary size is unknown, because the data have no tokenizer",
                         where="model.init.vocab_size", fix="add it, and eos_token_id; or use lit_llm.TextDataModule")
    return {}


# ---- without a trainer -----------------------------------------------------------------------------------------------

@contextmanager
def with_trainer(module: Module) -> Generator[None, None, None]:
    """Build a module without a trainer as for evaluation in float32 on the CPU."""
    if private.trainer_of(module) is not None:
        yield
        return
    speaker = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = speaker.level
    speaker.setLevel(logging.WARNING)               # silences the list of devices
    try:
        module.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                                   enable_progress_bar=False, enable_model_summary=False,
                                   plugins=[LightningEnvironment()])
        yield
    finally:
        module.trainer = None
        speaker.setLevel(level)
        module.built_without_trainer = True
