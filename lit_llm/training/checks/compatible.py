"""A module's options and a strategy in; nothing out, or an error that names what cannot go together and what can.

Each of these would otherwise hang, fail deep inside a library, or train something else in silence.
"""

import logging
from typing import Any

from lit_llm.errors import InputError, did_you_mean
from lit_llm.models import anatomy
from lit_llm.models.adapters import peft_method
from lit_llm.system import ranges
from lit_llm.text.tokenizer import Tokenizer, unlike
from lit_llm.training.checks.interface import Module
from lit_llm.training.loss import as_matrices
from lit_llm.training.parallel import distribution
from lit_llm.training.parallel.processes import end_together

log = logging.getLogger(__name__)
WHOLE = "set --trainer.strategy ddp (or auto), or --model.optimizer adamw"
NUMBERS = ("lr", "warmup", "cooldown", "min_lr_share", "weight_decay", "betas", "eps", "router_aux_loss",
           "neftune_alpha")
CALLBACKS = {                                       # Lightning's that would do something else here than they say
    "WeightAveraging": "measures averaged weights, while checkpoints and the export would hold the others",
    "StochasticWeightAveraging": "measures averaged weights, while checkpoints and the export would hold the others",
    "GradientAccumulationScheduler": "divides steps into other micro-batches than the loader made, so gradients would "
                                     "be too large; set trainer.accumulate_grad_batches",
    "OnExceptionCheckpoint": "makes the next run go on from its file unasked; --ckpt_path last goes on from the newest "
                             "checkpoint",
}


def check_options(module: Module) -> None:
    """Refuse values of a module that mean nothing, alone or together; it is not built, and no trainer is known.

    Raises:
        InputError: It names the key and what to set instead.
    """
    if (module.base is None) == (module.init is None):
        raise InputError("give model.base (a folder or hub id) or model.init (an architecture), one of the two",
                         where="model")
    ranges.check_all("model", {name: getattr(module, name) for name in NUMBERS})
    if (taken := module.lr * module.weight_decay) > 1:
        raise InputError(f"a step would take lr * weight_decay = {taken:g} of each weight, more than all of it",
                         where="model.weight_decay", fix="for example --model.weight_decay 0.1")
    _check_schedule(module)
    if module.init is not None and module.peft_spec is not None:
        raise InputError("adapters on random weights would learn nothing that could be merged or loaded again",
                         where="model.init", fix="set --model.lora null to train every weight, or give model.base")
    _check_start(module)
    if module.quantize is not None and module.peft_spec is None and module.start is None:
        raise InputError("4-bit weights cannot learn; adapters on them can", where="model.quantize",
                         fix="set model.lora (see configs/with/qlora.yaml), or --model.quantize null")


def _check_start(module: Module) -> None:
    """What an adapter to start from cannot go with."""
    if module.start is None:
        if module.merge_start:
            raise InputError("there is no adapter to merge", where="model.merge_adapter", fix="give model.adapter")
        return
    if module.init is not None:
        raise InputError("an adapter belongs to a base that was trained", where="model.adapter", fix="give model.base")
    if not module.merge_start and module.peft_spec is not None:
        raise InputError("an adapter is continued with its own method, and another is given", where="model.adapter",
                         fix="--model.lora null (and --model.peft null) continues it; --model.merge_adapter true "
                             "merges it into the base first and trains the other one on that")
    if module.merge_start and module.quantize is not None:
        raise InputError("an adapter cannot be merged into a base in 4 bits without loss", where="model.merge_adapter",
                         fix="export the adapter's run first, and give that folder as model.base")


def _check_schedule(module: Module) -> None:
    """Keys that another schedule than the one chosen would read: refused, or said where a shipped config sets them."""
    if module.cooldown != 0.2 and module.schedule != "wsd":
        raise InputError(f"a {module.schedule} schedule has no cool-down, which would change nothing",
                         where="model.cooldown", fix="set --model.schedule wsd, or leave it out")
    if module.min_lr_share != 0.1 and module.schedule == "constant":
        log.warning("model.min_lr_share: a constant learning rate has no end of its own, so it changes nothing")


