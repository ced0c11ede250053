"""ImportanceFigures as a guest: in somebody else's LightningModule, with anybody's logger, over kills and resumes."""

from __future__ import annotations

import csv
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.utils.data import DataLoader

from lightning_moe.callbacks import ImportanceFigures
from lightning_moe.callbacks.importance_curve import MOST_SNAPSHOTS, ImportanceCurve
from lightning_moe.callbacks.importance_panels import _short_names, experts

EXPERTS = (4, 6, 4)
FIGURES = {"curves", "distributions", "experts"}
STEPS = 6


class Gates(nn.Module):
    """Somebody's way to hold alpha and beta; layers differ in E."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.ParameterList([nn.Parameter(torch.zeros(count, dtype=dtype)) for count in EXPERTS])
        self.b = nn.Parameter(torch.ones(len(EXPERTS), dtype=dtype))

    def importance_logits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {f"blocks.{10 * i}.moe": (alpha, self.b[i]) for i, alpha in enumerate(self.a)}


class Foreign(LightningModule):
    """Somebody's search, with an optimiser each for alpha and beta: Lightning counts two steps a batch."""

    def __init__(self, gates: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(2, 2), gates])
        self.targets = [torch.randn(count, generator=torch.Generator().manual_seed(count)) for count in EXPERTS]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        gates: Any = self.parts[1]
        loss = sum((alpha - target).square().sum() for alpha, target in zip(gates.a, self.targets, strict=True))
        loss = loss + (gates.b - torch.arange(len(EXPERTS))).square().sum()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        gates: Any = self.parts[1]
        return [torch.optim.SGD(gates.a.parameters(), lr=0.02), torch.optim.SGD([gates.b], lr=0.02)]


