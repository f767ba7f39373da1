"""What a checkpoint of Lightning holds of the module, and how a module is made from one.

`fit` resumes from such a checkpoint, and `CausalLMModule.load_from_checkpoint` builds a module from one alone: it holds
the arguments of the constructor, the weights that learn, and which rows of the vocabulary were added or trained.
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


def plain_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor as numbers, texts, lists and mappings, which a checkpoint may hold.

    Args:
        given: Its local variables at its beginning.
    """
    return {name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in given.items() if name != "self" and not name.startswith("__")}


class SavedModule(L.LightningModule):
    """The part of `CausalLMModule` that is saved and loaded."""

    arguments: dict[str, Any]                       # of the constructor
    base: str | None
    init: dict[str, Any] | None
    quantize: Quantize | None
    optimizer: optim.Name
    peft_spec: dict[str, Any] | None
    hyperparameters: Hyperparameters
    trained_ids: list[int]                          # tokens whose rows learn beside the adapters
    saved_ids: list[int] | None                     # those of a checkpoint that is loaded without a trainer
    vocabulary: int | None                          # tokens of the data's tokenizer
    model: Any

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """A module with the weights of a checkpoint: on the CPU, in float32, to evaluate or to train on.

        The file is loaded as data: it cannot run a program. The base model is loaded from where the run loaded it.

        Args:
            checkpoint_path: A file of `Trainer.save_checkpoint`, or a checkpoint folder such as
                `runs/sft/checkpoints/step_40` (of one process, or of DDP).
            args: Lightning's own.
            kwargs: Lightning's own, and arguments of the constructor that replace the saved ones, such as `base`.

        Raises:
            InputError: A folder of ZeRO or FSDP2, whose state is in pieces.
        """
        if isinstance(checkpoint_path, str | Path) and (folder := Path(checkpoint_path)).is_dir():
            checkpoint_path = folder / "state"
            if not checkpoint_path.is_file():
                raise InputError("it has no state in one file, as ZeRO and FSDP2 write it in pieces", where=str(folder),
                                 fix=f"give {folder / 'model'} or {folder / 'adapter'} as model.base or model.adapter")
        if not safe_load.is_trusted():
            kwargs["weights_only"] = True
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch does it; frozen weights, which a checkpoint leaves out, are not reported as missing."""
        found = super().load_state_dict(state_dict, strict, assign)
        learning = {name for name, weight in self.named_parameters() if weight.requires_grad}
        missing = [name for name in found.missing_keys if name in learning]
        return torch_private.incompatible_keys(missing, found.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run and `load_from_checkpoint` need, and leave out weights that do not learn.

        Lightning does not say how many micro-batches a step had.
        """
        checkpoint[reshard.ACCUMULATE] = self.trainer.accumulate_grad_batches
        self.hyperparameters.save(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **self.saved_arguments()}
        checkpoint["trained_ids"], checkpoint["vocabulary"] = self.trained_ids, self.vocabulary
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        checkpoint["state_dict"] = {      # the scales of 4-bit weights have names behind theirs
            name: value for name, value in checkpoint.get("state_dict", {}).items()
            if name not in frozen and name.partition(".weight.")[0] + ".weight" not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run may go on with another division of its steps, but only with the same trained rows.

        Rows that are in only one of the two would be lost, or start again, in silence. Without a trainer, where
        `load_from_checkpoint` calls, the model is built again with the rows of the checkpoint.
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
        """The arguments of the constructor that `load_from_checkpoint` passes to it."""
        return self.arguments
