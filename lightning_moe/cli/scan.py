"""``scan``: the perplexity of a model without one of its experts, for each of them (MC-Suite, Fig. 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import tensor
from typing_extensions import override

from lightning_moe.callbacks.batch_saves import BatchSaves
from lightning_moe.callbacks.figure_logging import save_figure
from lightning_moe.cli.request import asked_data, asked_model, model_path, refuse_less_text
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.text_pass import start_at, watch_text
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.evaluation.perplexity import check_vocabulary
from lightning_moe.modules.causal_lm import MoECausalLM, perplexity_of
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.layers import hugging_face_model
from lightning_moe.moe.ranks import check_shared
from lightning_moe.pruning.scores import ExpertScores, write_scores
from lightning_moe.report.scan_figure import scan_figure
from lightning_moe.search.expert_scan import ExpertScan, ScannedExperts, can_spare_one

SCAN = "scan"

SHOWN = 5
"""Experts that the terminal shows from each end."""


def scan(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, out: str, overwrite: bool
) -> dict[str, Any] | None:
    """Write scan.json, scores.json and figures/scan.png."""
    shapes = layer_shapes(model_path(model))
    if not any(can_spare_one(shape) for shape in shapes):
        raise InputError(
            f"--model.path {model.path}: each layer has as many experts as its router picks, so none can be removed."
        )
    run = RunFolder(out, "scan", asked_model(trainer, model) | asked_data(data), overwrite)
    if run.finished:
        return run.finished
    partial = run.partial(batch_size=data.batch_size, world_size=trainer.world_size)
    found = scan_experts(trainer, model, data, partial)
    if not trainer.is_global_zero:
        return None
    identity, fingerprint = run.request["model_id"], data.text.fingerprint
    run.begin()
    write_scores(run.folder / "scores.json", [scan_scores(found, identity, fingerprint)])
    perplexity = perplexity_of(found.loss)
    without = {name: row and [perplexity_of(loss) for loss in row] for name, row in found.losses.items()}
    save_figure(run.folder / "figures" / "scan.png", scan_figure(perplexity, without))
    return run.finish(
        {
            "model_id": identity,
            "data_fingerprint": fingerprint,
            "perplexity": perplexity,
            "loss": found.loss,
            "tokens": found.tokens,
            "experts": sum(len(row) for row in without.values() if row),
            "work": round(found.work, 4),
            "layers": {
                name: row and {"perplexity": row, "difference": [one - perplexity for one in row]}
                for name, row in without.items()
            },
            "world_size": trainer.world_size,
        }
    )


def scan_experts(trainer: Trainer, model: MoECausalLM, data: TextDataModule, partial: Path) -> ScannedExperts:
    """The loss without each expert on the calibration text, going on from the last save in ``partial``.

    Every rank must call it, and gets the figures of all together.
    """
    refuse_less_text(trainer, "limit_predict_batches")
    data.setup("predict")
    model.prepare(trainer)
    check_shared(partial)
    check_vocabulary(model, data)
    watcher = _Scan(BatchSaves(partial, "scan"), start_at(trainer, data))
    watch_text(trainer, model, data, watcher, partial)
    assert watcher.found is not None
    return watcher.found


def scan_scores(found: ScannedExperts, model_id: str, fingerprint: str) -> ExpertScores:
    """How much the mean loss rises without each expert: higher means keep."""
    scores = {shape.name: tensor(found.rises(shape.name)).double() for shape in found.shapes}
    return ExpertScores(model_id, fingerprint, SCAN, found.shapes, scores)


class _Scan(Callback):
    """Scans the experts batch by batch, each after the loop itself has run the model on it."""

    def __init__(self, saves: BatchSaves, resume: Callable[[int], None]) -> None:
        self.saves, self.resume = saves, resume
        self.found: ScannedExperts | None = None
        self._done = 0
        self._scan: ExpertScan | None = None
        self._recorded = ExitStack()

    @property
    def scan(self) -> ExpertScan:
        assert self._scan is not None, "the loop has not begun"
        return self._scan

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._done = self.saves.last(trainer)
        self.resume(self._done)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scan = ExpertScan(hugging_face_model(pl_module, SCAN))
        if self._done:
            self.scan.load_sums(self.saves.load(trainer, self._done))

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._recorded.enter_context(self.scan.recorded())

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._recorded.close()
        with trainer.precision_plugin.forward_context():
            self.scan.add(batch)
        self._done += 1
        self.saves.save(trainer, self._done, self.scan.sums)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = self.scan.result(pl_module.device)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._recorded.close()


def show_extremes(results: Mapping[str, Any] | None) -> None:
    """Print the experts without which the model loses least, and most; nothing where there are no results."""
    if results is None:
        return
    experts = sorted(
        (difference, name, expert, row["perplexity"][expert])
        for name, row in results["layers"].items()
        for expert, difference in enumerate(row["difference"] if row else ())
    )
    ends = {"least": experts[:SHOWN], "most": experts[SHOWN:][-SHOWN:][::-1]}
    table = Table("missed", "layer", "expert", "perplexity without it", "change", title_justify="left")
    table.title = f"experts that are missed least and most; perplexity with all: {results['perplexity']:.4g}"
    for column in table.columns[2:]:
        column.justify = "right"
    for which, rows in ends.items():
        for difference, name, expert, perplexity in rows:
            table.add_row(which, name, str(expert), f"{perplexity:,.5g}", f"{difference:+,.3g}")
    Console(soft_wrap=True).print(table)
