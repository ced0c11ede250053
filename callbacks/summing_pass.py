"""SummingPass: sum something up while any model predicts, validates or tests; a killed pass goes on from its save."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.callbacks.batch_saves import BatchSaves
from lightning_moe.moe.layers import hugging_face_model


class RunningSums(Protocol):
    """Sums over the tokens of forwards, each announced by ``next_batch`` and run inside ``attached``."""

    def to(self, device: torch.device) -> Any: ...

    def next_batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None: ...

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]: ...

    def sums(self) -> dict[str, Tensor]: ...

    def load_sums(self, sums: dict[str, Tensor]) -> None: ...


SumsT = TypeVar("SumsT", bound=RunningSums)


class SummingPass(Callback, Generic[SumsT]):
    """Keeps sums over a loop of the Hugging Face MoE inside a LightningModule.

    Batches are mappings with ``input_ids`` and, when something is padded, ``attention_mask``. Not for training: with
    gradient checkpointing each token would count twice.

    Args:
        partial: Folder, seen by all ranks, for what is summed so far; a killed pass goes on from there. The caller
            removes it once the result is safe.
        resume: Called in ``setup`` with the number of batches that are summed already; the loader must leave them out.
        save_every: Batches between two saves.
    """

    def __init__(
        self, partial: Path | None = None, resume: Callable[[int], None] | None = None, save_every: int = 25
    ) -> None:
        self.partial, self.resume = partial, resume
        self._saves = BatchSaves(partial, "sums", save_every)
        self._context = ExitStack()
        self._running: SumsT | None = None
        self._done = self._summed = 0

    @abstractmethod
    def _begun(self, model: PreTrainedModel) -> SumsT:
        """The sums, with nothing in them yet."""

    @abstractmethod
    def _ended(self, running: SumsT) -> None:
        """Take what was summed; all ranks do so at once."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The strategy's collectives work from this hook on, and the loaders are made after it.
        self._summed = self._saves.last(trainer)
        if self.resume is not None:
            self.resume(self._summed)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = hugging_face_model(pl_module, type(self).__name__)
        running = self._begun(model)
        running.to(pl_module.device)
        self._done, self._summed = self._summed, 0
        if self._done:
            running.load_sums(self._saves.load(trainer, self._done, pl_module.device))
        self._running = running
        self._context.enter_context(running.attached(model))

    def _next_batch(self, batch: Any) -> None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError(f"{type(self).__name__}: batches must be mappings with `input_ids`.")
        assert self._running is not None
        self._running.next_batch(batch["input_ids"], batch.get("attention_mask"))

    def _batch_done(self, trainer: Trainer) -> None:
        self._done += 1
        assert self._running is not None
        self._saves.save(trainer, self._done, self._running.sums())

    def _end(self) -> None:
        self._context.close()
        assert self._running is not None
        self._ended(self._running)

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
