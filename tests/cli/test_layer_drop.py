"""``layer-drop`` and ``block-drop`` from text, statistics and plans, in ``compare``, and what follows on the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lightning_moe.cli.main import main
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, read, save_checkpoint
from tests.helpers.commands_on_ranks import commands_on_ranks

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
METHODS = ("layer-drop", "block-drop")
LAYERS = [f"model.layers.{index}.mlp" for index in range(3)]


def text_args(text: Path) -> list[object]:
    return ["--data.path", text, "--data.seq_len", 32, "--data.samples", 12]


def compare_args(model: Path, text: Path) -> list[object]:
    args = ["--model.path", model, *text_args(text), "--methods", "[layer-drop,block-drop,reap]"]
    return ["compare", *args, "--ratios", "[0.34]", "--scopes", "[global]", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of three layers."""
    return save_checkpoint(tmp_path_factory.mktemp("deep") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def compared(deep: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    main([str(word) for word in (*compare_args(deep, text), "--trainer.accelerator", "cpu", "--out", folder)])
    return folder


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell["method"]: cell for cell in read(folder / "compare.json")["cells"]}


def test_the_share_that_is_gone_is_said(run: Commands, deep: Path, text: Path, tmp_path: Path) -> None:
    """Of three layers half are two; of twelve experts half are half."""
    args = [*compare_args(deep, text), "--ratios", "[0.5]", "--methods", "[layer-drop,reap]"]
    said = run.ok(*args, "--trainer.accelerator", "cpu", "--out", tmp_path).out
    (note,) = [line for line in said.splitlines() if line.startswith("note: experts")]
    assert note.endswith("layer: layer-drop, global, 50%: 66.7%.")


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_what_prune_writes(
    method: str, run: Commands, deep: Path, text: Path, compared: Path, tmp_path: Path
) -> None:
    """From the statistics of the comparison; the layer that turns the residual stream least is gone."""
    cell = cells(compared)[method]
    out = tmp_path / "out"
    args = ["--method", method, "--ratio", 0.34, "--scope", "global", "--out", out]
    run.ok("prune", *QUIET, "--model.path", deep, "--stats", compared, *args)
    stats = load_stats(compared / "stats.safetensors")
    cosine = {
        layer.shape.name: float(layer.layer_cosine if method == "layer-drop" else layer.block_cosine) / layer.tokens
        for layer in stats.layers
    }
    gone = max(cosine, key=lambda name: float(cosine[name]))
    plan, told = read(out / "plan.json"), read(out / "prune.json")
    assert plan["keep"] == {name: [] if name == gone else list(range(8)) for name in LAYERS} == cell["plan"]
    assert plan.get("blocks", []) == cell.get("blocks", []) == ([gone] if method == "block-drop" else [])
    assert plan["made_by"]["similarity"] == pytest.approx({name: float(value) for name, value in cosine.items()})

    assert told["layers_dropped"] == [gone]
    assert (told["layers_before"], told["layers_after"]) == (3, 2)
    assert (told["experts_before"], told["experts_after"], told["kept_experts"][gone]) == (24, 16, 0)
    assert told["uniform"] == (method == "block-drop")
    tensors = load_file(out / "model" / "model.safetensors")
    assert told["parameters_after"] == sum(tensor.numel() for tensor in tensors.values()) == cell["parameters"]
    assert cell["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) and cell["experts"] == 16
    assert len(layer_shapes(str(out / "model"))) == 2

    run.ok("evaluate", *QUIET, "--model.path", out / "model", *text_args(text), "--out", tmp_path / "measured")
    measured = read(tmp_path / "measured" / "evaluate.json")
    assert measured["perplexity"] == pytest.approx(cell["perplexity"], rel=1e-5)
    assert measured["perplexity"] != pytest.approx(cells(compared)["full"]["perplexity"], rel=1e-5)
    assert measured["load"].keys() == cell["load"].keys() and len(cell["load"]) == 3  # with the mean

    if method == "block-drop":
        return  # a stock checkpoint from here on
    again = [*QUIET, "--model.path", out / "model", *text_args(text), "--method", "reap", "--ratio", 0.25]
    run.ok("prune", *again, "--out", tmp_path / "again")
    told = read(tmp_path / "again" / "prune.json")
    assert (told["experts_before"], told["experts_after"]) == (16, 12) and "layers_dropped" not in told
    assert [shape.num_experts for shape in layer_shapes(str(tmp_path / "again" / "model"))] == [6, 6]
    run.ok("evaluate", *QUIET, "--model.path", tmp_path / "again" / "model", *text_args(text), "--out", tmp_path / "e")


def test_a_plan_by_hand(run: Commands, deep: Path, tmp_path: Path) -> None:
    plan = {"keep": {LAYERS[2]: []}, "blocks": [LAYERS[0]]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run.ok("prune", *QUIET, "--model.path", deep, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    told = read(tmp_path / "out" / "prune.json")
    assert told["layers_dropped"] == [LAYERS[0], LAYERS[2]] and told["experts_after"] == 8
    assert [shape.name for shape in layer_shapes(str(tmp_path / "out" / "model"))] == [LAYERS[0]]
    (tmp_path / "plan.json").write_text(json.dumps({"keep": {LAYERS[0]: [], LAYERS[2]: []}}))
    other = run("prune", *QUIET, "--model.path", deep, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert other.code == 2 and "another `prune`" in other.err


REFUSED: dict[str, tuple[list[object], str]] = {
    "the same in each layer": ([], "--scope global"),
    "a floor": (["--scope", "global", "--floor", 2], "--floor 2"),
    "rounds": (["--scope", "global", "--rounds", 2], "in one cut"),
    "merging": (["--scope", "global", "--merge", "true"], "--merge"),
    "too little": (["--scope", "global", "--ratio", 0.1], "possible ratios: 0.3333, 0.6667"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_refusal_is_one_line(case: str, run: Commands, deep: Path, text: Path, tmp_path: Path) -> None:
    also, said = REFUSED[case]
    args = [*QUIET, "--model.path", deep, *text_args(text), "--ratio", 0.34, "--method", "block-drop"]
    refused = run("prune", *args, *also, "--out", tmp_path / "out")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and said in refused.err, refused.err
    assert not (tmp_path / "out" / "plan.json").exists()


def test_compare_refuses_rounds(run: Commands, deep: Path, text: Path, tmp_path: Path) -> None:
    args = [*compare_args(deep, text), "--strategies", "[one-shot,iterative]", "--out", tmp_path / "out"]
    refused = run(*args, "--trainer.accelerator", "cpu")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and "in one cut" in refused.err


@pytest.mark.scale
def test_two_ranks_find_what_one_does(deep: Path, text: Path, compared: Path, tmp_path: Path) -> None:
    """Where they split the model, and where each holds it; and they load what is left."""
    two = [[*compare_args(deep, text), "--data.batch_size", 4, "--out", tmp_path / "split"]]
    for method in METHODS:
        prune = ["prune", "--model.path", deep, *text_args(text), "--method", method, "--ratio", 0.34]
        two.append([*prune, "--scope", "global", "--trainer.enable_progress_bar", "false", "--out", tmp_path / method])
        evaluate = ["evaluate", "--model.path", tmp_path / method / "model", *text_args(text)]
        two.append([*evaluate, "--trainer.enable_progress_bar", "false", "--out", tmp_path / f"{method}-measured"])
    two.append([*two[0][:-1], tmp_path / "ddp", "--trainer.strategy", "ddp"])
    commands_on_ranks(2, two)
    one = cells(compared)
    for folder in ("split", "ddp"):
        for method, cell in cells(tmp_path / folder).items():
            assert cell["perplexity"] == pytest.approx(one[method]["perplexity"], rel=1e-5)
            assert cell.get("plan") == one[method].get("plan") and cell.get("blocks") == one[method].get("blocks")
            assert len(cell["load"]) == len(one[method]["load"])
    for method in METHODS:
        assert read(tmp_path / method / "plan.json")["keep"] == one[method]["plan"]
        measured = read(tmp_path / f"{method}-measured" / "evaluate.json")["perplexity"]
        assert measured == pytest.approx(one[method]["perplexity"], rel=1e-5)
