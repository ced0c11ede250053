"""ImportanceFigures as a guest: in somebody else's LightningModule, with anybody's logger, over kills and resumes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from lightning_moe.callbacks import ImportanceFigures
from lightning_moe.callbacks.importance_curve import ImportanceCurve
from tests.callbacks.importance_fit import (
    EXPERTS,
    FIGURES,
    STEPS,
    Dense,
    Foreign,
    Gates,
    PlainOwner,
    Planner,
    assert_same,
    fit,
    rows,
)


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
