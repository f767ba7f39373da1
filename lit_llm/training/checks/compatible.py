"""Refuse settings of a run that cannot work: incompatible pairs, and values that do not fit the model or the data.

The pairs are in the table of `rules/table.py`. The other checks here need the model or the data.
"""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import Strategy

from lit_llm import rules
from lit_llm.errors import InputError
from lit_llm.models import anatomy
from lit_llm.system import ranges
from lit_llm.text.tokenizer import Tokenizer, unlike
from lit_llm.training.checks.interface import Module
from lit_llm.training.loss import as_matrices
from lit_llm.training.parallel import distribution
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.rules import table

if TYPE_CHECKING:
    from lightning import Trainer

    from lit_llm.data.interface import Data

NUMBERS = ("lr", "warmup", "cooldown", "min_lr_share", "weight_decay", "betas", "eps", "router_aux_loss",
           "neftune_alpha")


def check_options(module: Module) -> None:
    """Refuse invalid values of a module; it is not built yet and has no trainer.

    Raises:
        InputError: The error names the key and what to set instead.
    """
    if module.base is None and module.init is None:
        raise table.ONE_MODEL.error()
    ranges.check_all("model", {name: getattr(module, name) for name in NUMBERS})
    if (taken := module.lr * module.weight_decay) > 1:
        raise InputError(f"a step would take lr * weight_decay = {taken:g} of each weight, more than the weight",
                         where="model.weight_decay", fix="for example --model.weight_decay 0.1")
    table.check(table.Setup(module))


def check(module: Module, strategy: Strategy, processes: int, *, precision: str, training: bool) -> None:
    """Refuse incompatible settings, before anything is loaded and again once properties of the model are known.

    Args:
        module: With its options.
        strategy: Of the trainer.
        processes: Of the run.
        precision: `trainer.precision`.
        training: Whether it trains, rather than validates or tests.

    Raises:
        InputError: The error names the key and what to set instead.
    """
    deterministic = (torch.are_deterministic_algorithms_enabled()
                     and not torch.is_deterministic_algorithms_warn_only_enabled())
    table.check(table.Setup(module, distribution.of(strategy), processes, precision, training,
                            strategy.root_device.type, deterministic))


def check_data(inner: Any, data: Any) -> None:
    """Refuse token ids and sequences that do not fit the model; the first step would fail with an index error.

    Args:
        inner: The transformers model.
        data: The run's data module; null if it is not this project's.

    Raises:
        InputError: The error names the key and what to set instead.
    """
    if data is None:
        return
    rows, tokens = inner.get_input_embeddings().num_embeddings, data.tokenizer.vocab_size
    if tokens > rows:                               # for random weights; a base was resized
        raise InputError(f"the tokenizer has {tokens} tokens, the model's embedding {rows} rows",
                         where="model.init.vocab_size", fix=f"leave it out, or set it to {tokens} or more")
    room = getattr(inner.config, "max_position_embeddings", None)
    if room is not None and data.seq_len > room:
        raise InputError(f"sequences of {data.seq_len} tokens are longer than the model's {room} positions",
                         where="data.seq_len", fix=f"set --data.seq_len {room} or less")


def check_tokenizer(base: str, data: "Data") -> None:
    """Refuse a tokenizer whose ids differ from the base's; additional tokens are allowed.

    Args:
        base: The base model.
        data: The run's data module; null if it is not this project's.

    Raises:
        InputError: The error names a token.
    """
    tokenizer = getattr(data, "tokenizer", None)
    if isinstance(tokenizer, Tokenizer) and (difference := unlike(tokenizer, base)):
        raise InputError(f"this is another tokenizer than the base's: {difference}", where="data.tokenizer",
                         fix="use the base's own (data.tokenizer: null), or one that only adds tokens to it")


def check_trainer(trainer: "Trainer") -> None:
    """Refuse options of Lightning that checkpoints or the loader would not follow.

    Raises:
        InputError: The error names the key.
    """
    distribution.of(trainer.strategy).check_arguments()
    rules.check(table.OF_TRAINER, table.TRAINER_FEATURES, trainer)


def check_built(module: Module) -> None:
    """Refuse a model that was built without a trainer where a strategy shards its weights when it is built.

    Raises:
        InputError: It says what to do instead.
    """
    if module.model is None or not module.built_without_trainer:
        return
    if distribution.of(module.trainer.strategy).gathers_layers:
        raise InputError("the model was built before it was given to the trainer, so its weights are not sharded",
                         where="trainer.strategy", fix="give the trainer a new module: CausalLMModule(...); or set "
                         "--trainer.strategy deepspeed_stage_2 (or auto, ddp)")


def check_windows(trainer: Any) -> None:
    """Refuse a limit that ends an epoch within an accumulation window.

    Raises:
        InputError: The last step of an epoch would be incomplete, and the next epoch would start with the rest.
    """
    if not hasattr(trainer.train_dataloader, "accumulate"):
        return                                      # an own DataLoader, whose windows may be of any size
    count, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches             # 1 is one batch, 1.0 is all
    if (isinstance(limit, int) or limit < 1.0) and count % accumulate and not trainer.fast_dev_run:
        end_together(trainer)
        raise InputError(f"{count} micro-batches are not a multiple of the {accumulate} micro-batches of a step",
                         where="trainer.limit_train_batches", fix=f"set it to {-(-count // accumulate) * accumulate}")


def check_head(module: Module) -> None:
    """Refuse an output head that the chosen cross-entropy does not support, once the model is built.

    Raises:
        InputError: The error names the key and what to set instead.
    """
    if module.cross_entropy != "fused" and module.trainer.state.fn == "fit":
        from lit_llm.kernels import borrowed

        borrowed.check(module.cross_entropy, str(module.trainer.precision))
        borrowed.check_head(module.cross_entropy, as_matrices(anatomy.head(module.model)))
