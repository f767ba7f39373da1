"""Dispatch the verbs of the command line, and report user errors in a few lines.

The verbs in `RUNS` read a run config (`runs.py`); `export` and `chat` read a folder. Each verb's code is imported only
when it is needed, so that `--help` and a mistyped verb are fast.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from lit_llm import disk
from lit_llm.cli import configs, pages, settings
from lit_llm.cli.parser import ToolParser, verb_first
from lit_llm.errors import InputError, did_you_mean, missing_package
from lit_llm.system import class_paths, library_warnings, ranges
from lit_llm.system.private import torch as torch_private
from lit_llm.system.redaction import redact_text

RUNS = {
    "fit": "Train, evaluate and export a model: pretraining, full fine-tuning or adapters.",
    "validate": "Measure perplexity on the validation data, for the base or a checkpoint.",
    "test": "Measure perplexity on the test data.",
    "prepare": "Tokenize the data of a run into the cache, and print statistics.",
    "inspect": "Show the tokens and the loss mask of a run's data, and which records were dropped and why.",
    "plan": "Estimate a run before training: memory, steps, FLOPs, disk, and settings that fit.",
    "verify-resume": "Verify with a run's config that an interrupted run resumes bit-identically.",
    "selftest": "Verify with a run's config that batch size, packing and processes do not change the gradient.",
}
TOOLS = {
    "export": ("lit_llm.exports.command:export",
               "Write a run's model as a folder that transformers loads, or as a GGUF file for llama.cpp."),
    "chat": ("lit_llm.inference.chat.command:chat", "Chat with a model in the terminal."),
    "evaluate": ("lit_llm.evaluation.command:evaluate",
                 "Measure perplexity of models on texts, with intervals: evaluate FOLDER --data FILE."),
    "generate": ("lit_llm.evaluation.answers.command:generate",
                 "Answer the prompts of a file and score the answers: generate FOLDER --data FILE --out FILE."),
    "report": ("lit_llm.report.writing:report", "Write the report of a run, or compare several: report runs/a runs/b."),
}
FOLDERS = {"export": "--run", "chat": "--model"}        # the option that a first word without a name stands for
LISTS = {"report": ("runs",), "evaluate": ("models", "data", "tasks"),  # options with several words; the first needs no
         "generate": ("models", "stop", "scores")}                      # name
SERVE = {"serve": "Serve a model over HTTP: OpenAI's API and a chat page. The same as python -m serve."}
HELP = """usage: python -m lit_llm VERB [options]

Train, evaluate, export and chat with language models.

verbs that read a run config (python -m lit_llm fit --config configs/sft.yaml):
{runs}

verbs that read a folder:
{tools}

