"""The `chat` verb: load a model or find a server, and talk."""

import sys
from typing import Any, Literal

from lit_llm.errors import InputError
from lit_llm.inference.chat import terminal
from lit_llm.inference.chat.commands import Commands
from lit_llm.inference.chat.remote import RemoteModel, check_options
from lit_llm.inference.chat.session import LocalModel, Model, Session
from lit_llm.inference.completion import TextEngine
from lit_llm.inference.loading import model_folder
from lit_llm.inference.sampling import DEFAULT_TEMPERATURE, SamplingParams
from lit_llm.inference.usage import read_usage


def chat(
    model: str | None = None,
    *,
    url: str | None = None,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = DEFAULT_TEMPERATURE,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: list[str] | None = None,
    seed: int | None = None,
    multi_turn: bool | Literal["auto"] = "auto",
    history: bool = True,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    template_args: dict[str, bool | int | float | str | list[str] | None] | None = None,
    threads: int | Literal["auto"] = "auto",
) -> None:
    """Chat with a model in the terminal: `lit-llm chat FOLDER`, or `lit-llm chat --url ADDRESS`.

    Answers are streamed. `exit`, `quit`, `退出`, `/bye` or Ctrl-D quit, Ctrl-C stops an answer, `/help` lists the
    commands. Piped lines are questions of their own, and only the answers are printed.

    Args:
        model: A run folder (its export/ is used), or any folder that transformers loads. With url, the name of the
            server's model; null takes the first one.
        url: Address of a server with OpenAI's API, such as http://127.0.0.1:8000/v1, instead of a folder. Its key is
            read from $LIT_LLM_API_KEY or $OPENAI_API_KEY.
        prompt: Answer this prompt and exit.
        system: System message at the start of every conversation.
        max_tokens: Maximum number of new tokens per answer; null uses the remaining context.
        temperature: 0 always picks the most likely token, so answers are reproducible; 0.7 gives more variety, 1
            samples from the model's own distribution.
        top_p: Sample from the most likely tokens whose probabilities sum to this value; 1 keeps all.
        top_k: Sample from this many most likely tokens; 0 keeps all.
        stop: An answer ends before the first of these strings.
        seed: Makes answers at temperatures above 0 reproducible; null uses a random seed.
        multi_turn: Whether a message is sent with the messages before it. `auto` does so in a terminal, unless the
            model card says that the model was trained on single questions; piped lines are sent alone.
        history: Keep typed lines for the next session, in lit_llm/chat_history in $XDG_STATE_HOME (or
            ~/.local/state), which only you can read.
        adapter: Folder of a PEFT adapter to apply to the model.
        device: `auto` uses the GPU if there is one; or cpu, cuda, mps.
        dtype: `auto` uses the checkpoint's dtype; or float32, bfloat16, float16.
        template_args: Values of the chat template's variables, such as `{enable_thinking: true}`; null uses those of
            the training.
        threads: Number of CPU threads. `auto` measures at start which number is fastest; on busy cores often 1.

    Raises:
        InputError: No such folder or server, no model in it, or a value out of its range.
    """
    params = SamplingParams(max_tokens, temperature, top_p, top_k, tuple(stop or ()), seed)
    if url is not None:
        check_options(adapter=adapter, device=device, dtype=dtype, threads=threads)
        answering: Model = RemoteModel(url, model, template_args)
        what, single_turn = f"{answering.name} at {url}", False
    else:
        answering = local = _load(model, template_args, device=device, dtype=dtype, adapter=adapter, threads=threads)
        what = f"{local.name}: context of {local.engine.engine.context_length} tokens"
        single_turn = read_usage(local.name).single_turn
    interactive = prompt is None and sys.stdin.isatty()
    session = Session(answering, params, system, note=terminal.note,
                      multi_turn=interactive and not single_turn if multi_turn == "auto" else multi_turn)
    if interactive:
        terminal.note(f"{what}. /help lists the commands; exit, quit, 退出 or Ctrl-D quits, Ctrl-C stops an answer.")
        if single_turn and multi_turn == "auto":
            terminal.note("This model was trained on single questions, so each message is sent alone; "
                          "/set multi_turn true changes it.")
    _talk(session, prompt, interactive=interactive, history=history)


def _talk(session: Session, prompt: str | None, *, interactive: bool, history: bool) -> None:
    """Answer the prompt, the lines that a user types, or the lines of a pipe."""
    try:
        if prompt is not None:
            terminal.show(session.ask(terminal.clean(prompt)), terminal=sys.stdout.isatty())
        elif interactive:
            terminal.converse(Commands(session, terminal.note), history=history)
        else:
            terminal.answer_lines(Commands(session, terminal.note))
    except BrokenPipeError:                         # `chat ... | head`: the reader has closed the pipe
        sys.stdout = None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _load(model: str | None, template_args: dict[str, Any] | None, **options: Any) -> LocalModel:
    """Load a model of this machine.

    Raises:
        InputError: No folder is given, or there is no model in it.
    """
    if model is None:
        raise InputError("no model was given", where="model",
                         fix="lit-llm chat FOLDER, or lit-llm chat --url http://127.0.0.1:8000/v1")
    folder = model_folder(model)
    from transformers.utils import logging

    logging.disable_progress_bar()
    engine = TextEngine.load(folder, **options)
    if engine.tokenizer.note:
        terminal.note(engine.tokenizer.note)
    if template_args:
        engine.tokenizer.check_template_args(template_args, "template_args")
    return LocalModel(engine, template_args, folder)
