"""Look up the memory and the peak rate of a device by its name, or of this machine.

This is the only table of devices. Rates are dense (without sparsity) with float32 accumulation, from data sheets and
architecture papers of the vendors: tensor cores for 16 bits, and torch's default (no TF32) for float32. Memory is what
drivers report, which is less than the nominal size with ECC. Nothing of it was measured here, nor was `utilisation`,
the share of the rate that a training step is assumed to reach.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_llm.errors import InputError, did_you_mean
from lit_llm.system import ranges
from lit_llm.system.config_limits import installed_memory

MARGIN = 0.85                                       # usable share of memory; the rest is for fragments and buffers
GIB, TERA = 2**30, 1e12
SERVER, DESKTOP, PROCESSOR = 0.40, 0.35, 0.50       # assumed utilisation of a class of devices


@dataclass(frozen=True, slots=True)
class Device:
    """A device that a run is planned for.

    Args:
        name: Name as typed, or as reported by a driver.
        memory: GiB of one device; for a processor, the machine's memory.
        half: TFLOP/s of matrix products in bfloat16 (float16 if there is no bfloat16); 0 if unknown.
        single: The same in float32.
        utilisation: Share of that rate that a training step is assumed to reach.
        cpu: Whether it is a processor, whose memory also contains the process and is shared by processes.
        bfloat16: Whether it supports bfloat16.
    """

    name: str
    memory: float
    half: float = 0.0
    single: float = 0.0
    utilisation: float = DESKTOP
    cpu: bool = False
    bfloat16: bool = True

    def rate(self, half: bool) -> float:
        """FLOP/s that a step is assumed to reach; 0 if unknown."""
        return (self.half if half else self.single) * self.utilisation * TERA

    def room(self, processes: int = 1) -> int:
        """Bytes that one of the run's processes on this machine may use."""
        return int(MARGIN * self.memory * GIB) // (processes if self.cpu else 1)


DEVICES = {device.name: device for device in (
    Device("t4", 14.6, 65, 8.1, SERVER, bfloat16=False),            # Turing data sheet
    Device("v100-32", 31.7, 125, 15.7, SERVER, bfloat16=False),     # Volta data sheet, SXM2
    Device("rtx3090", 23.7, 71, 35.6),                              # Ampere GA102 paper
    Device("rtx4080", 15.7, 97.5, 48.7),                            # Ada paper
    Device("rtx4090", 23.6, 165.2, 82.6),                           # Ada paper
    Device("rtx5090", 31.4, 209.5, 104.8),                          # Blackwell RTX paper
    Device("l4", 22.0, 121, 30.3, SERVER),                          # data sheet (half of the figure with sparsity)
    Device("l40s", 44.5, 362, 91.6, SERVER),                        # the same
    Device("a10", 22.0, 125, 31.2, SERVER),                         # data sheet
    Device("a6000", 47.5, 154.8, 38.7),                             # data sheet (half of the figure with sparsity)
    Device("a100-40", 39.4, 312, 19.5, SERVER),                     # data sheet
    Device("a100-80", 79.2, 312, 19.5, SERVER),                     # data sheet
    Device("h100", 79.2, 989.4, 66.9, SERVER),                      # data sheet, SXM5 (half of that with sparsity)
    Device("h200", 139.8, 989.4, 66.9, SERVER),                     # the same
    Device("b200", 178.0, 2250, 75, SERVER),                        # HGX data sheet (half of that with sparsity)
    Device("mi300x", 191.9, 1307.4, 163.4, SERVER),                 # data sheet
)}
ALIASES = {"a100": "a100-80", "v100": "v100-32", "h100-80": "h100", "h200-141": "h200"}


def named(name: str | None, memory: float | None) -> Device | None:
    """Look up a device by name; GiB without a name are a GPU of that size; None if neither is given.

    Raises:
        InputError: No such device, or no memory.
    """
    ranges.check("plan.memory", memory, where="memory")
    if name is None:
        return None if memory is None else Device(f"a GPU of {memory:g} GiB", memory)
    key = name.lower().replace("_", "-").replace(" ", "")
    key = ALIASES.get(key, key)
    if key == "cpu":
        device = processor()
    elif key in DEVICES:
        device = DEVICES[key]
    else:
        names = [*DEVICES, "cpu"]
        raise InputError(f"unknown device '{name}'.{did_you_mean(key, names)}", where="device",
                         fix=f"one of {', '.join(names)}; or --memory GIB alone, for another GPU")
    return device if memory is None else replace(device, memory=memory)


def here(root: Any) -> Device:
    """The device of a run on this machine.

    Args:
        root: The torch device of its first process.
    """
    if root.type != "cuda":
        return processor()
    seen = torch.cuda.get_device_properties(root)
    name_parts = seen.name.lower().replace("-", " ").split()
    joined = "".join(name_parts)
    like = [device for device in DEVICES.values()
            if device.name.split("-")[0] in name_parts or (device.name.startswith("rtx") and device.name in joined)]
    close = min(like, key=lambda device: abs(device.memory - seen.total_memory / GIB), default=Device("", 0))
    return replace(close, name=seen.name, memory=seen.total_memory / GIB)


def processor() -> Device:
    """The processor of this machine or container; its rate must be measured."""
    return Device("memory of this machine", installed_memory() / GIB, utilisation=PROCESSOR, cpu=True)


def measured(device: Device, seconds: float = 0.1) -> Device:
    """Measure a processor's rate: float32 products of matrices in cache, with torch's current threads."""
    with torch.random.fork_rng(devices=[]):
        left = torch.randn(512, 512)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - begun)
    rate = 2 * 512**3 / best / TERA
    return replace(device, half=rate, single=rate)