def check(module: Module, strategy: Any, world_size: int) -> None:
    """Refuse what cannot go together, before the model is built.

    Raises:
        InputError: It names the key and what to set instead.
    """
    _check_prompts(module, strategy, world_size)
    _check_optimizer(module.optimizer, strategy)
    _check_float16(module, strategy)
    _check_cross_entropy(module, strategy)
    by_layer = distribution.of(strategy).gathers_layers
    if by_layer and world_size > 1 and module.why_alone:
        raise InputError(f"{module.why_alone}; one by one, ranks have different numbers of them, and processes that "
                         "share each layer's weights would wait for each other forever", where="trainer.strategy",
                         fix="set --trainer.strategy deepspeed_stage_2")
    if distribution.of(strategy).partitions_on_load and peft_method.ties_adapters(module.peft_spec):
        raise InputError("ensure_weight_tying gives the head the adapter of the embedding, and stage 3 gathers only a "
                         "layer's weights", where="trainer.strategy", fix="set --trainer.strategy deepspeed_stage_2")
    if by_layer and module.quantize:
        raise InputError("4-bit weights cannot be cut into pieces for each layer", where="model.quantize",
                         fix="set --trainer.strategy deepspeed_stage_2 (or auto, ddp), or --model.quantize null")
    if by_layer and module.compile_layers:
        raise InputError("layers whose weights are gathered one by one cannot be compiled", where="model.compile",
                         fix="set --model.compile false, or --trainer.strategy deepspeed_stage_2")
    if module.compile_layers and module.gradient_checkpointing in ("selective", "auto"):
        raise InputError("a compiled layer is one operation, of which nothing can be kept",
                         where="model.gradient_checkpointing", fix="set it to true or false")


def check_balance(module: Module, strategy: Any, world_size: int) -> None:
    """Refuse recomputed layers whose router logits have a gradient of their own where ZeRO-3 cuts the weights.

    Ranks then reduce gradients in different orders, and wait for each other forever (measured with DeepSpeed 0.19.8).

    Raises:
        InputError: It names the key and what to set instead.
    """
    if module.balance_coefficient and module.recompute != "none" and world_size > 1 \
            and distribution.of(strategy).partitions_on_load:
        raise InputError("the routers' load balance hangs with recomputed layers under ZeRO-3",
                         where="model.gradient_checkpointing", fix="set --trainer.strategy fsdp2 or deepspeed_stage_2, "
                         "--model.gradient_checkpointing false, or --model.router_aux_loss 0")


def check_data(inner: Any, data: Any) -> None:
    """Refuse ids and rows that do not fit the model: the first step would die in an index error.

    Args:
        inner: The transformers model.
        data: Of the run; null where it has none of ours.

    Raises:
        InputError: It names the key and what to set instead.
    """
    if data is None:
        return
    rows, tokens = inner.get_input_embeddings().num_embeddings, data.tokenizer.vocab_size
    if tokens > rows:                               # of an architecture; a base has grown
        raise InputError(f"the tokenizer has {tokens} tokens, the model's embedding {rows} rows",
                         where="model.init.vocab_size", fix=f"leave it out, or set it to {tokens} or more")
    room = getattr(inner.config, "max_position_embeddings", None)
    if room is not None and data.seq_len > room:
        raise InputError(f"rows of {data.seq_len} tokens are longer than the model's {room} positions",
                         where="data.seq_len", fix=f"set --data.seq_len {room} or less")


def check_tokenizer(base: str, data: Any) -> None:
    """Refuse a tokenizer whose ids mean other words than the base has learned; more tokens are none of these.

    Args:
        base: What training starts from.
        data: Of the run; null where it has none of ours.

    Raises:
        InputError: It names a token.
    """
    tokenizer = getattr(data, "tokenizer", None)
    if isinstance(tokenizer, Tokenizer) and (difference := unlike(tokenizer, base)):
        raise InputError(f"this is another tokenizer than the base's: {difference}", where="data.tokenizer",
                         fix="use the base's own (data.tokenizer: null), or one that only adds tokens to it")


def check_trainer(trainer: Any) -> None:
    """Options of Lightning's that checkpoints or the loader, which never begins again, would not follow.

    Raises:
        InputError: It names the key.
    """
    distribution.of(trainer.strategy).check_arguments()
    for callback in trainer.callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in CALLBACKS:
                raise InputError(f"{type(callback).__name__} {CALLBACKS[kind.__name__]}", where="trainer.callbacks",
                                 fix="leave it out")
    if trainer.overfit_batches:
        raise InputError("an epoch here is never the same rows again", where="trainer.overfit_batches",
                         fix="give a file of a few records as data.sources, and set trainer.max_epochs")
    if trainer.reload_dataloaders_every_n_epochs:
        raise InputError("a loader made anew would begin with the first epoch's rows again", fix="leave it out",
                         where="trainer.reload_dataloaders_every_n_epochs")
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise InputError("only clipping by norm is supported", where="trainer.gradient_clip_algorithm",
                         fix="set it to norm")


def check_built(module: Module) -> None:
    """Refuse a model that was built without a trainer where a strategy shards its weights when it is built.

    Raises:
        InputError: It says what to do instead.
    """
    if module.model is not None and module.built_alone and distribution.of(module.trainer.strategy).gathers_layers:
        raise InputError("the model was built before it was given to the trainer, so its weights are not sharded",
                         where="trainer.strategy", fix="give the trainer a new module: CausalLMModule(...); or set "
                         "--trainer.strategy deepspeed_stage_2 (or auto, ddp)")


