"""Estimate the memory of a run before it starts, as configured and with options that need less.

The model is built without weights for each checkpointing mode and each way of training. `trace.py` traces the memory of
a step, and `estimate.py` sums it up.
"""

import logging
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lit_llm.errors import InputError
from lit_llm.models import anatomy, vocabulary
from lit_llm.models import load as model
from lit_llm.models.adapters import adapter, peft_method, trained_rows
from lit_llm.models.recompute import WAYS, Recompute, of_config
from lit_llm.training import learned_tokens
from lit_llm.training.parallel import distribution
from lit_llm.training.planning import devices, estimate, trace
from lit_llm.training.planning.devices import Device
from lit_llm.training.planning.estimate import Counts, Kind, Memory, Setting
from lit_llm.training.planning.trace import Step

if TYPE_CHECKING:
    from lightning import Trainer

    from lit_llm.data.interface import Data
    from lit_llm.training.checks.interface import Module

log = logging.getLogger(__name__)
CONTEXT = 512 * 2**20                               # CUDA context of a process; reported elsewhere, not measured here


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a run.

    Args:
        kind: Counts of its model and the memory of a step by number of packed sequences.
        setting: Settings of the run; `recompute` is resolved if the config says `auto`.
        rows: Packed sequences of a micro-batch.
        process: Bytes of the process without a model.
    """

    kind: Kind
    setting: Setting
    rows: int
    process: int

    def memory(self, **changes: Any) -> Memory:
        """Peak bytes on one device during a step, with these changes of the settings."""
        setting = replace(self.setting, **changes)
        return estimate.memory(self.kind.counts, setting, self.kind.step(self.rows, setting.recompute), self.process)


def of(trainer: "Trainer", module: "Module", data: "Data", room: int, device: Device | None = None) -> Footprint:
    """Estimate a run whose data are set up and whose model is not built.

    Args:
        trainer: The trainer before the run.
        module: The module, whose settings are read.
        data: The datamodule after setup.
        room: Usable bytes of a device, for `gradient_checkpointing: auto`.
        device: A device other than this machine's.

    Raises:
        InputError: A step of this architecture cannot be traced without its weights.
    """
    build = _builder(module, data)
    counts = count(*build(module.peft_spec), quantized=module.quantize is not None, muon=module.optimizer == "muon")
    borders, supervised = heaviest(data)
    mode = module.gradient_checkpointing
    auto = mode == "auto"
    rows = rows_at_once(data)
    setting = _setting(trainer, module, "none" if mode == "auto" else of_config(mode),
                       tokens=borders[-1], supervised=supervised,
                       cpu=trainer.strategy.root_device.type == "cpu" if device is None else device.cpu)
    kind = Kind(counts, _steps(lambda: build(module.peft_spec)[0], borders, setting, rows, counts))
    kind.step(rows, setting.recompute)              # traces a step, which loads libraries
    footprint = Footprint(kind, setting, rows, resident_bytes() if setting.cpu else CONTEXT)
    return replace(footprint, setting=replace(setting, recompute=cheapest(footprint, room))) if auto else footprint


def cheapest(footprint: Footprint, room: int) -> Recompute:
    """The mode with the least recomputation that fits; full if none does."""
    for way in WAYS:
        if footprint.memory(recompute=way).total < room:
            return way
    return "full"


def agreed(trainer: "Trainer", module: "Module", data: Any) -> Recompute:
    """The checkpointing mode for all ranks: that of the smallest device, because all ranks must gather alike.

    Collective: every rank calls it.
    """
    try:
        if data is None:
            raise InputError("the length of sequences is unknown, because the data are not of lit_llm.TextDataModule")
        way = of(trainer, module, data, room(trainer)).setting.recompute
    except InputError as error:
        log.warning("the memory of a step could not be estimated: using full gradient checkpointing (%s)", error)
        way = "full"
    place = torch.tensor(WAYS.index(way), device=trainer.strategy.root_device)
    way = WAYS[int(trainer.strategy.reduce(place, reduce_op="max"))]
    if trainer.is_global_zero:
        log.info("gradient checkpointing: %s", way)
    return way


def room(trainer: "Trainer", device: Device | None = None) -> int:
    """Usable bytes of a device; processes on CPUs share the machine's memory.

    Args:
        trainer: The trainer before the run.
        device: A device other than this machine's.
    """
    return (device or devices.here(trainer.strategy.root_device)).room(int(trainer.num_devices))


def rows_at_once(data: "Data") -> int:
    """Packed sequences of the largest micro-batch of the data."""
    return data.batch_size if data.streaming else min(data.batch_size, len(data.plans["train"].rows))


def count(whole: Any, inner: Any, *, quantized: bool = False, muon: bool = False) -> Counts:
    """Count the parameters of a model that determine memory and time.

    Args:
        whole: The model with its adapters.
        inner: The transformers model within it.
        quantized: Whether its frozen linear layers are in 4 bits.
        muon: Whether its matrices are trained with Muon.
    """
    sizes = anatomy.count_parameters(whole)
    head, config = inner.get_output_embeddings(), inner.config
    linears = [layer for layer in whole.modules() if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]
    if rows := trained_rows.trained_rows(head):          # its `weight` is rebuilt at each access
        head = rows.layer
    head_weight = getattr(head, "weight", None)
    head_weight = head.base_layer.weight if head_weight is None else head_weight
    weights = {id(layer.weight): layer.weight for layer in linears} | {id(head_weight): head_weight}
    tables = {id(weight) for weight in anatomy.embeddings(whole)}
    frozen = [weight for key, weight in weights.items() if not weight.requires_grad and key != id(head_weight)]
    trained = [weight for weight in whole.parameters() if weight.requires_grad]
    one = sum(weight.numel() // len(weight) for weight in inner.parameters() if weight.ndim == 3)   # of all experts
    seen = one * (getattr(config, "num_experts_per_tok", None) or 1)
    return Counts(sizes.total, sizes.trainable, sum(weight.numel() for weight in weights.values()) + seen,
                  sizes.trainable if whole is not inner else 0,
                  sum(weight.numel() for weight in frozen) if quantized else 0,
                  sum(weight.numel() for weight in trained if weight.ndim == 2 and id(weight) not in tables) if muon
                  else 0, head_weight.numel(), head_weight.requires_grad, head_weight.shape[0], config.hidden_size,
                  config.num_attention_heads * _head_width(config) * config.num_hidden_layers)


def _head_width(config: Any) -> int:
    """Width of a head; the mean of query and value widths for latent attention (DeepSeek)."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) // 2
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def heaviest(data: "Data") -> tuple[list[int], int]:
    """Document boundaries of the most expensive micro-batch that the data can make, and its supervised tokens.

    It has the longest documents: with dropout, attention on CPU keeps a tokens-by-tokens matrix of each document.
    """
    rows = data.plans["train"].rows
    squares = np.add.reduceat(np.square(rows.segments.lengths), rows.offsets[:-1])
    count = rows_at_once(data)
    chosen = np.argsort(-squares, kind="stable")[:count]
    width = int(rows.lengths[chosen].max()) if data.packing == "none" else data.seq_len
    borders = [0]
    for place in range(count):
        lengths = [stop - start for _, start, stop in rows.row(chosen[place % len(chosen)])]
        ends = [place * width + end for end in accumulate(lengths)]
        borders += [*ends, (place + 1) * width] if ends[-1] < (place + 1) * width else ends
    return borders, max(1, int(rows.supervised[chosen].sum()))


