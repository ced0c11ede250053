"""ExpertObservation: gather the statistics of every expert while any model predicts, validates or tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.callbacks.batch_saves import BatchSaves
from lightning_moe.moe.layers import hugging_face_model
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.observation import Observation


class ExpertObservation(Callback):
    """Observe the experts of the Hugging Face MoE inside a LightningModule; the result is in ``layers``.

    Batches are mappings with ``input_ids`` and, when something is padded, ``attention_mask``. Not for training: with
    gradient checkpointing each token would count twice.

    Args:
        partial: Folder, seen by all ranks, for what is summed so far; a killed pass goes on from there. The caller
            removes it once the result is safe.
        resume: Called in ``setup`` with the number of batches that are summed already; the loader must leave them out.
        save_every: Batches between two saves.
        stable_ranks: Whether to work out the stable ranks of all experts' matrices, which takes long for large ones.
    """

    def __init__(
        self,
        partial: Path | None = None,
        resume: Callable[[int], None] | None = None,
        save_every: int = 25,
        stable_ranks: bool = True,
    ) -> None:
        self.resume, self.stable_ranks = resume, stable_ranks
        self._saves = BatchSaves(partial, "observation", save_every)
        self.layers: list[LayerStats] = []
        """One per MoE layer, in the order of depth, summed over ranks; filled when the loop ends."""
        self._context = ExitStack()
        self._observation: Observation | None = None
        self._done = self._summed = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The strategy's collectives work from this hook on, and the loaders are made after it.
        self._summed = self._saves.last(trainer)
        if self.resume is not None:
            self.resume(self._summed)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = hugging_face_model(pl_module, "ExpertObservation")
        observation = Observation(model).to(pl_module.device)
        self._done, self._summed = self._summed, 0
        if self._done:
            observation.load_sums(self._saves.load(trainer, self._done, pl_module.device))
        self._observation = observation
        self._context.enter_context(observation.attached(model))

    def _next_batch(self, batch: Any) -> None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError("ExpertObservation: batches must be mappings with `input_ids`.")
        assert self._observation is not None
        self._observation.next_batch(batch["input_ids"], batch.get("attention_mask"))

    def _batch_done(self, trainer: Trainer) -> None:
        self._done += 1
        assert self._observation is not None
        self._saves.save(trainer, self._done, self._observation.sums())

    def _end(self) -> None:
        self._context.close()
        assert self._observation is not None
        self.layers = self._observation.compute(self.stable_ranks)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._next_batch(batch)

    @override
    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._batch_done(trainer)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    on_validation_start = on_test_start = on_predict_start
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end
    on_validation_end = on_test_end = on_predict_end

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._context.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._context.close()
