"""Refuse a model's config whose numbers are invalid or would make a model that no machine can hold.

A config may be a stranger's. Before anything is built, numbers are checked by the names of their keys. While a model is
built, also without its weights, its parameters and the seconds that pass are counted.
"""

import json
import math
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_llm import names
from lit_llm.errors import InputError

COUNTS = re.compile(r"^(n|num)_[a-z_]*(layers?|heads?|blocks|groups|stages|stacks)$|^(n|num)_(layers?|heads?)$"
                    r"|^(en|de)coder_(layers|attention_heads)$")
EXPERTS = re.compile(r"^(n|num|moe_num)_[a-z_]*experts$|^(num|moe_num)_experts$")
WIDTHS = re.compile(r"^(hidden_size|vocab_size|intermediate_size|n_embd|n_inner|n_positions|n_ctx|d_model|d_ff|head_dim"
                    r"|max_position_embeddings|embedding_size|emb_dim|ffn_dim)$")
SIZES = re.compile(r"(size|dim|width|rank|d_model|n_embd|n_inner|d_ff)$")
HIDDEN = re.compile(r"^(hidden_size|n_embd|d_model|emb_dim|head_dim)$")
LAYERS = re.compile(r"layers?$")
ANY = re.compile("")
MOST = ((LAYERS, 2_000), (COUNTS, 10_000), (EXPERTS, 100_000), (HIDDEN, 1 << 20), (SIZES, 1 << 27), (ANY, 1 << 40))
ENDLESS = re.compile(r"limit|max|min")                  # numbers that may rightly be infinite
BYTES = 64 << 20                                        # of a config.json; ours have some 2,000
PARAMETERS = 20 * 10**12                                # the largest published models have 2e12
SECONDS = 120.0                                         # to build one, which takes a few without weights
PER_BYTE = 8                                            # parameters to a byte of weights; loading counts some twice
SPARE = 10_000_000                                      # parameters that no file need hold: positions, tied heads


def check(keys: dict[str, Any], where: str, file: str = "") -> None:
    """Refuse numbers that cannot be meant.

    Args:
        keys: Of a model's config, also with configs in it.
        where: The run's key that names the model.
        file: What to say before a key, such as its file.

    Raises:
        InputError: It names the key and the value.
    """
    for key, value in scalars(keys):
        counted = COUNTS.search(key) or EXPERTS.search(key) or WIDTHS.search(key)
        shown = f"{value:,}"[:60] if isinstance(value, int) and abs(value) < 10**60 else str(value)[:60]
        if counted and value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InputError(f"{file}{key} is {shown!r}; it must be a whole number that is not negative", where=where)
        if isinstance(value, int) and not isinstance(value, bool):
            most = next(most for pattern, most in MOST if pattern.search(key))
            if abs(value) > most:
                raise InputError(f"{file}{key} is {shown}; {most:,} at most", where=where)
        elif isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not ENDLESS.search(key))):
            raise InputError(f"{file}{key} is {shown}, which is no number to compute with", where=where)


def scalars(keys: Any) -> Iterator[tuple[str, Any]]:
    """Each key with its value, those of lists one by one; no list and no mapping."""
    stack: list[tuple[str, Any]] = [("", keys)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack += ((str(name), each) for name, each in value.items())
        elif isinstance(value, list | tuple):
            stack += ((key, each) for each in value if not isinstance(each, str))
        else:
            yield key, value


def check_folder(path: str, where: str) -> None:
    """`check` for the `config.json` of a folder or of a hub id in the local cache; no such file passes.

    Raises:
        InputError: It names the file, or its key and value.
    """
    folder = names.folder_of(path)
    if folder is None or not (file := folder / "config.json").is_file():
        return
    if file.stat().st_size > BYTES:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes; {BYTES:,} at most", where=where)
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {str(error)[:160]}", where=where) from None
    if not isinstance(keys, dict):
        raise InputError(f"{file} is no mapping of keys to values", where=where)
    check(keys, where, f"{file}: ")


def most_parameters(path: str) -> int:
    """How many the weight files of a folder may hold; of a hub id that is not in the cache, all."""
    if (folder := names.folder_of(path)) is None:
        return PARAMETERS
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return SPARE + PER_BYTE * size if size else PARAMETERS


def installed_memory() -> int:
    """Bytes of this machine, or those that its container may have."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):                 # there is no such file, or it says "max"
        have = min(have, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return have


@contextmanager
def building(where: str, *, most: int = PARAMETERS, whole: bool = True) -> Generator[None, None, None]:
    """Count what is built in the block.

    Args:
        where: The key of the model.
        most: Parameters that it may have.
        whole: Whether this process holds all of them, so that those on the CPU must fit its memory.

    Raises:
        InputError: More parameters, more bytes than this machine has, or more than `SECONDS`.
    """
    from torch.nn.modules import module

    end, count, size = time.monotonic() + SECONDS, 0, 0
    room = installed_memory() if whole else math.inf

    def on_parameter(_: Any, name: str, weight: Any) -> None:
        nonlocal count, size
        if weight is None:
            return
        count += weight.numel()
        size += weight.nbytes if weight.device.type == "cpu" else 0
        if count > most:
            than = "any published model has" if most == PARAMETERS else "its weight files can hold"
            raise InputError(f"this config makes a model of more than {most:,} parameters, more than {than}",
                             where=where)
        if size > room:
            raise InputError(f"this config makes a model of more than {size / 1e9:,.0f} GB, and this machine has "
                             f"{room / 1e9:,.0f} GB of memory", where=where)

    def on_module(*_: Any) -> None:
        if time.monotonic() > end:
            raise InputError(f"this config makes a model of so many layers that building it takes more than "
                             f"{SECONDS:.0f} seconds", where=where)

    hooks = [module.register_module_parameter_registration_hook(on_parameter),
             module.register_module_module_registration_hook(on_module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
