"""Check durations in a config, such as `trainer.max_time`."""

import re
from datetime import timedelta
from typing import Any

from lit_llm.errors import InputError
from lit_llm.system import ranges

Duration = str | timedelta | dict[str, int]
UNITS = ("weeks", "days", "hours", "minutes", "seconds")
LONGEST = timedelta(days=36_500)


def check(where: str, value: Any) -> None:
    """Refuse a text or mapping that is not a duration; other values are not checked.

    Args:
        where: The key.
        value: `DD:HH:MM:SS`, or a mapping such as {hours: 12}.

    Raises:
        InputError: The error shows the value and the format.
    """
    if isinstance(value, str):
        parts = re.fullmatch(r"(\d{1,5}):([01]\d|2[0-3]):([0-5]\d):([0-5]\d)", value.strip())
        value, original = parts and dict(zip(UNITS[1:], map(int, parts.groups()), strict=True)), value
    elif isinstance(value, dict):
        original = value
    else:
        return
    is_valid = bool(value) and all(unit in UNITS and isinstance(count, int | float) and not isinstance(count, bool)
                                   and 0 <= count < 1e9 for unit, count in value.items())
    if not is_valid or timedelta(**value) > LONGEST:
        raise InputError(f"'{ranges.shown(original)}' is not a duration", where=where, fix="write it as DD:HH:MM:SS in "
                         f"quotes, \"00:12:00:00\", or as a mapping of {', '.join(UNITS)}: {{hours: 12}}")
