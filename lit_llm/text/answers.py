"""Select the answers of a conversation that are trained on, and find their spans in the rendered text."""

from collections.abc import Sequence
from typing import Literal

from lit_llm.errors import InputError
from lit_llm.text.conversation import Conversation
from lit_llm.text.templates.rendering import Rendered, Span

TrainOn = Literal["assistant", "last", "all"]
EMPTY_ANSWER = "an empty answer is not trained on"             # notes on answers that are left out
UNPROMPTED_ANSWER = "an answer that opens the conversation is not trained on: there is no prompt for it"


def answer_spans(rendered: Rendered, places: Sequence[int]) -> list[Span]:
    """Spans of the answers of these messages that the text shows exactly as the model would generate them."""
    return [(start, stop) for place, start, stop in rendered.answers if place in places]


def hidden_answer(place: int) -> InputError:
    """The error for an answer that must not be trained on, but whose place in the text the template does not show."""
    return InputError(f"the chat template does not show where the answer in message {place + 1} begins and ends: the "
                      "generation prompt differs from the text before the answer, or there is no stop token")


def trained_messages(conversation: Conversation, train_on: TrainOn, left_out: set[str]) -> list[int]:
    """Indices of the assistant messages to train on; the reasons for leaving others out are added to `left_out`."""
    answers = []
    for place, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        if place and not message.is_empty:
            answers.append(place)
        elif message.train is not False:
            left_out.add(EMPTY_ANSWER if message.is_empty else UNPROMPTED_ANSWER)
    default = {"assistant": answers, "last": answers[-1:], "all": answers}[train_on]
    flags = {place: conversation.messages[place].train for place in answers}
    return [place for place, flag in flags.items() if (place in default if flag is None else flag)]
