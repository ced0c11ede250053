"""``search``: learn alpha and beta on text; score every expert by them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_moe.callbacks.importance_figures import ImportanceFigures
from lightning_moe.cli.fitting import fit_steps
from lightning_moe.cli.request import asked_batches, asked_data, asked_model, model_path, refuse_less_text, seed
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.step_saves import StepSaves
from lightning_moe.cli.unheeded import UPDATES, refuse_other_lengths
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.evaluation.perplexity import check_vocabulary
from lightning_moe.files import write_json
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.ranks import check_shared
from lightning_moe.pruning.budget import check_ratio, make_plan
from lightning_moe.pruning.scores import ExpertScores, write_scores
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.plan_stability import PlanStability
from lightning_moe.search.presets import preset

SAVE_EVERY = 10
"""Updates between two saves."""


@dataclass(frozen=True)
class SearchRequest:
    """What ``search`` is asked, beside model and text."""

    ratio: float
    floor: int | None = None
    preset: str = "default"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``DiEPSearch`` in place of the preset's."""
    check_every: int = 10
    patience: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument of ``DiEPSearch`` but model and seed, defaults too: equal ones are the same search."""
        parameters = signature(DiEPSearch).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.name not in ("model", "seed")}
        changes = {name: value for name, value in self.changes.items() if value is not None}
        return defaults | preset(self.preset) | changes | {"ratio": self.ratio, "floor": self.floor}


def search(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, out: str, request: SearchRequest, overwrite: bool
) -> dict[str, Any] | None:
    """Write scores.json, plan.json, importance.json and figures/."""
    shapes = layer_shapes(model_path(model))
    asked_of = asked_model(trainer, model)
    DiEPSearch(model, **request.arguments)  # refuses what it cannot do, before anything is loaded
    check_ratio(shapes, request.ratio, "global", request.floor)
    stability = PlanStability(request.check_every, request.patience)
    looks = {"check_every": request.check_every, "patience": request.patience}
    asked = request.arguments | looks | {"seed": seed()}
    run = RunFolder(out, "search", asked_of | asked_data(data) | asked_batches(trainer, data) | asked, overwrite)
    if run.finished:
        return run.finished
    figures = ImportanceFigures(run.folder / "figures")
    start = time.perf_counter()
    module = run_search(trainer, model, data, request.arguments, seed(), run.partial(), [stability, figures])
    seconds = time.perf_counter() - start
    scores = importance_scores(module, asked_of["model_id"], data.text.fingerprint)
    plan = make_plan(scores, request.ratio, "global", request.floor)
    if not trainer.is_global_zero:
        return None
    run.begin()
    write_scores(run.folder / "scores.json", [scores])
    plan.save(run.folder / "plan.json")
    logits = {
        name: {"alpha": alpha_E.tolist(), "beta": float(beta)}
        for name, (alpha_E, beta) in module.importance_logits().items()
    }
    write_json(run.folder / "importance.json", {"version": 1, "model_id": asked_of["model_id"], "layers": logits})
    return run.finish(
        {
            "model_id": asked_of["model_id"],
            "data_fingerprint": scores.data_fingerprint,
            "updates": module.done,
            "stopped_early": module.done < module.updates,
            "plan_overlaps": stability.overlaps,
            "kept_experts": {name: len(ids) for name, ids in plan.keep.items()},
            "search_seconds": round(seconds, 3),
            "world_size": trainer.world_size,
        },
        "plan.json",
    )


def run_search(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    arguments: Mapping[str, Any],
    seed: int,
    folder: Path,
    callbacks: Sequence[Callback] = (),
) -> DiEPSearch:
    """Search on the calibration text, going on from the last save in ``folder`` if there is one.

    ``seed`` orders the windows. The trainer's own loop is put back afterwards, so it can do other work.
    """
    refuse_less_text(trainer, "limit_train_batches")
    refuse_other_lengths(trainer, data, UPDATES)
    calibration = data.calibration(shuffle_seed=seed)
    calibration.setup("fit")
    model.prepare(trainer)
    check_shared(folder)
    check_vocabulary(model, calibration)
    module = DiEPSearch(model, seed=seed, **arguments)
    saves = StepSaves(folder, every_steps=SAVE_EVERY)
    try:
        fit_steps(trainer, module, calibration, module.updates, module.accumulate, saves, "update", callbacks)
    finally:
        module.on_fit_end()  # which Lightning leaves out when the fit fails, and the model would stay frozen
    return module


def importance_scores(module: DiEPSearch, model_id: str, fingerprint: str, method: str = "diep") -> ExpertScores:
    """The scores of a finished search; betas make those of all layers comparable."""
    settings = {"relaxation": module.relaxation, "score": module.score, "updates": module.done, "seed": module.seed}
    shapes = [layer.shape for layer in module.moe_layers]
    return ExpertScores(model_id, fingerprint, method, shapes, module.scores(), True, settings)
