"""Command line of the server, `python -m serve` or `lit-llm serve`, which runs until Ctrl-C or SIGTERM."""

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from lit_llm.errors import InputError, did_you_mean, missing_package
from lit_llm.system import library_warnings, ranges
from lit_llm.system.threads import number

LOCAL = ("127.0.0.1",)
NUMBERS = ("port", "max_running", "max_waiting", "max_body_bytes", "max_wait_seconds", "max_seconds", "request_seconds",
           "write_seconds", "keep_alive_seconds", "max_connections", "drain_seconds")


class Parser(argparse.ArgumentParser):
    """Prints a mistake in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        """Print it, with the option that was probably meant, and end with code 2."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = did_you_mean(unknown[1], re.findall(r"--[\w-]+", self.format_usage())) if unknown else ""
        print(f"error: {message}{near and '.' + near} ({self.prog} --help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: list[str] | None = None, program: str = "python -m serve") -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(program, description="Serve a model: OpenAI's API and a chat page.")
    add = parser.add_argument
    add("--model", required=True, help="a run folder (its export/ is used), or any folder that transformers loads")
    add("--name", action="append", default=[], help="model name in the API; may be given several times for aliases "
        "(default: the name of the folder or run)")
    add("--backend", metavar="URL", help="let another server compute the answers from token ids: the address of its "
        "API, for instance http://127.0.0.1:8001/v1, of vLLM, SGLang, llama.cpp or this server; the folder of --model "
        "then needs only its config and tokenizer; $LIT_LLM_BACKEND_KEY is the key of the other server")
    add("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"), help="default: %(default)s")
    add("--port", default=8000, type=int, help=f"{ranges.of('serve.port')}, default: %(default)s")
    add("--api-key", action="append", default=[], help="require `Authorization: Bearer KEY`; may be given several "
        "times; $LIT_LLM_API_KEY is an alternative that process lists do not show")
    add("--allow-no-key", action="store_true", help="accept requests of other machines without a key")
    add("--allowed-host", action="append", default=[], metavar="NAME", help="value of the Host header to serve besides "
        "localhost and the address itself; may be given several times")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="origin whose pages may use the API, for "
        "instance https://chat.example.org; may be given several times, default: none")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto uses the checkpoint's dtype, default: %(default)s")
    add("--threads", default="auto", help="number of CPU threads, or auto, which measures the fastest number at start")
    add("--adapter", action="append", default=[], help="FOLDER of a PEFT adapter to merge into the model; or "
        "NAME=FOLDER, several times, for LoRA adapters that are served beside the model, each as a model of its own")
    add("--quantize", choices=("nf4", "int8"), help="keep the weights of linear layers in 4 or 8 bits (bitsandbytes)")
    add("--max-running", default=32, type=int, help="requests computed concurrently, default: %(default)s")
    add("--max-waiting", default=64, type=int, help="requests that may wait; others get a 429, default: %(default)s")
    add("--max-body-bytes", default=1_000_000, type=int,
        help="size limit of a request; larger ones get status 413, default: %(default)s")
    add("--max-wait-seconds", default=300, type=int,
        help="time until a request's first token; then it fails with status 503, default: %(default)s")
    add("--max-seconds", default=3600, type=int,
        help="time for a whole request; then it fails with status 504, default: %(default)s")
    add("--request-seconds", default=30, type=int,
        help="time for a client to send a request; then the connection is closed, default: %(default)s")
    add("--write-seconds", default=60, type=int,
        help="time for a client to read a part of its answer; then the connection is closed, default: %(default)s")
    add("--keep-alive-seconds", default=75, type=int,
        help="time that an idle connection stays open, default: %(default)s")
    add("--max-connections", default=512, type=int,
        help="open connections; further ones get status 503, default: %(default)s")
    add("--drain-seconds", default=30, type=int, help="time for running answers at shutdown, default: %(default)s")
    add("--strict", action="store_true", help="refuse requests with unknown fields, which are ignored otherwise")
    add("--log-level", default="warning", choices=("critical", "error", "warning", "info", "debug"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, program: str = "python -m serve") -> None:
    """Check the options, load the model, and serve it.

    Args:
        argv: Options; null takes those of this process.
        program: Name of the command on the help page.
    """
    options = parse(argv, program)
    library_warnings.listen()
    # Read by OpenMP in the worker. By default its threads wait for each other at full load for milliseconds, which
    # delays the process of the requests: 32 clients beside two other programs on two cores got 3 tokens/s, now 180.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        server, settings = _build(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"error: {ranges.shown(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    from serve.lifecycle import end_children, end_on_signals

    end_on_signals(server)
    _log(settings.log_level)
    try:
        server.serve(settings.log_level)
    except KeyboardInterrupt:
        pass
    finally:
        end_children()



def _build(options: argparse.Namespace) -> tuple[Any, Any]:
    """Build the server and its settings.

    Raises:
        InputError: An option is invalid.
    """
    keys = tuple(key for key in (*options.api_key, os.environ.get("LIT_LLM_API_KEY", "")) if key)
    if options.host not in LOCAL and not keys and not options.allow_no_key:
        raise InputError(f"{options.host} accepts requests of other machines, but there is no API key", where="--host",
                         fix="add --api-key KEY, or --allow-no-key if a proxy in front requires one")
    for flag in NUMBERS:
        ranges.check(f"serve.{flag}", getattr(options, flag), where=f"--{flag.replace('_', '-')}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        raise InputError(f"'{ranges.shown(options.device)}' is not one of auto, cpu, mps, cuda, cuda:N",
                         where="--device")
    if options.backend is not None:
        _check_alone(options)
    merged, named = _adapters(options.adapter)
    if options.threads != "auto":
        number(options.threads)
    from lit_llm.inference.loading import model_folder

    model_folder(options.model)                     # before importing LitServe, which takes seconds
    from serve.engine_client import Limits
    from serve.http.gate import check_host, check_origin
    from serve.server import Network, Settings, build

    address = None
    if options.backend is not None:
        from serve.backend import KEY, Address

        address = Address.of(options.backend, os.environ.get(KEY, ""))
    for host in options.allowed_host:
        check_host(host)
    for origin in options.cors_origin:
        check_origin(origin)
    limits = Limits(options.max_running, options.max_waiting, options.max_body_bytes, options.max_wait_seconds,
                    options.max_seconds)
    network = Network(options.host, options.port, tuple(options.allowed_host), tuple(options.cors_origin),
                      options.keep_alive_seconds, options.request_seconds, options.write_seconds,
                      options.max_connections, options.drain_seconds)
    engine = {"device": options.device, "dtype": options.dtype, "adapter": merged, "adapters": named,
              "quantize": options.quantize, "threads": options.threads}
    settings = Settings(options.model, tuple(options.name), network, keys, limits, engine, options.log_level,
                        options.strict, address)
    return build(settings), settings


def _check_alone(options: argparse.Namespace) -> None:
    """Refuse options of the engine beside a backend.

    Raises:
        InputError: One is given.
    """
    for flag, neutral in (("adapter", []), ("quantize", None), ("device", "auto"), ("dtype", "auto"),
                          ("threads", "auto")):
        if getattr(options, flag) != neutral:
            raise InputError("has no effect with --backend, which loads the weights itself", where=f"--{flag}",
                             fix="leave it out, or give it to the backend")


def _adapters(texts: list[str]) -> tuple[str | None, dict[str, str]]:
    """The adapter to merge, and the named ones.

    Raises:
        InputError: A folder that is not an adapter, a name that is given twice, or both kinds together.
    """
    named = [re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", text) if not Path(text).is_dir() else None
             for text in texts]
    folders = [match[2] if match else text for match, text in zip(named, texts, strict=True)]
    for folder in folders:
        if not Path(folder, "adapter_config.json").is_file():
            raise InputError(f"{ranges.shown(folder)} has no adapter_config.json, so it is not an adapter",
                             where="--adapter", fix="give a folder in PEFT's format")
    names = [match[1] for match in named if match]
    if len(set(names)) < len(texts) > 1:
        raise InputError("several adapters need different names, and one without a name is merged into the model alone",
                         where="--adapter", fix="--adapter NAME=FOLDER for each")
    return (None, dict(zip(names, folders, strict=True))) if names else (folders[0] if folders else None, {})


def _log(level: str) -> None:
    """Write the server's own log to stderr: from level info on, a line for each request, without any content."""
    log = logging.getLogger("serve")
    log.setLevel(level.upper())
    log.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    logging.getLogger("litserve").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
