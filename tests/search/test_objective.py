"""The parts of the loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_moe.search.objective import kl_divergence, mean_gate, reconstruction

STUDENT = torch.tensor([[[1.0, 2.0], [0.0, 3.0], [9.0, 9.0]]])
TEACHER = torch.tensor([[[1.0, 0.0], [2.0, 4.0], [5.0, 7.0]]])
REAL = torch.tensor([[True, True, False]])
"""The last position is padding."""


def test_reconstruction_by_hand() -> None:
    """Differences (0, 2) and (-2, -1): squares 4 + 5 = 9. Teacher 1 + 20 = 21. With padding 9 + 16 + 4 and 21 + 74."""
    assert reconstruction(STUDENT, TEACHER, REAL, relative=False).item() == pytest.approx(3)
    assert reconstruction(STUDENT, TEACHER, REAL, relative=True).item() == pytest.approx(9 / 21)
    everything = torch.ones_like(REAL)
    assert reconstruction(STUDENT, TEACHER, everything, relative=False).item() == pytest.approx(math.sqrt(29))
    assert reconstruction(STUDENT, TEACHER, everything, relative=True).item() == pytest.approx(29 / 95)


@pytest.mark.parametrize("relative", [True, False])
def test_reconstruction_at_the_teacher_has_no_gradient(relative: bool) -> None:
    """Nor one that is not a number, as a norm's could be."""
    student = TEACHER.clone().requires_grad_()
    distance = reconstruction(student, TEACHER, REAL, relative)
    distance.backward()
    assert distance.item() == 0
    assert student.grad is not None and student.grad.abs().max() == 0


def test_reconstruction_without_a_real_token_is_zero() -> None:
    nothing = torch.zeros_like(REAL)
    for relative in (True, False):
        assert reconstruction(STUDENT, TEACHER, nothing, relative).item() == 0


def test_kl_by_hand() -> None:
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL = 1/2 log 2 + 1/2 log 2/3; the second window is padding but for one
    position, where both agree: a mean over two positions."""
    student = torch.tensor([[[1.0, 3.0], [1.0, 9.0]], [[1.0, 2.0], [4.0, 1.0]]]).log()
    teacher = torch.tensor([[[1.0, 1.0], [7.0, 2.0]], [[2.0, 4.0], [1.0, 1.0]]]).log()
    real = torch.tensor([[1, 0], [1, 0]]).bool()
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert kl_divergence(student, teacher, real).item() == pytest.approx(expected, rel=1e-5)


def test_kl_of_equals_is_zero_and_flat() -> None:
    student = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    divergence = kl_divergence(student, student.detach().clone(), torch.ones(2, 3).bool())
    divergence.backward()
    assert divergence.item() == pytest.approx(0, abs=1e-7)
    assert student.grad is not None and student.grad.abs().max() < 1e-7


def test_bfloat16_is_compared_in_float32() -> None:
    """A bfloat16 sum of 4096 ones would stop at 256."""
    student, teacher = torch.zeros(1, 1024, 4).bfloat16(), torch.ones(1, 1024, 4).bfloat16()
    real = torch.ones(1, 1024).bool()
    assert reconstruction(student, teacher, real, relative=False).item() == 64
    assert kl_divergence(student, teacher, real).dtype == torch.float32


def test_mean_gate_by_hand() -> None:
    """Over all gates alike, not over layers; a negative gate counts by its size."""
    gates = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-4.0])]
    assert mean_gate(gates).item() == 2.5
