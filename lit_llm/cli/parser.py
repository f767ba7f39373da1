"""Parse options from the command line and YAML, and shorten jsonargparse's error messages to a line or two."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from lit_llm.cli import configs, settings
from lit_llm.errors import InputError, did_you_mean, did_you_mean_path
from lit_llm.system import class_paths, ranges
from lit_llm.system.private import others

# Names of the same options in other trainers.
ALIASES = {
    "learning_rate": "model.lr", "lr": "model.lr", "epochs": "trainer.max_epochs", "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs", "batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "micro_batch_size": "data.batch_size", "max_length": "data.seq_len", "max_seq_length": "data.seq_len",
    "sequence_len": "data.seq_len", "cutoff_len": "data.seq_len", "output_dir": "trainer.default_root_dir",
    "model_name_or_path": "model.base", "base_model": "model.base",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "lora_rank": "model.lora.r", "lora_r": "model.lora.r", "lora_alpha": "model.lora.alpha", "dataset": "data.sources",
    "datasets": "data.sources", "weight_decay": "model.weight_decay", "warmup_ratio": "model.warmup",
    "warmup_steps": "model.warmup", "lr_scheduler_type": "model.schedule", "max_grad_norm": "trainer.gradient_clip_val",
    "gradient_checkpointing": "model.gradient_checkpointing", "bf16": "trainer.precision", "fp16": "trainer.precision",
    "rank": "model.lora.r", "lora_dropout": "model.lora.dropout", "precision": "trainer.precision",
    "max_steps": "trainer.max_steps", "lrate": "model.lr", "seed": "seed_everything",
}
SOURCES = ("--data.sources", "--data.val_sources", "--data.test_sources", "--data.guard_sources")
UNKNOWN = (r"[Uu]nrecognized arguments: --([\w.+-]+)", r"Key ['\"]([\w.]+)['\"] is not expected",
           r"Option ['\"]([\w.]+)['\"] is not accepted", r"does not accept option ['\"]([\w.]+)['\"]",
           r"No action for key ['\"]([\w.]+)['\"]")
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null", "str": "a text",
         "list": "a list", "dict": "a mapping such as {key: value}"}


class ShortErrors:
    """Short error messages, as a mixin for the parsers of jsonargparse and Lightning."""

    prog: Any
    description: Any

    def parse_args(self, args: Any = None, *more: Any, **named: Any) -> Any:
        """Parse like jsonargparse, but also handle errors of Python's own conversions.

        Raises:
            InputError: A number has too many digits, or lists and mappings are nested too deeply.
        """
        try:
            return super().parse_args(args, *more, **named)  # type: ignore[misc]
        except (OverflowError, RecursionError) as error:
            long = [place for place, word in enumerate(args or ()) if re.search(r"\d{19}|[\[{]{50}", str(word))]
            option = str(args[max(0, long[0] - ("=" not in str(args[long[0]])))]) if long else "options"
            raise InputError("a number has too many digits" if isinstance(error, OverflowError)
                             else "lists and mappings are nested too deeply",
                             where=option.partition("=")[0].lstrip("-")) from None

    def format_help(self, *more: Any, **named: Any) -> str:
        """The help text, with the range of each number and whether a key may be null."""
        verb = str(self.prog).split()[-1].replace("-", "_")
        of_class = re.search(r"\.help=([\w.]+)\.(\w+)$", str(self.description))
        own = settings.names(getattr(sys.modules.get(of_class[1]), of_class[2], None)) if of_class else []
        for action in others.options(self):
            if not others.has_type(action) or hasattr(action, "range_help") or action.help is None:
                continue
            last = action.dest.rpartition(".")[2]
            keys = [f"{name}.{last}" for name in own]
            keys += [action.dest] if "." in action.dest else [f"{verb}.{action.dest}", action.dest]
            key = next((key for key in keys if ranges.of(key)), action.dest)
            required = action.required or action.default is None
            action.range_help = settings.help_of(key, others.type_of(action), required=required)
            action.help = (action.help or "") + action.range_help
        return super().format_help(*more, **named)  # type: ignore[misc]

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Print a few lines and exit with code 2, without the usage of 400 options."""
        if isinstance(kwargs.get("ex"), InputError):
            raise kwargs["ex"]
        raise InputError(explain(str(message), self.all_keys()))

    def all_keys(self) -> list[str]:
        """Keys of this parser and of its subcommands."""
        keys = [action.dest for action in others.options(self)]
        for verbs in others.options(self):                 # an action with parsers of its own
            for parser in verbs.choices.values() if isinstance(verbs.choices, dict) else ():
                keys += [action.dest for action in others.options(parser)]
        return sorted({key for key in keys if key and not key.startswith(("help", "print"))})


