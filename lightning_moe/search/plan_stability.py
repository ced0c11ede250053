"""PlanStability: stop a search whose plan no longer changes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.errors import InputError
from lightning_moe.search.diep import DiEPSearch


class PlanStability(Callback):
    """Make the plan of a ``DiEPSearch`` every so often, log how much of it stayed, stop when it stays the same.

    Logs ``search/plan_overlap``: the fraction of the experts kept now that the plan before kept too.

    Args:
        every: Updates between two plans.
        patience: Plans in a row that must equal the one before; None never stops.
    """

    def __init__(self, every: int = 10, patience: int | None = None) -> None:
        for name, value in (("check_every", every), ("patience", patience)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: at least 1.")
        self.every, self.patience = every, patience
        self.overlaps: list[float] = []
        """One per plan after the first."""
        self._keep: dict[str, list[int]] | None = None
        self._seen = 0

    @property
    def stable(self) -> bool:
        last = self.overlaps[-self.patience :] if self.patience else []
        return self.patience is not None and len(last) == self.patience and min(last) == 1.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.stable  # resumed from a save made at the very stop

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        assert isinstance(pl_module, DiEPSearch)
        if pl_module.done == self._seen or pl_module.done % self.every:
            return  # in the midst of accumulating, or not yet
        self._seen = pl_module.done
        keep = pl_module.kept_experts()
        if self._keep is not None:
            self.overlaps.append(overlap(self._keep, keep))
            pl_module.log("search/plan_overlap", self.overlaps[-1], prog_bar=True)
        self._keep = keep
        if self.stable:
            trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"overlaps": self.overlaps, "keep": self._keep, "seen": self._seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.overlaps, self._keep, self._seen = state_dict["overlaps"], state_dict["keep"], state_dict["seen"]


def overlap(before: dict[str, list[int]], now: dict[str, list[int]]) -> float:
    """The fraction of the experts kept in ``now`` that ``before`` kept too."""
    common = sum(len(set(before[name]) & set(ids)) for name, ids in now.items())
    return common / sum(len(ids) for ids in now.values())
