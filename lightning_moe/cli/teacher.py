"""The whole model's answers to the text that its routers will be tuned on."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_moe.cli.request import model_path
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.data.teacher_cache import TeacherCache
from lightning_moe.files import remove
from lightning_moe.modules.causal_lm import Batch, MoECausalLM
from lightning_moe.moe.checkpoints import read_config

CANDIDATES = 64
"""Likely next tokens kept of each place."""


def cache_teacher(trainer: Trainer, model: MoECausalLM, text: TextDataModule, folder: Path) -> TeacherCache:
    """Find the answers in a folder of their own in ``folder``, or run the whole model over the text once.

    A pass that was killed is made anew.
    """
    text.setup("predict")
    windows, seq_len = text.text.tokens_NS.shape
    vocabulary: int = read_config(model_path(model)).get_text_config().vocab_size
    folder = folder / f"teacher-{text.text.fingerprint}"
    cache = TeacherCache(folder, windows, seq_len, min(CANDIDATES, vocabulary), text.text.fingerprint)
    if cache.complete:
        return cache
    model.prepare(trainer)
    trainer.predict(AnswerPass(model, cache), datamodule=text, return_predictions=False)
    if trainer.is_global_zero:
        cache.finish()
    trainer.strategy.barrier()
    return cache


class AnswerPass(LightningModule):
    """A predict loop that keeps what the model answers."""

    def __init__(self, model: MoECausalLM, cache: TeacherCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    @override
    def configure_model(self) -> None:
        self.model.configure_model()

    @override
    def on_predict_start(self) -> None:
        if self.trainer.is_global_zero:
            remove(self.cache.folder)
            self.cache.create()
        self.trainer.strategy.barrier()

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        self.cache.write(batch["window"], self.model(batch))
