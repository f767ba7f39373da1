"""Upload a checked export to the Hugging Face hub.

The token is that of huggingface_hub: of `hf auth login`, or of the environment variable HF_TOKEN.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lit_llm import hub
from lit_llm.errors import InputError
from lit_llm.exports.metadata import HUB_ID
from lit_llm.system import integrity
from lit_llm.text import check as model_check

log = logging.getLogger(__name__)
Result = TypeVar("Result")
TRIES, WAIT = 4, 1.0                                # requests, and seconds before the second; doubled each time
BUSY = (408, 425, 429, 500, 502, 503, 504)          # answers after which a request is sent again
LOGIN = "hf auth login, or set HF_TOKEN to a token that may write"


def check(repository: str) -> None:
    """Refuse an upload that cannot work, before anything is computed.

    Raises:
        InputError: Not a repository's name, no token, or the hub is not reachable.
    """
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repository):
        raise InputError(f"{repository[:80]!r} is not a repository", where="push", fix="give owner/name")
    if get_token() is None:
        raise InputError("there is no token for the hub", where="push", fix=LOGIN)
    if hub.offline():
        raise InputError("the Hugging Face hub is not reachable, or HF_HUB_OFFLINE is set", where="push",
                         fix="leave --push out; behind a mirror: set HF_ENDPOINT to its address")


def upload(folder: Path, repository: str, *, public: bool) -> None:
    """Upload a folder as one commit and print the address.

    Args:
        folder: An export with its `check.json`.
        repository: `owner/name`; it is created if it does not exist.
        public: Whether a new repository is public, and whether an existing one may be.

    Raises:
        InputError: The folder is not as it was checked, the repository is public and should not be, or the hub refuses
            the upload.
    """
    from huggingface_hub import HfApi

    check_files(folder)
    api = HfApi()
    url = _repeated(folder, lambda: api.create_repo(repository, private=not public, exist_ok=True))
    if not public and not _repeated(folder, lambda: api.model_info(repository)).private:
        raise InputError(f"{url} is public", where="push", fix="--public uploads into it; or give another name")
    _repeated(folder, lambda: api.upload_folder(
        repo_id=repository, folder_path=folder, commit_message="Upload an export of lit_llm"))
    print(f"uploaded to {url}", flush=True)


def check_files(folder: Path) -> None:
    """Refuse a folder whose weights are not those that its `check.json` describes.

    Raises:
        InputError: There is no such file, or a weight file is missing or has another content.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / model_check.NAME).read_text(encoding="utf-8"))
        files = {str(name): str(file["sha256"]) for name, file in facts["files"].items()}
        assert facts["measured"]["difference"] <= facts["measured"]["bound"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"{model_check.NAME} does not show that this export was checked", where=str(folder),
                         fix="export the run again") from None
    present = {file.name for kind in ("safetensors", "gguf") for file in folder.glob(f"*.{kind}")}
    for name in sorted(files.keys() | present):
        if name not in files or name not in present or integrity.sha256(folder / name) != files[name]:
            raise InputError(f"{name} is not the file that was checked", where=str(folder), fix="export the run again")


def _repeated(folder: Path, request: Callable[[], Result]) -> Result:
    """The result of a request, which is sent again while the hub is busy or the connection fails."""
    for number in range(TRIES):
        try:
            return request()
        except Exception as error:                  # huggingface_hub raises those of its HTTP library as well
            status = getattr(getattr(error, "response", None), "status_code", None)
            broken = status is None and (isinstance(error, OSError) or type(error).__module__.startswith("http"))
            reason = " ".join(str(error).split())[:240]
            if number + 1 < TRIES and (status in BUSY or broken):
                log.warning("the hub did not take the upload (%s); trying again", reason)
                time.sleep(WAIT * 2**number)
                continue
            if status is None and not broken:
                raise
            raise InputError(f"the hub did not take the upload: {reason}; the export itself is complete: {folder}",
                             where="push", fix=LOGIN if status in (401, 403) else "try again later") from None
    raise AssertionError("the last try returns or raises")
