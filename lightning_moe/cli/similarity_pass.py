"""The pass that compares all experts of a model on the same tokens, of one layer or of two."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_moe.cli.request import refuse_less_text
from lightning_moe.cli.text_pass import watch_text
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.evaluation.perplexity import check_vocabulary
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.layers import hugging_face_model
from lightning_moe.stats.same_token_cka import SameTokenCKA

WINDOWS = 32
"""Windows of text that the tokens come from: 512 tokens are 16 of each."""


def same_token_cka(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, num_tokens: int
) -> tuple[Tensor | None, int]:
    """CKA of every two experts, ``(A, A)``, on rank 0, and the tokens it was measured on; every rank must call it."""
    refuse_less_text(trainer, "limit_predict_batches")
    sample = data.fewer(WINDOWS)
    sample.setup("predict")
    model.prepare(trainer)
    check_vocabulary(model, sample)
    watcher = _SameTokens(sample.text.lengths_N.tolist(), num_tokens)
    watch_text(trainer, model, sample, watcher)
    return watcher.cka_AA, watcher.cka.num_tokens


class _SameTokens(Callback):
    """Fills a ``SameTokenCKA`` in a predict loop, and computes at its end."""

    def __init__(self, lengths: list[int], num_tokens: int) -> None:
        self.lengths, self.num_tokens = lengths, num_tokens
        self.cka_AA: Tensor | None = None
        self._cka: SameTokenCKA | None = None
        self._attached = ExitStack()

    @property
    def cka(self) -> SameTokenCKA:
        assert self._cka is not None, "the loop has not begun"
        return self._cka

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cka = SameTokenCKA(hugging_face_model(pl_module, "score"), self.lengths, self.num_tokens)
        self._attached.enter_context(self.cka.attached())

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.cka.next_batch(batch["window"].tolist(), batch["input_ids"].shape[-1])

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attached.close()
        with trainer.precision_plugin.forward_context():
            self.cka_AA = self.cka.compute(trainer.is_global_zero)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._attached.close()
