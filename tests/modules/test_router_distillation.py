"""RouterDistillation: the divergence over candidates obeys its laws, and its gradients are usable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.modules.router_distillation import RouterDistillation, candidates_kl
from tests.helpers.families import tiny_batch, tiny_model

BATCH, SEQ_LEN, VOCAB = 2, 5, 12


def logits(seed: int, scale: float = 2.0, vocab: int = VOCAB) -> Tensor:
    return scale * torch.randn(BATCH, SEQ_LEN, vocab, generator=torch.Generator().manual_seed(seed))


def top(logits_BSV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the likeliest tokens, and their ids first."""
    best = logits_BSV.log_softmax(-1).topk(count, dim=-1)
    return best.indices, best.values


def full_kl(teacher_BSV: Tensor, student_BSV: Tensor) -> Tensor:
    p, q = (one.double().log_softmax(-1) for one in (teacher_BSV, student_BSV))
    return (p.exp() * (p - q)).sum(-1)


def slow_kl(student_V: list[float], ids_C: list[int], teacher_C: list[float]) -> float:
    """The sum over the candidates and one more outcome, token by token."""
    total = sum(math.exp(value) for value in student_V)
    divergence, teacher_rest, student_rest = 0.0, 1.0, 1.0
    for token, log_p in zip(ids_C, teacher_C, strict=True):
        p, q = math.exp(log_p), math.exp(student_V[token]) / total
        divergence += p * math.log(p / q)
        teacher_rest, student_rest = teacher_rest - p, student_rest - q
    return divergence + teacher_rest * math.log(teacher_rest / student_rest)


@given(st.integers(0, 1000), st.integers(1, VOCAB - 1))
def test_equals_a_slow_reference(seed: int, count: int) -> None:
    student_BSV = logits(seed + 1)
    ids_BSC, teacher_BSC = top(logits(seed), count)
    found_BS = candidates_kl(student_BSV, ids_BSC, teacher_BSC)
    assert found_BS.shape == (BATCH, SEQ_LEN)
    for row in range(BATCH):
        for place in range(SEQ_LEN):
            args = (tensor[row, place].double().tolist() for tensor in (student_BSV, ids_BSC, teacher_BSC))
            student_V, ids_C, teacher_C = args
            want = slow_kl(student_V, [int(token) for token in ids_C], teacher_C)
            assert float(found_BS[row, place]) == pytest.approx(want, rel=1e-4, abs=1e-5)


@given(st.integers(0, 1000))
def test_with_all_tokens_it_is_the_full_divergence(seed: int) -> None:
    teacher_BSV, student_BSV = logits(seed), logits(seed + 1)
    found_BS = candidates_kl(student_BSV, *top(teacher_BSV, VOCAB))
    torch.testing.assert_close(found_BS.double(), full_kl(teacher_BSV, student_BSV), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, VOCAB))
def test_less_candidates_tell_less(seed: int, count: int) -> None:
    """A lower bound of the full divergence that grows with the candidates, and no less than 0."""
    teacher_BSV, student_BSV = logits(seed), logits(seed + 1)
    found_BS = candidates_kl(student_BSV, *top(teacher_BSV, count)).double()
    assert (found_BS > -1e-5).all()
    assert (found_BS <= full_kl(teacher_BSV, student_BSV) + 1e-5).all()
    if count > 1:
        assert (candidates_kl(student_BSV, *top(teacher_BSV, count - 1)) <= found_BS + 1e-5).all()


@given(st.integers(0, 1000), st.integers(1, VOCAB), st.floats(0.1, 30.0), st.floats(-50.0, 50.0))
def test_equal_distributions_are_not_apart(seed: int, count: int, scale: float, shift: float) -> None:
    teacher_BSV = logits(seed, scale)
    student_BSV = (teacher_BSV + shift).requires_grad_()
    found_BS = candidates_kl(student_BSV, *top(teacher_BSV, count))
    torch.testing.assert_close(found_BS, torch.zeros_like(found_BS), rtol=0, atol=1e-4)
    (gradient_BSV,) = torch.autograd.grad(found_BS.sum(), student_BSV)
    torch.testing.assert_close(gradient_BSV, torch.zeros_like(gradient_BSV), rtol=0, atol=1e-3)


