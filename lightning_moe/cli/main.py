"""The command line: LightningCLI with our commands beside fit, validate, test and predict."""

from __future__ import annotations

import difflib
import logging
import re
import signal
import sys
import warnings
from subprocess import Popen
from typing import Any, ClassVar, NoReturn

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from typing_extensions import override

from lightning_moe.cli.cluster import Cluster
from lightning_moe.cli.leaving import GO_ON, failed_write, leave, lost_rank, part, stop
from lightning_moe.cli.plugins import load_plugins
from lightning_moe.cli.trainer import MoETrainer
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes

COMMANDS = ("score", "scan", "search", "prune", "evaluate", "compare", "agreement", "plan", "demo")
"""Our commands; each is a method of ``MoETrainer``."""


class OneLineParser(LightningArgumentParser):
    """A parser that refuses in one line, with the nearest known name for a misspelt one."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        text = re.sub(r"Parser key \"([\w.]+)\":", r"--\1:", text)
        choices = re.findall(r"Literal\[(.*?)\]", text)
        if choices:
            option, value = re.search(r"--[\w.]+", text), re.search(r"(?:Got|Given) value: (\S+)", text)
            kinds = {"bool": "true, false", "int": "whole numbers"}
            named = [words for kind, words in kinds.items() if f"<class '{kind}'>" in text]
            words = ", ".join([*named, *choices]).replace("'", "").split(", ")
            allowed = ", ".join(dict.fromkeys(words))
            text = f"{option[0] if option else 'an option'}: {value[1] if value else 'that'} is none of {allowed}."
        text = re.sub(r"Expected a <class '[\w.]*Sequence'>\. Got value: (.+)", r"\1 is no list; write '[\1]'.", text)
        text = re.sub(r"a <class '(\w+)'>", r"a value of type \1", text)
        commands = "|".join(MoECLI.subcommands())
        text = re.sub(rf"arguments are required: (?:{commands})\.", "arguments are required: --", text)
        unknown = re.search(r"(?:unrecognized arguments:|invalid choice:|accept option) '?([\w.-]+)", text)
        if unknown:
            known = [name for action in self._actions for name in (*action.option_strings, *(action.choices or ()))]
            near = difflib.get_close_matches(unknown.group(1), map(str, known), n=1)
            text += f". Did you mean {near[0]}?" if near else ""
        raise InputError(text)


class MoECLI(LightningCLI):
    """Commands around ``MoECausalLM``, ``TextDataModule`` and ``MoETrainer``."""

    launcher: ClassVar[Any] = None
    """What starts the other ranks, if this process does."""

    def __init__(self, args: ArgsType, **kwargs: Any) -> None:
        words = sys.argv[1:] if args is None else args
        self._asked = {name for name in self.subcommands() if name in words} or set(self.subcommands())
        super().__init__(MoECausalLM, TextDataModule, args=args, **kwargs)

    @override
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {command: {"model", "datamodule"} for command in COMMANDS}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand not in self._asked:
            return self.init_parser(**kwargs)  # a name with its help: options take a tenth of a second to collect
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in COMMANDS:
            # What --help says first should be the command's own options, not the hundred of the Trainer.
            general, (trainer, model, data, *own) = parser._action_groups[:2], parser._action_groups[2:]
            parser._action_groups = [*general, *own, model, data, trainer]
            parser.usage = f"lightning-moe {subcommand} [options]"
        return parser

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        if self.subcommand in COMMANDS:
            # These write their own results; a log folder and training checkpoints would only litter.
            config["logger"] = config["logger"] or False
            config["enable_checkpointing"] = False
            config["enable_model_summary"] = False
        cluster = Cluster.take(config) if self.subcommand == "plan" else None
        trainer: Any = super()._instantiate_trainer(config, callbacks)
        trainer.cluster = cluster
        MoECLI.launcher = trainer.strategy.launcher
        return trainer

    @override
    def after_instantiate_classes(self) -> None:
        if self.model.path is not None and self.subcommand not in COMMANDS:
            layer_shapes(self.model.path)  # ours look for themselves; Lightning's would first miss the tokenizer
        self.datamodule.model_path = self.model.path
        if self.datamodule.tokenizer is None:
            self.datamodule.tokenizer = self.model.path


def main(args: ArgsType = None) -> None:
    """Run one command; bad input ends with one line on stderr and exit code 2."""
    quiet()
    alone = args is None
    if alone:
        args = sys.argv[1:]
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(args, list):
        args = ["--overwrite=true" if _bare(args, place) else word for place, word in enumerate(args)]
    try:
        load_plugins()
        MoECLI(
            args,
            trainer_class=MoETrainer,
            save_config_callback=None,
            auto_configure_optimizers=False,  # MoECausalLM has its own, with decay groups
            seed_everything_default=0,
            parser_class=OneLineParser,
            parser_kwargs={"description": "Train, score, prune and evaluate Mixture-of-Experts language models."},
        )
        if alone:
            part()
    except (InputError, MisconfigurationException, OSError) as error:
        # An OSError is a full disk, a folder without permission: the message names it.
        leave(" ".join(str(error).split()), _children())
    except (RuntimeError, SafetensorError, CheckpointException) as error:
        unwritten, lost = failed_write(error), lost_rank(error)
        if unwritten is not None:
            leave(f"a file cannot be written ({unwritten}); make room on the disk. {GO_ON}", _children())
        if lost is None:
            raise
        leave(f"another process of this job is gone ({lost}). {GO_ON}", _children())


def _children() -> list[Popen[Any]]:
    """The processes of other ranks that this one has started."""
    return getattr(MoECLI.launcher, "procs", [])


def _terminate(signum: int, frame: Any) -> NoReturn:
    """Stop at once and say so by the exit code: Lightning, which keeps this handler beside its own, leaves by 0."""
    stop(128 + signum, _children())


def _bare(words: list[str], place: int) -> bool:
    """Whether the word there is ``--overwrite`` without a value."""
    return words[place] == "--overwrite" and (place + 1 == len(words) or words[place + 1].startswith("-"))


def quiet() -> None:
    """Leave out what other libraries say about themselves; our own lines and progress bars stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "huggingface_hub", "datasets", "fsspec", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"lightning\.")  # theirs, not those of our callbacks
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
