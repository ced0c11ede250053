"""Strategies of ``compare``: each cell is a moment of what ``prune`` does in rounds, and one run serves all ratios."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.cli import cells, methods, rounds
from lightning_moe.cli.grid import make_grid
from lightning_moe.cli.job import Job
from lightning_moe.cli.main import main
from lightning_moe.cli.methods import Method
from lightning_moe.errors import InputError
from lightning_moe.modules import causal_lm
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.pruning.round_record import read_records
from lightning_moe.pruning.scores import ExpertScores, score_experts
from lightning_moe.search.diep import DiEPSearch
from tests.helpers.checkpoint import Commands, Result, contents, documents, read, write_text

STRATEGIES = ("one-shot", "iterative", "lottery", "one-shot-tuned")
GRID = ("--methods", "[reap,random]", "--ratios", "[0.25,0.5]", "--scopes", "[layer]")
TUNING = ("--finetune_tokens", 128)
"""One step after the first round of the lottery, two after the second."""
ALL = (*GRID, "--strategies", f"[{','.join(STRATEGIES)}]", "--seeds", 2, *TUNING)
LOTTERY = ("--methods", "[reap]", *GRID[2:], "--strategies", "[lottery]", "--seeds", 1, *TUNING)
UNTUNED = ("--methods", "[reap]", *GRID[2:], "--strategies", "[one-shot,iterative]", "--seeds", 1)

TIMES = ("tokens_per_second", "method_seconds")


def on(checkpoint: Path, text: Path, val_text: Path) -> list[str]:
    """Model and text, in batches of four windows."""
    args = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--model.path", checkpoint]
    args += ["--data.path", text, "--data.val_path", val_text, "--data.seq_len", 32, "--data.batch_size", 4]
    return [*map(str, args), "--data.samples", "8", "--data.val_samples", "4", "--seed_everything", "3"]


@pytest.fixture(scope="module")
def val_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("val_text") / "letters.txt", documents(20, start=500))


@pytest.fixture(scope="module")
def finished(checkpoint: Path, text: Path, val_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole grid, unbroken; read it, and copy it to write."""
    out = tmp_path_factory.mktemp("strategies") / "run"
    main(["compare", *on(checkpoint, text, val_text), *map(str, ALL), "--out", str(out)])
    return out


Cells = dict[tuple[Any, ...], dict[str, Any]]


def cells_in(out: Path) -> Cells:
    """By method, strategy, ratio and seed."""
    found: list[dict[str, Any]] = read(out / "compare.json")["cells"]
    cells = {(row["method"], row["strategy"], row["ratio"], row["seed"]): row for row in found}
    assert len(cells) == len(found)
    return cells


def lasting(cells: Cells) -> Cells:
    """Without what another run of the same measures anew: time."""
    return {key: {name: row[name] for name in row.keys() - {*TIMES}} for key, row in cells.items()}


