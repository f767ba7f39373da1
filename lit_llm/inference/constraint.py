"""Constraints on the tokens of an answer, such as a JSON schema.

A request carries a description, because it may come from another process; the engine builds the constraint from it with
the factory that it was given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grammar:
    """Description of a constraint, which can be pickled.

    Args:
        kind: The language that `text` is written in; the factory knows its names.
        text: What the answer must satisfy.
        where: The field of the request that it comes from, for errors.
    """

    kind: str
    text: str
    where: str = "grammar"


class Constraint(Protocol):
    """The state of one answer; the engine queries it before each token and passes it the sampled token."""

    def allowed(self) -> "Tensor | None":
        """(V,) bool on the CPU, V being the model's vocabulary: true for each token that may come next.

        A token that ends the answer is among them where the text may end. Null allows all tokens.
        """

    def accept(self, token_id: int) -> None:
        """Continue the answer with this token. It is not called for the token that ends the answer."""


# Builds a constraint from its description and the number of tokens of the model's vocabulary; it raises an `InputError`
# for a description that it does not understand. A server pickles it for the engine's process.
Factory = Callable[[Grammar, int], Constraint]
