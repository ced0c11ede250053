"""What the search minimises: the student's loss, its distance to the teacher, and the pressure on the gates."""

# B windows, S positions, V vocabulary, H model width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Target = Literal["hidden", "logits"]
"""Where student and teacher are compared: what the output head is given, ``(B, S, H)``, or what it gives."""


@contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the output head is given in each forward inside the context."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    collected: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: collected.append(inputs[0]))
    try:
        yield collected
    finally:
        handle.remove()


def reconstruction(student: Tensor, teacher: Tensor, real_BS: Tensor, relative: bool) -> Tensor:
    """Distance between student and teacher over the real tokens.

    ``relative``: ``||F' - F||^2 / ||F||^2``, whose size does not depend on the model and which is flat where the two
    agree. Otherwise ``||F' - F||_F``, not squared, as DiEP prints it (Eq. 7); where the two agree exactly its
    gradient is 0.
    """
    difference = (student.float() - teacher.float()) * real_BS.unsqueeze(-1)
    if not relative:
        norm: Tensor = torch.linalg.vector_norm(difference)
        return norm
    scale = (teacher.float() * real_BS.unsqueeze(-1)).square().sum()
    return difference.square().sum() / scale.clamp(min=torch.finfo(torch.float32).tiny)


def kl_divergence(student_BSV: Tensor, teacher_BSV: Tensor, real_BS: Tensor) -> Tensor:
    """Mean over real tokens of ``KL(teacher || student)``; one window at a time, to spare memory."""
    total = student_BSV.new_zeros((), dtype=torch.float32)
    for student_SV, teacher_SV, real_S in zip(student_BSV, teacher_BSV, real_BS, strict=True):
        divergence_SV = nn.functional.kl_div(
            student_SV.float().log_softmax(-1), teacher_SV.float().log_softmax(-1), reduction="none", log_target=True
        )
        total = total + (divergence_SV.sum(-1) * real_S).sum()
    return total / real_BS.sum().clamp(min=1)


def mean_gate(gates: list[Tensor]) -> Tensor:
    """Mean over all gates of all layers, a negative gate counted by its size: what the pressure pushes down."""
    return torch.cat(gates).abs().mean()
