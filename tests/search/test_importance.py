"""ImportanceLogits: gates of exactly 1 at the start, in any precision; the fixed profiles by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.errors import InputError
from lightning_moe.search.importance import ImportanceLogits, beta_profile, parse_ratio


def test_gates_are_exactly_one_at_the_start() -> None:
    """For every count, also those whose reciprocal times themselves is not 1 in float32: 41, 47, 55 ..."""
    for count, gates_E in enumerate(ImportanceLogits(range(1, 513)).gates(), start=1):
        assert torch.equal(gates_E, torch.ones(count)), count


def test_gates_by_hand() -> None:
    """softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8; times E = 3 and beta = 2. Alphas may be shifted alike."""
    importance = ImportanceLogits([3, 2])
    with torch.no_grad():
        importance.alphas[0].copy_(torch.tensor([1.0, 2.0, 5.0]).log() + 300)
        importance.beta_L.copy_(torch.tensor([2.0, -1.0]))
    first, second = importance.gates()
    torch.testing.assert_close(first, torch.tensor([0.75, 1.5, 3.75]), rtol=1e-4, atol=0)
    assert second.tolist() == [-1, -1]


def test_gradient_of_the_gates_is_that_of_the_softmax() -> None:
    importance = ImportanceLogits([5])
    probe_E = torch.randn(5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        importance.alphas[0].copy_(torch.randn(5, generator=torch.Generator().manual_seed(1)))
        importance.beta_L.fill_(1.5)
    (importance.gates()[0] @ probe_E).backward()
    alpha_E = importance.alphas[0].detach().double().requires_grad_()
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (5 * alpha_E.softmax(0) * beta @ probe_E.double()).backward()
    torch.testing.assert_close(importance.alphas[0].grad, alpha_E.grad, check_dtype=False)
    torch.testing.assert_close(importance.beta_L.grad[0], beta.grad, check_dtype=False)


def test_no_cast_reaches_it() -> None:
    """Neither one of the module around it nor a default type."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        inside = torch.nn.Sequential(ImportanceLogits([2]), torch.nn.Linear(1, 1))
        profile = beta_profile("random", 9, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(profile, beta_profile("random", 9, 1))
    with torch.no_grad():
        inside[0].beta_L.fill_(1.0001)
    inside.to(torch.bfloat16)
    assert inside[1].weight.dtype == torch.bfloat16
    assert inside[0].beta_L.item() == pytest.approx(1.0001, abs=1e-7)
    assert {parameter.dtype for parameter in inside[0].parameters()} == {torch.float32}
    assert inside.to("meta")[0].beta_L.device.type == "meta"


@pytest.mark.parametrize(
    ("profile", "layers", "expected"),
    [
        ("3:1", 4, [1.5, 1.5, 0.5, 0.5]),  # 3 3 1 1, mean 2
        ("1:2", 2, [2 / 3, 4 / 3]),  # 1 2, mean 3/2
        ("2:1", 5, [10 / 7, 10 / 7, 5 / 7, 5 / 7, 5 / 7]),  # 2 2 1 1 1, mean 7/5: the middle one is in the second half
        ("2:1", 1, [1.0]),
    ],
)
def test_profiles_by_hand(profile: str, layers: int, expected: list[float]) -> None:
    for seed in (0, 1):
        assert beta_profile(profile, layers, seed).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_random_profile_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    first = beta_profile("random", 7, seed=3)
    torch.manual_seed(6)
    assert torch.equal(beta_profile("random", 7, seed=3), first)
    assert not torch.equal(beta_profile("random", 7, seed=4), first)
    assert first.mean().item() == pytest.approx(1)
    assert first.min() >= 0 and first.std() > 0.1


@pytest.mark.parametrize("text", ["", "3", "3:", ":1", "0:1", "1:0", "-1:2", "1.5:1", "3:1:1", "a:b", "3 : 1"])
def test_no_ratio_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"schedule .*such as 3:1"):
        parse_ratio(text, "schedule")
