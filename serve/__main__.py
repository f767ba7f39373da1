"""`python -m serve --model DIR`: a command line in, a server until Ctrl-C or SIGTERM; mistakes end with code 2."""

import argparse
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError
from lit_llm.system import library_warnings, ranges
from lit_llm.system.threads import number

LOCAL = ("127.0.0.1",)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m serve", description="Serve a model: OpenAI's API and a chat page.")
    add = parser.add_argument
    add("--model", required=True, help="a run's folder (its export/ is taken), or any folder that transformers loads")
    add("--name", help="what clients call the model (default: the folder's name, or the run's)")
    add("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"), help="default: %(default)s")
    add("--port", default=8000, type=int, help=f"{ranges.of('serve.port')}, default: %(default)s")
    add("--api-key", action="append", default=[], help="let in only `Authorization: Bearer KEY`; may be given several "
        "times; $LIT_LLM_API_KEY is another way, which no process list shows")
    add("--allow-no-key", action="store_true", help="listen to other machines without a key")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto takes the checkpoint's own, default: %(default)s")
    add("--threads", default="auto", help="of a CPU: a number, or auto, which measures at the start which is fastest")
    add("--adapter", help="a PEFT adapter's folder to put on the model")
    add("--max-running", default=8, type=int, help="requests computed at a time, default: %(default)s")
    add("--max-waiting", default=64, type=int, help="requests that may wait; more get 429, default: %(default)s")
    add("--max-body-bytes", default=1_000_000, type=int, help="of a request; more gets 413, default: %(default)s")
    add("--drain-seconds", default=30, type=int, help="for answers still running at the end, default: %(default)s")
    add("--log-level", default="warning", choices=("critical", "error", "warning", "info", "debug"))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Check, load, serve."""
    options = parse(words)
    library_warnings.listen()
    try:
        server, settings = _build(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"error: {ranges.shown(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    _end_on_sigterm()
    from serve.server import end_children

    try:
        server.run(host=settings.host, port=settings.port, num_api_servers=1, log_level=settings.log_level,
                   generate_client_file=False)
    except KeyboardInterrupt:
        pass
    finally:
        end_children()


def _build(options: argparse.Namespace) -> tuple[Any, Any]:
    """The server and its settings.

    Raises:
        InputError: What was asked for cannot be.
    """
    keys = tuple(key for key in (*options.api_key, os.environ.get("LIT_LLM_API_KEY", "")) if key)
    if options.host not in LOCAL and not keys and not options.allow_no_key:
        raise InputError(f"{options.host} lets other machines in, and there is no key", where="--host",
                         fix="add --api-key KEY, or --allow-no-key if a proxy in front asks for one")
    for flag in ("port", "max_running", "max_waiting", "max_body_bytes", "drain_seconds"):
        ranges.check(f"serve.{flag}", getattr(options, flag), where=f"--{flag.replace('_', '-')}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        raise InputError(f"'{ranges.shown(options.device)}' is none of auto, cpu, mps, cuda, cuda:N", where="--device")
    if options.adapter is not None and not Path(options.adapter, "adapter_config.json").is_file():
        raise InputError(f"{ranges.shown(options.adapter)} holds no adapter_config.json, so it is no adapter",
                         where="--adapter", fix="give a folder in PEFT's format")
    if options.threads != "auto":
        number(options.threads)
    from lit_llm.inference.engine import model_folder

    model_folder(options.model)                     # before the seconds that LitServe takes to be imported
    from serve.line import Limits
    from serve.server import Settings, build

    limits = Limits(options.max_running, options.max_waiting, options.max_body_bytes)
    engine = {"device": options.device, "dtype": options.dtype, "adapter": options.adapter,
              "threads": options.threads}
    settings = Settings(options.model, options.name, options.host, options.port, keys, limits, engine,
                        options.log_level)
    server = build(settings)
    server.uvicorn_graceful_timeout = options.drain_seconds
    return server, settings


def _end_on_sigterm() -> None:
    """SIGTERM ends the main process as Ctrl-C does; LitServe alone would leave the other processes behind."""
    main_pid, asked = os.getpid(), False

    def end(signum: int, frame: Any) -> None:
        nonlocal asked
        if os.getpid() == main_pid and not asked:   # the forked processes inherit this; the main one ends them in order
            asked = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    logging.getLogger("litserve").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
