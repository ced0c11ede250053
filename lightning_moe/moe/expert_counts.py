"""Expert counts: what a config says of how many experts each layer holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from lightning_moe.moe.decoder_layers import renumbered
from lightning_moe.moe.non_uniform import COUNT_NAMES, experts_per_layer


def count_name(config: PreTrainedConfig) -> str:
    """The name under which this config stores its number of experts (aliases aside)."""
    stored = config.to_dict()
    return next(name for name in COUNT_NAMES if isinstance(stored.get(name), int))


def layers_gone(config: PreTrainedConfig) -> list[int]:
    """The decoder layers whose MoE block is no more there, by what the config says."""
    return [index for index, count in experts_per_layer(config).items() if count == 0]


def set_counts(config: PreTrainedConfig, counts: Mapping[int, int]) -> None:
    """Write the number of experts of each MoE decoder layer into ``config``; 0 where the block is gone.

    Layers that it says were dropped before stay so. Stock transformers builds every layer at the config's own count,
    and refuses layers of other sizes. Where a block is gone and the other layers are of one size, they would fit, and
    it would fill in the missing block at random: so there that count is one more than any layer holds.
    """
    text_config = config.get_text_config()
    gone = layers_gone(config) + [index for index, count in counts.items() if count == 0]
    left = {index: count for index, count in counts.items() if count}
    text_config.per_layer_config = None
    vars(text_config).pop("allow_global_per_layer_attribute_access", None)
    name = count_name(text_config)
    uniform = len(set(left.values())) == 1
    if uniform or gone:
        setattr(text_config, name, max(left.values()) + bool(gone))
    if gone or not uniform:
        set_apart = dict.fromkeys(gone, 0) | left
        text_config.per_layer_config = {index: {name: set_apart[index]} for index in sorted(set_apart)}
        text_config.allow_global_per_layer_attribute_access = True
    # The model's own balance loss assumes one count for all layers; ours does not.
    if not uniform and getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False


def drop_settings(config: PreTrainedConfig, settings: Mapping[str, Any], dropped: Collection[int]) -> None:
    """Write what ``settings_without`` found into ``config``, and number the layers anew that have no experts left."""
    text_config = config.get_text_config()
    gone = layers_gone(config)
    text_config.per_layer_config = None
    for name, value in settings.items():
        setattr(text_config, name, value)
    if gone:
        name = count_name(text_config)
        text_config.per_layer_config = {renumbered(index, dropped): {name: 0} for index in gone}
