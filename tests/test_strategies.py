"""``moe_fsdp`` in somebody's own project, on two processes: it trains as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_moe.errors import InputError
from lightning_moe.strategies import MoEFSDPStrategy, check_strategy

Figures = dict[str, Any]


def run(job: str, folder: Path, devices: int, strategy: str) -> dict[str, Figures]:
    command = [sys.executable, "-m", "tests.helpers.foreign_ranks", job, str(folder), str(devices), strategy]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    found: dict[str, Figures] = json.loads((folder / f"{job}.json").read_text())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Figures], dict[str, Figures]]:
    folder = tmp_path_factory.mktemp("foreign")
    return run("one", folder, 1, "auto"), run("two", folder, 2, "moe_fsdp")


def weights_differ(one: Figures, other: Figures) -> float:
    """The largest relative difference in the sum, or the sum of squares, of a parameter."""
    assert one["weights"].keys() == other["weights"].keys()
    pairs = [zip(one["weights"][name], other["weights"][name], strict=True) for name in one["weights"]]
    return max(abs(mine - yours) / max(abs(yours), 1e-3) for pair in pairs for mine, yours in pair)


@pytest.mark.parametrize("how", ["automatic", "clipped", "accumulated", "by_hand", "two_epochs"])
def test_trains_as_one_process(runs: tuple[dict[str, Figures], dict[str, Figures]], how: str) -> None:
    """Losses, weights, and the loss validated after them, which stale weights would show."""
    one, two = runs[0][how], runs[1][how]
    assert two["split"] and not one["split"]
    assert two["alike"]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-5)
    assert two["validated"] == pytest.approx(one["validated"], abs=2e-5)
    assert weights_differ(two, one) < 1e-4


def test_clipping_clipped(runs: tuple[dict[str, Figures], dict[str, Figures]]) -> None:
    assert weights_differ(runs[1]["clipped"], runs[1]["automatic"]) > 1e-3


def test_mixed_precision(runs: tuple[dict[str, Figures], dict[str, Figures]]) -> None:
    one, two = runs[0]["mixed"], runs[1]["mixed"]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    assert two["validated"] == pytest.approx(one["validated"], abs=2e-3)
    assert two["losses"] != runs[1]["automatic"]["losses"]


def test_recomputed_activations_change_nothing(runs: tuple[dict[str, Figures], dict[str, Figures]]) -> None:
    assert runs[1]["recomputed"]["losses"] == pytest.approx(runs[1]["automatic"]["losses"], abs=1e-6)
    assert weights_differ(runs[1]["recomputed"], runs[1]["automatic"]) < 1e-5


@pytest.mark.parametrize("full", [False, True])
def test_goes_on_from_a_checkpoint(runs: tuple[dict[str, Figures], dict[str, Figures]], full: bool) -> None:
    """Of parts, or of one file: as if it had not been stopped."""
    whole, resumed = runs[1]["two_epochs"], runs[1][f"resumed-{full}"]
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], abs=1e-6)
    assert weights_differ(resumed, whole) < 1e-6


def test_a_checkpoint_of_other_experts_is_refused(runs: tuple[dict[str, Figures], dict[str, Figures]]) -> None:
    kind, said = runs[1]["other_plan"]
    assert kind == "InputError"
    assert "another plan" in said and "(8, 32)" in said and "(6, 32)" in said and "\n" not in said


def test_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="replicas 0: at least 1"):
        MoEFSDPStrategy(replicas=0)
    with pytest.raises(InputError, match="quantize 'fp3': one of nf4, int8"):
        MoEFSDPStrategy(quantize="fp3")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", FSDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_would_mislead(strategy: Any) -> None:
    with pytest.raises(InputError, match="moe_fsdp"):
        check_strategy(strategy)


@pytest.mark.parametrize("strategy", [None, "auto", "ddp", "moe_fsdp", MoEFSDPStrategy()])
def test_strategies_that_do(strategy: Any) -> None:
    check_strategy(strategy)


def test_lightning_knows_its_name() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="moe_fsdp", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, MoEFSDPStrategy)