def gradient(student_BSV: Tensor, teacher_BSV: Tensor, count: int, half: bool = True) -> Tensor:
    """With the teacher as the cache gives it back: through 16 bits."""
    student_BSV = student_BSV.clone().requires_grad_()
    ids_BSC, teacher_BSC = top(teacher_BSV, count)
    loss = candidates_kl(student_BSV, ids_BSC, teacher_BSC.half().float() if half else teacher_BSC).sum()
    assert loss.isfinite()
    (found_BSV,) = torch.autograd.grad(loss, student_BSV)
    return found_BSV


@pytest.mark.parametrize("count", [1, 4, VOCAB])
@pytest.mark.parametrize(("teacher_scale", "student_scale"), [(100.0, 1.0), (1.0, 100.0), (100.0, 100.0), (0.0, 0.0)])
def test_gradients_are_finite(count: int, teacher_scale: float, student_scale: float) -> None:
    """Also where the candidates hold all mass, of the teacher, of the student, or of both."""
    student_BSV, teacher_BSV = logits(1, student_scale), logits(2, teacher_scale)
    assert gradient(student_BSV, teacher_BSV, count).isfinite().all()
    assert gradient(student_BSV.bfloat16(), teacher_BSV, count).isfinite().all()


def test_the_gradient_is_that_of_the_full_divergence_where_all_tokens_are_candidates() -> None:
    """``q - p``, by hand: the derivative of a cross entropy by its logits."""
    student_BSV, teacher_BSV = logits(1), logits(2)
    want_BSV = student_BSV.softmax(-1) - teacher_BSV.softmax(-1)
    torch.testing.assert_close(gradient(student_BSV, teacher_BSV, VOCAB, half=False), want_BSV, rtol=1e-3, atol=1e-4)


def test_descent_brings_the_student_to_the_teacher() -> None:
    teacher_BSV = logits(2)
    student_BSV = logits(1)
    first = float(full_kl(teacher_BSV, student_BSV).mean())
    for _ in range(200):
        student_BSV = student_BSV - 2.0 * gradient(student_BSV, teacher_BSV, 8)
    assert float(full_kl(teacher_BSV, student_BSV).mean()) < 0.05 * first


class Answers:
    """A teacher that says by heart what a model answers."""

    def __init__(self, logits_NSV: Tensor, count: int) -> None:
        self.ids_NSC, self.values_NSC = top(logits_NSV, count)

    def read(self, window_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.ids_NSC[window_B], self.values_NSC[window_B]


def test_a_step_is_the_mean_over_real_tokens() -> None:
    """Of the windows that the batch names, whatever stands in the padding."""
    whole, pruned = tiny_model("mixtral", seed=0), tiny_model("mixtral", seed=1)
    ids = tiny_batch(batch=4)
    with torch.no_grad():
        teacher_NSV, student_NSV = (model(ids).logits for model in (whole, pruned))
    vocab = teacher_NSV.shape[-1]
    module = RouterDistillation(Answers(teacher_NSV, vocab)).adopt(pruned)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    window_B = torch.tensor([3, 1])
    mask = torch.ones_like(ids[window_B])
    mask[1, 7:] = 0
    batch = {"input_ids": ids[window_B], "attention_mask": mask, "window": window_B}
    loss = module.training_step(batch, 0)
    places = full_kl(teacher_NSV[window_B], student_NSV[window_B])[mask.bool()]
    assert float(loss) == pytest.approx(float(places.mean()), rel=1e-3)
    batch["input_ids"][1, 7:] = 5
    assert float(module.training_step(batch, 0)) == pytest.approx(float(loss), rel=1e-5)
    blank = batch | {"attention_mask": torch.zeros_like(mask)}
    assert float(module.training_step(blank, 0)) == 0
