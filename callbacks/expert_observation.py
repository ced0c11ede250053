"""ExpertObservation: gather the statistics of every expert while any model predicts, validates or tests."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.files import replaced_file
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.observation import Observation


class ExpertObservation(Callback):
    """Observe the experts of the Hugging Face MoE inside a LightningModule; the result is in ``layers``.

    Batches are mappings with ``input_ids`` and, when something is padded, ``attention_mask``.

    Args:
        partial: Folder for what is summed so far, one file a rank, from which a killed pass continues; the
            file is removed at the end. The caller starts the loader at ``batches_done``.
        save_every: Batches between two such saves.
    """

    def __init__(self, partial: Path | None = None, save_every: int = 25) -> None:
        self.partial, self.save_every = partial, save_every
        self.layers: list[LayerStats] = []
        """One per MoE layer, in the order of depth, summed over ranks; filled when the loop ends."""
        self._context = ExitStack()
        self._observation: Observation | None = None
        self._done = 0

    def batches_done(self, rank: int) -> int:
        """Batches that an earlier, killed pass of this rank has already summed."""
        file = self._file(rank)
        return int(load_file(file)["batches"]) if file is not None and file.exists() else 0

    def _file(self, rank: int) -> Path | None:
        return None if self.partial is None else self.partial / f"observation-{rank}.safetensors"

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = next((m for m in pl_module.modules() if isinstance(m, PreTrainedModel)), None)
        if model is None:
            raise TypeError(f"ExpertObservation: {type(pl_module).__name__} holds no Hugging Face model.")
        observation = Observation(model).to(pl_module.device)
        file = self._file(trainer.global_rank)
        if file is not None and file.exists():
            saved = load_file(file, device=str(pl_module.device))
            self._done = int(saved.pop("batches"))
            observation.load_sums(saved)
        self._observation = observation
        self._context.enter_context(observation.attached(model))

    def _next_batch(self, batch: Any) -> None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError("ExpertObservation: batches must be mappings with `input_ids`.")
        assert self._observation is not None
        self._observation.next_batch(batch["input_ids"], batch.get("attention_mask"))

    def _batch_done(self, trainer: Trainer) -> None:
        self._done += 1
        file = self._file(trainer.global_rank)
        if file is not None and self._done % self.save_every == 0:
            assert self._observation is not None
            with replaced_file(file) as beside:
                save_file(self._observation.sums() | {"batches": torch.tensor(self._done)}, beside)

    def _end(self, trainer: Trainer) -> None:
        self._context.close()
        assert self._observation is not None
        self.layers = self._observation.compute()
        file = self._file(trainer.global_rank)
        if file is not None:
            file.unlink(missing_ok=True)

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
        self._end(trainer)

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
