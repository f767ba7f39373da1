"""A strategy with torch's FSDP2: weights, gradients and optimizer states are sharded by layer.

It does what ZeRO-3 does with torch only (arXiv:2304.11277; each weight is a DTensor). Gradients are averaged over
processes, as under DDP.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lit_llm.training.parallel import safe_load
from lit_llm.training.parallel.distribution import Distribution

T = TypeVar("T")
REST = "rest.pt"                                    # the rest of the state: loops, schedule, callbacks


class Fsdp2Strategy(Distribution, ModelParallelStrategy):
    """Torch's FSDP2 as a Lightning strategy, on CUDA and on CPU.

    Every process builds the whole model in its CPU memory and then keeps its shard, so the host needs memory for one
    copy per process. Checkpoints contain the trained weights, and any number of processes can read them.

    Args:
        process_group_backend: nccl or gloo; null selects the one for the device.
        timeout: How long a process waits for the others, as H:MM:SS.
    """

    casts_weights = writes_folders = True
    split_stage = 3

    def __init__(self, process_group_backend: str | None = None,
                 timeout: timedelta | None = timedelta(minutes=30)) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        """Join the process group; all processes form one mesh axis."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # ---- sharding

    def shard(self, model: nn.Module, layers: Iterable[nn.Module], *, dtype: torch.dtype | None = None) -> None:
        """Shard a model that every process has built; its layers are gathered one by one.

        Args:
            model: The whole model; weights outside the layers (embedding, last norm, head) are gathered once per step.
            layers: Its decoder layers.
            dtype: Dtype in which weights are gathered and multiplied; null uses that in which they are stored.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._align(model)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        for part in (*layers, model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=policy)

    def _align(self, model: nn.Module) -> None:
        """Copy rank 0's trained weights to all ranks, because adapters and new models are initialized at random."""
        for weight in model.parameters():
            if weight.requires_grad:
                here = weight.detach().to(self.root_device)
                torch.distributed.broadcast(here, 0)
                weight.data.copy_(here)

    def gathered(self, model: nn.Module, compute: Callable[[], T]) -> T:
        """Call `compute` while the weights outside the layers are gathered.

        FSDP2 gathers weights around a call of the module, but embedding, norm and head are used separately here.
        Therefore `compute` temporarily replaces the forward method of the model, and the model is called.
        """
        model.forward = compute
        try:
            return model()
        finally:
            del model.forward                       # restores the class's method

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Shards of the trained weights; a frozen base is not saved with each checkpoint."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        assert self.model is not None
        return get_model_state_dict(self.model, options=_options())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This process's shards of an optimizer's state."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        assert self.model is not None
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer), options=_options())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Write a folder: every process writes its shards, and the first one the rest of the state."""
        from torch.distributed.checkpoint import save

        path = Path(self.broadcast(filepath))
        path.mkdir(parents=True, exist_ok=True)
        tensors = {"model": checkpoint.pop("state_dict"), "optimizer": checkpoint.pop("optimizer_states", [{}])[0]}
        save(tensors, checkpoint_id=path)
        if self.is_global_zero:
            torch.save(checkpoint, path / REST)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and optimizer from shards of any number of processes; Lightning restores the rest."""
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.state_dict import set_state_dict

        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        tensors = {"model": self.lightning_module_state_dict(), "optimizer": self.optimizer_state(self.optimizers[0])}
        with safe_load.data_only():
            load(tensors, storage_reader=_reader(path))
        set_state_dict(self.model, self.optimizers[0], model_state_dict=tensors["model"],
                       optim_state_dict=tensors["optimizer"], options=_options())
        with safe_load.data_only():
            return torch.load(path / REST, map_location="cpu", weights_only=bool(weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Does nothing: `load_checkpoint` has loaded the weights."""


def _reader(path: Path) -> Any:
    """Torch's reader of a distributed checkpoint, which unpickles the index from an allowlist of classes only."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class DataReader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            index: Metadata = safe_load.read_index(path / ".metadata")
            index.storage_meta = index.storage_meta or StorageMeta()
            index.storage_meta.load_id = self.load_id
            return index

    return DataReader(path)


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)
