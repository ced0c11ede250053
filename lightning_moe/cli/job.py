"""Job: one model and one calibration text, which methods work from."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lightning.pytorch import Trainer

from lightning_moe.cli.request import model_path
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError, describe
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import model_id
from lightning_moe.moe.layers import LayerShape, find_moe_layers
from lightning_moe.moe.left_out import layers_left_out
from lightning_moe.moe.merged_experts import NO_MERGE, Merge
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.split_tensors import is_sharded
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.store import ModelStats


class Job:
    """One model and one calibration text: what methods work from. Each part is made when it is first asked for.

    Args:
        trainer: How and where to run.
        model: The model.
        data: The calibration text.
        observe: Makes, or finds, the statistics of the whole model on that text; told whether with gradients.
        identity: What scores say they were made for; default is the id of the checkpoint.
        whole: The layers before any round of pruning, of which a ratio is a share; default is as they are.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MoECausalLM,
        data: TextDataModule,
        observe: Callable[[MoECausalLM, bool], ModelStats],
        identity: str | None = None,
        whole: Sequence[LayerShape] | None = None,
    ) -> None:
        self.trainer, self.data, self.whole = trainer, data, whole
        self._identity = identity
        self.preparation_seconds = 0.0
        """Spent on loading the model and on the statistics: work that methods share."""
        self._model, self._observe = model, observe
        self._cut = False
        self._stats: ModelStats | None = None
        self._failures: dict[bool, str] = {}

    @property
    def identity(self) -> str:
        return self._identity or model_id(model_path(self._model))

    @property
    def model(self) -> MoECausalLM:
        """The model with all its experts, loaded."""
        with self._preparation():
            self._whole().prepare(self.trainer)
        return self._model

    @property
    def stats(self) -> ModelStats:
        """The statistics of the model on the calibration text. A pass that failed is not made again."""
        return self._made(self._stats, gradients=False)

    @property
    def gradient_stats(self) -> ModelStats:
        """The same, with gradients: of further passes that are made when they are first asked for."""
        stats = self.stats
        return self._made(stats if stats.has_gradients else None, gradients=True)

    def _made(self, stats: ModelStats | None, gradients: bool) -> ModelStats:
        if gradients in self._failures:
            raise InputError(self._failures[gradients])
        if stats is None:
            with self._preparation():
                try:
                    stats = self._stats = self._observe(self._whole(), gradients)
                except Exception as error:
                    what = "gradients" if gradients else "statistics"
                    self._failures[gradients] = f"the {what} could not be made: {describe(error)}"
                    raise
        return stats

    @contextmanager
    def cut_model(
        self, keep: Mapping[str, Sequence[int]], merge: Merge = NO_MERGE, blocks: Collection[str] = ()
    ) -> Iterator[MoECausalLM]:
        """The model with only these experts and layers, in memory; whoever asks for ``model`` next gets a whole one.

        Where it is split over ranks the others are masked, or left out, which gives the same; experts cannot be merged
        there.
        """
        model = self.model
        if is_sharded(model.network):
            assert not merge.groups, "refused before the model was split"
            masked = {name: ids for name, ids in keep.items() if len(ids)}
            with (
                mask_plan(model.moe_layers, masked),
                layers_left_out(model.network, model.moe_layers, keep, blocks),
            ):
                yield model
            return
        self._cut = bool(keep)
        keep_experts(model.network, keep, merge, blocks)
        model.moe_layers = find_moe_layers(model.network)
        yield model

    def whole_model_to_change(self) -> MoECausalLM:
        """The model with all its experts, loaded, to do with as one likes; whoever asks next gets another."""
        model = self.model
        self._cut = True
        return model

    def _whole(self) -> MoECausalLM:
        """The model, loaded or not, but not one that was cut."""
        if self._cut:
            self._model.release()
            self._cut = False
        return self._model

    @contextmanager
    def _preparation(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.preparation_seconds += time.perf_counter() - start
