"""Find secrets in configs, messages and texts, and replace them before they are written, printed or logged.

Three signs are used: the name of a key (`api_key`, `auth`, `hf_token_2`), the form of a value (token prefixes of
services, passwords in URLs, private keys), and long random-looking values. The last sign is used only for config
values, because texts also contain hashes and file names. The forms follow the rules of detect-secrets and gitleaks.
"""

import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

REMOVED = "(removed)"
LEAST = 8                                           # characters of an environment secret that is searched in texts

# Forms of tokens by their issuer.
FORMS = re.compile("|".join((
    r"\bhf_[A-Za-z0-9]{8,}", r"\bapi_org_[A-Za-z0-9]{16,}",                                     # Hugging Face
    r"\bsk-[A-Za-z0-9_-]{8,}", r"\bsess-[A-Za-z0-9]{16,}",                                      # OpenAI, Anthropic, ...
    r"\b(?:gsk|r8|pplx|xai|nvapi|tvly|lsv2|fw|csk|tgp_v1|dckr_pat|dop_v1|npm|glpat|gldt|shpat|figd|lin_api|ntn|secret)"
    r"[_-][A-Za-z0-9_-]{16,}",
    r"\bwandb_\w{8,}", r"\bgh[pousr]_[A-Za-z0-9]{8,}", r"\bgithub_pat_\w{8,}",
    r"\bxox[a-z]-[A-Za-z0-9-]{8,}", r"\bxapp-[A-Za-z0-9-]{8,}",                                 # Slack
    r"hooks\.slack\.com/services/[\w/]+", r"discord(?:app)?\.com/api/webhooks/[\w/-]+",
    r"\bAIza[\w-]{20,}", r"\bya29\.[\w-]{16,}", r"\bGOCSPX-[\w-]{16,}",                         # Google
    r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA|ABIA|ACCA)[A-Z0-9]{12,}",                                   # AWS
    r"(?i:AccountKey|SharedAccessKey)=[A-Za-z0-9+/=]{16,}",                                     # Azure
    r"\beyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?",                                                  # JSON web token
    r"\bSG\.[\w-]{12,}\.[\w-]{12,}", r"\b[sr]k_(?:live|test)_\w{8,}", r"\bkey-[0-9a-f]{32}\b",  # SendGrid, Stripe
    r"\bpypi-[\w-]{32,}", r"\bhvs\.[\w-]{16,}", r"\bAGE-SECRET-KEY-[A-Z0-9]{16,}",
    r"\b\d{8,10}:[A-Za-z0-9_-]{35}\b", r"\b[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}",            # Telegram, Discord
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
)))
# Patterns whose first group is kept.
ASSIGNED = re.compile(
    r"(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9+/=._~-]{12,}"
    r"|([?&](?:[\w-]*(?:token|key|secret|signature|password|credential|auth)|sig|pwd)=)[^&\s\"'#]+"
    r"|(\b(?:password|passwd|passphrase|pwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token)[\"']?\s*[=:]\s*[\"']?)"
    r"[^\s\"',;}\]]{4,}")
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:\"']*(?::[^\s/@\"']*)?@")
SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "apikey", "credential", "credentials",
                "auth", "authorization", "bearer", "cookie", "webhook", "pat"}
SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("signing", "key"),
                ("encryption", "key"), ("account", "key"), ("license", "key"), ("ssh", "key"), ("session", "key")}
# Words that occur with `token` in keys without secrets.
TOKEN_KINDS = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "end", "start", "image", "audio", "video",
               "special", "decoder", "forced", "added", "extra", "id", "ids", "index", "indices", "type", "accuracy",
               "trainable", "per", "max", "num", "min", "topk", "dim", "count", "learned", "boi", "eoi"}
HASHES = re.compile(r"(?i)revision|commit|sha|hash|md5|digest|fingerprint|checksum|(^|_)id$|version")