class ToolParser(ShortErrors, ArgumentParser):
    """jsonargparse's parser with short errors."""


def explain(message: str, keys: list[str]) -> str:
    """Shorten a message of jsonargparse, and suggest the key or value that was probably meant.

    >>> explain("Key 'model.lrr' is not expected", ["model.lr", "data.seq_len"])
    "unknown key 'model.lrr'. Did you mean 'model.lr'?"
    >>> explain('Parser key "data.packing": Expected a Literal["best_fit", "none"]. Got value: bestfit', [])
    "data.packing: 'bestfit' is not one of best_fit, none. Did you mean 'best_fit'?"
    """
    place = re.search(r"[Pp]arser key ['\"]([\w.]+)['\"]", message)
    where = f"{place[1]}: " if place else ""
    if match := re.search(r"(?:unknown key '|write a space after)[^\n]*", message):    # for a nested option
        return where + match[0]
    if place and (match := re.search(r"- (\w+: '[^\n]*' is no[^\n]*)", message)):
        return f"{place[1]}.{match[1]}"
    if match := re.search(r"ption '([\w.]+):(.+?)'(?: is not accepted|$)", message):
        return f"{where}write a space after the colon: {match[1].rpartition('.')[2]}: {match[2]}"
    if match := re.search(r"arguments are required: (?:\w+\.)??(\w+(?:\.\w+)?)(?:,|$)", message):
        return f"{match[1]} is not given; set it with --{match[1]}, or in a file that --config names"
    if match := re.search(r"[Uu]nrecognized arguments: (\S+\.ya?ml)\b", message):
        return f"unknown argument '{match[1]}'. Did you mean '--config {match[1]}'?"
    for pattern in UNKNOWN:
        if match := re.search(pattern, message):
            return unknown(match[1].rstrip("+"), where, keys)
    if match := re.search(r"Importing '([^']+)' is not allowed", message):
        names = [name for exported in class_paths.EXPORTS.values() for name in exported]
        return (f"{where}'{match[1]}' is not allowed; a class_path may name Lightning's callbacks, loggers, "
                "strategies, plugins and profilers, and those of lit_llm.training."
                f"{did_you_mean(match[1].rpartition('.')[2], names)}"
                + (f"\n  {way}" if (way := class_paths.how_to_open(match[1])) else ""))
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        has = [name for name in dir(sys.modules.get(match[1])) if name[0] != "_"]
        return f"{where}{match[1]} has no '{match[2]}'.{did_you_mean(match[2], has)}"
    if match := re.search(r"File does not exist: '(.*)'", message):
        return f"there is no file {match[1]}.{did_you_mean_path(match[1], others=configs.shipped())}"
    if match := re.search(r"Literal\[([^\]]*)\]\. Got value: (.*)", message):
        choices = [choice.strip("'\" ") for choice in match[1].split(",")]
        return f"{where}'{match[2]}' is not one of {', '.join(choices)}.{did_you_mean(match[2], choices)}"
    if match := re.search(r"Expected a (?:<class ')?(\w+)(?:'>)?\. Got value: (.*)", message):
        example = ", such as [{path: FILE}]" if where.endswith("sources: ") else ""
        came = "null" if match[2] == "None" else f"'{ranges.shown(match[2])}'"
        return f"{where}{came} is not {WORDS.get(match[1], match[1])}{example}{_takes(place and place[1])}"
    if place and (match := re.search(r"- (\w+) is not given; set it", message)):
        return f"{where}init_args.{match[1]} is not given"
    if match := re.search(r"Subtypes: \[(.*)\]\n(?:.|\n)*Given value: (.*)", message):
        kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", match[1])
        choices = re.findall(r"'([^']+)'", re.sub(r"<class '.*?'>", "", match[1]))
        fits = dict.fromkeys([*choices, *(WORDS.get(kind, kind) for kind in kinds)])
        came = ranges.shown(match[2])
        return (f"{where}'{came}' is not one of {', '.join(fits)}.{did_you_mean(came, choices)}"
                f"{_takes(place and place[1])}")
    if where.endswith("sources: "):                 # a file name, which was read as a config
        return f"{where}this is not a list of files, such as [{{path: FILE}}]"
    lines = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line.strip(" -")) for line in message.splitlines()]
    noise = r"[Pp]arser key ['\"][\w.]+['\"]:$|Errors:|Subtypes:|usage:"
    lines = [line for line in lines if line and not re.match(noise, line)]
    return "\n  ".join(line[:240] for line in [where + lines[0], *lines[1:4]]) if lines else message