class Strategies:
    """Runs the command on the tiny checkpoint, and counts what it does."""

    def __init__(self, run: Commands, args: list[str], patch: pytest.MonkeyPatch, out: Path) -> None:
        self.run, self.args, self.out = run, args, out
        self.counts = {"measured": 0, "tuned": 0, "observed": 0, "steps": 0, "loaded": 0}
        self.before_step: Callable[[int], None] = lambda turn: None
        self._count(patch, "measured", (cells, "measure"), (rounds, "measure"))
        self._count(patch, "tuned", (rounds, "tune"))
        self._count(patch, "observed", (cells, "observe"), (rounds, "observe_into"))
        self._count(patch, "loaded", (causal_lm, "load_model"))
        step = MoECausalLM.training_step

        def counting_step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.counts["steps"] += 1
            self.before_step(self.counts["steps"])
            return step(module, batch, batch_idx)

        patch.setattr(MoECausalLM, "training_step", counting_step)

    def _count(self, patch: pytest.MonkeyPatch, name: str, *places: tuple[Any, str]) -> None:
        def counting(stock: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                self.counts[name] += 1
                return stock(*args, **kwargs)

            return counted

        for module, function in places:
            patch.setattr(module, function, counting(getattr(module, function)))

    def __call__(self, *args: object, command: str = "compare") -> Result:
        """As often as it is asked, counts begin at 0."""
        self.counts = dict.fromkeys(self.counts, 0)
        return self.run(command, *self.args, *args, "--out", self.out)

    def ok(self, *args: object) -> Result:
        said = self(*args)
        assert said.code == 0, said.err
        return said

    def cells(self) -> Cells:
        return cells_in(self.out)


@pytest.fixture
def strategies(
    run: Commands, checkpoint: Path, text: Path, val_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Strategies:
    return Strategies(run, on(checkpoint, text, val_text), monkeypatch, tmp_path / "run")


@pytest.fixture
def again(strategies: Strategies, finished: Path) -> Strategies:
    """In a folder where the whole grid is there already."""
    shutil.copytree(finished, strategies.out)
    return strategies


# --------------------------------------------------------------------------------------------------- cells


def test_the_cells_of_the_grid(finished: Path) -> None:
    """What neither tunes nor draws by chance has no seed; the tuned full model is there once a ratio and seed."""
    ratios, seeds = (0.25, 0.5), (3, 4)
    expected = {("full", "one-shot", 0.0, None)}
    expected |= {("full", "tuned", ratio, seed) for ratio in ratios for seed in seeds}
    for strategy in STRATEGIES:
        expected |= {("random", strategy, ratio, seed) for ratio in ratios for seed in seeds}
        of_reap = seeds if strategy in ("lottery", "one-shot-tuned") else (None,)
        expected |= {("reap", strategy, ratio, seed) for ratio in ratios for seed in of_reap}
    found = cells_in(finished)
    assert found.keys() == expected
    assert all(row["status"] == "done" for row in found.values())
    assert not list(finished.rglob("*partial*"))


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("iterative", ("--rounds", 2)),
        ("lottery", ("--rounds", 2, *TUNING)),
        ("one-shot-tuned", ("--finetune_tokens", 3 * 128)),  # as many as both rounds of the lottery
    ],
)
@pytest.mark.parametrize(("method", "seed"), [("reap", 3), ("reap", 4), ("random", 4)])
def test_cells_are_moments_of_what_prune_gives(
    finished: Path, strategies: Strategies, strategy: str, more: tuple[object, ...], method: str, seed: int
) -> None:
    strategies.args += ["--seed_everything", str(seed)]
    said = strategies("--method", method, "--ratio", 0.5, "--scope", "layer", *more, command="prune")
    assert said.code == 0, said.err
    pruned, records = read(strategies.out / "prune.json"), read_records(strategies.out / "rounds.jsonl")
    cells = cells_in(finished)
    for turn, record in enumerate(records, start=1):
        own_seed = None if (method, strategy) == ("reap", "iterative") else seed
        row = cells[method, strategy, record.ratio, own_seed]
        assert row["plan"] == record.keep
        assert row["perplexity"] == pytest.approx(record.final_perplexity, rel=1e-6)
        assert row["perplexity_pruned"] == pytest.approx(record.perplexity["after_prune"]["all"], rel=1e-6)
        assert row["domains"] == pytest.approx(record.perplexity[str(record.last_moment)]["domains"], rel=1e-6)
        assert row["load_cv"] == pytest.approx(record.final_load["mean"]["cv"], rel=1e-6)
        assert (row["rounds"], row["finetune_lr"]) == (turn, record.lr)
        assert row["finetune_tokens"] == sum(one.tokens for one in records[:turn])
        assert row["parameters"] == record.parameters
        assert row["made_by"] == record.made_by
    assert row["plan"] == read(strategies.out / "plan.json")["keep"]
    assert row["perplexity"] == pytest.approx(pruned["perplexity_after"], rel=1e-6)
    assert row["kept_experts"] == pruned["kept_experts"]
    assert row["finetune_tokens"] == pruned["finetune_tokens"] == (0 if strategy == "iterative" else 384)