def check_windows(trainer: Any) -> None:
    """An epoch that a limit cuts must be whole steps, for whose tokens the loader gives the count.

    Raises:
        InputError: The last one would be a part of a step, and the next epoch begin with its rest.
    """
    if not hasattr(trainer.train_dataloader, "accumulate"):
        return                                      # an own DataLoader, whose windows may be of any size
    count, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches             # 1 is a batch, 1.0 is all of them
    if (isinstance(limit, int) or limit < 1.0) and count % accumulate and not trainer.fast_dev_run:
        end_together(trainer)
        raise InputError(f"{count} micro-batches are no whole steps of {accumulate}",
                         where="trainer.limit_train_batches", fix=f"set it to {-(-count // accumulate) * accumulate}")


def _check_prompts(module: Module, strategy: Any, world_size: int) -> None:
    """Prompt methods make a forward for each conversation; ZeRO-3 and FSDP2 wait for all ranks at each forward."""
    if not peft_method.adds_virtual_tokens(module.peft_spec):
        return
    if module.neftune_alpha:
        raise InputError("prompt and prefix tuning have embeddings of their own, which take no noise",
                         where="model.neftune_alpha", fix="set --model.neftune_alpha null")
    if world_size > 1 and distribution.of(strategy).gathers_layers:
        raise InputError("prompt and prefix tuning cannot be trained by processes that share each layer's weights",
                         where="trainer.strategy", fix="set --trainer.strategy deepspeed_stage_2")


def _check_float16(module: Module, strategy: Any) -> None:
    """Small gradients vanish in it, unless the loss is multiplied by a scale, which DeepSpeed and 16-mixed do."""
    training = module.trainer.state.fn == "fit"
    if training and str(module.trainer.precision) == "16-true" and not distribution.of(strategy).keeps_masters:
        raise InputError("small gradients would vanish in float16 without a loss scale", where="trainer.precision",
                         fix="set it to 16-mixed or bf16-true; or --trainer.strategy deepspeed_stage_2, which has one")


def _check_cross_entropy(module: Module, strategy: Any) -> None:
    """Other people's kernels have needs of their own, in training."""
    if module.cross_entropy == "fused" or module.trainer.state.fn != "fit":
        return
    from lit_llm.kernels import borrowed

    if module.way is not None and module.way.own_logits:
        raise InputError(f"the model makes its logits itself: {module.way.why_own_logits}",
                         where="model.cross_entropy", fix="set --model.cross_entropy fused")
    if peft_method.adds_virtual_tokens(module.peft_spec):
        raise InputError("prompt and prefix tuning make logits, and no head is left for other kernels",
                         where="model.cross_entropy", fix="set --model.cross_entropy fused")
    borrowed.check(module.cross_entropy, strategy.root_device, str(module.trainer.precision))


def check_head(module: Module) -> None:
    """Refuse an output head that the chosen cross-entropy cannot do, once the model is built.

    Raises:
        InputError: It names the key and what to set instead.
    """
    if module.cross_entropy != "fused" and module.trainer.state.fn == "fit":
        from lit_llm.kernels import borrowed

        borrowed.check_head(module.cross_entropy, as_matrices(anatomy.head(module.model)))


def _check_optimizer(optimizer: str, strategy: Any) -> None:
    """Not every optimizer can step on a piece of a weight."""
    if optimizer == "muon" and distribution.of(strategy).flattens_weights:
        raise InputError("muon steps on whole matrices, and ZeRO hands the optimizer flat pieces of many",
                         where="model.optimizer", fix=WHOLE)
    if optimizer == "adamw_8bit" and distribution.of(strategy).split_stage:
        raise InputError("8-bit states cannot be cut into pieces, saved and read again as ZeRO and FSDP2 do it",
                         where="model.optimizer", fix=WHOLE)


def check_monitors(trainer: Any) -> None:
    """Refuse a misspelled metric, which would stop the run at its first validation.

    Raises:
        InputError: It names the metrics that there are.
    """
    known = ["train/loss", *(f"val/{name}" for name in ("nll", "perplexity", "bits_per_byte", "token_accuracy"))]
    bare = {name.partition("/")[2] for name in known}
    data = trainer.datamodule
    measured = data is None or bool(data.val_dataloader())
    for callback in trainer.callbacks:
        name = str(getattr(callback, "monitor", None) or "")
        where = f"{type(callback).__name__}.monitor"
        own = name and type(trainer.lightning_module).__module__.startswith("lit_llm.")     # which logs nothing else
        if (own or name.startswith(("val", "train")) or name in bare) and name not in known:
            raise InputError(f"nothing is called '{name}'; there are {', '.join(known)}.{did_you_mean(name, known)}",
                             where=where)
        stops = any(kind.__name__ == "EarlyStopping" for kind in type(callback).__mro__)
        if name.startswith("val/") and stops and not measured:
            raise InputError(f"{name} is never measured: there is no validation data", where=where,
                             fix="set data.val_sources or data.val_fraction")
