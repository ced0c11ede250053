"""The command line: LightningCLI with our commands beside fit, validate, test and predict."""

from __future__ import annotations

import sys

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_moe.cli.trainer import MoETrainer
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM


class MoECLI(LightningCLI):
    """Commands around ``MoECausalLM``, ``TextDataModule`` and ``MoETrainer``."""

    def after_instantiate_classes(self) -> None:
        if self.datamodule.tokenizer is None:
            self.datamodule.tokenizer = self.model.path


def main(args: ArgsType = None) -> None:
    """Run one command; bad input ends with one line on stderr and exit code 2."""
    try:
        MoECLI(
            MoECausalLM,
            TextDataModule,
            trainer_class=MoETrainer,
            save_config_callback=None,
            seed_everything_default=0,
            args=args,
        )
    except InputError as error:
        print(f"lightning-moe: {error}", file=sys.stderr)
        sys.exit(2)
