"""Surgery: cut a model in memory to the experts a plan keeps. The only code that changes weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.decoder_layers import drop_decoder_layers, renumbered
from lightning_moe.moe.expert_counts import drop_settings, set_counts
from lightning_moe.moe.layer_settings import settings_without
from lightning_moe.moe.layers import LayerShape, check_unpacked, find_moe_layers
from lightning_moe.moe.merged_experts import NO_MERGE, LayerMerge, Merge, check_merge
from lightning_moe.moe.non_uniform import drop_block, keep_in_block, set_common_count
from lightning_moe.moe.skip_tables import cut_entry, refresh_skipping, stored_entry


def check_keep(shapes: Sequence[LayerShape], keep: Mapping[str, Sequence[int]], blocks: Collection[str] = ()) -> None:
    """Refuse, in one line, whatever these layers cannot be cut to. A layer not named in ``keep`` stays whole.

    Of a layer that keeps no expert the MoE block is dropped as a whole; of those in ``blocks`` the decoder layer.
    """
    known = {shape.name: shape for shape in shapes}
    for name in (*keep, *blocks):
        if name not in known:
            raise InputError(
                f"the plan names a layer {name!r} that the model does not have; its MoE layers are "
                f"{shapes[0].name} ... {shapes[-1].name} ({len(shapes)}). Is the plan for another model?"
            )
    for name, ids in keep.items():
        if name in blocks and ids:
            raise InputError(
                f"{name}: the plan drops its decoder layer by `blocks` and keeps {len(ids)} of its experts; leave out "
                "one of the two."
            )
        _check_layer(known[name], ids)
    if all(name in blocks or len(keep.get(name, (0,))) == 0 for name in known):
        raise InputError(
            f"the plan drops all {len(shapes)} MoE layers of the model; a Mixture-of-Experts keeps at least one."
        )


def _check_layer(shape: LayerShape, ids: Sequence[int]) -> None:
    if len(ids) == 0:
        return
    if not all(isinstance(i, int) for i in ids) or list(ids) != sorted(set(ids)):
        raise InputError(f"{shape.name}: the kept experts must be different ids in ascending order, not {ids}.")
    if ids and not 0 <= ids[0] <= ids[-1] < shape.num_experts:
        raise InputError(
            f"{shape.name}: the plan keeps expert {ids[0] if ids[0] < 0 else ids[-1]}, but the layer has experts 0 to "
            f"{shape.num_experts - 1}. Is the plan for another model?"
        )
    if len(ids) < shape.fewest:
        groups = f", {shape.num_groups} groups" if shape.num_groups > 1 else ""
        raise InputError(
            f"{shape.name}: the plan keeps {len(ids)} experts, but the router needs {shape.fewest} "
            f"(top_k={shape.top_k}{groups}). Keep at least that many."
        )
    if shape.num_groups > 1:
        counts = [sum(i // shape.group_size == group for i in ids) for group in range(shape.num_groups)]
        if len(set(counts)) > 1:
            raise InputError(
                f"{shape.name}: the router works in {shape.num_groups} groups of {shape.group_size} experts; the plan "
                f"keeps {counts} of them. Keep the same number in every group."
            )


def keep_experts(
    model: PreTrainedModel,
    keep: Mapping[str, Sequence[int]],
    merge: Merge = NO_MERGE,
    blocks: Collection[str] = (),
) -> None:
    """Keep only the named experts of each layer, or raise ``InputError`` and change nothing.

    Ids are ascending; layers that ``keep`` does not name stay whole. Where it names no expert the MoE block goes,
    router and shared experts with it, and adds nothing any more (Layer Drop). ``blocks`` names MoE blocks whose whole
    decoder layers go; the others are numbered anew (Block Drop, arXiv 2406.02500). ``merge`` names dropped experts
    whose weights go into kept ones, see ``merged_experts``. The config is brought in line: one count when all layers
    agree, transformers' ``per_layer_config`` when they do not; skip tables are cut along.
    """
    layers = find_moe_layers(model)
    shapes = [layer.shape for layer in layers]
    check_unpacked(model, "cut")
    check_keep(shapes, keep, blocks)
    check_merge(shapes, keep, merge)
    dropped = [layer.parts.index for layer in layers if layer.name in blocks]
    settings = settings_without(model.config, dropped) if dropped else {}
    merges = {layer.name: LayerMerge(layer, merge) for layer in layers if layer.name in merge.groups}
    counts: dict[int, int] = {}
    for layer in layers:
        if layer.name in blocks:
            continue
        ids = keep.get(layer.name, range(layer.num_experts))
        counts[renumbered(layer.parts.index, dropped)] = len(ids)
        if len(ids) == 0:
            drop_block(model, layer.parts)
        elif len(ids) < layer.num_experts:
            keep_in_block(layer.parts, ids)
            if layer.name in merges:
                merges.pop(layer.name).write(ids)
    if dropped:
        drop_decoder_layers(model, dropped)
        drop_settings(model.config, settings, dropped)
    set_counts(model.config, counts)
    if stored_entry(model.config) is not None:
        cut_entry(model.config, {one.parts.index: keep[one.name] for one in layers if one.name in keep}, dropped)
        refresh_skipping(model)
    set_common_count(model)
