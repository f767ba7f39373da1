"""Access to the Hugging Face hub: whether it is reachable, and the error message if it is not."""

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from lit_llm.errors import InputError, did_you_mean_path

SECONDS = 5.0


@cache
def offline() -> bool:
    """Whether only the local cache can be used: by configuration, or without a connection within a few seconds.

    Checked once, because the hub's own client retries for most of a minute. Behind a proxy the client decides itself.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return True
    return False


def cached(name: str) -> Path | None:
    """The folder of a model in the hub's local cache, or null; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json")
    except ValueError:                              # not a hub id
        return None
    return Path(file).parent if isinstance(file, str) else None


def has_files(name: str) -> bool:
    """Whether the hub's local cache has any file of a model or tokenizer."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir()


def unreachable(name: str, *, where: str = "") -> InputError:
    """The error for a hub id that could not be downloaded, with the offline alternatives."""
    near = did_you_mean_path(name, folders=True)
    return InputError(
        f"'{name}' is not a local folder and could not be downloaded from the Hugging Face hub{near and '.' + near}",
        where=where,
        fix="offline: give a local folder, or fill the cache elsewhere and set HF_HOME to it with HF_HUB_OFFLINE=1;\n"
            "  behind a mirror: set HF_ENDPOINT to its address")
