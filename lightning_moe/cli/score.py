"""``score``: observe a model on text once, score its experts by every criterion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.callbacks.figure_logging import save_figure
from lightning_moe.cli.gradient_pass import add_gradients, forget_gradients
from lightning_moe.cli.request import (
    asked_data,
    asked_model,
    checkpoint_size,
    model_path,
    refuse_less_text,
    seed,
)
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.similarity_pass import same_token_cka
from lightning_moe.cli.text_pass import start_at, watch_text
from lightning_moe.criteria import criteria
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.evaluation.perplexity import check_vocabulary
from lightning_moe.files import write_json
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes, same_model
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.ranks import check_shared
from lightning_moe.pruning.scores import methods_in, score_by_all, write_scores
from lightning_moe.report.findings import findings, inter_layer
from lightning_moe.report.findings_figure import findings_figure, inter_layer_figure
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.same_token_cka import check_sample
from lightning_moe.stats.store import VERSION, ModelStats, load_stats


def score(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    out: str,
    overwrite: bool,
    gradients: bool = False,
    similarity_tokens: int = 0,
) -> dict[str, Any] | None:
    """Write stats.safetensors, scores.json and findings.json, with its figures.

    ``gradients`` adds those criteria, ``similarity_tokens`` the CKA between experts of two layers, to results that are
    there too: they change no other figure, so the request is the same.
    """
    path = model_path(model)
    shapes = layer_shapes(path)
    if similarity_tokens:
        check_sample(similarity_tokens, sum(shape.num_experts for shape in shapes))
    run = RunFolder(out, "score", asked_model(trainer, model) | asked_data(data) | {"seed": seed()}, overwrite)
    asked, stored = run.request, run.folder / "stats.safetensors"
    if run.finished:
        found = _stored(stored, asked["model_id"], asked["precision"], run.finished["data_fingerprint"])
        by_gradients = {criterion.name for criterion in criteria() if criterion.gradients}
        wanted = by_gradients if gradients else set()
        before = run.finished.get("similarity_tokens", 0)
        beyond = [] if gradients or not by_gradients & set(run.finished["methods"]) else ["--gradients"]
        beyond += ["--similarity_tokens"] if before and not similarity_tokens else []
        similarity_tokens = similarity_tokens or before
        kept = methods_in(run.folder / "scores.json")  # another command may have written its own there
        if found is not None and wanted <= set(run.finished["methods"]) <= kept and similarity_tokens == before:
            return run.finished | {"beyond": beyond}
    stats = observe(trainer, model, data, run, gradients, anew=overwrite)
    cka_AA, num_tokens = None, 0
    if similarity_tokens:
        cka_AA, num_tokens = same_token_cka(trainer, model, data, similarity_tokens)
    if not trainer.is_global_zero:
        return None
    run.begin()
    methods = score_by_all(stats, seed())
    write_scores(run.folder / "scores.json", methods)
    said, drawn = findings(stats, methods), run.folder / "figures" / "inter_layer.png"
    save_figure(run.folder / "figures" / "findings.png", findings_figure(said))
    drawn.unlink(missing_ok=True)  # of a run that this one replaces
    if cka_AA is not None:
        said["inter_layer"] = inter_layer(cka_AA, shapes, num_tokens)
        save_figure(drawn, inter_layer_figure(said["inter_layer"], cka_AA))
    write_json(run.folder / "findings.json", said)
    return run.finish(
        {
            "model_id": stats.model_id,
            "data_fingerprint": stats.data_fingerprint,
            "tokens": int(stats.layers[0].tokens),
            "experts": sum(layer.shape.num_experts for layer in stats.layers),
            "methods": [one.method for one in methods],
            **({"similarity_tokens": similarity_tokens} if similarity_tokens else {}),
            **checkpoint_size(path),
            "world_size": trainer.world_size,
        }
    )


def observe(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    run: RunFolder,
    gradients: bool = False,
    anew: bool = False,
) -> ModelStats:
    """The statistics of this model on this text: from the run folder if it holds them, else from one pass.

    ``gradients`` adds those, ``anew`` makes the passes in any case. A pass that was killed goes on from its last save.
    """
    partial = run.partial(batch_size=data.batch_size, world_size=trainer.world_size, stats=VERSION)
    identity, precision = run.request["model_id"], run.request["precision"]
    file = run.folder / "stats.safetensors"
    return observe_into(trainer, model, data, file, partial, identity, precision, anew, gradients=gradients)


def observe_into(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    file: Path,
    partial: Path,
    identity: str,
    precision: str,
    anew: bool = False,
    stable_ranks: bool = True,
    gradients: bool = False,
) -> ModelStats:
    """The statistics in ``file``, or those of one pass, written there; ``partial`` is for unfinished passes.

    ``gradients`` adds those, of further passes. ``stable_ranks``: see ``weight_stats``.
    """
    data.setup("predict")
    stats = None if anew else _stored(file, identity, precision, data.text.fingerprint)
    if stats is not None and (stats.has_gradients or not gradients):
        return stats
    refuse_less_text(trainer, "limit_predict_batches")
    model.prepare(trainer)
    check_shared(partial)
    check_vocabulary(model, data)
    if stats is None:
        layers = _observed(trainer, model, data, partial, stable_ranks)
        stats = ModelStats(identity, data.text.fingerprint, layers, precision)
        _keep(trainer, stats, file)
    if gradients:
        stats = add_gradients(trainer, model, data, stats, partial)
        _keep(trainer, stats, file)
        if trainer.is_global_zero:
            forget_gradients(partial)
    return stats


def _keep(trainer: Trainer, stats: ModelStats, file: Path) -> None:
    if trainer.is_global_zero:
        stats.save(file)
    trainer.strategy.barrier()  # whoever looks for the file next must find it


def _observed(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, partial: Path, stable_ranks: bool
) -> list[LayerStats]:
    """The statistics of one pass, which goes on from an earlier one's last save in ``partial``."""

    observation = ExpertObservation(partial, start_at(trainer, data), stable_ranks=stable_ranks)
    watch_text(trainer, model, data, observation, partial)
    return observation.layers


def known_stats(stats_file: str, identity: str, shapes: Sequence[LayerShape]) -> ModelStats:
    """Statistics from a file, or from the run folder that holds one, if they are of this model."""
    file = Path(stats_file)
    if file.is_dir():
        file = file / "stats.safetensors"
        if not file.exists() and (file.parent / "scores.json").exists():
            raise InputError(
                f"--stats {stats_file}: it holds scores, and no statistics, which `score` writes; `prune` takes "
                f"these by --scores {stats_file}."
            )
    stats = load_stats(file)
    if not same_model(stats.model_id, identity) or [layer.shape for layer in stats.layers] != list(shapes):
        raise InputError(
            f"--stats {stats_file}: made for model {stats.model_id}, this is {identity}; score this model first."
        )
    return stats


def _stored(file: Path, identity: str, precision: str, fingerprint: str) -> ModelStats | None:
    """The statistics in a file, if they are of this model, in this precision, on this text, and of today's version."""
    if not file.is_file():
        return None
    stats = load_stats(file)
    same = same_model(stats.model_id, identity) and stats.has_cosines
    return stats if same and (stats.data_fingerprint, stats.dtype) == (fingerprint, precision) else None
