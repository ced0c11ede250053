"""RouterRebalance on two ranks: both keep the same weights and biases, by the counts of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.callbacks.router_rebalance import RouterRebalance
from tests.callbacks.rebalance_fit import CountsBiases, Late
from tests.callbacks.router_fit import loader, trainer
from tests.helpers.training_models import training_model


class WritesRank(Callback):
    """What this rank holds and has counted when training ends."""

    def __init__(self, folder: Path, monitor: ExpertUsageMonitor) -> None:
        self.folder, self.monitor = folder, monitor

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        held = {"weights": pl_module.state_dict(), "counts": pl_module.counts, "biases": pl_module.biases}
        torch.save(held | {"looks": self.monitor.looks}, self.folder / f"rank-{trainer.global_rank}.pt")


def on_two_ranks(folder: Path, module: LightningModule, *callbacks: Callback) -> None:
    trainer(folder, *callbacks, devices=2, strategy="ddp_spawn").fit(module, loader())


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path, _one_thread: None) -> None:
    """The same weights and biases on both; biases by the counts of both, which the monitor beside it sees, too."""
    monitor = ExpertUsageMonitor(tmp_path / "usage", every_n_steps=1)
    module = CountsBiases(training_model("deepseek_v3"))
    on_two_ranks(
        tmp_path,
        module,
        RouterRebalance(0.5, z_loss=0.2, bias_step=0.01, entropy=0.2),
        monitor,
        WritesRank(tmp_path, monitor),
    )
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, two["weights"][name]), name
    assert one["counts"] != two["counts"]
    assert one["looks"] == two["looks"]
    assert len(one["looks"]) == len(one["counts"]) == 2
    for number, (_, _, seen) in enumerate(one["looks"]):
        for turn, count_E in enumerate(seen.values()):
            both_E = torch.tensor(one["counts"][number][turn]) + torch.tensor(two["counts"][number][turn])
            assert count_E == both_E.tolist()
            signs_E = torch.sign(both_E.double().mean() - both_E)
            moved_E = one["biases"][number + 1][turn] - one["biases"][number][turn]
            torch.testing.assert_close(moved_E, (0.01 * signs_E).float(), rtol=0, atol=1e-7)
    assert sorted(file.name for file in (tmp_path / "usage").iterdir()) == ["expert_usage.csv", "expert_usage.png"]


@pytest.mark.slow
def test_two_ranks_train_routers_of_a_model_that_is_made_late(tmp_path: Path, _one_thread: None) -> None:
    """DDP must not wait for gradients of what is frozen."""
    on_two_ranks(tmp_path, Late(), RouterRebalance(0.5, train="routers"))