class Dense(LightningModule):
    """Has no importance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PlainOwner(Dense):
    """Offers the logits on the LightningModule itself."""

    def __init__(self, logits: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.logits = logits

    def importance_logits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.logits


class Planner(PlainOwner):
    """Knows the plan, too."""

    def kept_experts(self) -> Mapping[str, Sequence[int]]:
        return {name: [2, 0] for name in self.logits}


def fit(module: LightningModule, *callbacks: Any, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"logger": False, "max_epochs": 1, "enable_checkpointing": False} | kwargs
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, DataLoader(torch.zeros(STEPS, 1)), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "importance.csv").open() as lines:
        return list(csv.DictReader(lines))


def assert_same(one: ImportanceCurve, other: ImportanceCurve) -> None:
    assert one.steps == other.steps
    assert one.betas == other.betas
    assert list(one.alphas) == list(other.alphas)
    assert all(torch.equal(one.alpha_SE(name), other.alpha_SE(name)) for name in one.alphas)


def test_the_files_are_there(tmp_path: Path) -> None:
    fit(Foreign(Gates()), ImportanceFigures(tmp_path / "deep" / "figures", ratio=0.5))
    files = {file.name: file for file in (tmp_path / "deep" / "figures").iterdir()}
    assert set(files) == {"importance.csv"} | {f"importance_{name}.png" for name in FIGURES}
    for name in FIGURES:
        data = files[f"importance_{name}.png"].read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert min(struct.unpack(">II", data[16:24])) > 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_holds_the_numbers_of_the_module(tmp_path: Path, dtype: torch.dtype) -> None:
    gates = Gates(dtype)
    fit(Foreign(gates), ImportanceFigures(tmp_path, ratio=0.5))
    table = rows(tmp_path)
    names = list(gates.importance_logits())
    steps = list(range(0, 2 * STEPS + 1, 2))
    assert [(int(row["step"]), row["layer"]) for row in table] == [(step, name) for step in steps for name in names]
    for row in table[: len(names)]:
        assert float(row["beta"]) == 1
        assert {row[f"alpha_{expert}"] for expert in range(4)} == {"0"}
        assert row["kept"] == ""
    for (alpha, beta), row in zip(gates.importance_logits().values(), table[-3:], strict=True):
        columns = [row[f"alpha_{expert}"] for expert in range(max(EXPERTS))]
        assert torch.equal(torch.tensor([float(x) for x in columns[: len(alpha)]]), alpha.float())
        assert columns[len(alpha) :] == [""] * (max(EXPERTS) - len(alpha))
        assert np.float32(row["beta"]) == beta.float().item()


def test_kept_are_the_highest_gates(tmp_path: Path) -> None:
    """By hand: beta = 0, 1, 2 in the end, so the first layer goes down to its floor before any other loses one."""
    gates = Gates()
    fit(Foreign(gates), ImportanceFigures(tmp_path, ratio=3 / 14, floor=2), max_epochs=20)
    kept = {row["layer"]: [int(x) for x in row["kept"].split()] for row in rows(tmp_path)[-3:]}
    assert sum(map(len, kept.values())) == 14 - 3
    gate_of = {
        (name, expert): (len(alpha) * alpha.softmax(0) * beta)[expert].item()
        for name, (alpha, beta) in gates.importance_logits().items()
        for expert in range(len(alpha))
    }
    first = sorted((gate, expert) for (name, expert), gate in gate_of.items() if name == "blocks.0.moe")
    assert kept["blocks.0.moe"] == sorted(expert for _, expert in first[2:])
    others = sorted((gate, key) for key, gate in gate_of.items() if key[0] != "blocks.0.moe")
    (dropped,) = {key for _, key in others} - {(name, expert) for name in kept for expert in kept[name]}
    assert dropped == others[0][1]


def test_the_module_may_say_what_it_keeps(tmp_path: Path) -> None:
    logits = {"moe": (torch.randn(4), torch.tensor(1.0))}
    fit(Planner(logits), ImportanceFigures(tmp_path / "own"))
    assert rows(tmp_path / "own")[-1]["kept"] == "0 2"
    fit(Planner(logits), ImportanceFigures(tmp_path / "ratio", ratio=0.25))
    assert len(rows(tmp_path / "ratio")[-1]["kept"].split()) == 3
    fit(PlainOwner(logits), ImportanceFigures(tmp_path / "none"))
    assert rows(tmp_path / "none")[-1]["kept"] == ""


def test_every_n_steps_and_the_last(tmp_path: Path) -> None:
    figures = ImportanceFigures(every_n_steps=5)
    fit(Foreign(Gates()), figures)
    assert figures.curve.steps == [0, 6, 12]
    fit(Foreign(Gates()), figures, max_steps=4)  # another fit starts another curve
    assert figures.curve.steps == [0, 4]


def test_resume_keeps_the_curve(tmp_path: Path) -> None:
    whole = ImportanceFigures(tmp_path / "whole", ratio=0.5)
    fit(Foreign(Gates()), whole, max_epochs=2)

    class Killed(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.trainer.current_epoch == 1 and batch_idx == 3:
                raise RuntimeError("killed")
            super().training_step(batch, batch_idx)

    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, save_on_train_epoch_end=True)
    first = ImportanceFigures(tmp_path / "parts", ratio=0.5)
    kwargs: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="killed"):
        fit(Killed(Gates()), first, checkpoint, **kwargs)
    assert not (tmp_path / "parts").exists()
    second = ImportanceFigures(tmp_path / "parts", ratio=0.5)
    fit(Foreign(Gates()), second, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert_same(second.curve, whole.curve)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_step_back_forgets_what_came_after() -> None:
    curve = ImportanceCurve(1)
    for step in (0, 1, 2, 3, 1):
        curve.add(step, {"moe": (torch.full((2,), float(step)), torch.tensor(10.0 * step))})
    assert curve.steps == [0, 1]
    assert curve.alpha_SE("moe").tolist() == [[0, 0], [1, 1]]
    assert curve.betas["moe"] == [0, 10]


def test_memory_is_bounded() -> None:
    """However long the search: at most so many snapshots, evenly spaced from the first on, the newest among them."""
    curve = ImportanceCurve(1)
    for step in range(2000):
        if curve.is_due(step):
            curve.add(step, {"moe": (torch.full((2,), float(step)), torch.tensor(1.0))})
            assert len(curve.steps) <= MOST_SNAPSHOTS
            assert curve.steps[-1] == step
    assert len(curve.steps) >= MOST_SNAPSHOTS // 2
    assert curve.steps == list(range(0, 2000, 8))
    assert curve.alpha_SE("moe")[:, 0].tolist() == curve.steps
    again = ImportanceCurve(1)
    again.load_state_dict(curve.state_dict())
    assert_same(again, curve)
    assert again.spacing == curve.spacing == 8


def test_snapshots_are_copies() -> None:
    """Optimisers write in place."""
    alpha, beta = torch.zeros(2), torch.ones(())
    curve = ImportanceCurve(1)
    curve.add(0, {"moe": (alpha, beta)})
    alpha += 1
    assert curve.alpha_SE("moe").tolist() == [[0, 0]]


class Board(DummyLogger):
    """As TensorBoardLogger: figures go to the experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, tuple[Any, int]] = {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.got[tag] = figure, global_step


class Images(Board):
    """As WandbLogger: a list of images under a key."""

    add_figure = None  # type: ignore[assignment]

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert len(images) == 1 and step is not None
        self.got[key] = images[0], step


def test_each_logger_gets_what_it_takes(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    board, images = Board(), Images()
    loggers = [board, images, CSVLogger(tmp_path), DummyLogger()]
    fit(Foreign(Gates()), ImportanceFigures(ratio=0.5), logger=loggers)
    for logger in (board, images):
        assert set(logger.got) == {f"importance/{name}" for name in FIGURES}
        assert {step for _, step in logger.got.values()} == {2 * STEPS}
    assert all(isinstance(figure, Figure) for figure, _ in board.got.values())
    for image, _ in images.got.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 10
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(Foreign(Gates()), ImportanceFigures(), logger=TensorBoardLogger(tmp_path))
    (events,) = tmp_path.rglob("events*")
    assert set(EventAccumulator(str(events)).Reload().Tags()["images"]) == {f"importance/{name}" for name in FIGURES}


def test_no_importance_is_said_before_training() -> None:
    with pytest.raises(TypeError, match=r"neither Dense nor a module inside it has .* importance_logits\(\)"):
        fit(Dense(), ImportanceFigures())


@pytest.mark.parametrize(
    ("logits", "said"),
    [
        ({}, "no layer"),
        ({"moe": (torch.zeros(2, 2), torch.ones(()))}, r"moe an alpha of shape \(2, 2\)"),
        ({"moe": (torch.zeros(2), torch.ones(2))}, r"a beta of shape \(2,\)"),
    ],
)
def test_odd_importance_is_said_before_training(logits: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        fit(PlainOwner(logits), ImportanceFigures())


def test_an_impossible_ratio_is_said_before_training() -> None:
    figures = ImportanceFigures(ratio=0.9, floor=2)
    with pytest.raises(ValueError, match="possible ratios"):
        fit(Foreign(Gates()), figures)
    assert figures.curve.steps == []


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"ratio": 1.0}, {"ratio": 0.0}, {"floor": 0}, {"folder": "x"}])
def test_bad_arguments_are_said_at_once(bad: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    if "folder" in bad:
        bad = {"folder": tmp_path / "x"}
    with pytest.raises(ValueError, match="ImportanceFigures"):
        ImportanceFigures(**bad)


def test_a_diverged_search_is_still_drawn(tmp_path: Path) -> None:
    logits = {"moe": (torch.tensor([0.0, float("nan")]), torch.tensor(float("nan")))}
    fit(PlainOwner(logits), ImportanceFigures(tmp_path, ratio=0.5))
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_sharded_logits_are_gathered(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        curve = ImportanceCurve(1)
        curve.add(0, {"moe": (distribute_tensor(torch.arange(4.0), mesh), torch.ones(()))})
    finally:
        torch.distributed.destroy_process_group()
    assert type(curve.alphas["moe"][0]) is Tensor
    assert curve.alpha_SE("moe").tolist() == [[0, 1, 2, 3]]


def test_marks_lie_on_the_kept() -> None:
    gates = {"a.0.moe": torch.ones(3), "a.1.moe": torch.tensor([2.0, 0.5])}
    figure = experts(gates, {"a.0.moe": [2], "a.1.moe": [0, 1]})
    heat, bars, *_ = figure.axes
    assert heat.get_title() == "importance of 5 experts; a dot marks the 3 kept (60.0%)"
    assert heat.collections[0].get_offsets().tolist() == [[2, 0], [0, 1], [1, 1]]  # type: ignore[union-attr]
    assert [text.get_text() for text in bars.texts] == ["1", "2"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m.layers.3.mlp", "m.layers.11.mlp"], ("MoE layer (m.layers.*.mlp)", ["3", "11"])),
        (["first", "second"], ("MoE layer", ["first", "second"])),
        (["m.mlp"], ("MoE layer", ["m.mlp"])),
        (["m.0", "m.0.moe"], ("MoE layer (m.*)", ["0", "0.moe"])),
        (["a.x.mlp", "b.y.z.mlp"], ("MoE layer (*.mlp)", ["a.x", "b.y.z"])),
    ],
)
def test_short_names(names: list[str], expected: tuple[str, list[str]]) -> None:
    assert _short_names(names) == expected
