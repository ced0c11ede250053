"""Strategies of ``compare``: each cell is a moment of what ``prune`` does in rounds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_moe.pruning.round_record import read_records
from tests.cli.strategies.grid_runs import LOTTERY, STRATEGIES, TUNING, Strategies, cells_in
from tests.helpers.checkpoint import read


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


def test_fewer_tokens_than_a_step_are_one_step(strategies: Strategies) -> None:
    """However little is asked, each round tunes; the second has twice the tokens, which is still one step."""
    strategies.ok(*LOTTERY, "--finetune_tokens", 16)
    assert strategies.counts["steps"] == 2 * 2
    assert strategies.cells()["reap", "lottery", 0.5, 3]["finetune_tokens"] == 2 * 128