def kinds(now: Footprint, module: "Module", data: "Data") -> list[Kind]:
    """Ways to train the model: as configured, with adapters, with adapters on a 4-bit base."""
    ways, spec, setting = [now.kind], module.peft_spec, now.setting
    if module.base is None or module.quantize is not None:
        return ways                                # adapters on random weights are pointless
    build, (borders, _) = _builder(module, data), heaviest(data)

    def kind(spec: dict[str, Any], options: str, *, quantized: bool = False) -> Kind:
        counts = count(*build(spec), quantized=quantized, muon=module.optimizer == "muon")
        precision = "bf16-true" if quantized else None      # as that config says
        of = replace(setting, precision=precision or setting.precision,
                     stage=min(setting.stage, 2) if quantized else setting.stage)
        return Kind(counts, _steps(lambda: build(spec)[0], borders, of, now.rows, counts), options, precision)

    if spec is None:
        spec = peft_method.LoRA().as_peft()
        ways.append(kind(spec, "--config configs/with/lora.yaml"))
    return [*ways, kind(spec, "--config configs/with/qlora.yaml", quantized=True)]


def _builder(module: "Module", data: "Data") -> Callable[[dict[str, Any] | None], tuple[Any, Any]]:
    """A function that builds the model without weights, with or without adapters of a spec."""
    def build(spec: dict[str, Any] | None) -> tuple[Any, Any]:
        facts = model.tokenizer_facts(data.tokenizer)
        inner = model.skeleton(module.base, module.init, attention=module.choose_attention(facts), **facts)
        if module.base is not None:
            vocabulary.grow(inner, data.tokenizer.vocab_size)
        with torch.device("meta"):
            whole = adapter.wrap_peft(inner, spec, tokens=_trained_tokens(module, data, inner)) if spec else inner
        return whole, inner

    return build


