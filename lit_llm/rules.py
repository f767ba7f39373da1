"""Rules of incompatible features: a pair of features, and the error or warning for a run that has both.

Tables of rules are data: `lit_llm/data/idle.py` has those among keys of the data, `lit_llm/training/rules/table.py` all
of them. `lit_llm/training/rules/matrix.py` prints them into a README.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llm.errors import InputError

log = logging.getLogger(__name__)
Features = Mapping[str, Callable[[Any], bool]]      # name, as the support matrix shows it -> whether a setup has it


@dataclass(frozen=True)
class Rule:
    """Two incompatible features.

    Attributes:
        first: Name of a feature.
        second: Name of the other one.
        why: The reason. Like `where` and `fix`, it can contain attributes of the setup: "{s.schedule}".
        where: The key that the error names.
        fix: What to type instead.
        refused: Whether the run is refused; otherwise it continues with a warning that the key has no effect.
    """

    first: str
    second: str
    why: str
    where: str
    fix: str = ""
    refused: bool = True

    def error(self, setup: object = None, *, where: str | None = None) -> InputError:
        """The error of a setup that has both features.

        Args:
            setup: What the texts show.
            where: A more specific place than the key.
        """
        return InputError(self.why.format(s=setup), where=where or self.where.format(s=setup),
                          fix=self.fix.format(s=setup))


def check(rules: Iterable[Rule], features: Features, setup: object) -> None:
    """Refuse a setup that has both features of a rule, and warn where a rule refuses nothing.

    Args:
        rules: In the order in which they are checked.
        features: Features that this setup determines; rules of other features are skipped.
        setup: What the features look at.

    Raises:
        InputError: Of the first rule that refuses it.
    """
    has: dict[str, bool] = {}                       # a feature is asked for once, the second after the first

    def is_there(name: str) -> bool:
        if name not in has:
            has[name] = name in features and features[name](setup)
        return has[name]

    for rule in rules:
        if is_there(rule.first) and is_there(rule.second):
            if rule.refused:
                raise rule.error(setup)
            log.warning("%s: %s", rule.where.format(s=setup), rule.why.format(s=setup))
