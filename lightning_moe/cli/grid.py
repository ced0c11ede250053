"""The grid of a comparison: its cells, and what is refused before any of them is begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from lightning_moe.cli.methods import Method, get_method
from lightning_moe.errors import InputError, did_you_mean
from lightning_moe.pruning.budget import Scope


@dataclass(frozen=True)
class Cell:
    """One way to prune the model."""

    method: Method
    scope: Scope
    ratio: float
    seed: int | None
    """None where the method depends on none."""

    @property
    def settings(self) -> dict[str, Any]:
        """In plain values: cells with equal ones are the same work."""
        return {"method": self.method.name, "scope": self.scope, "ratio": self.ratio, "seed": self.seed}

    @property
    def title(self) -> str:
        """For people."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.method.name}, {self.scope}, {100 * self.ratio:g}%{seed}"

    @property
    def file_name(self) -> str:
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method.file_name}-{self.scope}-{self.ratio!r}{seed}"


def make_grid(
    methods: Sequence[str], ratios: Sequence[float], scopes: Sequence[str], seeds: int, first_seed: int
) -> list[Cell]:
    """Every method, with its seeds, at every ratio and scope; each once. Raises ``InputError`` for unknown names."""
    for option, values in (("methods", methods), ("ratios", ratios), ("scopes", scopes)):
        if not values:
            raise InputError(f"--{option}: give at least one.")
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: at least 1 is needed.")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise InputError(
                f"--ratios {ratio}: the fraction of experts to drop must lie between 0 and 1, both excluded."
            )
    chosen = [_named(name) for name in dict.fromkeys(methods)]
    known = [_scope(name) for name in dict.fromkeys(scopes)]
    return [
        Cell(method, scope, ratio, seed)
        for method in chosen
        for seed in (range(first_seed, first_seed + seeds) if method.seeded else [None])
        for ratio in dict.fromkeys(ratios)
        for scope in known
    ]


def _named(name: str) -> Method:
    try:
        return get_method(name)
    except InputError as error:
        raise InputError(f"--methods: {error}") from error


def _scope(name: str) -> Scope:
    scopes = get_args(Scope)
    if name not in scopes:
        raise InputError(f"--scopes: Unknown scope '{name}'.{did_you_mean(name, scopes)} Known: {', '.join(scopes)}.")
    return cast(Scope, name)