def test_first_rounds_are_one_cut_and_controls_drop_nothing(finished: Path) -> None:
    cells = cells_in(finished)
    full = cells["full", "one-shot", 0.0, None]
    for method, seed in (("reap", None), ("random", 3), ("random", 4)):
        tuned_seed = seed or 3
        for ratio in (0.25, 0.5):
            cut = cells[method, "one-shot", ratio, seed]
            tuned = cells[method, "one-shot-tuned", ratio, tuned_seed]
            assert tuned["plan"] == cut["plan"]
            assert tuned["perplexity_pruned"] == cut["perplexity"] != tuned["perplexity"]
        cut = cells[method, "one-shot", 0.25, seed]
        for strategy, own_seed in (("iterative", seed), ("lottery", tuned_seed)):
            assert cells[method, strategy, 0.25, own_seed]["plan"] == cut["plan"]
        assert cells[method, "iterative", 0.25, seed]["perplexity"] == cut["perplexity"]
    for ratio, tokens in ((0.25, 128), (0.5, 384)):
        for seed in (3, 4):
            control = cells["full", "tuned", ratio, seed]
            for name in ("plan", "parameters", "experts", "bytes"):
                expected = {name: list(range(8)) for name in full["kept_experts"]} if name == "plan" else full[name]
                assert control[name] == expected
            assert control["scope"] is None
            assert control["finetune_tokens"] == tokens
            assert control["perplexity"] != full["perplexity"]
            for strategy in ("lottery", "one-shot-tuned"):
                row = cells["reap", strategy, ratio, seed]
                assert (row["finetune_tokens"], row["finetune_lr"]) == (tokens, control["finetune_lr"])
    assert cells["full", "tuned", 0.25, 3]["perplexity_pruned"] == full["perplexity"]


