"""Tables and recipes in ``configs/``: what they name exists, and they run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_moe.cli import lottery
from lightning_moe.cli.grid import Cell, make_grid
from lightning_moe.cli.recovery import Recovery
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.search.presets import PRESETS
from tests.helpers.checkpoint import Commands, edited_copy, read

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "configs" / "papers"
TABLES = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if "lightning-moe compare" in file.read_text())
DOCS = (ROOT / "docs" / "tables.md").read_text()


QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


def head(file: Path) -> str:
    """The command in its first comment."""
    return next(line[2:] for line in file.read_text().splitlines() if line.startswith("# lightning-moe "))


@pytest.fixture
def as_written(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Carries out the command in a file's head, on a tiny model and small text, in an empty folder; what it wrote."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    places = {"MODEL": checkpoint, "TEXT": text / "harbour.txt", "HELD_OUT": text / "island.txt"}

    def carry_out(file: Path, *more: object) -> Path:
        words: list[Any] = [places.get(word, word) for word in head(file).split()[1:]]
        run.ok(*words, *QUIET, "--data.seq_len", 16, "--data.samples", 8, "--data.val_samples", 4, *more)
        return tmp_path / str(words[-1])

    return carry_out


def grid_of(file: Path) -> list[Cell]:
    """As ``compare`` makes it; unknown methods, scopes and strategies are refused."""
    asked: dict[str, Any] = yaml.safe_load(file.read_text())
    options = RoundOptions(
        asked.get("rounds", 1),
        tokens=asked.get("finetune_tokens", 0),
        growth=asked.get("finetune_growth", 2.0),
        recovery=Recovery(**asked.get("recovery", {})),
    )
    options.check()
    strategies = asked.get("strategies", ["one-shot"])
    return make_grid(asked["methods"], asked["ratios"], asked["scopes"], asked["seeds"], 0, strategies, options)


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_table_has_its_cells(file: Path) -> None:
    grid = grid_of(file)
    for cell in grid:
        if cell.method is not None:
            cell.method.check_scope(cell.scope)
    assert {cell.ratio for cell in grid} == set(yaml.safe_load(file.read_text())["ratios"])


def test_all_sixteen_criteria_are_in_the_first_table_from_both_ends() -> None:
    families = ("ews rwn wsr ewn", "euf ecc evc ets", "eas eae eao ean", "egs ege ego egn")
    suite = [name for family in families for name in family.split()]
    named = {cell.method_name for cell in grid_of(PAPERS / "mc_suite_table1.yaml")}
    assert named == {f"{name}-{end}" for name in suite for end in ("min", "max")} | {"random"}


def test_every_table_of_a_paper_has_its_command() -> None:
    """In its own head and in the docs, the same; and the docs name no file that is not there."""
    assert all(f"`{head(file)}`" in DOCS for file in PAPERS.glob("*.yaml"))
    assert all((ROOT / name).is_file() for name in re.findall(r"configs/\S+\.yaml", DOCS))


def test_the_main_table_runs(as_written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row at both ratios, each in its own scope; of shorter searches."""
    for name in ("default", "paper"):
        monkeypatch.setitem(PRESETS, name, PRESETS[name] | {"updates": 4})
    cells = read(as_written(PAPERS / "diep_main.yaml", "--data.batch_size", 4) / "compare.json")["cells"]
    assert [row["status"] for row in cells] == ["done"] * 13
    found = {(row["method"], row["scope"]) for row in cells[1:]}
    layer, scattered = {"s-smoe", "trimming", "naee"}, {"m-smoe", "diep-paper", "diep"}
    assert found == {(name, "layer") for name in layer} | {(name, "global") for name in scattered}
    for row in cells[1:]:
        assert sum(row["kept_experts"].values()) == 16 * (1 - row["ratio"])
        assert ("merge" in row) == row["method"].endswith("-smoe")


def test_seer_runs_and_then_does_with_fewer_experts(
    as_written: Callable[..., Path], run: Commands, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entropy decides the weights; and one expert per token is a line of JSON away."""
    monkeypatch.setattr(lottery, "_draw", lambda folder, records: None)
    weights = []
    for entropy in ((), ("--recovery.entropy", 0)):
        more = ("--data.batch_size", 2, "--finetune_tokens", 64, *entropy, "--overwrite", "true")
        out = as_written(ROOT / "configs" / "seer.yaml", *more)
        found = read(out / "prune.json")
        assert (found["experts_after"], found["finetune_tokens"], found["rounds"]) == (12, 64, 1)
        weights.append(load_file(out / "model" / "model.safetensors"))
    assert any(not torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    model = edited_copy(out / "model", tmp_path / "top-1", num_experts_per_tok=1)
    assert {layer.top_k for layer in layer_shapes(str(model))} == {1}
    on = ("--data.path", text / "island.txt", "--data.seq_len", 16, "--data.samples", 4)
    run.ok("evaluate", *QUIET, "--model.path", model, *on, "--out", tmp_path / "at-1")
    assert read(tmp_path / "at-1" / "evaluate.json")["perplexity"] != pytest.approx(found["perplexity_after"], rel=1e-6)