def _trained_tokens(module: "Module", data: "Data", inner: Any) -> list[int]:
    """Tokens whose rows are trained beside adapters; for `auto`, all candidates."""
    if module.peft_spec is None or module.train_tokens is None or trained_rows.row_obstacle(inner, module.peft_spec):
        return []
    if module.train_tokens != "auto":
        return learned_tokens.named(data.tokenizer, module.train_tokens)
    chats = any(not plan.corpus.is_document.all() for stage, plan in data.plans.items() if stage != "guard")
    if not chats or trained_rows.chooses_rows(inner, module.peft_spec):
        return []
    return learned_tokens.candidates(data.tokenizer)


def _steps(build: Callable[[], Any], borders: list[int], setting: Setting, whole: int, counts: Counts
           ) -> Callable[[float, Recompute], Step]:
    """Memory of a step by number of packed sequences, interpolated between traces of all and of one."""
    one = borders[-1] // whole
    autocast = setting.half and setting.stage == 0

    @cache
    def traced(rows: int, way: Recompute) -> Step:
        part = [border for border in borders if border <= rows * one]
        half = setting.half and (not autocast or setting.precision.endswith("true"))
        try:
            return trace.step(build, part, supervised=max(1, setting.supervised * rows // whole), recompute_=way,
                              half=half, autocast=autocast, quantized=setting.half and counts.quantized > 0,
                              cuda=not setting.cpu)
        except InputError:
            raise
        except Exception as error:                  # forward passes that need values raise errors of many types
            raise InputError("the memory of a step of this architecture cannot be traced without its weights "
                             f"({type(error).__name__}: {' '.join(str(error).split())[:120]})", where="model") from None

    def step(rows: float, way: Recompute) -> Step:
        if rows == whole:
            return traced(whole, way)
        few = traced(1, way)
        if rows <= 1:
            return few.times(rows)
        return few.towards(traced(whole, way), (rows - 1) / (whole - 1))

    return step


def resident_bytes() -> int:
    """Resident bytes of this process after all imports and a traced step: the memory of libraries."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:                                 # macOS reports the peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _setting(trainer: "Trainer", module: "Module", way: Recompute, *, tokens: int, supervised: int,
             cpu: bool) -> Setting:
    strategy = distribution.of(trainer.strategy)
    return Setting(strategy.split_stage, trainer.world_size, tokens, supervised, way, module.optimizer,
                   str(trainer.precision), *strategy.offloads, trainer.accumulate_grad_batches, cpu,
                   getattr(trainer, "exports", False) and bool(trainer.checkpoint_callbacks))
