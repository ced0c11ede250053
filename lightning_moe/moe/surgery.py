"""Surgery: cut a model in memory to the experts a plan keeps. The only code that changes weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape, check_unpacked, find_moe_layers
from lightning_moe.moe.merged_experts import NO_MERGE, LayerMerge, Merge, check_merge
from lightning_moe.moe.non_uniform import COUNT_NAMES, keep_in_block
from lightning_moe.moe.skip_tables import cut_entry, refresh_skipping, stored_entry


def check_keep(shapes: Sequence[LayerShape], keep: Mapping[str, Sequence[int]]) -> None:
    """Refuse, in one line, whatever these layers cannot be cut to. A layer not named in ``keep`` stays whole."""
    known = {shape.name: shape for shape in shapes}
    for name, ids in keep.items():
        if name not in known:
            raise InputError(
                f"the plan names a layer {name!r} that the model does not have; its MoE layers are "
                f"{shapes[0].name} ... {shapes[-1].name} ({len(shapes)}). Is the plan for another model?"
            )
        _check_layer(known[name], ids)


def _check_layer(shape: LayerShape, ids: Sequence[int]) -> None:
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


def keep_experts(model: PreTrainedModel, keep: Mapping[str, Sequence[int]], merge: Merge = NO_MERGE) -> None:
    """Keep only the named experts of each layer, or raise ``InputError`` and change nothing.

    Ids are ascending; layers that ``keep`` does not name stay whole. ``merge`` names dropped experts whose weights go
    into kept ones, see ``merged_experts``. The config is brought in line: one count when all layers
    agree, transformers' ``per_layer_config`` when they do not; skip tables are cut along.
    """
    layers = find_moe_layers(model)
    shapes = [layer.shape for layer in layers]
    check_unpacked(model, "cut")
    check_keep(shapes, keep)
    check_merge(shapes, keep, merge)
    merges = {layer.name: LayerMerge(layer, merge) for layer in layers if layer.name in merge.groups}
    for layer in layers:
        if len(keep.get(layer.name, ())) not in (0, layer.num_experts):
            keep_in_block(layer.parts, keep[layer.name])
            if layer.name in merges:
                merges.pop(layer.name).write(keep[layer.name])
    counts = {layer.parts.index: layer.num_experts for layer in layers}
    set_counts(model.config, counts)
    if stored_entry(model.config) is not None:
        cut_entry(model.config, {layer.parts.index: keep[layer.name] for layer in layers if layer.name in keep})
        refresh_skipping(model)
    if len(set(counts.values())) == 1:
        for name in COUNT_NAMES:  # the model's own balance loss reads its count from the model
            if isinstance(getattr(model, name, None), int):
                setattr(model, name, layers[0].num_experts)


def count_name(config: PreTrainedConfig) -> str:
    """The name under which this config stores its number of experts (aliases aside)."""
    stored = config.to_dict()
    return next(name for name in COUNT_NAMES if isinstance(stored.get(name), int))


def set_counts(config: PreTrainedConfig, counts: Mapping[int, int]) -> None:
    """Write the number of experts of each MoE decoder layer into ``config``."""
    text_config = config.get_text_config()
    text_config.per_layer_config = None
    vars(text_config).pop("allow_global_per_layer_attribute_access", None)
    name = count_name(text_config)
    if len(set(counts.values())) == 1:
        setattr(text_config, name, next(iter(counts.values())))
        return
    text_config.per_layer_config = {index: {name: count} for index, count in counts.items()}
    text_config.allow_global_per_layer_attribute_access = True
    # The model's own balance loss assumes one count for all layers; ours does not.
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False
