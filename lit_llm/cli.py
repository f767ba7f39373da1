"""Words typed in; a verb done, or a few lines that say what to type instead.

`fit validate test prepare` read a run config and are LightningCLI's; `export chat` read a folder and build no trainer.
The only module that knows all others; none knows it.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_llm.data.datamodule import TextDataModule
from lit_llm.ending import finish, held_out_prompts
from lit_llm.errors import InputError
from lit_llm.inference.chat import chat
from lit_llm.inference.export import export
from lit_llm.parser import ALLOWED_IMPORTS, Parser, check_configs, verb_first
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer

NOT_ENOUGH_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
MEMORY = """there is not enough memory for the batch
  halve data.batch_size and double trainer.accumulate_grad_batches (the same step), lower data.seq_len,
  set model.gradient_checkpointing: true, or split the model with trainer.strategy: deepspeed_stage_3"""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)

def show_export(run: str, checkpoint: str = "best", out: str | None = None, dtype: str = "auto") -> None:
    """Write a run's model as a folder that transformers loads as it stands.

    Args:
        run: The run folder, e.g. runs/sft.
        checkpoint: `best` by the monitored metric, `last`, or a folder's name such as step_40.
        out: Where to write; null is `export` in the run folder. It is replaced as a whole.
        dtype: Of the weights: float32, bfloat16, float16, or auto, which keeps the base's.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"unknown dtype '{dtype}'; use auto, float32, bfloat16 or float16", where="dtype")
    print(export(run, checkpoint, out, dtype))  # type: ignore[arg-type]


TOOLS: dict[str, Callable[..., Any]] = {"export": show_export, "chat": chat}


class LitLLMCLI(LightningCLI):
    """The command line. One config tree: `model`, `data`, `trainer`."""

    trainer: Trainer
    parser: Parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verb -> arguments that the CLI fills in itself."""
        lightnings = LightningCLI.subcommands()
        ours = {verb: lightnings[verb] for verb in ("fit", "validate", "test")}
        return ours | {"prepare": {"model", "datamodule"}}

    def setup_parser(self, add_subcommands: bool, main_kwargs: dict[str, Any],
                     subparser_kwargs: dict[str, Any]) -> None:
        """Lightning's verbs, then the tools."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for name, tool in TOOLS.items() if add_subcommands else ():
            parser = Parser(description=(tool.__doc__ or "").splitlines()[0])
            parser.add_argument("-c", "--config", action="config", help="YAML with this verb's options")
            parser.add_function_arguments(tool, as_group=False)
            self.parser.verbs.add_subcommand(name, parser, help=(tool.__doc__ or "").splitlines()[0])

    def _parse_ckpt_path(self) -> None:
        """What is typed and what stands in the file wins over what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        """A tool needs no model, data or trainer. The tokenizer is the model's unless another is named."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        if tool := TOOLS.get(self.subcommand):
            tool(**{key: value for key, value in config.as_dict().items() if key not in ("config", "seed_everything")})
            raise SystemExit(0)
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.base

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what Lightning refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(str(error).splitlines()[0][:300], where="trainer") from None

    def after_instantiate_classes(self) -> None:
        """Give the run folder the config it is to keep."""
        assert self.subcommand is not None
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
        import yaml

        config = yaml.safe_load(text)[self.subcommand]
        config.pop("config", None)
        config.pop("ckpt_path", None)
        self.trainer.run.config = config

    def after_fit(self) -> None:
        """Export, compare, and say what to type next; on one process."""
        trainer = self.trainer
        if not trainer.is_global_zero or not trainer.checkpoint_callbacks:    # fast_dev_run has none
            return
        files = [str(path) for path in self.config["fit"].get("config") or []]
        finish(Path(self.trainer.default_root_dir), base=self.model.base, before=self.trainer.run.before,
               after=self.trainer.run.after, prompts=held_out_prompts(self.datamodule), configs=files)

    def after_validate(self) -> None:
        """The figures on stdout."""
        self._print_figures()

    def after_test(self) -> None:
        """The figures on stdout."""
        self._print_figures()

    def _print_figures(self) -> None:
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.run.after.items()):
                print(f"{name:<20} {value:,.0f}" if name.endswith("/tokens") else f"{name:<20} {value:.9g}")


# ---- the rim ---------------------------------------------------------------------------------------------------------

def main(args: list[str] | None = None) -> None:
    """Run a verb; what the user got wrong ends in a few lines on stderr and exit code 2."""
    quiet()
    import jsonargparse

    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED_IMPORTS)
    args = verb_first(sys.argv[1:] if args is None else args, [*LitLLMCLI.subcommands(), *TOOLS])
    try:
        check_configs(args)
        LitLLMCLI(CausalLMModule, TextDataModule, trainer_class=Trainer, parser_class=Parser, save_config_callback=None,
                  seed_everything_default=42, auto_configure_optimizers=False, load_from_checkpoint_support=False,
                  parser_kwargs={"allow_abbrev": False, "description": "A language model's whole life."}, args=args)
    except InputError as error:
        _refuse(str(error))
    except MisconfigurationException as error:
        _refuse("trainer: " + str(error).splitlines()[0][:300])
    except KeyboardInterrupt:
        _refuse("stopped", code=130)
    except MemoryError:
        _refuse(MEMORY)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in NOT_ENOUGH_MEMORY):
            raise
        _refuse(MEMORY)
    except OSError as error:
        if error.errno not in DISK or not error.filename:
            raise
        _refuse(f"{error.filename}: {error.strerror}\n  make room, or write elsewhere: --trainer.default_root_dir")
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        _refuse(f"trainer.logger: wandb: {str(error).splitlines()[0][:300]}\n"
                "  without an account: --trainer.logger.init_args.offline true; with one: wandb login")


def _refuse(message: str, code: int = 2) -> NoReturn:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:   # one process speaks for all
        lines = message.splitlines()[:6]
        print("error: " + "\n".join(lines), file=sys.stderr, flush=True)
    raise SystemExit(code)


def quiet() -> None:
    """Hide what libraries say to nobody: adverts, deprecations, hints that do not apply here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a warning on stdout, whoever imports deepspeed first
    libraries = "lightning|torch|transformers|peft|deepspeed|jsonargparse|litserve"
    warnings.filterwarnings("ignore", module=rf"({libraries})(\.|$)")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("lit_llm").setLevel(logging.INFO)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "DeepSpeed", "httpx",
                 "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
