"""ExpertObservation: gather the statistics of every expert while any model predicts, validates or tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.callbacks.summing_pass import SummingPass
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.observation import Observation


class ExpertObservation(SummingPass[Observation]):
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
        super().__init__(partial, resume, save_every)
        self.stable_ranks = stable_ranks
        self.layers: list[LayerStats] = []
        """One per MoE layer, in the order of depth, summed over ranks; filled when the loop ends."""

    @override
    def _begun(self, model: PreTrainedModel) -> Observation:
        return Observation(model)

    @override
    def _ended(self, running: Observation) -> None:
        self.layers = running.compute(self.stable_ranks)
