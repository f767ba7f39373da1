"""A run config in, its verb done: `fit validate test prepare inspect plan ...`, which are LightningCLI's.

Knows the links between config keys and what follows a verb; errors are `main.py`'s.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_llm.cli import examples, precheck, runconfig, settings
from lit_llm.cli.parser import ShortErrors, with_whole_sources
from lit_llm.cli.summary import finish
from lit_llm.data.datamodule import TextDataModule
from lit_llm.errors import InputError
from lit_llm.system import class_paths, ranges
from lit_llm.system.library_warnings import lower_loggers
from lit_llm.training.checks import divergence
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer

LOOKS = ("prepare", "inspect", "plan", "verify_resume", "selftest")     # verbs that train nothing of the run


class RunParser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser with short errors."""


class LitLLMCLI(LightningCLI):
    """The command line. One config tree: `model`, `data`, `trainer`."""

    trainer: Trainer
    parser: RunParser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verb -> arguments that the CLI fills in itself."""
        lightnings = LightningCLI.subcommands()
        ours = {verb: lightnings[verb] for verb in ("fit", "validate", "test")}
        return ours | {verb: {"model", "datamodule"} for verb in LOOKS}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse values that no key takes before anything is done with one."""
        super().parse_arguments(parser, args)
        verb = self.config["subcommand"]            # which Lightning keeps only later
        check_values(verb, self.config[verb])

    def _parse_ckpt_path(self) -> None:
        """What is typed and what stands in the file wins over what a checkpoint remembers."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(str(error), where="seed_everything") from None

    def before_instantiate_classes(self) -> None:
        """The tokenizer is the model's unless another is named."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.base

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what Lightning refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise refusal(error) from None

    def after_instantiate_classes(self) -> None:
        """Give the run folder the config it is to keep."""
        assert self.subcommand is not None
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
        import yaml

        self.trainer.run.config = runconfig.kept(yaml.safe_load(text)[self.subcommand])

    def after_fit(self) -> None:
        """Export, compare, and say what to type next; on one process."""
        trainer = self.trainer
        if not (trainer.is_global_zero and trainer.exports and trainer.checkpoint_callbacks):  # fast_dev_run has none
            return
        finish(Path(self.trainer.default_root_dir), base=self.model.base, before=self.trainer.run.before,
               shown=examples.choose(self.datamodule))

    def after_validate(self) -> None:
        """The figures on stdout."""
        self._print_figures("val")

    def after_test(self) -> None:
        """The figures on stdout."""
        self._print_figures("test")

    def _print_figures(self, split: str) -> None:
        if not self.trainer.is_global_zero:
            return
        figures = self.trainer.run.after
        for name, value in sorted(figures.items()):
            print(f"{name:<20} {value:,.0f}" if name.endswith("/tokens") else f"{name:<20} {value:.9g}")
        if not divergence.are_finite(figures, split):
            raise InputError(f"perplexity is {figures.get(f'{split}/perplexity')}, so weights of the model are inf or "
                             f"nan, or do not fit {self.trainer.precision}",
                             where="model.base" if self.model.base else "model.init",
                             fix="set --trainer.precision 32-true, or measure another checkpoint or model")


def keys() -> list[str]:
    """All keys that the verbs of a run take, for `precheck.py`, which may not import what knows them.

    After a key is added: `python -c "from lit_llm.cli import runs; runs.write_keys()"`.
    """
    found: list[str] = []

    class Stopped(LitLLMCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.extend(key for key in parser.known() if not key.endswith(".help"))
            raise StopIteration

    class_paths.restrict(jsonargparse, class_paths.allowed())
    with suppress(StopIteration):
        _built(Stopped, ["fit"])
    return sorted(set(found))


def write_keys() -> None:
    """Write `keys.json` anew."""
    precheck.FILE.write_text(json.dumps(keys(), indent=1) + "\n", encoding="utf-8")


def _built(kind: type[LitLLMCLI], args: list[str]) -> LitLLMCLI:
    return kind(CausalLMModule, TextDataModule, trainer_class=Trainer, parser_class=RunParser,
                save_config_callback=None, seed_everything_default=42, auto_configure_optimizers=False,
                load_from_checkpoint_support=False, args=args,
                parser_kwargs={"allow_abbrev": False, "prog": "python -m lit_llm"})


def run(args: list[str]) -> None:
    """Do a verb that reads a run config.

    Args:
        args: The verb and its options.

    Raises:
        InputError: What the user, or Lightning, finds wrong with the options.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a warning on stdout, whoever imports deepspeed first
    class_paths.restrict(jsonargparse, class_paths.allowed())
    lower_loggers()                                 # Lightning has set its own level when it was imported
    try:
        _built(LitLLMCLI, with_whole_sources(runconfig.located(args)))
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        if not (isinstance(error, MisconfigurationException) or _is_lightnings(error)):
            raise
        raise refusal(error) from None


def check_values(verb: str, config: Any) -> None:
    """Refuse nulls and numbers that a key does not take.

    Args:
        verb: Its own options are checked too.
        config: As it was parsed.

    Raises:
        InputError: It names the key and what it takes.
    """
    given = settings.plain(config)
    kinds = {"model": CausalLMModule, "data": TextDataModule, "trainer": Trainer}
    settings.check(given, kinds)
    if (seed := given.get("seed_everything", 42)) is None:
        raise InputError("null is no seed", where="seed_everything", fix="--seed_everything 42; true takes another one "
                         "each time, false none")
    ranges.check("seed_everything", seed)
    options = {name: value for name, value in given.items() if name not in ("config", "seed_everything", *kinds)}
    settings.check_arguments("", options, getattr(Trainer, verb), prefix=verb)


def refusal(error: BaseException) -> InputError:
    """What a constructor, Lightning's or of a class that a config names, says of its arguments, in a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reasons = [line.strip(" -") for line in lines[1:] if line.startswith("  - ") and "Expected a <class" not in line]
    said = reasons[-1] if reasons else lines[0]
    where, colon, what = said.partition(": ")
    at = where if colon and where.startswith("trainer.") else "trainer"
    return InputError((what if at != "trainer" else said)[:300], where=at)


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning itself raised it, which it does where its options do not fit each other or the data."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("lightning.")
