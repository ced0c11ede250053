"""What ``compare`` takes for its own: cells of the same request, clipped alike and, if learned, on as many ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.cli import measuring_commands, rounds, search
from lightning_moe.cli.grid import Cell, make_grid
from lightning_moe.cli.main import main
from lightning_moe.cli.methods import get_method
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.search.presets import PRESETS
from tests.cli.lottery_runs import model_args, text_args
from tests.helpers.checkpoint import Commands, read

GRID = ("--methods", "[ean,diep]", "--ratios", "[0.25,0.5]", "--scopes", "[layer]", "--seeds", 1)
STRATEGIES = ("--strategies", "[one-shot,iterative,lottery]", "--finetune_tokens", 64)
BY_VALUE = ("--trainer.gradient_clip_algorithm", "value")
TIGHT = ("--trainer.gradient_clip_val", 1e-4)

Rows = dict[tuple[Any, ...], dict[str, Any]]
Make = Callable[..., tuple[str, Rows]]


@pytest.fixture(scope="module")
def finished(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole grid, with the default settings."""
    out = tmp_path_factory.mktemp("reused") / "run"
    args = ("compare", *model_args(checkpoint), *text_args(text), *GRID, *STRATEGIES, "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "default", {"updates": 3})
        main([str(arg) for arg in args])
    return out


@pytest.fixture
def again(run: Commands, checkpoint: Path, text: Path, finished: Path, tmp_path: Path) -> Make:
    """Asks for the same grid where it is there already; what is said, and all rows."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)

    def ask(*args: object) -> tuple[str, Rows]:
        said = run.ok("compare", *model_args(checkpoint), *text_args(text), *GRID, *STRATEGIES, *args, "--out", out)
        return said.out, rows_in(out)

    return ask


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "default", {"updates": 3})


def rows_in(out: Path) -> Rows:
    return {(row["method"], row["strategy"], row["ratio"]): row for row in read(out / "compare.json")["cells"]}


def other(before: Rows, after: Rows) -> set[tuple[str, str]]:
    """Methods and strategies whose rows are not the same."""
    return {key[:2] for key in before.keys() | after.keys() if before[key] != after[key]}


@pytest.mark.parametrize("same", [("--trainer.gradient_clip_val", 1.0), ("--trainer.gradient_clip_algorithm", "norm")])
def test_defaults_by_name_are_the_same_work(again: Make, finished: Path, same: tuple[object, ...]) -> None:
    """What is given is what the tuning has anyway."""
    said, rows = again("--methods", "[ean]", *same)
    assert "0 cells computed now" in said and "in their place" not in said and "full, None" not in said
    assert rows == {key: row for key, row in rows_in(finished).items() if key[0] != "diep"}


@pytest.mark.parametrize("change", [TIGHT, BY_VALUE, (*TIGHT, *BY_VALUE)])
def test_other_clipping_is_other_tuning(again: Make, finished: Path, change: tuple[object, ...]) -> None:
    said, rows = again("--methods", "[ean]", *change)
    assert "note: 4 cells of other rounds, tuning or ranks are there" in said
    before = {key: row for key, row in rows_in(finished).items() if key[0] != "diep"}
    assert other(before, rows) == {("ean", "lottery"), ("full", "tuned")}
    for key, row in rows.items():
        assert (row["perplexity"] == before[key]["perplexity"]) == (key[1] not in ("lottery", "tuned"))
    assert again("--methods", "[ean]")[1] == before  # and those of before are still there


def test_what_is_learned_on_other_ranks_is_other_work(
    again: Make, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a batch from each rank; what only adds up over the text is the same on any number of them."""
    stock, before = make_grid, rows_in(finished)
    with monkeypatch.context() as patch:
        patch.setattr(measuring_commands, "make_grid", lambda *args, **also: stock(*args, **(also | {"ranks": 2})))
        _, rows = again()
    assert other(before, rows) == {
        ("ean", "lottery"), ("full", "tuned"), ("diep", "one-shot"), ("diep", "iterative"), ("diep", "lottery"),
    }  # fmt: skip
    work = {"tuned": 0, "searched": 0}
    for name, module, function in (("tuned", rounds, "tune"), ("searched", search, "fit_steps")):
        _count(monkeypatch, work, name, module, function)
    _, rows = again()  # cells stand under one name, whoever made them; runs and scores do not
    assert work == {"tuned": 0, "searched": 0}
    assert {key: row["perplexity"] for key, row in rows.items()} == {
        key: row["perplexity"] for key, row in before.items()
    }


def _count(patch: pytest.MonkeyPatch, work: dict[str, int], name: str, module: Any, function: str) -> None:
    stock = getattr(module, function)

    def counted(*args: Any, **kwargs: Any) -> Any:
        work[name] += 1
        return stock(*args, **kwargs)

    patch.setattr(module, function, counted)


def grid(ranks: int, **clipping: Any) -> dict[str, Cell]:
    methods = ["ean", "random", "naee", "scan", "m-smoe", "diep", "diep-paper"]
    return {cell.file_name: cell for cell in make_grid(methods, [0.5], ["layer"], 1, 0, ranks=ranks, clipping=clipping)}


def test_cells_of_one_cut_depend_on_ranks_by_a_search_in_steps_alone() -> None:
    one, two, clipped = grid(1), grid(2), grid(1, gradient_clip_val=0.5)
    assert not any(cell.recipe for cell in (*one.values(), *clipped.values()))
    other = {cell.method_name for name, cell in two.items() if cell.settings != one[name].settings}
    assert other == {"diep", "diep-paper"}
    for name, cell in two.items():
        same = cell.settings == one[name].settings
        assert cell.made(one[name].settings) == one[name].made(cell.settings) == same
    for method, ranks_matter in (("diep", True), ("naee", False), ("scan", False), ("reap", False)):
        keys = {get_method(method).key(0.5, 0, ranks) for ranks in (1, 2, 4)}
        assert len(keys) == (3 if ranks_matter else 1)


def test_recipes_of_before_are_still_found() -> None:
    """Of the lottery and of rounds, as the version that knew neither ranks nor clipping wrote them."""
    options = RoundOptions(tokens=12500)
    strategies = ["iterative", "lottery", "one-shot-tuned"]
    cells = make_grid(["ean"], [0.25, 0.5], ["layer"], 1, 0, strategies, options)
    assert {cell.run_name for cell in cells} == {
        "ean-iterative-layer-4a5b79657385",
        "ean-lottery-layer-seed0-311b813932cf",
        "ean-one-shot-tuned-layer-0.25-seed0-2f898428700b",
        "ean-one-shot-tuned-layer-0.5-seed0-d0d129252bbf",
        "full-tuned-seed0-311b813932cf",
    }
