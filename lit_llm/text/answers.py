"""Which answers of a conversation are learned, and where they stand in its rendered text. Knows no token ids."""

from collections.abc import Sequence
from typing import Literal

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation
from lit_llm.text.templates.rendering import Rendered, Span

TrainOn = Literal["assistant", "last", "all"]
EMPTY = "an empty answer is not learned"                # said of what is left out
UNASKED = "an answer that begins the talk is not learned: there is no prompt for it"


def spans_of(rendered: Rendered, places: Sequence[int]) -> list[Span]:
    """Where the answers of these messages stand, as far as the text shows them as they are produced."""
    return [(start, stop) for place, start, stop in rendered.answers if place in places]


def hidden(place: int) -> InputError:
    """That a template does not show an answer that is not to be learned."""
    return InputError(f"the chat template does not show where the answer in message {place + 1} begins and stops: its "
                      "generation prompt is not what stands before the answer, or it writes no stop token")


def trained(conversation: Conversation, train_on: TrainOn, left_out: set[str]) -> list[int]:
    """Indices of the assistant messages to learn; why others are left out is added to `left_out`."""
    answers = []
    for place, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        if place and not message.is_empty:
            answers.append(place)
        elif message.train is not False:
            left_out.add(EMPTY if message.is_empty else UNASKED)
    default = {"assistant": answers, "last": answers[-1:], "all": answers}[train_on]
    flags = {place: conversation.messages[place].train for place in answers}
    return [place for place, flag in flags.items() if (place in default if flag is None else flag)]
