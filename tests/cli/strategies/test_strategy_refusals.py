"""Strategies of ``compare`` that cannot be: refused in a line, before any work."""

from __future__ import annotations

import pytest

from lightning_moe.cli.grid import make_grid
from lightning_moe.errors import InputError
from tests.cli.strategies.grid_runs import LOTTERY, Strategies

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
