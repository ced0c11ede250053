"""``agreement``: a layer that a plan leaves out stays whole, so it is as one that names all of its experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.moe.checkpoints import layer_shapes, model_id
from tests.cli.lottery_runs import LAYERS, QUIET
from tests.helpers.checkpoint import Commands, contents, read

WHOLE = list(range(8))
Keep = dict[str, list[int]]
PLANS: dict[str, Keep] = {
    "both": {LAYERS[0]: [0, 1, 2], LAYERS[1]: [2, 3]},
    "first": {LAYERS[0]: [0, 1, 3]},
    "second": {LAYERS[1]: [2, 3, 5, 7]},
    "dropped": {LAYERS[0]: [], LAYERS[1]: [3, 4]},
    "none": {},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, keep: Keep, **more: Any) -> Path:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"keep": keep, **more}))
        return file

    return write


def args(out: Path, *plans: Path) -> list[object]:
    return ["agreement", *QUIET, "--plans", f"[{','.join(map(str, plans))}]", "--out", out]


def by_hand(one: Keep, other: Keep) -> float:
    """Over all experts of the model, by sets of pairs of layer and expert."""
    mine, yours = ({(layer, expert) for layer in LAYERS for expert in keep.get(layer, WHOLE)} for keep in (one, other))
    return len(mine & yours) / len(mine | yours)


def test_left_out_is_whole(run: Commands, checkpoint: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """Any two plans of a model agree as the same two that name every layer do."""
    assert {shape.name: shape.num_experts for shape in layer_shapes(str(checkpoint))} == dict.fromkeys(LAYERS, 8)
    found, spelled = [], []
    for place, completed in ((found, False), (spelled, True)):
        plans = [
            write(f"{name}-{completed}", {layer: keep.get(layer, WHOLE) for layer in LAYERS} if completed else keep)
            for name, keep in PLANS.items()
        ]
        out = tmp_path / f"out-{completed}"
        run.ok(*args(out, *plans), *(() if completed else ("--model.path", checkpoint)))
        result = read(out / "agreement.json")
        place += [result["agreement"], [{k: v for k, v in one.items() if k != "plans"} for one in result["layers"]]]
    assert found == spelled
    for (i, one), (j, other) in product(enumerate(PLANS.values()), repeat=2):
        assert found[0][i][j] == pytest.approx(by_hand(one, other))


def test_where_all_name_the_same_layers_the_model_is_not_needed(
    run: Commands, checkpoint: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Of those alone it speaks then, and with the model of all."""
    plans = [write("one", {LAYERS[0]: [0, 1]}), write("other", {LAYERS[0]: [1, 2]})]
    run.ok(*args(tmp_path / "out", *plans))
    assert read(tmp_path / "out" / "agreement.json")["agreement"][0][1] == pytest.approx(1 / 3)
    run.ok(*args(tmp_path / "of-model", *plans), "--model.path", checkpoint)
    assert read(tmp_path / "of-model" / "agreement.json")["agreement"][0][1] == pytest.approx(9 / 11)


@pytest.mark.parametrize("turned", [False, True])
def test_without_the_model_it_says_what_is_not_known(
    run: Commands, write: Callable[..., Path], tmp_path: Path, turned: bool
) -> None:
    plans = [write("first", PLANS["first"]), write("both", PLANS["both"])]
    before = contents(tmp_path)
    said = run(*args(tmp_path / "out", *(plans[::-1] if turned else plans)))
    assert said.code == 2 and len(said.err.splitlines()) == 1
    for word in (f"{plans[0]} leaves out {LAYERS[1]}", f"which {plans[1]} names", "--model.path"):
        assert word in said.err, said.err
    assert contents(tmp_path) == before


def test_plans_without_a_common_layer(run: Commands, write: Callable[..., Path], tmp_path: Path) -> None:
    plans = [write(name, PLANS[name]) for name in ("first", "second")]
    said = run(*args(tmp_path / "out", *plans))
    assert said.code == 2 and f"{plans[0]} and {plans[1]} name no layer in common" in said.err


@pytest.mark.parametrize(
    ("keep", "more", "words"),
    [
        ({"model.layers.7.mlp": [0]}, {}, ["'model.layers.7.mlp'", "another model"]),
        ({LAYERS[0]: [0, 8]}, {}, [LAYERS[0], "8"]),
        ({LAYERS[0]: [0, 1]}, {"model_id": "somebody's"}, ["somebody's"]),
    ],
)
def test_a_plan_for_another_model_is_refused(
    run: Commands,
    checkpoint: Path,
    write: Callable[..., Path],
    tmp_path: Path,
    keep: Keep,
    more: dict[str, Any],
    words: list[str],
) -> None:
    plans = [write("both", PLANS["both"], model_id=model_id(str(checkpoint))), write("foreign", keep, **more)]
    said = run(*args(tmp_path / "out", *plans), "--model.path", checkpoint)
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert all(word in said.err for word in ("--plans", str(plans[1]), *words)), said.err
    assert not (tmp_path / "out").exists()
