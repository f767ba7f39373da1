"""Regular expressions of an adapter's config in, refused where they are none or where matching them takes too long.

PEFT matches them with the name of every layer. A pattern like `(a+)+b` can take years,
and Python cannot stop it, so it is tried in a process of its own first.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lit_llm.errors import InputError

PATTERNS = ("target_modules", "exclude_modules", "target_parameters", "layers_pattern", "modules_to_save")
KEYS = ("rank_pattern", "alpha_pattern")            # of these mappings the keys are patterns
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
        keys: Of an adapter's config.
        names: Of the layers.
        where: The adapter's folder.

    Raises:
        InputError: It names the key and the pattern.
    """
    found = [(key, value) for key in PATTERNS for value in _texts(keys.get(key)) if isinstance(keys.get(key), str)]
    found += [(key, value) for key in KEYS for value in _texts(keys.get(key))]
    for key, pattern in found:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{key} is no regular expression: {error}", where=where) from None
    hard = [(key, pattern) for key, pattern in found if re.search(r"[*+{]", pattern)]
    if not hard:
        return
    given = json.dumps([[pattern for _, pattern in hard], list(names)])
    try:
        subprocess.run([sys.executable, "-I", "-S", "-c", TRY], input=given, text=True, timeout=PATIENCE, check=False,
                       capture_output=True)
    except subprocess.TimeoutExpired:
        key, pattern = max(hard, key=lambda pair: len(pair[1]))
        raise InputError(f"{key} '{pattern[:80]}' takes more than {PATIENCE:.0f} s to match with the names of "
                         "this model's layers", where=where, fix="name the layers in a list") from None


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, dict | list | tuple | set) else [value]
    return [each for each in values if isinstance(each, str)]