def test_all_files_know_the_strategies(finished: Path) -> None:
    found = read(finished / "compare.json")
    with (finished / "compare.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["strategy"] for line in lines] == [row["strategy"] for row in found["cells"]]
    for line, row in zip(lines, found["cells"], strict=True):
        for name in ("perplexity_pruned", "load_cv", "load_cv_pruned", "finetune_tokens", "finetune_lr", "rounds"):
            assert line[name] == ("" if row.get(name) is None else str(row[name]))
    spread = {(entry["method"], entry["strategy"], entry["ratio"]): entry for entry in found["spread"]}
    assert spread["reap", "iterative", 0.5]["cells"] == 1
    assert spread["reap", "lottery", 0.5]["cells"] == spread["full", "tuned", 0.5]["cells"] == 2
    assert spread["reap", "lottery", 0.5]["perplexity"]["std"] > 0
    agreements = {
        (entry["method"], entry["ratio"], *entry["plans"]): entry
        for entry in read(finished / "agreement.json")["agreements"]
    }
    assert len(agreements) == 2 * 2 * 3
    for method in ("reap", "random"):
        for pair in (("one-shot", "iterative"), ("one-shot", "lottery"), ("iterative", "lottery")):
            assert agreements[method, 0.25, *pair]["agreement"] == 1
    assert (finished / "agreement.png").is_file()


# ----------------------------------------------------------------------------------- nothing is done twice


def test_one_run_of_rounds_serves_all_ratios(strategies: Strategies) -> None:
    """Measured are the full model; both cuts; both rounds; both rounds twice, before and after tuning; both cuts that
    are tuned, likewise; the full model tuned, twice. Experts are observed once, and in each second round."""
    said = strategies.ok(*ALL[:1], "[reap]", *ALL[2:], "--seeds", 1)
    assert strategies.counts["measured"] == 1 + 2 + 2 + 4 + 4 + 2
    assert (strategies.counts["tuned"], strategies.counts["steps"]) == (2 + 2 + 2, 3 + (1 + 3) + 3)
    assert strategies.counts["observed"] == 1 + 1 + 1
    assert "11 cells computed now, 0 earlier, 0 failed" in said.out
    for title in ("full model", "tuned", *STRATEGIES):
        assert title in said.out


def test_asked_again_nothing_is_computed(again: Strategies, finished: Path) -> None:
    before, found = contents(again.out / "cells") | contents(again.out / "rounds"), cells_in(finished)
    said = again.ok(*ALL)
    assert "0 cells computed now, 33 earlier, 0 failed" in said.out
    assert set(again.counts.values()) == {0}
    assert contents(again.out / "cells") | contents(again.out / "rounds") == before
    assert again.cells() == found


@pytest.mark.parametrize(
    "change",
    [("--finetune_lr", 1e-3), ("--finetune_tokens", 256), ("--finetune_growth", 1), ("--recovery.load_balance", 0.5)],
)
def test_other_tuning_is_computed_where_there_is_some(
    again: Strategies, finished: Path, change: tuple[object, ...]
) -> None:
    again.ok(*LOTTERY, "--strategies", "[one-shot,iterative,lottery]", *change)
    before, after = cells_in(finished), again.cells()
    assert len(after) == 1 + 2 + 2 + 2 + 2
    for (method, strategy, ratio, seed), row in after.items():
        same = row == before[method, strategy, ratio, seed]
        same_first = change[0] == "--finetune_growth" and ratio == 0.25  # nothing has grown in the first round
        assert same == (strategy not in ("lottery", "tuned"))
        if not same_first:
            assert same == (row["perplexity"] == before[method, strategy, ratio, seed]["perplexity"])
    assert again.counts["tuned"] == 4
    again.ok(*LOTTERY)  # as it was: those runs are still known
    assert (again.counts["tuned"], again.counts["measured"]) == (0, 0)
    assert all(row == before[key] for key, row in again.cells().items())


def test_other_rounds_are_computed_where_there_are_some(again: Strategies, finished: Path) -> None:
    again.ok(*UNTUNED, "--rounds", "[0.125,0.25,0.375,0.5]")
    before, after = cells_in(finished), again.cells()
    assert again.counts["measured"] == 4
    assert [after["reap", "iterative", ratio, None]["rounds"] for ratio in (0.25, 0.5)] == [2, 4]
    assert all(
        after["reap", "one-shot", ratio, None] == before["reap", "one-shot", ratio, None] for ratio in (0.25, 0.5)
    )
    again.ok(*UNTUNED, "--rounds", 4)  # the same by another name
    assert (again.counts["measured"], again.cells()) == (0, after)


@pytest.mark.parametrize("name", [("--rounds", 2), ("--rounds", "[0.25,0.5]"), ("--spacing", "cosine")])
def test_the_same_rounds_by_another_name_are_known(again: Strategies, finished: Path, name: tuple[object, ...]) -> None:
    """Two rounds of a cosine are equal ones."""
    said = again.ok(*ALL, *name)
    assert "0 cells computed now, 33 earlier, 0 failed" in said.out
    assert set(again.counts.values()) == {0}
    assert again.cells() == cells_in(finished)


def test_a_method_for_each_ratio_works_for_the_rounds(strategies: Strategies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round asks it for the share that is gone after that round, and says of what."""
    asked: list[tuple[float | None, list[int] | None]] = []

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        asked.append((ratio, None if job.whole is None else [shape.num_experts for shape in job.whole]))
        return score_experts(job.stats, "reap")

    stock = methods.methods
    added = Method("cutwise", "For a test.", scores, per_ratio=True)
    monkeypatch.setattr(methods, "methods", lambda: [*stock(), added])
    strategies.ok("--methods", "[cutwise]", *GRID[2:], "--strategies", "[iterative]")
    assert asked == [(0.25, None), (0.5, [8, 8])]  # the first is of the whole model itself


def test_cells_of_a_version_without_strategies_do_no_harm(again: Strategies, finished: Path) -> None:
    """They knew neither strategy nor load; in such a folder the same command gives what it gives in a new one."""
    for file in (again.out / "cells").iterdir():
        row = read(file)
        if row["strategy"] != "one-shot":
            file.unlink()
        else:
            kept = {name: row[name] for name in row.keys() - {"strategy", "load", "load_cv"}}
            file.write_text(json.dumps(kept | {"version": 1}))
    shutil.rmtree(again.out / "rounds")
    again.ok(*UNTUNED)
    whole = cells_in(finished)
    assert lasting(again.cells()) == lasting({key: whole[key] for key in again.cells()})


# -------------------------------------------------------------------------------------- kills and failures


@pytest.mark.parametrize(
    ("kill_at", "save_seconds", "lost"), [(1, 300.0, 0), (2, 0.0, 0), (3, 0.0, 0), (3, 300.0, 1), (6, 0.0, 0)]
)
def test_killed_while_tuning_it_goes_on(
    strategies: Strategies,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
    save_seconds: float,
    lost: int,
) -> None:
    """Steps 1, then 2 and 3, are of the rounds of the lottery; 4, then 5 and 6, of the full model."""
    monkeypatch.setattr(rounds, "SAVE_SECONDS", save_seconds)
    go_on = strategies.before_step

    def kill(turn: int) -> None:
        if turn == kill_at:
            raise SystemExit(137)

    strategies.before_step = kill
    killed = strategies(*LOTTERY)
    assert killed.code == 137 and "goes on" in killed.err
    assert (strategies.out / ".partial").is_dir()
    strategies.before_step = go_on
    strategies.ok(*LOTTERY)
    assert strategies.counts["steps"] == 6 - (kill_at - 1) + lost
    whole = cells_in(finished)
    assert lasting(strategies.cells()) == lasting({key: whole[key] for key in strategies.cells()})
    assert len(strategies.cells()) == 1 + 2 + 2
    assert not (strategies.out / ".partial").exists()


def test_a_run_of_rounds_that_fails_fails_once(strategies: Strategies, finished: Path) -> None:
    def fail(turn: int) -> None:
        if turn == 2:
            raise RuntimeError("the device is\non fire")

    go_on, strategies.before_step = strategies.before_step, fail
    said = strategies(*LOTTERY, "--strategies", "[one-shot,lottery]")
    assert said.code == 1 and "2 of 7 cells failed" in said.err.splitlines()[-1]
    assert strategies.counts["steps"] == 2 + 3  # not tried for every ratio; the full model is tuned all the same
    cells, whole = strategies.cells(), cells_in(finished)
    for ratio in (0.25, 0.5):
        assert "RuntimeError: the device is" in cells["reap", "lottery", ratio, 3]["reason"]
    done = {key: row for key, row in cells.items() if row["status"] == "done"}
    assert len(done) == 5
    assert lasting(done) == lasting({key: whole[key] for key in done})
    strategies.before_step = go_on
    strategies.ok(*LOTTERY, "--strategies", "[one-shot,lottery]")
    assert strategies.counts["steps"] == 2  # the first round is there already
    assert lasting(strategies.cells()) == lasting({key: whole[key] for key in cells})


@pytest.mark.parametrize("how", ["raises", "diverges"])
def test_a_search_that_fails_leaves_a_model_to_tune(
    strategies: Strategies, finished: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It froze the weights and left training mode; the next method gets the same model, and tunes it as ever."""

    def fail(search: DiEPSearch, *args: Any) -> None:
        if how == "raises":
            raise RuntimeError("out of memory")
        with torch.no_grad():
            search.importance.beta_L.fill_(torch.inf)

    monkeypatch.setattr(DiEPSearch, "training_step" if how == "raises" else "_update", fail)
    said = strategies(*LOTTERY, "--methods", "[diep,reap]")
    assert said.code == 1 and "2 of 7 cells failed" in said.err.splitlines()[-1]
    cells, whole = strategies.cells(), cells_in(finished)
    for ratio in (0.25, 0.5):
        reason = cells["diep", "lottery", ratio, 3]["reason"]
        assert ("out of memory" if how == "raises" else "no longer finite") in reason
    done = {key: row for key, row in cells.items() if row["status"] == "done"}
    assert len(done) == 5
    assert lasting(done) == lasting({key: whole[key] for key in done})
    assert strategies.counts["loaded"] == 2  # the first served the search, too


# ----------------------------------------------------------------------------------------------- refusals

BAD: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "unknown strategy": (("--strategies", "[one-shot,lotery]"), ["--strategies", "lotery", "'lottery'"]),
    "no strategy": (("--strategies", "[]"), ["--strategies"]),
    "lottery without tuning": (("--finetune_tokens", 0), ["lottery", "--finetune_tokens"]),
    "tuned without tuning": (
        ("--finetune_tokens", 0, "--strategies", "[one-shot-tuned]"),
        ["one-shot-tuned", "--finetune_tokens"],
    ),
    "rate without tuning": (
        ("--finetune_tokens", 0, "--strategies", "[one-shot]", "--finetune_lr", 1e-3),
        ["--finetune_tokens"],
    ),
    "rate": (("--finetune_lr", 0), ["--finetune_lr 0.0"]),
    "tokens": (("--finetune_tokens", -1), ["--finetune_tokens -1"]),
    "growth": (("--finetune_growth", 0), ["--finetune_growth 0"]),
    "batch": (("--recovery.batch_tokens", 0), ["--recovery.batch_tokens 0"]),
    "distilled experts": (
        ("--recovery.kind", "router-kd", "--recovery.train", "routers"),
        ["--recovery.train routers"],
    ),
    "less text": (("--trainer.limit_train_batches", 1), ["--trainer.limit_train_batches"]),
    "no such text": (("--finetune_path", "/nowhere"), ["/nowhere"]),
    "ratio too high": (("--ratios", "[0.5,0.9]", "--rounds", "[0.5,0.9]"), ["round 2 of 2", "0.9"]),
    "ratio too high at once": (
        ("--ratios", "[0.9]", "--scopes", "[global]", "--strategies", "[one-shot-tuned]"),
        ["round 1 of 1", "0.9", "possible ratios"],
    ),
    "rounds too small": (("--rounds", 16), ["round 1 of 16", "drops nothing"]),
    "far too many rounds": (("--rounds", 2000), ["round"]),
    "no round": (("--rounds", 0), ["--rounds 0"]),
    "rounds beside a ratio": (("--rounds", 3), ["0.25", "0.1667, 0.3333, 0.5", "--rounds"]),
    "a list beside a ratio": (("--rounds", "[0.125,0.5]"), ["0.25", "0.125, 0.5", "--rounds"]),
    "a list that ends early": (("--rounds", "[0.125,0.25]"), ["--rounds [0.125, 0.25]", "0.5"]),
    "a list that descends": (("--rounds", "[0.25,0.125,0.5]"), ["--rounds [0.25, 0.125, 0.5]", "ascending"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(strategies: Strategies, name: str) -> None:
    args, words = BAD[name]
    said = strategies(*LOTTERY, *args)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1, said.err
    assert all(word in said.err for word in words), said.err
    assert set(strategies.counts.values()) == {0}
    assert not strategies.out.exists()


def test_more_ratios_than_equal_rounds_are_tried_is_refused() -> None:
    with pytest.raises(InputError, match="--rounds as a list"):
        make_grid(["reap"], [percent / 100 for percent in range(20, 60, 2)], ["layer"], 1, 0, ["iterative"])


def test_fewer_tokens_than_a_step_are_one_step(strategies: Strategies) -> None:
    """However little is asked, each round tunes; the second has twice the tokens, which is still one step."""
    strategies.ok(*LOTTERY, "--finetune_tokens", 16)
    assert strategies.counts["steps"] == 2 * 2
    assert strategies.cells()["reap", "lottery", 0.5, 3]["finetune_tokens"] == 2 * 128
