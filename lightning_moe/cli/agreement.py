"""``agreement``: how far plans agree, a number for each pair and a figure (MC-Suite, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lightning_moe.callbacks.figure_logging import save_figure
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import layer_shapes, model_id, same_model
from lightning_moe.pruning.plan import PruningPlan, agreement, load_plan
from lightning_moe.report.agreement import matrix_figure

Keep = dict[str, list[int]]


def agree(
    trainer: Trainer, plans: Sequence[str], out: str, overwrite: bool, model: str | None = None
) -> dict[str, Any] | None:
    """Write agreement.json and agreement.png, print the table.

    A layer that a plan leaves out stays whole; ``model`` says how many experts that is, and which layers there are.
    """
    if len(plans) < 2:
        raise InputError(f"--plans: {len(plans)} given; at least two are needed.")
    found = [_load(place) for place in plans]
    first = found[0]
    for place, plan in zip(plans[1:], found[1:], strict=True):
        if first.model_id and plan.model_id and not same_model(first.model_id, plan.model_id):
            raise InputError(f"--plans: {place} is for model {plan.model_id}, {plans[0]} for {first.model_id}.")
    keeps = _same_layers(plans, found) if model is None else _all_layers(plans, found, model)
    run = RunFolder(out, "agreement", {"plans": keeps, "names": list(plans)}, overwrite)
    if not trainer.is_global_zero:
        return None
    pairs = [[agreement(one, other) for other in keeps] for one in keeps]
    numbers = [[pair["all"] for pair in row] for row in pairs]
    names = _short(plans)
    run.begin()
    save_figure(run.folder / "agreement.png", matrix_figure(names, numbers))
    table = Table("", *names, title="experts that both plans keep, over those that either keeps", title_justify="left")
    for name, row in zip(names, numbers, strict=True):
        table.add_row(name, *(f"{number:.3f}" for number in row))
    Console(soft_wrap=True).print(table)
    return run.finish(
        {
            "plans": list(plans),
            "agreement": numbers,
            "layers": [
                {"plans": [plans[i], plans[j]], **pairs[i][j]}
                for i in range(len(keeps))
                for j in range(i + 1, len(keeps))
            ],
        }
    )


def _load(place: str) -> PruningPlan:
    try:
        return load_plan(Path(place))
    except InputError as error:
        raise InputError(str(error).replace("--plan ", "--plans: ", 1)) from error


def _same_layers(places: Sequence[str], plans: Sequence[PruningPlan]) -> list[Keep]:
    """What they keep, if all name the same layers. Raises ``InputError`` where one keeps a layer whole."""
    for place, plan in zip(places, plans, strict=True):
        for named_in, other in zip(places, plans, strict=True):
            if other.keep and plan.keep and not other.keep.keys() & plan.keep.keys():
                raise InputError(
                    f"--plans: {place} and {named_in} name no layer in common; if all are for one model, give it by "
                    "--model.path."
                )
            for name in (one for one in other.keep if one not in plan.keep):
                raise InputError(
                    f"--plans: {place} leaves out {name}, which {named_in} names; there all experts stay, and no plan "
                    "says how many these are: give --model.path, the model that all are for."
                )
    return [plan.keep for plan in plans]


def _all_layers(places: Sequence[str], plans: Sequence[PruningPlan], model: str) -> list[Keep]:
    """What they keep of every layer of the model."""
    shapes, identity = layer_shapes(model), model_id(model)
    for place, plan in zip(places, plans, strict=True):
        try:
            plan.check(shapes, identity)
        except InputError as error:
            raise InputError(f"--plans: {place}: {error}") from error
    return [{one.name: plan.keep.get(one.name, list(range(one.num_experts))) for one in shapes} for plan in plans]


def _short(places: Sequence[str]) -> list[str]:
    """The places without what all of them share; numbers where that leaves nothing."""
    parts = [[part for part in Path(place).parts if part != "plan.json"] for place in places]
    while all(len(one) > 1 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    names = ["/".join(one) for one in parts]
    return names if len(set(names)) == len(names) else [f"{number}: {name}" for number, name in enumerate(names, 1)]
