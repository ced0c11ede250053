"""RouterDistillation: train a pruned model's routers to say what the whole model said."""

# B windows, S positions, V vocabulary, C candidates per token

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.modules.causal_lm import Batch, MoECausalLM


class Teacher(Protocol):
    """Where the whole model's answers are."""

    def read(self, window_B: Tensor) -> tuple[Tensor, Tensor]:
        """Likely next tokens ``(B, S, C)`` and their log-probabilities, of the windows of these numbers."""


class RouterDistillation(MoECausalLM):
    """Router KD (arXiv 2603.02217): KL divergence from the whole model's distribution over the next token.

    Batches say by ``window`` which windows they hold. What else learns than routers is up to ``RouterRebalance``'s
    ``train``; other arguments are those of ``MoECausalLM``.
    """

    def __init__(self, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ids_BSC, teacher_BSC = self.teacher.read(batch["window"])
        divergence_BS = candidates_kl(self(batch), ids_BSC, teacher_BSC)
        real_BS = batch["attention_mask"].to(divergence_BS)
        loss = (divergence_BS * real_BS).sum() / real_BS.sum().clamp(min=1)
        self.log("train/kl", loss, prog_bar=True)
        return loss


def candidates_kl(logits_BSV: Tensor, ids_BSC: Tensor, teacher_BSC: Tensor) -> Tensor:
    """``KL(teacher || student)`` over the candidates and, as one more outcome, all other tokens; ``(B, S)``.

    ``teacher_BSC`` are log-probabilities. Where all tokens are candidates this is the divergence over the vocabulary;
    else it is less, by what the teacher tells of the tokens left out.
    """
    student_BSC = logits_BSV.float().log_softmax(-1).gather(-1, ids_BSC)
    both = [_with_rest(one) for one in (teacher_BSC.float(), student_BSC)]
    return (both[0].exp() * (both[0] - both[1])).sum(-1)


def _with_rest(log_BSC: Tensor) -> Tensor:
    """The log-probabilities, and that of all other tokens behind them."""
    smallest = torch.finfo(torch.float32).eps
    rest = (1 - log_BSC.exp().sum(-1, keepdim=True)).clamp(min=smallest).log()
    return torch.cat([log_BSC, rest], dim=-1)