def redact(value: object, key: str = "") -> Any:
    """A config value without its secrets.

    Args:
        value: Texts, numbers, and lists and mappings of them.
        key: Its key.

    >>> redact({"api_key": "x", "note": "my hf_abcdefghij", "data": {"tokenizer": "gpt2"}})
    {'api_key': '(removed)', 'note': 'my (removed)', 'data': {'tokenizer': 'gpt2'}}
    """
    if isinstance(value, Mapping):
        return {(redact_text(name) if isinstance(name, str) else name): _removed(item) if names_secret(str(name)) else
                redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return REMOVED if looks_random(value) and not HASHES.search(key) else redact_text(value)
    return value


def redact_text(text: str) -> str:
    """A text without known tokens, passwords in URLs and assignments, and secrets of this environment.

    >>> redact_text("cannot reach https://me:hunter2@hub.example/api?token=abc")
    'cannot reach https://(removed)@hub.example/api?token=(removed)'
    """
    for secret in _of_environment():
        text = text.replace(secret, REMOVED)
    text = IN_URL.sub(rf"\g<1>{REMOVED}@", text)
    text = FORMS.sub(REMOVED, text)
    return ASSIGNED.sub(lambda match: (match[1] or match[2] or match[3]) + REMOVED, text)


def redact_words(words: Sequence[str]) -> list[str]:
    """The arguments of a command without secrets.

    >>> redact_words(["--logger.api_key", "x1", "--logger.auth=x2", "--model.lr", "1e-4"])
    ['--logger.api_key', '(removed)', '--logger.auth=(removed)', '--model.lr', '1e-4']
    """
    shown, hide = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        secret = option.startswith("-") and names_secret(option.rpartition(".")[2])
        shown.append(REMOVED if hide else f"{option}={REMOVED}" if secret and equals else redact_text(word))
        hide = secret and not equals
    return shown


@contextmanager
def redacted_argv() -> Generator[None, None, None]:
    """Remove secrets from `sys.argv`, which loggers store, within this context."""
    words, sys.argv = sys.argv, redact_words(sys.argv)
    try:
        yield
    finally:
        sys.argv = words


@lru_cache(maxsize=4096)                            # the names of the environment are asked for at each text
def names_secret(key: str) -> bool:
    """Whether a key's name indicates a secret.

    >>> [names_secret(key) for key in ("hf_token_2", "authToken", "pad_token_id", "tokenizer", "author")]
    [True, True, False, False, False]
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)]
    pairs = set(pairwise(words))
    return (bool(SECRET_WORDS & set(words)) or bool(pairs & SECRET_PAIRS)
            or ("token" in words and not TOKEN_KINDS & set(words)))


def looks_random(text: str) -> bool:
    """Whether a text is one random string, like tokens without a known prefix.

    >>> looks_random("wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzSAMPLEKEY"), looks_random("meta-llama/Llama-3.2-1B-Instruct")
    (True, False)
    """
    if re.fullmatch(r"[0-9a-f]{32,}|[0-9A-F]{32,}", text):
        return _entropy(text) > 3.0
    if not re.fullmatch(r"[A-Za-z0-9+/=_-]{24,}", text) or text.startswith(("/", "~")):
        return False
    kinds = all(re.search(kind, text) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    words = re.findall(r"[A-Z]?[a-z]{3,}", text)    # names of models and folders consist of words
    return kinds and sum(map(len, words)) < len(text) / 2 and _entropy(text) > 4.0


def _entropy(text: str) -> float:
    """Bits per character."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _removed(value: object) -> Any:
    """The replacement of a secret value; null and false are kept."""
    if isinstance(value, Mapping):
        return {name: _removed(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_removed(item) for item in value]
    return value if value is None or isinstance(value, bool) else REMOVED


def _of_environment() -> list[str]:
    """Values of environment variables with secret names, the longest first."""
    values = {value for name, value in os.environ.items() if names_secret(name) and len(value) >= LEAST}
    return sorted((value for value in values if not value.isdigit() and "/" not in value[:1]), key=len, reverse=True)


class RedactingFilter(logging.Filter):
    """Removes secrets from log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record's message; every record is kept."""
        record.msg, record.args = redact_text(record.getMessage()), None
        return True
