"""Tell clients and the server's log which fields of a request have no effect."""

import logging
from collections.abc import Sequence
from urllib.parse import quote

from serve.errors import ApiError

LOG = logging.getLogger("serve")
HEADER = "x-ignored-fields"
SHOWN = 16                                          # names in a header
CHARACTERS = 40                                     # of a name
LOGGED = 1000                                       # names that are logged, each once


class IgnoredFields:
    """Fields that clients send and the server does not know.

    Args:
        strict: Refuse them.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._logged: set[str] = set()

    def headers(self, names: Sequence[str]) -> dict[str, str]:
        """Headers of the response to a request with these fields; each name is logged once.

        Raises:
            ApiError: 400 if such fields are refused.
        """
        if not names:
            return {}
        # An empty name is shown as quotation marks, since a header must not end with a space.
        shown = [quote(name[:CHARACTERS], safe="._-") or '""' for name in names[:SHOWN]]
        if self.strict:
            raise ApiError(400, f"unknown field '{shown[0]}'; this server refuses fields that have no effect",
                           param=names[0][:CHARACTERS], code="unknown_parameter")
        new = [name for name in shown if name not in self._logged]
        if new and len(self._logged) < LOGGED:
            self._logged.update(new)
            LOG.warning("requests have fields without an effect: %s", ", ".join(new))
        return {HEADER: ", ".join([*shown, "..."] if len(names) > SHOWN else shown)}
