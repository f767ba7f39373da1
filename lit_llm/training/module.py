"""The LightningModule that trains and evaluates a causal language model.

The loss is divided by the number of supervised tokens of the whole optimizer step. The constructor only stores the keys
of `model` of a config; `build.py` builds the model when Lightning configures it, so `--help`, `inspect` and `plan` load
no weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_llm.data.rows import padded
from lit_llm.errors import InputError
from lit_llm.kernels import attention
from lit_llm.models import anatomy, recompute
from lit_llm.models.adapters import peft_method
from lit_llm.models.adapters.peft_method import spec_of
from lit_llm.models.quantize import Quantize
from lit_llm.system.class_paths import refuse_within
from lit_llm.system.private import lightning as private
from lit_llm.training import build, forward, optim
from lit_llm.training.checks import adapter_fault, compatible, proof
from lit_llm.training.forward import Choices, Sums
from lit_llm.training.hyperparameters import Hyperparameters
from lit_llm.training.loss import CrossEntropy
from lit_llm.training.metrics import Perplexity
from lit_llm.training.parallel import distribution, shards
from lit_llm.training.parallel.saved import SavedModule, plain_arguments
from lit_llm.training.step import scores
from lit_llm.training.step.window import Window

if TYPE_CHECKING:
    from lit_llm.data.rows.loader import Batch


class CausalLMModule(SavedModule):
    """A causal language model; trains all of its weights, or adapters of any PEFT method.

    Args:
        base: The model to start from: a folder in Hugging Face's layout, a hub id, or `sample:base`.
        init: Instead of `base`, an architecture with random weights to pretrain: `model_type` and keys of its config.
            Vocabulary size and control tokens are the tokenizer's unless given.
        lora: Train low-rank adapters only; null trains all weights.
        quantize: Quantize the linear layers of the frozen base to 4 bits, as QLoRA does (arXiv:2305.14314): nf4, fp4.
            They take a quarter of the memory of bf16 and are slower; adapters are merged into the unquantized base.
            Needs bitsandbytes, also on a CPU.
        peft: The long form: any PEFT config by `class_path` and `init_args`, e.g. class_path: peft.LoHaConfig.
        adapter: A trained adapter to start from: a folder in PEFT's format, a checkpoint, or a run (its best one). It
            is continued with its own method, so model.lora and model.peft must be null.
        merge_adapter: Merge that adapter into the base first; then model.lora, model.peft or all weights are trained
            on the result. Checkpoints contain the merged adapter as well.
        lr: Peak learning rate. 2e-4 suits adapters; training all weights needs about a tenth of it.
        warmup: Linear rise of the learning rate: a number of steps, or a share of the run if below 1.
        schedule: The learning rate after the warmup: cosine, linear, wsd (flat, then a short cool-down) or constant.
        cooldown: Share of a wsd run that the cool-down takes at its end (arXiv:2405.18392, section 4).
        min_lr_share: Learning rate at the end, as a share of the peak.
        optimizer: adamw; adamw_8bit (bitsandbytes, 2 instead of 8 bytes of state per weight; one device or DDP); muon
            for the matrices of layers and AdamW for the rest (arXiv:2502.16982 reports half the compute in
            pretraining), at the same lr; it needs whole matrices and does not run under ZeRO.
        weight_decay: Decoupled decay of matrices; norms and biases are never decayed.
        betas: Decay rates of AdamW's averages. 0.95 for the second adapts faster than the usual 0.999, which helps
            short runs.
        eps: AdamW's term against division by zero.
        router_aux_loss: Coefficient of the load-balancing loss of a mixture of experts (arXiv:2101.03961), which its
            class in transformers computes. It is computed for each document, averaged over the step by tokens, and
            logged as `train/aux_loss`; it is no part of `train/loss` and `val/nll`. Null takes the coefficient of the
            model's config (`router_aux_loss_coef` and the like), also if `output_router_logits` is false in a base's
            config (in `init` that turns the loss off); 0 turns it off.
        neftune_alpha: Noise on token embeddings in training (arXiv:2310.05914), 5 to 15, which gives longer answers
            after short SFT runs. Null adds none.
        gradient_checkpointing: Compute activations again in the backward pass. true: all of them, which takes a tenth
            of the memory and at least a fifth more time; selective: all except matrix products and attention, which
            takes about half of the memory; auto: the fastest way that fits into the device according to `plan`.
        compile: Compile each decoder layer with torch, which takes a minute at the start and needs a C++ compiler on a
            CPU. It pays on CUDA for long runs; on a CPU in bfloat16 it gains little. Not available if layers are
            gathered one by one (ZeRO-3, FSDP2).
        cross_entropy: Kernels that compute the training loss from hidden states and head without the logits of a whole
            batch: fused (of this project); liger (arXiv:2410.10989); cut_cross_entropy (arXiv:2411.09009), whose
            release 25.1.1 has errors of some percent in gradients of large vocabularies and does not resume bit for
            bit. The last two need CUDA and `pip install 'lit_llm[kernels]'`. Perplexity always uses fused. May change
            when a run is resumed.
    """

    def __init__(
        self,
        base: str | None = None,
        init: dict[str, Any] | None = None,
        lora: peft_method.LoRA | None = None,
        peft: dict[str, Any] | None = None,
        quantize: Quantize | None = None,
        adapter: str | None = None,
        merge_adapter: bool = False,
        lr: float = 2e-4,
        warmup: float = 0.03,
        schedule: optim.Schedule = "cosine",
        cooldown: float = 0.2,
        min_lr_share: float = 0.1,
        optimizer: optim.Name = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        router_aux_loss: float | None = None,
        neftune_alpha: float | None = None,
        gradient_checkpointing: bool | Literal["selective", "auto"] = False,
        compile: bool = False,
        cross_entropy: CrossEntropy = "fused",
    ) -> None:
        arguments = plain_arguments(locals())
        super().__init__()
        self.arguments = arguments                  # for `load_from_checkpoint`
        lora = peft_method.LoRA(**lora) if isinstance(lora, dict) else lora     # of a checkpoint
        refuse_within(init, "model.init")
        self.base, self.init = base, init
        self.peft_spec = spec_of(peft, lora)
        self.start, self.merge_start = adapter, merge_adapter       # an adapter's folder
        self.train_tokens = lora.train_tokens if lora is not None else "auto"
        self.trained_ids: list[int] = []            # tokens whose embedding and head rows are trained with adapters
        self.saved_ids: list[int] | None = None     # those of a checkpoint that is loaded without a trainer
        self.vocabulary: int | None = None          # tokens of the data's tokenizer
        self.quantize = quantize
        self.lr, self.warmup, self.schedule, self.cooldown = lr, warmup, schedule, cooldown
        self.min_lr_share, self.optimizer, self.weight_decay, self.betas = min_lr_share, optimizer, weight_decay, betas
        self.eps, self.gradient_checkpointing, self.neftune_alpha = eps, gradient_checkpointing, neftune_alpha
        self.recompute: recompute.Recompute = recompute.of_config(
            False if gradient_checkpointing == "auto" else gradient_checkpointing)
        self.compile_layers = compile               # nn.Module.compile is a method
        self.cross_entropy, self.router_aux_loss = cross_entropy, router_aux_loss
        self.checkpoint: Path | None = None         # set by Trainer.validate and .test: weights of one checkpoint
        self.model: Any = None
        self.way: forward.Way | None = None         # how the loss is computed; null until `choose_attention`
        self.built_without_trainer = False
        self.half_adapters, self.balance_coefficient = False, 0.0   # the latter is 0 without a load-balancing loss
        self.gradient_norm: Tensor | None = None    # of the last step, if `FiniteGuard` measures it
        self.step_skipped = False                   # whether the last step was skipped: its gradient was not finite
        self.hyperparameters = Hyperparameters()
        self.strict_loading = False                 # checkpoints of adapters contain adapters only
        self.perplexity = nn.ModuleDict({"val": Perplexity(), "test": Perplexity()})
        self.window = Window()                      # sums of the current accumulation window
        compatible.check_options(self)
        if adapter is not None:
            build.check_start(self, adapter)

    # ---- building ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Determine the properties of the model that need no weights, before a strategy shards them."""
        compatible.check_built(self)
        if self.model is None:
            build.ask(self, stage)

    def choose_attention(self, facts: dict[str, Any]) -> str | None:
        """The attention implementation of the layers: this project's for packed documents, or null for the default.

        Args:
            facts: Config values of a new model that come from the tokenizer.
        """
        if peft_method.adds_virtual_tokens(self.peft_spec):
            return None
        if self.way is None:                        # determined once per model
            longest = getattr(getattr(private.trainer_of(self), "datamodule", None), "seq_len", None)
            self.way = proof.way_of(build.pretrained(self), self.init, seq_len=longest, **facts)
        return attention.NAME if self.way.packed else None

    @property
    def why_unpacked(self) -> str:
        """Why each document has its own forward pass; empty if documents are packed or this is not determined yet."""
        return self.way.why_unpacked if self.way is not None else ""

    def configure_model(self) -> None:
        """Load or build the model and wrap it, once; Lightning calls this hook at the start of every verb."""
        if self.model is None:
            with build.with_trainer(self):
                build.build(self)

    def _adapted(self, inner: nn.Module) -> Any:
        """The model with an adapter: a checkpoint's, one to be continued, or a new one."""
        return build.adapted(self, inner)

    def _choose_tokens(self, inner: nn.Module) -> list[int]:
        """Ids of `lora.train_tokens`: the given ones, or tokens of the data that the base was never trained on."""
        return build.tokens_to_train(self, inner)

    def _tokenizer_facts(self) -> dict[str, Any]:
        """Config values of a new model that come from the tokenizer."""
        return build.tokenizer_facts(self)

    def saved_arguments(self) -> dict[str, Any]:
        """Add values of a new model that come from the tokenizer; `load_from_checkpoint` has no tokenizer."""
        return self.arguments | ({"init": self._tokenizer_facts() | self.init} if self.init else {})

    # ---- steps -------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Check epoch limits now that the epoch length is known, and apply changed settings to a resumed run."""
        compatible.check_windows(self.trainer)
        self.hyperparameters.take_effect(self.trainer)

    def training_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """The micro-batch's share of the step's loss: its summed NLL by the supervised tokens of the whole step.

        A step consists of all micro-batches of all ranks between two updates of the weights (see `window.py`).
        """
        batch = padded.packed(batch)
        if self.is_skipped(batch):
            return torch.zeros((), device=self.device, requires_grad=True)      # Lightning calls backward on it
        batch = self.window.counted(batch, self.trainer, balance=self.balance_coefficient > 0)
        loss = self.window.add(self._nll(batch), batch, self.trainer, self.balance_coefficient)
        if batch["last_in_step"]:
            self._log_loss()
        return loss

    def on_after_backward(self) -> None:
        """Rescale the gradients of an accumulation window whose loader did not know its number of tokens."""
        self.window.correct(self.parameters())

    @staticmethod
    def is_skipped(batch: "Batch") -> bool:
        """Whether no forward pass is needed: no rank has a supervised token, and gradients are not reduced here."""
        return bool(batch.get("idle")) and not batch["last_in_step"]

    def _log_loss(self) -> None:
        """Log the mean NLL of the step over all ranks; reduced only on steps that are logged, and on the last one."""
        window = self.window.taken()
        if private.logs_this_step(self.trainer) or self.hyperparameters.is_last(self.global_step + 1):
            total = self.trainer.strategy.reduce(window, reduce_op="sum")
            self.log("train/loss", total[0].float(), prog_bar=True, rank_zero_only=True)
            if self.balance_coefficient:
                self.log("train/aux_loss", total[1].float(), rank_zero_only=True)
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)

    def validation_step(self, batch: "Batch", batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of `val/`, which cover all validation loaders together."""
        self._evaluate(batch, "val")

    def test_step(self, batch: "Batch", batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of `test/`."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: "Batch", batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Score each document, in the order of the batch: (documents,) `nll` in nats, and `tokens` (supervised)."""
        return scores.of_documents(self, batch)

    def on_predict_epoch_end(self) -> None:
        """Take part in the steps of ranks that have more batches."""
        scores.finish(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, V) logits of the next token for (B, T) ids; zeros where a (B, T) mask has 0, which is padding."""
        return forward.logits(self.model, input_ids, attention_mask, self.way or forward.Way())

    def on_validation_epoch_end(self) -> None:
        """Log what `metrics.Perplexity` reports: `val/nll` with `val/nll_low` and `val/nll_high`, and so on."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the same under `test/`."""
        self._report("test")

    def _evaluate(self, batch: "Batch", split: str) -> None:
        batch = padded.packed(batch)
        if batch.get("idle"):                       # on all ranks
            return
        self.update_metrics(batch, self._nll(batch), split)

    def update_metrics(self, batch: "Batch", sums: Sums, split: str) -> None:
        """Add a micro-batch to the metrics of `val/` or `test/`: the one method to override for another metric.

        Args:
            batch: Of this rank, with the number of its supervised tokens, `num_supervised`, and bytes, `num_bytes`.
            sums: The result of `sums` for it, without a gradient.
            split: `val` or `test`; what is logged under `f"{split}/..."` is in `metrics.csv` and can be monitored.
        """
        metric: Any = self.perplexity[split]
        cells = metric.cells_of(batch, sums.tokens) if isinstance(sums, Sums) else None
        metric.update(sums.total, batch["num_supervised"], batch["num_bytes"], sums.correct, cells)

    def _report(self, split: str) -> None:
        metric: Any = self.perplexity[split]
        figures = metric.report()
        metric.reset()
        self.log_dict({f"{split}/{name}": torch.tensor(value, dtype=torch.float64) for name, value in figures.items()},
                      rank_zero_only=False, sync_dist=False)

    def _nll(self, batch: "Batch") -> Sums:
        """Sums over one micro-batch."""
        return self._surrounded(batch, lambda: self.sums(batch))

    def plain_sums(self, batch: "Batch") -> Sums:
        """Sums of a batch by the model alone, without terms that an override of `sums` adds."""
        return self._surrounded(batch, lambda: forward.nll(
            self.model, batch, forward.Choices(self.way or forward.Way())))

    def _surrounded(self, batch: "Batch", compute: Callable[[], Sums]) -> Sums:
        """Call `compute` with the weights gathered and the autocast that strategy and precision need."""
        device = batch["input_ids"].device.type
        # float32 masters of adapters among bf16 weights
        halved = torch.autocast(device, torch.bfloat16) if self.half_adapters else nullcontext()
        with adapter_fault.explained(self.model, self.peft_spec), halved:
            if private.trainer_of(self) is None:
                return compute()
            return distribution.of(self.trainer.strategy).gathered(self.model, compute)

    def sums(self, batch: "Batch") -> Sums:
        """Sums of a micro-batch for the loss and the metrics: the one method to override for another loss.

        Called in training and in evaluation (`self.training` distinguishes them), under every strategy and precision,
        with all weights available. A term added to `total` is divided, like the NLL, by the number of supervised tokens
        of the step; in evaluation it would be part of `val/nll`.

        Args:
            batch: A micro-batch of this rank; `num_supervised` is the number of its supervised tokens.
        """
        return forward.nll(self.model, batch, self._choices())

    def supervised_logits(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """(N, V) logits of supervised positions and (N,) their targets, for an override of `sums` that needs them.

        All of them are in memory at once, which the loss of `sums` avoids.
        """
        return forward.supervised_logits(self.model, batch, self._choices())

    def _choices(self) -> Choices:
        return Choices(self.way or forward.Way(), self.neftune_alpha if self.training else None,
                       self.cross_entropy, self.training and self.balance_coefficient > 0)

    # ---- optimization ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Create the optimizer and its schedule, which is stepped after every optimizer step."""
        self.keep_masters()
        optimizer = optim.build(self.optimizer, self.named_parameters(), lr=self.lr, weight_decay=self.weight_decay,
                                betas=self.betas, eps=self.eps, embeddings=anatomy.embeddings(self.model))
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise InputError("the run has no end", where="trainer",
                             fix="set --trainer.max_epochs or --trainer.max_steps")
        schedule = self.hyperparameters.scheduled(self, optimizer, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the schedule, except after a skipped step."""
        if not self.step_skipped:
            super().lr_scheduler_step(scheduler, metric)

    def keep_masters(self) -> None:
        """Keep trained weights in float32, because half precision would lose small updates; DeepSpeed has its own."""
        if not distribution.of(self.trainer.strategy).keeps_masters:
            optim.keep_masters(self)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: float | None = None,
                                    gradient_clip_algorithm: str | None = None) -> None:
        """Clip by the norm of all gradients; DeepSpeed's engine does it itself."""
        if gradient_clip_val and not distribution.of(self.trainer.strategy).owns_gradients:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shards.clip(weights, float(gradient_clip_val), self.gradient_norm)
