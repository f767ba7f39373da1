"""The verbs that read a run config: `fit validate test prepare inspect plan ...`, built on LightningCLI.

This module links config keys and defines what follows a verb; `main.py` reports errors.
"""

import json
import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import jsonargparse
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_llm.cli import configs, examples, pages, precheck, settings
from lit_llm.cli.parser import ShortErrors, ToolParser, with_whole_sources
from lit_llm.cli.summary import finish
from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.errors import InputError, missing_package
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.system import class_paths, ranges
from lit_llm.system.library_warnings import lower_loggers
from lit_llm.system.private import others
from lit_llm.training.checks import divergence, idle
from lit_llm.training.module import CausalLMModule
from lit_llm.training.parallel import named
from lit_llm.training.record.breakdowns import breakdown_of
from lit_llm.training.trainer import Trainer

NESTED = {"model.lora": LoRA, "data.sources": Source}       # keys that take a mapping, or a list of them
DESCRIPTIONS = {                                    # in place of Lightning's
    "seed_everything": "Seed of weights, dropout and order. true takes another one each time, false sets none.",
    "trainer.precision": "Number format of weights and computation. bf16-mixed: weights in float32, computation in "
                         "bfloat16; bf16-true: both in bfloat16; 16-mixed: computation in float16 with a loss scale "
                         "(CUDA); null is 32-true.",
    "trainer.devices": "Devices on this machine, or processes on a CPU. A number, a list of indices, -1 for all, or "
                       "auto.",
    "trainer.accumulate_grad_batches": "Micro-batches on each device for one optimizer step.",
    "trainer.gradient_clip_val": "Largest norm of the gradient. A larger gradient is scaled down; null clips none.",
}
REFUSED = ("overfit_batches", "reload_dataloaders_every_n_epochs", "gradient_clip_algorithm", "barebones")
BASES: dict[str, Any] = {"model": CausalLMModule, "data": TextDataModule}
CHECKING_VERBS = ("prepare", "inspect", "plan", "verify_resume", "selftest")     # verbs that do not train


