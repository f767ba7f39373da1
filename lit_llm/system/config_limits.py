"""Refuse a model's config whose numbers are invalid or would give a model that fits into no machine.

A config may be untrusted. Before anything is built, numbers are checked by the names of their keys. While a model is
built, even without weights, its parameters and the elapsed time are limited.
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
ENDLESS = re.compile(r"limit|max|min")                  # keys that may be infinite
BYTES = 64 << 20                                        # bytes of a config.json; usual ones have about 2,000
PARAMETERS = 20 * 10**12                                # the largest published models have 2e12
SECONDS = 120.0                                         # to build a model, which takes a few without weights
PER_BYTE = 8                                            # parameters per byte of weights; loading counts some twice
SPARE = 10_000_000                                      # parameters that may be missing in files: positions, tied heads


def check(keys: dict[str, Any], where: str, file: str = "") -> None:
    """Refuse invalid numbers in a model's config.

    Args:
        keys: A model's config, possibly with sub-configs.
        where: The run's key for the model.
        file: Prefix for keys in messages, such as the file.

    Raises:
        InputError: The error names the key and the value.
    """
    for key, value in scalars(keys):
        counted = COUNTS.search(key) or EXPERTS.search(key) or WIDTHS.search(key)
        shown = f"{value:,}"[:60] if isinstance(value, int) and abs(value) < 10**60 else str(value)[:60]
        if counted and value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InputError(f"{file}{key} is {shown!r}; it must be a whole number that is not negative", where=where)
        if isinstance(value, int) and not isinstance(value, bool):
            most = next(most for pattern, most in MOST if pattern.search(key))
            if abs(value) > most:
                raise InputError(f"{file}{key} is {shown}; at most {most:,} is allowed", where=where)
        elif isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not ENDLESS.search(key))):
            raise InputError(f"{file}{key} is {shown}, which is not a finite number", where=where)


def scalars(keys: object) -> Iterator[tuple[str, Any]]:
    """Each key with its scalar values; lists and mappings are flattened."""
    stack: list[tuple[str, Any]] = [("", keys)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack += ((str(name), item) for name, item in value.items())
        elif isinstance(value, list | tuple):
            stack += ((key, item) for item in value if not isinstance(item, str))
        else:
            yield key, value


def check_folder(path: str, where: str) -> None:
    """`check` for the `config.json` of a folder or of a hub id in the local cache; a missing file is accepted.

    Raises:
        InputError: The error names the file, or its key and value.
    """
    folder = names.folder_of(path)
    if folder is None or not (file := folder / "config.json").is_file():
        return
    if file.stat().st_size > BYTES:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes; at most {BYTES:,} are allowed", where=where)
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {str(error)[:160]}", where=where) from None
    if not isinstance(keys, dict):
        raise InputError(f"{file} is not a mapping of keys to values", where=where)
    check(keys, where, f"{file}: ")


def most_parameters(path: str) -> int:
    """Limit on parameters from the size of a folder's weight files; no limit for hub ids that are not cached."""
    if (folder := names.folder_of(path)) is None:
        return PARAMETERS
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return SPARE + PER_BYTE * size if size else PARAMETERS


def installed_memory() -> int:
    """Memory of this machine or container in bytes."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):                 # there is no such file, or it contains "max"
        have = min(have, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return have


@contextmanager
def building(where: str, *, most: int = PARAMETERS, whole: bool = True) -> Generator[None, None, None]:
    """Limit the parameters and the time of building a model in the block.

    Args:
        where: The run's key for the model.
        most: Maximum number of parameters.
        whole: Whether this process has all of them, so that those on the CPU must fit into its memory.

    Raises:
        InputError: Too many parameters, more bytes than this machine has, or more than `SECONDS`.
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
            than = "any published model has" if most == PARAMETERS else "its weight files can contain"
            raise InputError(f"this config gives a model with more than {most:,} parameters, more than {than}",
                             where=where)
        if size > room:
            raise InputError(f"this config gives a model of more than {size / 1e9:,.0f} GB, but this machine has "
                             f"{room / 1e9:,.0f} GB of memory", where=where)

    def on_module(*_: object) -> None:
        if time.monotonic() > end:
            raise InputError(f"this config gives a model with so many layers that building it takes more than "
                             f"{SECONDS:.0f} seconds", where=where)

    hooks = [module.register_module_parameter_registration_hook(on_parameter),
             module.register_module_module_registration_hook(on_module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
