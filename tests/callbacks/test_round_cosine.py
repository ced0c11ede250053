"""ExpertPruning's cosine over each round: a factor on what the schedule says, within the step alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from lightning_moe.callbacks import ExpertPruning
from tests.callbacks.foreign_fit import Foreign, Killed, Look, calibration, fit, loader, small_model

Rates = Callable[..., tuple[list[float], list[float]]]


@pytest.fixture
def rates_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rates:
    """Of every step of a fit: the rate by which weights move, and that which the schedule left behind."""
    inside: list[float] = []
    module = importlib.import_module("torch.optim.sgd")
    plain = module.sgd

    def recorded(*args: Any, **kwargs: Any) -> None:
        inside.append(kwargs["lr"])
        plain(*args, **kwargs)

    monkeypatch.setattr(module, "sgd", recorded)

    def run(pruning: ExpertPruning | None, schedule: Any = None, kind: Any = torch.optim.SGD, **kwargs: Any) -> Any:
        inside.clear()
        outside = Look(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
        module = Foreign(small_model(), lambda parameters: kind(parameters, lr=0.1), schedule)
        fit(module, tmp_path, *([] if pruning is None else [pruning]), outside, **kwargs)
        return list(inside), outside.seen

    return run


SCHEDULES: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "step": lambda optimizer: StepLR(optimizer, 1, 0.5),
    "chained": lambda optimizer: CosineAnnealingLR(optimizer, 6, 0.01),  # goes on from the rate that it finds
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("lowest", [0.0, 0.25])
def test_a_cosine_over_each_round(
    rates_of: Rates, lowest: float, start: int, schedule: Callable[[Any], Any] | None
) -> None:
    """Within the step, a factor on what the schedule says; the schedule never knows."""
    pruning = ExpertPruning(
        calibration(), 0.25, 2, "rwn", start=start, every=2, optimizer="carry", cosine=True, min_lr_ratio=lowest
    )
    inside, outside = rates_of(pruning, schedule)
    plain, untouched = rates_of(None, schedule)
    assert outside == untouched
    half = lowest + (1 - lowest) / 2
    factors = [1.0] * start + [1, half, 1, half, lowest, lowest]
    assert inside == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=False)])


@pytest.mark.parametrize("start", [0, 1])
def test_a_cosine_with_optimisers_made_anew(rates_of: Rates, start: int) -> None:
    pruning = ExpertPruning(calibration(), 0.25, 2, "rwn", start=start, every=4, cosine=True)
    inside, outside = rates_of(pruning, None, data=loader(8))
    assert outside == [0.1] * 8
    factors = [1.0] * start + 2 * [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert inside == pytest.approx([0.1 * factor for factor in factors[:8]])


def test_a_cosine_over_growing_rounds_of_tokens(rates_of: Rates) -> None:
    """Progress is that of the unit: 24 tokens a step, rounds of 48 and 96."""
    pruning = ExpertPruning(
        calibration(), 0.25, 2, "rwn", unit="tokens", every=48, growth=2.0, optimizer="carry", cosine=True
    )
    inside, _ = rates_of(pruning, None)
    factors = [(1 + math.cos(math.pi * done)) / 2 for done in (0, 1 / 2, 0, 1 / 4, 1 / 2, 3 / 4)]
    assert inside == pytest.approx([0.1 * factor for factor in factors])


class Child(torch.optim.SGD):
    """Somebody's own optimiser: torch calls the hooks of a step for each class on the way."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_a_step_that_calls_its_parents_is_scaled_once(rates_of: Rates) -> None:
    rates_of(None)  # the first of its class to be made hooks the class
    pruning = ExpertPruning(calibration(), 0.25, method="rwn", every=4, optimizer="carry", cosine=True)
    inside, outside = rates_of(pruning, None, Child)
    assert outside == [0.1] * 6
    factors = [(1 + math.cos(math.pi * step / 4)) / 2 for step in (0, 1, 2, 3, 4, 4)]
    assert inside == pytest.approx([0.1 * factor for factor in factors])


def test_a_killed_step_leaves_the_rate_of_the_schedule(tmp_path: Path, rates_of: Rates) -> None:
    """The forward pass runs within the step: what is saved when it fails must not hold the rate scaled."""
    pruning = ExpertPruning(calibration(), 0.25, method="rwn", every=4, optimizer="carry", cosine=True)
    module = Foreign(small_model(), scheduler=SCHEDULES["chained"], kill_at=2)
    saving = ModelCheckpoint(tmp_path, save_on_exception=True, filename="killed")
    with pytest.raises(Killed):
        fit(module, tmp_path, pruning, saving)
    (file,) = tmp_path.glob("*.ckpt")
    found = torch.load(file, weights_only=False)["optimizer_states"][0]["param_groups"][0]["lr"]
    _, untouched = rates_of(None, SCHEDULES["chained"])
    assert found == untouched[1]
