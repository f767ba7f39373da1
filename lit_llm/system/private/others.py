"""Private names of argparse, jsonargparse, datasets, Jinja and torchmetrics."""

from typing import Any


def options(parser: object) -> list[Any]:
    """The options of a parser of argparse, including those with parsers of their own."""
    return list(getattr(parser, "_actions", ()))


def has_type(option: object) -> bool:
    """Whether jsonargparse checks the values of an option by an annotation."""
    return hasattr(option, "_typehint")


def type_of(option: Any) -> Any:
    """The annotation of an option."""
    return option._typehint


def fingerprint(dataset: Any) -> str:
    """A name of the contents of a data set of the datasets library."""
    return str(dataset._fingerprint)


def first_argument(jinja_filter: Any) -> str:
    """What Jinja passes to a filter before its value: `context`, `eval_context`, `environment`, or nothing."""
    from jinja2.utils import _PassArg

    wanted = _PassArg.from_obj(jinja_filter)
    return "" if wanted is None else wanted.name


def is_synchronized(metric: Any) -> bool:
    """Whether a metric of torchmetrics sums its states over processes when it is computed."""
    return bool(metric._to_sync)
