"""Skip tables: what each layer needs to skip experts, in a model, in its config, and cut with it."""

# T tokens, E experts

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.decoder_layers import renumbered
from lightning_moe.moe.non_uniform import find_blocks
from lightning_moe.moe.skipping import CONFIG_KEY, VERSION, LayerSkipping, attach_skipping

Rule = Literal["diep", "naee"]

DIGITS = 4
"""Digits behind the point in the config: more would only make it larger."""


@dataclass(frozen=True)
class SkipTable:
    """What one layer needs to skip experts."""

    gamma1: float
    """Median of the second largest routing weight over the largest."""
    gamma2_EE: Tensor
    """Likeness of two experts over the mean of the layer's pairs."""


def config_entry(tables: Mapping[int, SkipTable], rule: Rule = "diep", active: bool = False) -> dict[str, Any]:
    """The tables (by decoder layer) as they stand in a config."""
    layers = {
        str(index): {
            "gamma1": round(table.gamma1, DIGITS),
            "gamma2": [[round(value, DIGITS) for value in row] for row in table.gamma2_EE.tolist()],
        }
        for index, table in tables.items()
    }
    return {"version": VERSION, "active": active, "rule": rule, "layers": layers}


def stored_entry(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a config says about skipping, or None."""
    entry: dict[str, Any] | None = getattr(config.get_text_config(), CONFIG_KEY, None)
    return entry


def store_entry(config: PreTrainedConfig, entry: Mapping[str, Any]) -> None:
    setattr(config.get_text_config(), CONFIG_KEY, dict(entry))


def switched_entry(entry: Mapping[str, Any], skipping: bool | Literal["naee"]) -> dict[str, Any]:
    """The entry turned off, or on with DiEP's rule (True) or NAEE's."""
    rule = {"rule": "naee" if skipping == "naee" else "diep"} if skipping else {}
    return {**entry, **rule, "active": bool(skipping)}


def cut_entry(config: PreTrainedConfig, kept: Mapping[int, Sequence[int]], dropped: Collection[int] = ()) -> None:
    """Cut the tables in ``config`` to the experts that stay in each decoder layer.

    Where none stays the table goes. ``dropped`` are decoder layers that go as a whole, so that others get new numbers.
    """
    entry = stored_entry(config)
    if entry is None:
        return
    layers = {}
    for name, table in entry["layers"].items():
        index = int(name)
        ids = kept.get(index, range(len(table["gamma2"])))
        if index not in dropped and len(ids):
            gamma2 = [[table["gamma2"][i][j] for j in ids] for i in ids]
            layers[str(renumbered(index, dropped))] = {**table, "gamma2": gamma2}
    store_entry(config, {**entry, "layers": layers})


def refresh_skipping(model: PreTrainedModel) -> None:
    """Let the experts of ``model`` skip as its config says now."""
    attach_skipping(model, {block.index: block.experts for block in find_blocks(model)})


def set_skipping(
    model: PreTrainedModel, tables: Mapping[int, SkipTable], rule: Rule = "diep", active: bool = True
) -> None:
    """Give ``model`` skip tables, by decoder layer, rounded as its config will have them, and turn them on."""
    store_entry(model.config, config_entry(tables, rule, active))
    refresh_skipping(model)


def switch_skipping(model: PreTrainedModel, skipping: bool | Literal["naee"]) -> None:
    """Turn skipping off (False), or on with the tables the model has: DiEP's rule (True) or NAEE's."""
    entry = stored_entry(model.config)
    if entry is None:
        if not skipping:
            return
        raise InputError(
            "this model has no skip tables; make them from text with `lightning-moe score` and give --stats its "
            "folder, or prune it from text, which stores them."
        )
    store_entry(model.config, switched_entry(entry, skipping))
    refresh_skipping(model)


def _rules(model: PreTrainedModel) -> dict[str, LayerSkipping]:
    found = {block.name: getattr(block.experts, CONFIG_KEY, None) for block in find_blocks(model)}
    return {name: rule for name, rule in found.items() if rule is not None}


def skipped(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Of each layer that skips: assignments skipped, and all, since ``reset_skipped``."""
    return {name: (rule.skipped, rule.seen) for name, rule in _rules(model).items()}


def reset_skipped(model: PreTrainedModel) -> None:
    for rule in _rules(model).values():
        rule.skipped = rule.seen = 0


def count_only(model: PreTrainedModel, mask: Tensor | None) -> None:
    """Count in ``skipped`` only the tokens of the coming forwards whose mask is not 0; None counts all."""
    for rule in _rules(model).values():
        rule.counted_T = None if mask is None else mask.flatten().to(torch.bool)
