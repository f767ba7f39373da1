"""Private names of argparse, jsonargparse, datasets, Jinja and torchmetrics."""

from typing import Any, Union, get_args, get_origin


def options(parser: object) -> list[Any]:
    """The options of a parser of argparse, including those with parsers of their own."""
    return list(getattr(parser, "_actions", ()))


def has_type(option: object) -> bool:
    """Whether jsonargparse checks the values of an option by an annotation."""
    return hasattr(option, "_typehint")


def type_of(option: Any) -> Any:
    """The annotation of an option."""
    return option._typehint


def try_whole_numbers_first(option: Any) -> None:
    """Let an option that takes an int or a float read `1` as an int: `limit_val_batches` is 1 batch, and not 1.0, all.

    `typing` has one `Union` for both orders, so that of Lightning's annotations is the one that any library has used
    first in the process; httpx's is the other.
    """
    kinds = list(get_args(option._typehint)) if has_type(option) and get_origin(option._typehint) is Union else []
    if int in kinds and float in kinds and kinds.index(float) < kinds.index(int):
        kinds.remove(int)
        kinds.insert(kinds.index(float), int)
        option._typehint = Union[tuple(kinds)]      # noqa: UP007  (of a number of types that is not known here)


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