def _takes(key: str | None) -> str:
    """The range of a key, as an additional line."""
    numbers = ranges.of(key or "")
    return f"\n  {key} takes {numbers}; for example --{key} {numbers.example}" if numbers else ""


def unknown(key: str, where: str, keys: list[str]) -> str:
    """The message for an unknown key, with the key that was probably meant."""
    if key in keys:
        return f"{where}this verb has no key '{key}'; other verbs have"
    elsewhere = get_close_matches(key.rsplit(".", 1)[-1], ALIASES, n=1, cutoff=0.9)     # also misspelt aliases
    if elsewhere and ALIASES[elsewhere[0]] != key:
        return f"{where}unknown key '{key}'. Did you mean '{ALIASES[elsewhere[0]]}'?"
    return f"{where}unknown key '{key}'.{did_you_mean(key, [*keys, *_nested()])}"


def _nested() -> list[str]:
    """Keys of `model.lora` and of the items of `data.sources`."""
    from lit_llm.data.records.sources import Source
    from lit_llm.models.adapters.peft_method import LoRA

    return [field.name for kind in (Source, LoRA) for field in fields(kind)]


def verb_first(args: Sequence[str], verbs: Sequence[str]) -> list[str]:
    """Move the verb before the config files, for users who type them in the other order.

    >>> verb_first(["--config", "a.yaml", "fit", "--model.lr", "1"], ["fit"])
    ['fit', '--config', 'a.yaml', '--model.lr', '1']
    """
    place = 0
    while place < len(args) and args[place].split("=")[0] in ("-c", "--config"):
        place += 1 if "=" in args[place] else 2
    if 0 < place < len(args) and args[place] in verbs:
        return [args[place], *args[:place], *args[place + 1:]]
    return list(args)


def with_whole_sources(args: Sequence[str]) -> list[str]:
    """Complete each typed source with all of its keys, so that it inherits none from a config file's source.

    jsonargparse fills the items of a typed list from those of a config file's list of the same length: a typed source
    would get the weight, columns or split of another file.

    Args:
        args: Arguments after `python -m lit_llm`.
    """
    from lit_llm.data.records.sources import Source

    defaults = {field.name: field.default_factory() if field.default is MISSING and field.default_factory is not MISSING
                else field.default for field in fields(Source) if field.name != "path"}
    whole = list(args)
    for place, word in enumerate(whole):
        option, equals, value = word.partition("=")
        at = place if equals else place + 1
        if option not in SOURCES or at >= len(whole):
            continue
        try:
            items = yaml.safe_load(value if equals else whole[at])
        except yaml.YAMLError:
            continue                                # the parser reports it
        if isinstance(items, list) and items and all(isinstance(item, dict) and "path" in item for item in items):
            text = json.dumps([item | {key: value for key, value in defaults.items() if key not in item}
                               for item in items])
            whole[at] = f"{option}={text}" if equals else text
    return whole
