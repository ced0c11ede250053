"""The options of commands that say whether a model skips experts, and where its tables come from."""

from __future__ import annotations

from typing import Any, Literal

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import read_config
from lightning_moe.moe.skip_tables import config_entry, stored_entry, switched_entry
from lightning_moe.stats.similarity import skip_tables
from lightning_moe.stats.store import ModelStats

Skipping = bool | Literal["naee"] | None
"""On with DiEP's rule, off, on with NAEE's; None is what the model's config says."""


def wanted_entry(path: str, stats: ModelStats | None, skipping: Skipping) -> dict[str, Any] | None:
    """What the config shall say of skipping, for the experts of the model at ``path``; None for nothing.

    The tables are those of the statistics, or else the model's own. Raises ``InputError`` when it shall skip and
    there are none.
    """
    own = stored_entry(read_config(path))
    entry = own if stats is None else config_entry(skip_tables(stats.layers))
    if entry is None:
        if skipping:
            raise InputError(
                f"--skipping {str(skipping).lower()}: {path} holds no skip tables; run `lightning-moe score` on it "
                "and give that folder as --stats. Models pruned from text or statistics hold theirs."
            )
        return None
    if skipping is not None:
        return switched_entry(entry, skipping)
    return entry if own is None else {**entry, "rule": own["rule"], "active": own["active"]}
