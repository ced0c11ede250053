"""PruningPlan: which experts and layers stay. A small JSON file, to be read and edited by people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lightning_moe.errors import InputError, did_you_mean
from lightning_moe.files import write_json
from lightning_moe.moe.checkpoints import same_model
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.merged_experts import NO_MERGE, Merge, Router, check_merge
from lightning_moe.moe.surgery import check_keep

VERSION = 1
KEYS = ("version", "model_id", "data_fingerprint", "made_by", "keep", "blocks", "merge", "align", "router")
"""What is read of a file."""


@dataclass(frozen=True)
class PruningPlan:
    """The kept expert ids of each MoE layer, ascending, under the layer's path in the model."""

    keep: dict[str, list[int]]
    """Of a layer without any, the MoE block goes as a whole (Layer Drop, arXiv 2406.02500)."""
    model_id: str | None = None
    """The checkpoint it was made for; a plan without one fits any model with such layers."""
    data_fingerprint: str | None = None
    made_by: dict[str, Any] = field(default_factory=dict)
    merge: Merge = NO_MERGE
    """In the file ``merge`` are its groups (layer -> kept expert -> the experts averaged into it, itself among them ->
    weight), and ``align`` and ``router`` say how; a file without these two has them as ``Merge`` does."""
    blocks: list[str] = field(default_factory=list)
    """MoE blocks whose whole decoder layer goes, attention too (Block Drop); ``keep`` names no experts of theirs."""

    def check(self, shapes: Sequence[LayerShape], model_id: str) -> None:
        """Raise ``InputError`` unless the plan fits these layers of this model."""
        check_keep(shapes, self.keep, self.blocks)
        check_merge(shapes, self.keep, self.merge)
        if self.model_id is not None and not same_model(self.model_id, model_id):
            raise InputError(
                f"the plan was made for model {self.model_id}, this is {model_id}. To use it all the same, delete "
                "its line `model_id`."
            )

    @property
    def num_merged(self) -> int:
        """Dropped experts that are averaged into kept ones."""
        groups = [(kept, group) for layer in self.merge.groups.values() for kept, group in layer.items()]
        return sum(len(set(group) - {kept}) for kept, group in groups)

    def save(self, file: Path) -> None:
        value = {
            "version": VERSION,
            "model_id": self.model_id,
            "data_fingerprint": self.data_fingerprint,
            "made_by": self.made_by,
            "keep": self.keep,
            **({"blocks": self.blocks} if self.blocks else {}),
            **({"merge": self.merge.groups, **self.merge.settings} if self.merge.groups else {}),
        }
        write_json(file, value)


def compose(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Two cuts as one: ``now`` names places among the experts that ``before`` kept; the result names the first ids.

    A layer that ``now`` does not name stays as ``before`` left it.
    """
    return {name: [ids[place] for place in now.get(name, range(len(ids)))] for name, ids in before.items()}


def cut_shapes(shapes: Sequence[LayerShape], keep: Mapping[str, Sequence[int]]) -> list[LayerShape]:
    """The layers once only the experts in ``keep`` are left."""
    return [replace(shape, num_experts=len(keep.get(shape.name, range(shape.num_experts)))) for shape in shapes]


def agreement(one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """How far two plans agree, layer by layer: experts that both keep, over those that either keeps (Jaccard).

    Under ``all``, that of all layers together. Two that drop a layer as a whole agree on it. Layers that only one of
    them names are left out.
    """
    both = {name: (set(ids), set(other[name])) for name, ids in one.items() if name in other}
    layers = {
        name: len(mine & yours) / len(mine | yours) if mine | yours else 1.0 for name, (mine, yours) in both.items()
    }
    common = sum(len(mine & yours) for mine, yours in both.values())
    either = sum(len(mine | yours) for mine, yours in both.values())
    return {**layers, "all": common / either if either else 1.0}


def load_plan(file: Path) -> PruningPlan:
    """Read a plan, or that of a run folder; only ``keep`` is needed. Raises ``InputError`` that names the fault."""
    file = file / "plan.json" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"--plan {file}: no such file.")
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--plan {file}: not JSON ({error}).") from error
    if isinstance(value, dict) and "blocks" in value:
        value.setdefault("keep", {})
    if not isinstance(value, dict) or not isinstance(value.get("keep"), dict):
        raise InputError(f'--plan {file}: no `keep` in it; expected {{"keep": {{"model.layers.0.mlp": [0, 2, ...]}}}}.')
    if value.get("version", VERSION) != VERSION:
        raise InputError(f"--plan {file}: version {value['version']}, this program reads {VERSION}.")
    if not isinstance(value.get("model_id"), str | None):
        raise InputError(f"--plan {file}: model_id must be a name, not {value['model_id']!r}; its line can be deleted.")
    for name in value.keys() - KEYS:  # people may keep notes in it, but a misspelt key would be passed over
        near = did_you_mean(name, KEYS)
        if near:
            raise InputError(f"--plan {file}: Unknown key {name!r}.{near} Known: {', '.join(KEYS)}.")
    for name, ids in value["keep"].items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise InputError(f"--plan {file}: {name}: expected a list of expert ids, found {ids!r}.")
    blocks = value.get("blocks") or []
    if not isinstance(blocks, list) or not all(isinstance(name, str) for name in blocks):
        raise InputError(f'--plan {file}: `blocks` must be a list of layers, ["model.layers.3.mlp"], not {blocks!r}.')
    keep = {name: [] for name in blocks} | {name: sorted(ids) for name, ids in value["keep"].items()}
    made_by, merge = value.get("made_by") or {}, _read_merge(file, value)
    return PruningPlan(keep, value.get("model_id"), value.get("data_fingerprint"), made_by, merge, blocks)


def _read_merge(file: Path, value: Mapping[str, Any]) -> Merge:
    """What a plan says of merging, the ids as numbers; JSON has them as words."""
    stored = value.get("merge")
    try:
        groups = {
            name: {int(kept): {int(i): weight for i, weight in group.items()} for kept, group in layer.items()}
            for name, layer in ({} if stored is None else stored).items()
        }
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"--plan {file}: `merge` must name layers, in each the kept experts, and for these the weights of their "
            'group: {"model.layers.0.mlp": {"2": {"2": 0.6, "5": 0.4}}}.'
        ) from error
    align, router = value.get("align", Merge.align), value.get("router", Merge.router)
    if not isinstance(align, bool):
        raise InputError(f"--plan {file}: `align` must be true or false, not {align!r}.")
    if router not in get_args(Router):
        raise InputError(f"--plan {file}: `router` must be one of {', '.join(get_args(Router))}, not {router!r}.")
    return Merge(groups, align, router)
