"""ImportanceFigures: what a DiEP search learns, drawn for the logger and as PNG files."""

# E experts of one layer

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks.figure_logging import log_figure, save_figure
from lightning_moe.callbacks.importance_curve import ImportanceCurve
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.scores import ExpertScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@runtime_checkable
class HasImportance(Protocol):
    """What a LightningModule, or a part of it, must offer."""

    def importance_logits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Alpha ``(E,)`` and beta, a scalar, of each MoE layer, by name in the order of depth; ``E`` may differ."""


@runtime_checkable
class HasKeptExperts(Protocol):
    """What the same part may offer besides, when it knows the plan."""

    def kept_experts(self) -> Mapping[str, Sequence[int]]:
        """Ids of the experts to keep as things stand, of every layer."""


class ImportanceFigures(Callback):
    """Show alpha and beta over the steps of a search, where they end, and which experts that keeps.

    When training ends there are three figures, ``curves``, ``distributions`` and ``experts``. They go to every logger
    that takes figures (``experiment.add_figure``, as TensorBoard's) or images (``log_image``, as that of Weights &
    Biases) under ``importance/...``, and to ``folder`` as ``importance_curves.png`` and so on, with the numbers in
    ``importance.csv``. A search that was stopped and resumed shows one curve.

    The kept experts are those with the highest ``E * softmax(alpha) * beta`` over all layers at ``ratio``, as
    ``make_plan`` with scope ``global`` finds them where routers have no groups. The callback does not know the
    routers: for group-limited ones, or another score or scope, leave ``ratio`` out and let the module answer by a
    method ``kept_experts()``. With neither, no expert is marked.

    Args:
        folder: Where to write the files, which replace those of an earlier search; null for the logger alone.
        every_n_steps: Optimiser steps between two snapshots. It doubles when there are more than 400 of them.
        ratio: Share of all experts to drop, between 0 and 1.
        floor: Fewest experts that ``ratio`` leaves in a layer; what the router needs is its ``top_k``.
    """

    def __init__(
        self, folder: Path | str | None = None, every_n_steps: int = 1, ratio: float | None = None, floor: int = 1
    ) -> None:
        if every_n_steps < 1:
            raise InputError(f"ImportanceFigures: every_n_steps {every_n_steps}: expected 1 or more.")
        if ratio is not None and not 0 < ratio < 1:
            raise InputError(f"ImportanceFigures: ratio {ratio} must lie between 0 and 1, both excluded.")
        if floor < 1:
            raise InputError(f"ImportanceFigures: floor {floor}: a layer keeps at least 1 expert.")
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"ImportanceFigures: {self.folder} is a file, not a folder.")
        self.every_n_steps, self.ratio, self.floor = every_n_steps, ratio, floor
        self.curve = ImportanceCurve(every_n_steps)
        """The snapshots so far."""
        self._ended = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, ratio=self.ratio)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.curve.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve.load_state_dict(state_dict)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = False
        logits = _checked(_part_with_importance(pl_module).importance_logits())
        if self.ratio is not None:  # a ratio that these layers do not allow is told now, not after the search
            self._highest({name: alpha_E.detach() for name, (alpha_E, _) in logits.items()}, self.ratio)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._snapshot(trainer, pl_module)  # here and not in on_fit_start, where a checkpoint may not be loaded yet

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if self.curve.is_due(trainer.global_step):
            self._snapshot(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        self._snapshot(trainer, pl_module)
        keep = self._kept(pl_module)
        if not trainer.is_global_zero:
            return
        figures = self._figures(keep)
        if self.folder is not None:
            self.curve.save_table(self.folder / "importance.csv", keep)
            for name, figure in figures.items():
                save_figure(self.folder / f"importance_{name}.png", figure)
        for logger in trainer.loggers:
            for name, figure in figures.items():
                log_figure(logger, f"importance/{name}", figure, trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ended:  # killed before it ended: with no step left, Lightning neither starts nor ends a training
            self.on_train_end(trainer, pl_module)

    def _snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks, since sharded logits need them all.
        self.curve.add(trainer.global_step, _part_with_importance(pl_module).importance_logits())

    def _kept(self, pl_module: LightningModule) -> dict[str, list[int]] | None:
        if self.ratio is not None:
            return self._highest(self.curve.gates(), self.ratio)
        part = _part_with_importance(pl_module)
        if isinstance(part, HasKeptExperts):
            return {name: sorted(ids) for name, ids in part.kept_experts().items()}
        return None

    def _highest(self, scores: Mapping[str, Tensor], ratio: float) -> dict[str, list[int]]:
        """Ids of the experts with the highest scores over all layers, by the same rules as in ``prune``."""
        shapes = [
            LayerShape(name, depth, len(score_E), top_k=min(self.floor, len(score_E)))
            for depth, (name, score_E) in enumerate(scores.items())
        ]
        doubles = {name: score_E.double() for name, score_E in scores.items()}
        return make_plan(ExpertScores("", "", "importance", shapes, doubles), ratio, "global").keep

    def _figures(self, keep: Mapping[str, Sequence[int]] | None) -> dict[str, Figure]:
        from lightning_moe.callbacks import importance_panels  # matplotlib, only once it is needed

        return {
            "curves": importance_panels.curves(self.curve),
            "distributions": importance_panels.distributions(self.curve),
            "experts": importance_panels.experts(self.curve.gates(), keep),
        }


def _part_with_importance(module: LightningModule) -> HasImportance:
    for part in module.modules():
        if isinstance(part, HasImportance):
            return part
    raise TypeError(
        f"ImportanceFigures: neither {type(module).__name__} nor a module inside it has a method importance_logits(), "
        "which gives alpha (E,) and beta, a scalar, of each MoE layer by name."
    )


def _checked(logits: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, tuple[Tensor, Tensor]]:
    if not logits:
        raise TypeError("ImportanceFigures: importance_logits() gives no layer.")
    for name, (alpha_E, beta) in logits.items():
        if alpha_E.dim() != 1 or beta.numel() != 1:
            raise TypeError(
                f"ImportanceFigures: importance_logits() gives for {name} an alpha of shape {tuple(alpha_E.shape)} and "
                f"a beta of shape {tuple(beta.shape)}; expected (E,) and a scalar."
            )
    return logits
