"""``prune``: make a plan, or take one, and write the smaller checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.cli.cut import ROUND_FILES, Cut, note_order, reduction, target_of
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import get_method
from lightning_moe.cli.request import asked_batches, asked_data, asked_model, model_path, seed
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.score import known_stats, observe
from lightning_moe.cli.skipping import Skipping, wanted_entry
from lightning_moe.cli.unheeded import UPDATES, refuse_other_lengths
from lightning_moe.cli.weight_pruning import prune_weights
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.compaction import check_droppable, check_mergeable, compact_checkpoint
from lightning_moe.pruning.budget import check_ratio, make_plan
from lightning_moe.pruning.merging import merge_alike
from lightning_moe.pruning.plan import PruningPlan, load_plan
from lightning_moe.pruning.scores import ExpertScores, load_scores, score_by_all, score_experts, write_scores
from lightning_moe.stats.store import ModelStats


def prune(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    out: str,
    cut: Cut,
    stats_file: str | None,
    scores_file: str | None,
    plan_file: str | None,
    overwrite: bool,
    skipping: Skipping = None,
    merge: bool = False,
) -> dict[str, Any] | None:
    """Write plan.json and model/, and what led to them. One of text, statistics, scores or plan is the source.

    Text and statistics also give the model its skip tables; ``skipping`` says whether it uses them. ``merge`` averages
    dropped experts into kept ones, whatever the method; a method or a plan may say so by itself.
    """
    path = model_path(model)
    sources = {"--data.path": data.path, "--stats": stats_file, "--scores": scores_file, "--plan": plan_file}
    method = get_method(cut.method)
    if method.weights is not None:
        return prune_weights(trainer, model, data, out, cut, sources, overwrite, skipping, merge)
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"prune works from one of --data.path, --stats, --scores or --plan; given: {' and '.join(given) or 'none'}."
        )
    if merge and method.merge is not None:
        raise InputError(f"--merge: {cut.method} merges as it is; leave it out.")
    if merge and method.drops != "experts":
        raise InputError(f"--merge: {cut.method} drops whole layers and leaves no expert to merge into; leave it out.")
    rule = merge_alike if merge else method.merge
    if method.needs_text and stats_file is not None:
        raise InputError(f"--stats {stats_file}: {cut.method} searches on the text itself; give --data.path instead.")
    shapes, asked_of = layer_shapes(path), asked_model(trainer, model)
    identity = asked_of["model_id"]
    plan: PruningPlan | None = None
    stats: ModelStats | None = None
    scores: list[ExpertScores] = []
    if rule is not None and scores_file is not None:
        raise InputError(f"--scores {scores_file}: merging needs statistics; give --data.path or --stats instead.")
    if plan_file is not None:
        if cut != Cut() or merge:
            raise InputError(
                "--plan says which experts stay, and which are merged; leave out --method, --ratio, --scope, "
                "--direction, --floor and --merge."
            )
        plan = load_plan(Path(plan_file))
        try:
            plan.check(shapes, identity)
        except InputError as error:
            raise InputError(f"--plan {plan_file}: {error}") from error
        # It may have been edited since: what its `made_by` says of method and ratio need not hold.
        plan = replace(plan, made_by={"method": "plan", "file": plan_file})
        wanted_entry(path, None, skipping)  # refused before any work
        asked: dict[str, Any] = {"plan": plan.keep}
        asked |= {"merge": plan.merge.groups, **plan.merge.settings} if plan.merge.groups else {}
        asked |= {"blocks": plan.blocks} if plan.blocks else {}
    else:
        drops = method.drops
        if stats_file is not None:
            stats = known_stats(stats_file, identity, shapes)
            if method.gradients and not stats.has_gradients:
                raise InputError(
                    f"--stats {stats_file}: it holds no gradients, which {cut.method} needs; give --data.path, or "
                    "`score` this model with --gradients true first."
                )
            source: dict[str, Any] = {"stats": stats.data_fingerprint}
        elif scores_file is not None:
            if cut.direction is not None:
                raise InputError(f"--direction {cut.direction}: the scores have theirs already; leave it out.")
            # The default says nothing of what is wanted; any other name does.
            wanted = None if cut.method == Cut.method else cut.method
            scores = [load_scores(Path(scores_file), wanted, shapes, identity)]
            drops = scores[0].drops
            if drops != "experts" and (cut.scope != "global" or cut.floor is not None):
                raise InputError(
                    f"--scores {scores_file}: by {scores[0].method} whole layers go, chosen among all; give --scope "
                    "global and no --floor."
                )
            wanted_entry(path, None, skipping)  # refused before any work
            source = {"scores": scores[0].fingerprint}
        else:
            source = asked_data(data)
            if method.batchwise:
                refuse_other_lengths(trainer, data, UPDATES)
            if method.needs_text:
                source |= asked_batches(trainer, data) | {"search": method.settings}
        check_ratio(shapes, cut.ratio, cut.scope, cut.floor, drops)  # an impossible one is refused before any work
        asked = cut.asked() | source | ({"merge": True} if merge else {})
    if rule is not None or (plan is not None and plan.merge.groups):
        check_mergeable(path, align=plan is None or plan.merge.align)
    if skipping is not None:
        asked["skipping"] = skipping
    target = target_of(out, path)
    run = RunFolder(out, "prune", asked_of | asked, overwrite)
    if run.finished and target.is_dir():
        return run.finished
    if plan is None and not scores:
        known = stats
        job = Job(trainer, model, data, lambda whole, gradients: known or observe(trainer, whole, data, run, gradients))
        stats = method.stats(job)
        if method.criterion:
            scores = [score_experts(stats, cut.method, cut.direction, seed())]
        else:
            scores = [method.run(job, cut.ratio, seed(), run.partial(method=cut.method))]
        scores += [one for one in score_by_all(stats, seed()) if one.method != cut.method]
    if plan is None:
        plan = make_plan(scores[0], cut.ratio, cut.scope, cut.floor)
        if rule is not None and stats is not None:
            plan = replace(plan, merge=rule(stats, plan.keep))
            if not plan.merge.groups:
                raise InputError("--merge: no two experts were seen on the same tokens, so none is known to be alike.")
    if not trainer.is_global_zero:
        return None
    if scores:
        note_order(scores[0].method, cut.scope, scores[0].comparable)
    check_droppable(path, plan.blocks)
    run.begin(*ROUND_FILES)
    started = time.perf_counter()
    entry = wanted_entry(path, stats, skipping)
    # The model first: when its weights turn out damaged, nothing is written.
    compact_checkpoint(path, plan.keep, target, skipping=entry, merge=plan.merge, blocks=plan.blocks)
    plan.save(run.folder / "plan.json")
    if scores and scores_file is None:
        write_scores(run.folder / "scores.json", scores)
    return run.finish(
        {
            "model_id": identity,
            "data_fingerprint": plan.data_fingerprint,
            **{name: plan.made_by.get(name) for name in ("method", "ratio", "scope", "direction")},
            **reduction(path, target, shapes, plan.keep, plan.blocks),
            **({"merged": plan.num_merged} if plan.merge.groups else {}),
            "save_seconds": round(time.perf_counter() - started, 3),
            "world_size": trainer.world_size,
        },
        "plan.json",
    )
