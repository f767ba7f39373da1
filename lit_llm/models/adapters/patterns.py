"""Refuse regular expressions in an adapter's config that are invalid or take too long to match.

PEFT matches them with the name of every layer. A pattern such as `(a+)+b` can take years and Python cannot interrupt
it, so patterns are first tried in a separate process.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lit_llm.errors import InputError

PATTERNS = ("target_modules", "exclude_modules", "target_parameters", "layers_pattern", "modules_to_save")
KEYS = ("rank_pattern", "alpha_pattern")            # mappings whose keys are patterns
PATIENCE = 10.0                                     # seconds for all of them
TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name), re.match(r"(.*\\.)?(" + pattern + ")$", name)
"""


def check(keys: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Refuse a config whose patterns cannot be matched with the names of a model's layers.

    Args:
        keys: The adapter's config.
        names: Names of the layers.
        where: The adapter's folder.

    Raises:
        InputError: The error names the key and the pattern.
    """
    patterns = [(key, value) for key in PATTERNS for value in _texts(keys.get(key)) if isinstance(keys.get(key), str)]
    patterns += [(key, value) for key in KEYS for value in _texts(keys.get(key))]
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{key} is not a regular expression: {error}", where=where) from None
    hard = [(key, pattern) for key, pattern in patterns if re.search(r"[*+{]", pattern)]
    if not hard:
        return
    request = json.dumps([[pattern for _, pattern in hard], list(names)])
    try:
        subprocess.run([sys.executable, "-I", "-S", "-c", TRY], input=request, text=True, timeout=PATIENCE, check=False,
                       capture_output=True)
    except subprocess.TimeoutExpired:
        key, pattern = max(hard, key=lambda pair: len(pair[1]))
        raise InputError(f"{key} '{pattern[:80]}' takes more than {PATIENCE:.0f} s to match the names of "
                         "this model's layers", where=where, fix="name the layers in a list") from None


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, dict | list | tuple | set) else [value]
    return [text for text in values if isinstance(text, str)]
