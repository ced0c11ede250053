"""MoETrainer: Lightning's Trainer; each of its methods is a command."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Trainer

from lightning_moe.cli.demo import demo
from lightning_moe.cli.display import show
from lightning_moe.cli.evaluate import evaluate
from lightning_moe.cli.prune import Cut, prune
from lightning_moe.cli.score import score
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM


class MoETrainer(Trainer):
    """Lightning's Trainer; how and where to run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Our loaders know their rank, so no sampler may be replaced.
        super().__init__(*args, use_distributed_sampler=False, **kwargs)

    def score(self, model: MoECausalLM, datamodule: TextDataModule, out: str, overwrite: bool = False) -> None:
        """Observe the model on text once and score its experts by every criterion.

        Args:
            model: The model.
            datamodule: The calibration text.
            out: Run folder; gets stats.safetensors, scores.json and summary.json.
            overwrite: Replace the results of another request in that folder.
        """
        show(out, score(self, model, datamodule, out, overwrite))

    def prune(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str,
        method: str = Cut.method,
        ratio: float = Cut.ratio,
        scope: Literal["layer", "global"] = Cut.scope,
        direction: Literal["min", "max"] | None = None,
        floor: int | None = None,
        stats: str | None = None,
        plan: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Drop the experts that matter least and write the smaller checkpoint.

        Works from text (observes first), from the statistics of an earlier ``score`` or ``prune``, or from a plan.

        Args:
            model: The model.
            datamodule: The calibration text.
            out: Run folder; gets plan.json, scores.json, stats.safetensors, model/ and summary.json.
            method: Criterion that scores the experts: ews rwn wsr ewn euf ecc evc ets eas eae eao ean reap reap-sum
                man msan seer trimming random.
            ratio: Fraction of the experts to drop.
            scope: Drop the same number in each layer, or the lowest of all layers.
            direction: Drop the experts with the least or the most of the criterion; default as its paper has it.
            floor: Fewest experts a layer keeps under global scope; default is what its router needs (top_k).
            stats: A stats.safetensors (or the run folder that holds it) to use instead of text.
            plan: A plan.json to apply as it is.
            overwrite: Replace the results of another request in that folder.
        """
        cut = Cut(method, ratio, scope, direction, floor)
        show(out, prune(self, model, datamodule, out, cut, stats, plan, overwrite))

    def evaluate(self, model: MoECausalLM, datamodule: TextDataModule, out: str, overwrite: bool = False) -> None:
        """Measure perplexity on text, per file and overall.

        Args:
            model: The model.
            datamodule: The text.
            out: Run folder; gets evaluate.json and summary.json.
            overwrite: Replace the results of another request in that folder.
        """
        show(out, evaluate(self, model, datamodule, out, overwrite))

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
