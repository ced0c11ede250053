"""StepSaves: the newest whole save of a fit, made at ends of steps only, and a fit that goes on from it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_moe.cli import step_saves
from lightning_moe.cli.step_saves import StepSaves, step_of

BATCHES = 7


class Killed(RuntimeError):
    """Stands for a kill: nothing in the package knows it."""


class Line(LightningModule):
    """A line through seven points, fitted by automatic or by manual optimisation."""

    def __init__(self, accumulate: int = 1, manual: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.accumulate, self.automatic_optimization = accumulate, not manual
        self.batches = 0

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x_BN,) = batch
        loss = ((x_BN * self.weight).sum() - 1) ** 2
        if not self.automatic_optimization:
            self.manual_backward(loss / self.accumulate)
            self.batches += 1
            if self.batches % self.accumulate == 0:
                optimizer: Any = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Looks(Callback):
    """What lies in the folder after each batch, beside the number of steps that were made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[int, list[str]]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.seen.append((trainer.global_step, sorted(file.name for file in self.folder.glob("*"))))


def fit(
    module: Line, saves: StepSaves, steps: int, callbacks: Sequence[Callback] = (), resume: Path | None = None
) -> list[Tensor]:
    points = TensorDataset(torch.linspace(-1, 1, 2 * BATCHES).view(BATCHES, 2))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=1 if not module.automatic_optimization else module.accumulate,
        callbacks=[saves, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(points), ckpt_path=None if resume is None else str(resume))
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_save_after_each_step_and_none_between(tmp_path: Path, accumulate: int, manual: bool) -> None:
    looks = Looks(tmp_path)
    saves = StepSaves(tmp_path)
    assert saves.newest is None
    fit(Line(accumulate, manual), saves, 3, [looks])
    assert len(looks.seen) == 3 * accumulate
    for step, names in looks.seen:
        assert names == ([f"step-{step}.ckpt"] if step else [])
    assert saves.newest == tmp_path / "step-3.ckpt"
    saved = torch.load(saves.newest, weights_only=False)
    assert saved["global_step"] == step_of(saves.newest) == 3


def test_every_few_steps(tmp_path: Path) -> None:
    looks = Looks(tmp_path)
    fit(Line(), StepSaves(tmp_path, every_steps=2), 6, [looks])
    names = [[f"step-{step // 2 * 2}.ckpt"] if step >= 2 else [] for step in range(6)]
    assert looks.seen == list(enumerate(names))


def test_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a step takes 4 seconds on: saves are due 10 seconds after the start, or after the one before."""
    now = 100.0

    class Clock(Callback):
        @override
        def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
            nonlocal now
            now += 4.0

    monkeypatch.setattr(step_saves.time, "monotonic", lambda: now)
    looks = Looks(tmp_path)
    fit(Line(), StepSaves(tmp_path, every_seconds=10.0), 7, [Clock(), looks])
    saved = [int(names[0].removeprefix("step-").removesuffix(".ckpt")) if names else 0 for _, names in looks.seen]
    assert saved == [0, 0, 0, 3, 3, 3, 6]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_saves_what_other_callbacks_know_by_then(tmp_path: Path, accumulate: int) -> None:
    """They are told of the end of a batch before, whatever their place in the list."""

    class Count(Callback):
        batches = 0

        @override
        def state_dict(self) -> dict[str, Any]:
            return {"batches": self.batches}

        @override
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            self.batches += 1

    saves = StepSaves(tmp_path)
    fit(Line(accumulate), saves, 3, [Count()])
    assert saves.newest is not None
    callbacks = torch.load(saves.newest, weights_only=False)["callbacks"]
    assert [state["batches"] for name, state in callbacks.items() if "Count" in name] == [3 * accumulate]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_goes_on_exactly(tmp_path: Path, epochs: int, accumulate: int) -> None:
    """From the end of an epoch, so that a plain loader goes on with the right batch."""
    per_epoch = -(-BATCHES // accumulate)
    whole = fit(Line(accumulate), StepSaves(tmp_path / "whole"), 3 * per_epoch)
    saves = StepSaves(tmp_path / "parts")
    fit(Line(accumulate), saves, epochs * per_epoch)
    parts = fit(Line(accumulate), StepSaves(tmp_path / "parts"), 3 * per_epoch, resume=saves.newest)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
    assert saves.newest == tmp_path / "parts" / f"step-{3 * per_epoch}.ckpt"


@pytest.mark.parametrize("half", [True, False])
def test_a_save_that_was_not_finished_is_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Killed while it is written, or before it has its name: the one before is the newest, and it is whole."""
    stock = Trainer.save_checkpoint

    def dying(trainer: Trainer, path: Any, *args: Any, **kwargs: Any) -> None:
        stock(trainer, path, *args, **kwargs)
        if trainer.global_step == 3:
            if half:
                Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise Killed

    saves = StepSaves(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", dying)
        with pytest.raises(Killed):
            fit(Line(), saves, 5)
    assert saves.newest == tmp_path / "step-2.ckpt"
    assert torch.load(saves.newest, weights_only=False)["global_step"] == 2
    assert {file.name for file in tmp_path.iterdir()} > {"step-2.ckpt"}
    fit(Line(), saves, 5, resume=saves.newest)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["step-5.ckpt"]


def test_the_newest_is_that_of_the_most_steps(tmp_path: Path) -> None:
    """By number, not by name or date; what has another name is no save."""
    for name in ("step-9.ckpt", "step-10.ckpt", "step-2.ckpt", "step-11.partial", "search-step=12.ckpt"):
        (tmp_path / name).touch()
    assert StepSaves(tmp_path).newest == tmp_path / "step-10.ckpt"
    assert StepSaves(tmp_path / "nowhere").newest is None


def test_saves_that_are_folders_are_replaced_too(tmp_path: Path) -> None:
    """As some strategies write them."""
    (tmp_path / "step-1.ckpt").mkdir(parents=True)
    (tmp_path / "step-1.ckpt" / "part").touch()
    fit(Line(), StepSaves(tmp_path, every_steps=2), 2)
    assert [file.name for file in tmp_path.iterdir()] == ["step-2.ckpt"]
