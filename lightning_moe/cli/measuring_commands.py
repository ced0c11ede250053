"""Commands that measure and compare; they leave models as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import Trainer

from lightning_moe.cli.agreement import agree
from lightning_moe.cli.compare import compare
from lightning_moe.cli.demo import demo
from lightning_moe.cli.display import show
from lightning_moe.cli.evaluate import evaluate
from lightning_moe.cli.grid import make_grid
from lightning_moe.cli.recovery import NEXT_TOKEN, Recovery, clipping
from lightning_moe.cli.request import seed
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.cli.scan import scan, show_extremes
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.pruning.schedule import Spacing


class MeasuringCommands(Trainer):
    """Each method is a command."""

    def evaluate(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str,
        skipping: bool | Literal["naee"] | None = None,
        stats: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Measure perplexity on text, per file and overall, and how many experts were skipped.

        Args:
            model: The model.
            datamodule: The text.
            out: Run folder; gets evaluate.json and summary.json.
            skipping: Skip experts that matter little for a token beside its first: true for the rule of DiEP, naee
                for that of NAEE; false never. Default: what the model's config says.
            stats: A stats.safetensors of this model (or the run folder that holds it), to skip by when the model
                holds no tables.
            overwrite: Replace the results of another request in that folder.
        """
        show(out, evaluate(self, model, datamodule, out, overwrite, skipping, stats))

    def scan(self, model: MoECausalLM, datamodule: TextDataModule, out: str, overwrite: bool = False) -> None:
        """Measure the perplexity of the model without one expert, for each of its experts.

        The router chooses among the others, as in a model that was pruned by that expert alone. What `evaluate` would
        give for each is computed together: less than L E passes over the text, but many; take few windows.

        Args:
            model: The model.
            datamodule: The text.
            out: Run folder; gets scan.json (perplexity and its change, layer by layer), scores.json (the rise of the
                loss, for `prune --scores`), figures/scan.png and summary.json.
            overwrite: Replace the results of another request in that folder.
        """
        results = scan(self, model, datamodule, out, overwrite)
        show_extremes(results)
        show(out, results)

    def compare(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str,
        methods: Sequence[str] = ("random", "ean", "reap-sum"),
        ratios: Sequence[float] = (0.25, 0.5),
        scopes: Sequence[str] = ("layer", "global"),
        seeds: int = 3,
        strategies: Sequence[str] = ("one-shot",),
        rounds: int | Sequence[float] = 1,
        spacing: Spacing = "equal",
        finetune_tokens: int = 0,
        finetune_growth: float = 2.0,
        finetune_path: str | None = None,
        finetune_lr: float | None = None,
        recovery: Recovery = NEXT_TOKEN,
        overwrite: bool = False,
    ) -> None:
        """Prune the model by several methods and measure what each leaves of it.

        Experts are scored on --data.path, perplexity is measured on --data.val_path. Every method, ratio and scope
        is one cell; a killed run goes on from its last finished cell, and a folder can be given more cells later.

        Args:
            model: The model.
            datamodule: The calibration text, and as val_path the text to measure on.
            out: Run folder; gets compare.csv, compare.json, stats.safetensors, a file per cell in cells/ and the scores
                of each method in scores/.
            methods: Any of the methods of ``prune``; METHOD@layer or METHOD@global in that scope alone.
            ratios: Fractions of the experts to drop.
            scopes: Drop the same number in each layer (layer), or the lowest of all layers (global).
            seeds: How often to run what depends on a seed, as all tuning does; the first is that of --seed_everything.
            strategies: one-shot; iterative: rounds; lottery: rounds with tuning; one-shot-tuned: one cut, tuned on as
                many tokens as the lottery has had by then. Beside tuned ones stands the full model, tuned alike.
            rounds: Rounds to the highest ratio that pass through all others, or a list of the shares gone after each;
                1 takes the fewest equal ones. One run of them serves all ratios.
            spacing: Rounds of one size, or small ones first and last (cosine).
            finetune_tokens: Tokens to tune on after the first round.
            finetune_growth: The tokens of a round over those of the round before.
            finetune_path: Text to tune on; default is the calibration text, all of it.
            finetune_lr: Highest learning rate; default for Mixtral 8x7B 1e-6 (router-kd 5e-5), for smaller models more.
            recovery: What that tuning is.
            overwrite: Replace the results of another request in that folder.
        """
        options = RoundOptions(rounds, spacing, finetune_tokens, finetune_growth, finetune_path, finetune_lr, recovery)
        ranks, clips = self.world_size, clipping(self)
        grid = make_grid(methods, ratios, scopes, seeds, seed(), strategies, options, ranks=ranks, clipping=clips)
        compare(self, model, datamodule, out, grid, overwrite, options)

    def agreement(
        self, model: MoECausalLM, datamodule: TextDataModule, plans: Sequence[str], out: str, overwrite: bool = False
    ) -> None:
        """Say how far plans agree: the experts that two of them keep, over those that either keeps.

        Args:
            model: The model that they are for; needed only where one leaves out a layer, which then stays whole.
            datamodule: Not used.
            plans: Files plan.json, or the run folders that hold them, of plans for the same model.
            out: Run folder; gets agreement.json and agreement.png.
            overwrite: Replace the results of another request in that folder.
        """
        agree(self, plans, out, overwrite, model.path)

    def demo(
        self, model: MoECausalLM, datamodule: TextDataModule, out: str = "runs/demo", overwrite: bool = False
    ) -> None:
        """Prune the bundled reference model several ways and print what each costs and saves.

        Args:
            model: Not used; the demo brings its own.
            datamodule: Not used; the demo brings its own.
            out: Run folder; gets one folder per pruned model, and summary.json.
            overwrite: Replace what is in that folder.
        """
        demo(self, out, overwrite)