class RunParser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser with short errors."""

    def instantiate(self, namespace: Any, *more: Any, **named: Any) -> Any:
        """As jsonargparse; which class is built for `model` and `data` was decided before, and is no argument of it."""
        cfg = namespace.clone()
        for part in BASES:
            cfg.pop(f"{part}.class_path", None)
        return super().instantiate(cfg, *more, **named)


class LitLLMCLI(LightningCLI):
    """The command line, with one config tree: `model`, `data`, `trainer`."""

    trainer: Trainer
    parser: RunParser
    named: ClassVar[dict[str, str]] = {}            # classes of the user: `model` and `data` -> path
    kinds: ClassVar[dict[str, Any]] = BASES         # and what is built for them

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verb -> arguments that the CLI provides."""
        lightnings = LightningCLI.subcommands()
        verbs = {verb: lightnings[verb] for verb in ("fit", "validate", "test")}
        return verbs | {verb: {"model", "datamodule"} for verb in CHECKING_VERBS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keys for classes of the user in place of ours, and the order in which numbers are tried."""
        for option in others.options(parser):
            others.try_whole_numbers_first(option)
        for part, base in BASES.items():
            usage = f"its arguments are keys of {part}, and its package is given with {class_paths.OPTION}"
            parser.add_argument(f"--{part}.class_path", type=str | None,
                                help=f"A subclass of lit_llm.{base.__name__}; {usage}.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check all values before using any."""
        super().parse_arguments(parser, args)
        verb = self.config["subcommand"]            # Lightning stores it only later
        for part in BASES:
            path = self.config[verb][part].class_path
            if path != self.named.get(part):
                raise InputError(f"'{path}' is in a config within another", where=f"{part}.class_path",
                                 fix="type it, or give it in the file that --config names")
        check_values(verb, self.config[verb], self.kinds)

    def _parse_ckpt_path(self) -> None:
        """Options and config files take precedence over a checkpoint's hyperparameters."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(str(error), where="seed_everything") from None

    def before_instantiate_classes(self) -> None:
        """Use the model's tokenizer unless another is set."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.base

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; errors of Lightning are user errors."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise refusal(error) from None

    def after_instantiate_classes(self) -> None:
        """Pass the config to the run folder."""
        assert self.subcommand is not None
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
        import yaml

        self.trainer.run.config = configs.run_settings(yaml.safe_load(text)[self.subcommand])

    def after_fit(self) -> None:
        """Export, compare answers, and print the next commands, on one process."""
        trainer = self.trainer
        if not (trainer.is_global_zero and trainer.exports and trainer.checkpoint_callbacks):  # fast_dev_run has none
            return
        finish(Path(self.trainer.default_root_dir), base=self.model.base, before=self.trainer.run.before,
               shown=examples.choose(self.datamodule))

    def after_validate(self) -> None:
        """Print the metrics."""
        self._print_figures("val")

    def after_test(self) -> None:
        """Print the metrics."""
        self._print_figures("test")

    def _print_figures(self, split: str) -> None:
        if not self.trainer.is_global_zero:
            return
        figures = self.trainer.run.after
        counts, breakdown = (f"{split}/tokens", f"{split}/documents"), breakdown_of(self.trainer, split)
        listed = {f"{split}/nll_low", f"{split}/nll_high", *(f"{split}/nll/{name}" for name in breakdown.sources())
                  } if breakdown else {}
        for name, value in sorted(figures.items()):
            if name not in listed:
                print(f"{name:<20} {value:,.0f}" if name in counts else f"{name:<20} {value:.9g}")
        if breakdown:                                   # for readers; stdout has a name and a value on each line
            print("\n".join(breakdown.lines(split)), file=sys.stderr, flush=True)
        if not divergence.are_finite(figures, split):
            raise InputError(f"perplexity is {figures.get(f'{split}/perplexity')}, so some weights are inf or nan, "
                             f"or exceed the range of {self.trainer.precision}",
                             where="model.base" if self.model.base else "model.init",
                             fix="set --trainer.precision 32-true, or evaluate another checkpoint or model")


def described() -> dict[str, Any]:
    """All keys and options with their types, defaults and descriptions, for `pages.py` and `precheck.py`.

    Those two may not import what this is derived from: the signatures and docstrings of the module, the data module,
    the trainer, its verbs, and the classes that a config may name. After one of them has changed:
    `python -c "from lit_llm.cli import runs; runs.write_keys()"`.

    Returns:
        `keys`: key -> entry; `nested`: keys below `model.lora` and in the items of `data.sources`; `verbs`: verb ->
        option -> entry; `classes`: class path -> its description and the entries of its arguments.
    """
    parsers: dict[str, Any] = {}

    class Stopped(LitLLMCLI):
        def parse_arguments(self, parser: object, args: object) -> None:
            for action in others.options(parser):          # one of them has a parser for each verb
                parsers.update(action.choices if isinstance(action.choices, dict) else {})
            raise StopIteration

    class_paths.restrict(jsonargparse, class_paths.allowed())
    with suppress(StopIteration):
        _built(Stopped, ["fit"])
    entries = {verb: _entries(parser) for verb, parser in parsers.items()}
    own = {verb: {key: entry for key, entry in entries_of_verb.items() if "." not in key and key not in configs.KEPT}
           for verb, entries_of_verb in entries.items()}
    nested = {name: entry for key, kind in NESTED.items() for name, entry in _entries(_parser_of(kind, key)).items()}
    classes = {}
    for package, names in class_paths.EXPORTS.items():
        for name in names:
            kind = getattr(import_module(package), name)
            classes[f"{package}.{name}"] = {"help": _first_paragraph(kind), "arguments": _entries(_parser_of(kind))}
    return {"keys": {key: entry for key, entry in entries["fit"].items() if key not in own["fit"]}, "nested": nested,
            "verbs": {verb.replace("_", "-"): options for verb, options in own.items()}, "classes": classes,
            "strategies": ["auto", *named.OWN, *StrategyRegistry.available_strategies()],
            "hidden": ["weights_only", *(f"trainer.{name}" for name in (*idle.IGNORED, *REFUSED))]}


def _parser_of(kind: type, key: str | None = None) -> ToolParser:
    """A parser whose options are the arguments of a class, below a key."""
    parser = ToolParser(description=f"--class.help={kind.__module__}.{kind.__name__}")     # where ranges are looked up
    parser.add_class_arguments(kind, key, fail_untyped=False, as_group=False)
    return parser


def _entries(parser: Any) -> dict[str, dict[str, Any]]:
    """Options of a parser: type, default, whether one must be given, and the description with the range of numbers."""
    for action in others.options(parser):
        action.help = DESCRIPTIONS.get(action.dest, action.help)
    parser.format_help()                            # adds the ranges
    entries = {}
    for action in others.options(parser):
        if others.has_type(action) and not action.dest.endswith(".help"):
            default = settings.plain(action.default)
            json_like = isinstance(default, bool | int | float | str | list | tuple | dict | None)
            entries[action.dest] = {"type": settings.spec_of(others.type_of(action)),
                                    "default": default if json_like else None, "required": action.required,
                                    "help": _plain(action.help)}
    return entries


def _plain(text: str | None) -> str:
    """Remove from a description the markup of Lightning's documentation, and the default, which is shown separately."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join((text or "").split()))
    return re.sub(r" ?Defaults?:? (to )?``[^`]*``\.?", "", text).replace("``", "`")


def _first_paragraph(kind: type) -> str:
    return _plain((kind.__doc__ or "").strip().split("\n\n")[0])


def write_keys() -> None:
    """Write `keys.json`."""
    pages.FILE.write_text(json.dumps(described(), indent=1) + "\n", encoding="utf-8")


def _built(kind: type[LitLLMCLI], args: list[str]) -> LitLLMCLI:
    return kind(kind.kinds["model"], kind.kinds["data"], trainer_class=Trainer, parser_class=RunParser,
                save_config_callback=None, seed_everything_default=42, auto_configure_optimizers=False,
                load_from_checkpoint_support=False, args=args,
                parser_kwargs={"allow_abbrev": False, "prog": "python -m lit_llm"})


def run(args: list[str]) -> None:
    """Run a verb that reads a run config.

    Args:
        args: The verb and its options.

    Raises:
        InputError: The options are wrong, according to this project or Lightning.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning on stdout when deepspeed is imported
    class_paths.restrict(jsonargparse, class_paths.allowed())
    lower_loggers()                                 # Lightning sets its own level when it is imported
    try:
        _built(_for_command(args[0], precheck.own_classes(args[1:])), with_whole_sources(configs.with_run_folder(args)))
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        if not (isinstance(error, MisconfigurationException) or _is_lightnings(error)):
            raise
        raise refusal(error) from None


def _for_command(verb: str, paths: dict[str, str]) -> type[LitLLMCLI]:
    """The command line with one verb, because building the parsers of all takes most of a second.

    Args:
        verb: The verb.
        paths: `model` and `data` -> class_path of a class of the user, whose arguments are keys.
    """
    classes = {part: class_paths.subclass(paths[part], base, f"{part}.class_path") if part in paths else base
               for part, base in BASES.items()}

    class Own(LitLLMCLI):
        named: ClassVar[dict[str, str]] = paths
        kinds: ClassVar[dict[str, Any]] = classes

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {verb: LitLLMCLI.subcommands()[verb]}

    return Own


def check_values(verb: str, config: object, classes: dict[str, Any] | None = None) -> None:
    """Refuse nulls and numbers that a key does not accept.

    Args:
        verb: The verb, whose own options are checked as well.
        config: The parsed config.
        classes: Of `model` and `data`; null takes ours.

    Raises:
        InputError: The error names the key and its allowed values.
    """
    values = settings.plain(config)
    kinds = {**(classes or BASES), "trainer": Trainer}
    settings.check(values, kinds)
    if (seed := values.get("seed_everything", 42)) is None:
        raise InputError("null is not a seed", where="seed_everything",
                         fix="--seed_everything 42; true uses a new seed each time, false sets none")
    ranges.check("seed_everything", seed)
    options = {name: value for name, value in values.items() if name not in ("config", "seed_everything", *kinds)}
    settings.check_arguments("", options, getattr(Trainer, verb), prefix=verb)


def refusal(error: BaseException) -> InputError:
    """The error of a constructor about its arguments, in one line."""
    if (missing := missing_package(error)) is not None:
        return missing.at("trainer")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reasons = [line.strip(" -") for line in lines[1:] if line.startswith("  - ") and "Expected a <class" not in line]
    reason = reasons[-1] if reasons else lines[0]
    where, colon, what = reason.partition(": ")
    at = where if colon and where.startswith("trainer.") else "trainer"
    return InputError((what if at != "trainer" else reason)[:300], where=at)


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning itself raised the error, which it does for inconsistent options."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("lightning.")
