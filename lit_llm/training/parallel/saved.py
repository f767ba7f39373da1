"""Save a module in Lightning's checkpoints, and build a module from one.

`fit` resumes from such a checkpoint, and `CausalLMModule.load_from_checkpoint` needs nothing else to build a module: it
contains the arguments of the constructor, the trained weights, and which rows of embedding and head were added or
trained.
"""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Self

import lightning as L

from lit_llm.errors import InputError
from lit_llm.models.quantize import Quantize
from lit_llm.system.private import lightning as private
from lit_llm.system.private import torch as torch_private
from lit_llm.training import optim
from lit_llm.training.hyperparameters import Hyperparameters
from lit_llm.training.parallel import reshard, safe_load


def plain_arguments(local_values: Mapping[str, object]) -> dict[str, Any]:
    """Arguments of a constructor as numbers, texts, lists and mappings, which checkpoints may contain.

    Args:
        local_values: The local variables at the beginning of the constructor.
    """
    return {name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in local_values.items() if name != "self" and not name.startswith("__")}


class SavedModule(L.LightningModule):
    """The part of `CausalLMModule` that is saved and loaded."""

    arguments: dict[str, Any]                       # arguments of the constructor
    base: str | None
    init: dict[str, Any] | None
    quantize: Quantize | None
    optimizer: optim.Name
    peft_spec: dict[str, Any] | None
    hyperparameters: Hyperparameters
    trained_ids: list[int]                          # tokens whose embedding and head rows are trained with adapters
    saved_ids: list[int] | None                     # those of a checkpoint that is loaded without a trainer
    vocabulary: int | None                          # size of the data's tokenizer
    model: Any

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module with the weights of a checkpoint, on the CPU in float32, to evaluate it or train it further.

        The file is loaded as data and cannot run code. The base model is loaded from where the run loaded it.

        Args:
            checkpoint_path: A file of `Trainer.save_checkpoint`, or a checkpoint folder such as
                `runs/sft/checkpoints/step_40` (of one process, or of DDP).
            args: Lightning's arguments.
            kwargs: Lightning's arguments, and arguments of the constructor that replace the saved ones, such as `base`.

        Raises:
            InputError: A folder of ZeRO or FSDP2, whose state is sharded.
        """
        if isinstance(checkpoint_path, str | Path) and (folder := Path(checkpoint_path)).is_dir():
            checkpoint_path = folder / "state"
            if not checkpoint_path.is_file():
                raise InputError("the state in this checkpoint is sharded by ZeRO or FSDP2", where=str(folder),
                                 fix=f"give {folder / 'model'} or {folder / 'adapter'} as model.base or model.adapter")
        if not safe_load.is_trusted():
            kwargs["weights_only"] = True
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does, but do not report frozen weights, which checkpoints leave out, as missing."""
        result = super().load_state_dict(state_dict, strict, assign)
        trainable = {name for name, weight in self.named_parameters() if weight.requires_grad}
        missing = [name for name in result.missing_keys if name in trainable]
        return torch_private.incompatible_keys(missing, result.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run and `load_from_checkpoint` need, and leave out frozen weights.

        The number of micro-batches per step is added as well, because Lightning does not store it.
        """
        checkpoint[reshard.ACCUMULATE] = self.trainer.accumulate_grad_batches
        self.hyperparameters.save(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **self.saved_arguments()}
        checkpoint["trained_ids"], checkpoint["vocabulary"] = self.trained_ids, self.vocabulary
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        checkpoint["state_dict"] = {      # names of the scales of 4-bit weights begin with the weight's name
            name: value for name, value in checkpoint.get("state_dict", {}).items()
            if name not in frozen and name.partition(".weight.")[0] + ".weight" not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt the checkpoint to this run's number of micro-batches per step, and check the trained token rows.

        Rows that only one of the two trains would silently be lost or start again. Without a trainer, when
        `load_from_checkpoint` calls this, the model is built again with the rows of the checkpoint.
        """
        ids, tokens = list(checkpoint.get("trained_ids", [])), checkpoint.get("vocabulary")
        same = sorted(ids) == sorted(self.trained_ids)
        if private.trainer_of(self) is None:
            if not (same and tokens in (None, self.vocabulary)):
                self.saved_ids, self.vocabulary, self.model = ids, tokens, None
                self.configure_model()
            return
        if not same:
            raise InputError(f"this checkpoint trains the rows of tokens {ids or 'none'}, this run of "
                             f"{self.trained_ids or 'none'}", where="model.lora.train_tokens",
                             fix="resume with the settings of the run, or start anew without --ckpt_path")
        if self.trainer.state.fn == "fit":
            self.hyperparameters.load(checkpoint)
            reshard.recount(checkpoint, self.trainer.accumulate_grad_batches)

    def saved_arguments(self) -> dict[str, Any]:
        """Arguments that `load_from_checkpoint` passes to the constructor."""
        return self.arguments