python -m lit_llm VERB --help shows the most common options of a verb, VERB --help all every one; a verb without options
names the configs that ship with the package.
fit --allow PACKAGE (typed only) also builds callbacks, loggers, modules and data modules of your own package.
fit --trust-checkpoint (command line only) also loads checkpoints with pickled objects, which can run any program."""
NOT_ENOUGH_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
MEMORY = """there is not enough memory for the batch
  halve data.batch_size and double trainer.accumulate_grad_batches (the same step), lower data.seq_len,
  set model.gradient_checkpointing: true, or split the model with trainer.strategy: deepspeed_stage_3;
  `python -m lit_llm plan` with the options of this run shows which of these would fit"""
DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
        errno.EISDIR)
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)


def main(args: list[str] | None = None) -> None:
    """Run a verb; user errors print a few lines on stderr and exit with code 2."""
    library_warnings.listen()
    args = verb_first(sys.argv[1:] if args is None else args, [*RUNS, *TOOLS])
    try:
        _dispatch(args)
    except InputError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _refuse("stopped", code=130)
    except MemoryError:
        _refuse(MEMORY)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in NOT_ENOUGH_MEMORY):
            raise
        _refuse(MEMORY)
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        _refuse(str(missing))
    except BrokenPipeError:                         # whoever reads the output, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        name = error.filename2 or error.filename
        if error.errno in NO_PATH:
            _refuse(f"{ranges.shown(name)}: {error.strerror}\n  give a shorter path")
        if not disk.is_full(error) and (error.errno not in (*DISK, *disk.GONE) or not name):
            raise
        remedy = disk.remedy(error, Path(str(name)).parent if name else Path.cwd())
        _refuse(f"{name or 'writing'}: {error.strerror}\n  {remedy}, or write elsewhere: --trainer.default_root_dir")
    except Exception as error:
        if disk.is_full(error):                     # libraries in Rust and C++ raise other errors
            _refuse(f"{str(error).splitlines()[0][:200]}\n  free some space, or write elsewhere")
        if not type(error).__module__.startswith("wandb."):
            raise
        _refuse(f"trainer.logger: wandb: {str(error).splitlines()[0][:300]}\n"
                "  without an account: --trainer.logger.init_args.offline true; with one: wandb login")


def _dispatch(args: Sequence[str]) -> None:
    verb, *options = args or [""]
    if verb in ("-h", "--help"):
        print(HELP.format(runs=_table(RUNS), tools=_table({name: what for name, (_, what) in TOOLS.items()} | SERVE)))
        raise SystemExit(0)
    if verb in SERVE:
        import_module("serve.__main__").main(options, "python -m lit_llm serve")
        return
    if verb not in RUNS and verb not in TOOLS:
        verbs = [*RUNS, *TOOLS, *SERVE]
        came = f"unknown verb '{verb}'" if verb else "no verb was given"
        raise InputError(f"{came}; use one of {', '.join(verbs)}.{did_you_mean(verb, verbs)}",
                         fix="python -m lit_llm --help describes them")
    options = class_paths.open_typed(options)
    if class_paths.opened and verb in TOOLS:
        raise InputError(f"{verb} builds no class that a config names", where=class_paths.OPTION, fix="leave it out")
    if verb in RUNS and not options:
        print(f"error: {configs.listing(verb)}", file=sys.stderr)
        raise SystemExit(2)
    if (verb in RUNS and (subject := pages.requested(options)) is not None
            and (text := pages.page(verb, subject, RUNS[verb], list(configs.shipped()))) is not None):
        print(text, flush=True)
        raise SystemExit(0)
    import jsonargparse

    class_paths.restrict(jsonargparse, [])          # `runs.py` allows the classes of a run
    options = configs.with_shipped(options)
    configs.check_configs(options)
    if verb in TOOLS:
        if verb == "evaluate":
            options = import_module("lit_llm.evaluation.tasks.code").typed(options)
        _tool(verb, options)
    else:
        from lit_llm.cli import precheck

        precheck.check(verb, options)
        from lit_llm.cli.runs import run

        run([verb.replace("-", "_"), *_trusting(options)])


def _trusting(options: list[str]) -> list[str]:
    """Remove `--trust-checkpoint`, which only the command line may set, and activate it."""
    from lit_llm.training.parallel import safe_load

    os.environ.pop(safe_load.TRUST, None)
    if safe_load.OPTION in options:
        os.environ[safe_load.TRUST] = "1"
        print(f"{safe_load.OPTION}: the checkpoint's files are loaded with pickle and can run any program with your "
              "rights", file=sys.stderr)
    return [option for option in options if option != safe_load.OPTION]


def _tool(verb: str, options: list[str]) -> None:
    """Call a function whose arguments are the options."""
    module, _, name = TOOLS[verb][0].partition(":")
    function = getattr(import_module(module), name)
    if verb in LISTS:
        options = _with_lists(options, LISTS[verb])
    elif options and not options[0].startswith("-"):
        options = [FOLDERS[verb], *options]
    parser = ToolParser(prog=f"python -m lit_llm {verb}", description=TOOLS[verb][1], allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML with this verb's options")
    parser.add_function_arguments(function, as_group=False)
    arguments = parser.parse_args(_with_flags(options, function)).as_dict()
    arguments.pop("config", None)
    settings.check_plain(arguments)
    settings.check_arguments("", arguments, function, prefix=verb)
    result = function(**arguments)
    if result is not None:
        print(result)
    if verb == "export" and (result / "config.json").is_file():
        from lit_llm.report.commands import for_many_users

        if line := for_many_users(result):
            print(line, file=sys.stderr)


def _with_lists(options: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words after each of some options as its list; those in front of all options belong to the first one.

    >>> _with_lists(["runs/a", "runs/b", "--out", "x.html"], ["runs"])
    ['--runs=["runs/a", "runs/b"]', '--out', 'x.html']
    >>> _with_lists(["runs/a", "--data", "a.jsonl", "b.txt"], ["models", "data"])
    ['--models=["runs/a"]', '--data=["a.jsonl", "b.txt"]']
    """
    rest = [f"--{names[0]}", *options] if not options or not options[0].startswith("-") else list(options)
    out: list[str] = []
    while rest:
        word = rest.pop(0)
        out.append(word)
        if word.removeprefix("--") in names:
            words = list(takewhile(lambda word: not word.startswith("-"), rest))
            if len(words) != 1 or not words[0].startswith("["):         # a list in JSON is already one
                out[-1] = f"{word}={json.dumps(words)}"
                del rest[:len(words)]
    return out


def _with_flags(options: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Options with `=true` after each flag that has no value, such as --adapter."""
    flags = {f"--{name}" for name, kind in get_type_hints(function).items() if kind is bool}
    following = [*options[1:], "--"]
    return [f"{word}=true" if word in flags and after.startswith("-") else word
            for word, after in zip(options, following, strict=True)] if options else []


def _table(verbs: dict[str, str]) -> str:
    return "\n".join(f"    {name:<13} {what}" for name, what in verbs.items())


def _refuse(message: str, code: int = 2) -> NoReturn:
    if _speaks_for_all():
        lines = redact_text(message).splitlines()[:6]
        print("error: " + "\n".join(lines), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _speaks_for_all() -> bool:
    """Whether this process reports an error: rank 0, or the first other rank if rank 0 has no error."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    store = torch_private.default_store()
    try:
        if distributed.get_rank() == 0:
            store.set("lit_llm refused", "")
            return not store.check(["lit_llm told"])
        for _ in range(20):                         # rank 0 may be about to report it
            if store.check(["lit_llm refused"]):
                return False
            time.sleep(0.1)
        return bool(store.add("lit_llm told", 1) == 1)
    except RuntimeError:                            # rank 0, which hosts the store, has ended
        return False
