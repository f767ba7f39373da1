"""What answers the prompts of a file: a model of this machine, loaded when it is needed, or a server."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lit_llm import names
from lit_llm.errors import InputError
from lit_llm.evaluation.answers.prompts import Prompt
from lit_llm.inference import loading
from lit_llm.inference.chat.remote import RemoteModel
from lit_llm.inference.completion import Completion, TextEngine
from lit_llm.inference.engine import Engine, budget
from lit_llm.inference.sampling import SamplingParams
from lit_llm.system import origin
from lit_llm.text.conversation import Document
from lit_llm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to generate.

    Args:
        prompt: The prompt.
        sample: Number of the answer to this prompt, from 0.
        encoded: Token ids of the prompt, or for a server its messages.
        params: Sampling settings, with the answer's own seed.
        fingerprint: Hash of the prompt, the model and the settings.
    """

    prompt: Prompt
    sample: int
    encoded: Any
    params: SamplingParams
    fingerprint: str


class Answering(Protocol):
    """A model of this machine, or of a server."""

    name: str

    @property
    def identity(self) -> str:
        """What distinguishes its answers from those of other models, for fingerprints."""

    def encode(self, prompt: Prompt) -> Any:
        """What the model reads for a prompt.

        Raises:
            InputError: It leaves no room for an answer; located at the prompt.
        """

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        """Generate answers, in the order in which they end."""


class LocalModel:
    """A model of this machine; its weights are loaded when the first answer is generated.

    Args:
        name: A run, a folder that transformers loads, or a hub id.
        adapter: Folder of a PEFT adapter to merge into it.
        device: As in `Engine.load`.
        dtype: As in `Engine.load`.
        threads: As in `Engine.load`.
        max_running: As in `Engine`.
        template_args: Values of the chat template's variables, which are checked here.

    Raises:
        InputError: No model there, or a wrong variable.
    """

    def __init__(self, name: str, *, adapter: str | None, device: str, dtype: str, threads: int | str,
                 max_running: int, template_args: Mapping[str, Any] | None) -> None:
        self.name, self._folder, self._adapter = name, loading.model_folder(name), adapter
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads,
                                         "max_running": max_running}
        self.tokenizer = Tokenizer.load(loading.tokenizer_folder(self._folder, adapter))
        if template_args:
            self.tokenizer.check_template_args(template_args, "template_args")
        self.context_length, _ = loading.sizes(self._folder, adapter)
        self.note = self.tokenizer.note

    @property
    def identity(self) -> str:
        """Hashes of the weights, of the adapter and of the tokenizer, and the dtype."""
        parts = [self._options["dtype"], self.tokenizer.fingerprint, self._folder]
        for place in [self._folder, *([self._adapter] if self._adapter else [])]:
            path = Path(names.resolve(place))
            if (content := origin.content_hash(place)) is not None:
                parts[2:] = [*parts[3:], content]   # a moved folder is the same model
            if (config := path / "adapter_config.json").is_file():
                parts.append(hashlib.sha256(config.read_bytes()).hexdigest())
        return json.dumps(parts)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, by the template of the training."""
        try:
            if isinstance(prompt.content, Document):
                ids: list[int] = self.tokenizer.encode_document(prompt.content, end=False).input_ids.tolist()
            else:
                ids = self.tokenizer.encode_prompt(prompt.content)
            budget(len(ids), SamplingParams(), self.context_length)
        except InputError as error:
            raise InputError(error.what, where=prompt.place, fix=error.fix) from None
        return ids

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        """Generate answers in batches; an answer gets what room the context has, up to `max_tokens`."""
        if not requests:
            return
        from transformers.utils import logging

        logging.disable_progress_bar()
        engine = TextEngine(Engine.load(self._folder, adapter=self._adapter, **self._options), self.tokenizer)
        for number, answer in engine.generate_many((request.encoded, self._within(request)) for request in requests):
            yield requests[number], answer

    def _within(self, request: Request) -> SamplingParams:
        room = self.context_length - len(request.encoded)
        return replace(request.params, max_tokens=min(room, request.params.max_tokens or room))


class ServedModel:
    """A model of a server with OpenAI's API.

    Args:
        url: Its address.
        name: The model's name there; null takes the first one.
        max_running: Requests that are sent at a time.
        template_args: Values of the chat template's variables.

    Raises:
        InputError: No server answers there.
    """

    note = ""

    def __init__(self, url: str, name: str | None, *, max_running: int,
                 template_args: Mapping[str, Any] | None) -> None:
        self._model, self._max_running = RemoteModel(url, name, template_args), max_running
        self.name = self._model.name
        self.identity = json.dumps([self._model.url, self.name, dict(template_args or {})])

    def encode(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The messages, which the server renders.

        Raises:
            InputError: A prompt that is not only messages; located at the prompt.
        """
        content = prompt.content
        if isinstance(content, Document) or content.tools or content.template_args:
            what = "a text to continue" if isinstance(content, Document) else "tools or template variables of its own"
            raise InputError(f"this record has {what}, which are not sent to a server", where=prompt.place,
                             fix="give the model's folder instead of --url")
        return content.to_openai()

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        """Send several requests at a time."""
        waiting, running = iter(requests), dict[Future[Completion], Request]()
        with ThreadPoolExecutor(self._max_running) as pool:
            try:
                while True:
                    while len(running) < self._max_running and (request := next(waiting, None)) is not None:
                        running[pool.submit(self._answer, request)] = request
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        request = running.pop(future)
                        yield request, future.result()
            finally:
                for future in running:
                    future.cancel()

    def _answer(self, request: Request) -> Completion:
        content = request.prompt.content
        assert not isinstance(content, Document), "refused by encode"
        try:
            pieces = list(self._model.stream(content.messages, request.params, alone=True))
        except InputError as error:
            raise InputError(error.what, where=request.prompt.place, fix="") from None
        reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
        last = pieces[-1]
        return Completion("".join(piece.text for piece in pieces), (), reasons[-1] if reasons else None,
                          last.prompt_tokens, last.completion_tokens)


def requests(prompts: Sequence[Prompt], model: Answering, params: SamplingParams, n: int, *,
             skip_overlong: bool = False) -> list[Request]:
    """All answers that a model is to generate.

    An answer's seed depends on the seed of the user, the prompt and the number of the answer, and not on the place of
    the prompt in the file; a prompt that occurs again gets another one.

    Args:
        prompts: The prompts.
        model: What answers them.
        params: Sampling settings.
        n: Answers to each prompt.
        skip_overlong: Leave out prompts that leave no room for an answer, instead of an error.

    Raises:
        InputError: Located at the prompt.
    """
    identity, seen, out = model.identity, dict[str, int](), list[Request]()
    for prompt in prompts:
        try:
            encoded = model.encode(prompt)
        except InputError as error:
            if skip_overlong and "leaves no room" in error.what:
                continue
            raise
        text = json.dumps(encoded, ensure_ascii=False)
        repeated = seen[text] = seen.get(text, -1) + 1
        for sample in range(n):
            own = hashlib.sha256(json.dumps([params.seed, text, repeated, sample]).encode("utf-8", "replace")).digest()
            seeded = replace(params, seed=None if params.greedy else int.from_bytes(own[:4], "big") >> 1)
            facts = json.dumps([identity, text, str(seeded), repeated, sample])
            fingerprint = hashlib.sha256(facts.encode("utf-8", "replace")).hexdigest()[:24]
            out.append(Request(prompt, sample, encoded, seeded, fingerprint))
    return out
