"""NAEE by ``prune`` and ``compare``: the sets of the slow reference, in rounds, on two ranks, and after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from lightning_moe.cli import naee
from lightning_moe.cli.main import main
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import load_model
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.search.naee import ChosenSet, choose_experts, remove_experts
from tests.helpers.checkpoint import Commands, damaged_copy, read, save_checkpoint
from tests.helpers.commands_on_ranks import commands_on_ranks
from tests.helpers.plans import compose
from tests.search.naee_reference import chosen_sets

METHODS = {"naee": False, "naee-progressive": True}
QUIET = ("--trainer.enable_progress_bar", "false")
SEQ_LEN, SAMPLES = 16, 5
LAYERS = [f"model.layers.{index}.mlp" for index in range(2)]


def on(checkpoint: Path, text: Path) -> list[object]:
    """Five windows, two at a time: the last batch is smaller, and of two ranks one has blanks alone."""
    data = ["--data.path", text, "--data.seq_len", SEQ_LEN, "--data.samples", SAMPLES, "--data.batch_size", 2]
    return [*QUIET, "--model.path", checkpoint, *data]


def prune(checkpoint: Path, text: Path, method: str, *more: object) -> list[object]:
    return ["prune", *on(checkpoint, text), "--trainer.accelerator", "cpu", "--method", method, *more]


def windows(checkpoint: Path, text: Path) -> list[dict[str, Any]]:
    """The same windows, one by one."""
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=SAMPLES)
    shown = [data.text[number] for number in range(len(data.text))]
    return [{name: one[name][None] for name in ("input_ids", "attention_mask")} for one in shown]


def loaded(checkpoint: Path) -> PreTrainedModel:
    model = load_model(str(checkpoint)).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3: sigmoid, correction bias, two groups, a shared expert."""
    return save_checkpoint(tmp_path_factory.mktemp("grouped") / "tiny", "deepseek_v3")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are searched, and a ``|`` for each pass over the text."""
    seen: list[str] = []
    start = naee._Search.on_predict_start

    def counted(search: Any, *args: Any) -> None:
        seen.append("|")
        start(search, *args)

    def choose(shape: Any, *args: Any) -> ChosenSet:
        seen.append(shape.name)
        return choose_experts(shape, *args)

    monkeypatch.setattr(naee._Search, "on_predict_start", counted)
    monkeypatch.setattr(naee, "choose_experts", choose)
    return seen


@pytest.fixture(scope="module")
def finished(checkpoint: Path, grouped: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both methods, each on a model of its own; to be read."""
    folder = tmp_path_factory.mktemp("finished")
    for method, path in zip(METHODS, (checkpoint, grouped), strict=True):
        main([*map(str, prune(path, text, method, "--out", folder / method))])
    return folder


# ------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(("method", "sets"), [("naee", 70), ("naee-progressive", 36)])
def test_prune_keeps_the_sets_of_the_reference(
    method: str, sets: int, finished: Path, checkpoint: Path, grouped: Path, text: Path
) -> None:
    path = grouped if METHODS[method] else checkpoint
    keep, moved = chosen_sets(loaded(path), windows(path, text), 4, METHODS[method])
    plan = read(finished / method / "plan.json")
    assert plan["keep"] == keep
    assert plan["made_by"]["errors"] == pytest.approx(moved, rel=1e-6)
    assert plan["made_by"]["search"] == f"exact, all {sets} sets in 2 layers"
    assert read(finished / method / "prune.json")["uniform"]


def test_each_round_chooses_among_what_is_left(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """As anybody would: cut to 6, and the 6 to 4; ``compare`` does the same, and its single cut is that of prune."""
    model, shown = loaded(checkpoint), windows(checkpoint, text)
    first, _ = chosen_sets(model, shown, 2, False)
    keep_experts(model, first)
    second, moved = chosen_sets(model, shown, 2, False)
    run.ok(*prune(checkpoint, text, "naee", "--rounds", 2, "--out", tmp_path / "rounds"))
    plan = read(tmp_path / "rounds" / "plan.json")
    assert plan["keep"] == compose(first, second)
    assert plan["made_by"]["errors"] == pytest.approx(moved, rel=1e-6)
    lines = (tmp_path / "rounds" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["keep"] for line in lines] == [first, plan["keep"]]
    grid = ["--methods", "[naee]", "--ratios", "[0.25,0.5]", "--strategies", "[one-shot,iterative]"]
    args = ["compare", *on(checkpoint, text), "--trainer.accelerator", "cpu", *grid, "--out", tmp_path / "compare"]
    refused = run(*args, "--scopes", "[global]")
    assert refused.code == 2 and "give --scope layer" in refused.err
    run.ok(*args, "--scopes", "[layer,global]")
    cells = {
        (row["strategy"], row["ratio"], row["scope"]): row for row in read(tmp_path / "compare/compare.json")["cells"]
    }
    assert cells["iterative", 0.25, "layer"]["plan"] == cells["one-shot", 0.25, "layer"]["plan"] == first
    assert cells["iterative", 0.5, "layer"]["plan"] == plan["keep"]
    assert cells["one-shot", 0.5, "layer"]["plan"] == chosen_sets(loaded(checkpoint), shown, 4, False)[0]
    assert {scope for _, _, scope in cells} <= {"layer", None}


def test_a_layer_that_loses_nothing_stays_whole(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """As in a round that spares it."""
    shapes = [LayerShape(name, number, left, 2) for number, (name, left) in enumerate(zip(LAYERS, (4, 6), strict=True))]
    whole = [replace(shape, num_experts=8) for shape in shapes]
    assert naee.drops_of(shapes, 0.5, whole) == {LAYERS[0]: 0, LAYERS[1]: 2}
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=SAMPLES)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    model = MoECausalLM(str(checkpoint))
    found = naee.naee_sets(trainer, model, data, {LAYERS[0]: 0, LAYERS[1]: 4}, tmp_path, progressive=True)
    expected = chosen_sets(loaded(checkpoint), windows(checkpoint, text), 4, False)[0]
    assert {name: one.keep for name, one in found.items()} == {LAYERS[1]: expected[LAYERS[1]]}


def test_more_sets_than_can_be_tried(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and the plan says so for ever."""
    monkeypatch.setattr("lightning_moe.search.naee.EXACT_SETS", 69)
    chosen: list[ChosenSet] = []
    monkeypatch.setattr(naee, "choose_experts", lambda *args: chosen.append(remove_experts(*args)) or chosen[-1])  # type: ignore[func-returns-value]
    said = run.ok(*prune(checkpoint, text, "naee", "--out", tmp_path))
    plan = read(tmp_path / "plan.json")
    assert list(plan["keep"].values()) == [one.keep for one in chosen]
    assert "beam of 8" in plan["made_by"]["search"] and f"naee: {plan['made_by']['search']}." in said.out


def test_scores_serve_their_ratio_alone(run: Commands, checkpoint: Path, finished: Path, tmp_path: Path) -> None:
    again = ["prune", *QUIET, "--model.path", checkpoint, "--scores", finished / "naee", "--method", "naee"]
    run.ok(*again, "--out", tmp_path / "same")
    assert read(tmp_path / "same" / "plan.json")["keep"] == read(finished / "naee" / "plan.json")["keep"]
    refused = run(*again, "--ratio", 0.25, "--out", tmp_path / "other")
    assert refused.code == 2 and "for ratio 0.5" in refused.err and refused.err.count("\n") == 1


# ----------------------------------------------------------------------------------------------- refusals


BAD: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "global": (("--scope", "global"), ["--scope global", "give --scope layer"]),
    "global in rounds": (("--scope", "global", "--rounds", 2), ["--scope global", "give --scope layer"]),
    "direction": (("--direction", "max"), ["--direction max", "leave it out"]),
    "too many": (("--ratio", 0.9), ["possible ratios"]),
    "less text": (("--trainer.limit_predict_batches", 1), ["--data.samples"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(
    name: str, run: Commands, checkpoint: Path, text: Path, tmp_path: Path, searched: list[str]
) -> None:
    more, words = BAD[name]
    refused = run(*prune(checkpoint, text, "naee", *more, "--out", tmp_path / "run"))
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert all(word in refused.err for word in words), refused.err
    assert not searched and not (tmp_path / "run").exists()


def test_damaged_weights_are_refused(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    path = damaged_copy(checkpoint, tmp_path / "damaged")
    refused = run(*prune(path, text, "naee", "--out", tmp_path / "run"))
    assert refused.code == 2 and refused.err.count("\n") == 1 and "finite" in refused.err
    assert not (tmp_path / "run" / "plan.json").exists()


# ------------------------------------------------------------------------------------------ passes and kills


def test_layers_share_passes_as_memory_allows(
    run: Commands,
    checkpoint: Path,
    text: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    searched: list[str],
) -> None:
    """36 products and up to 9 words for each token in a layer."""
    needed = 8 * (36 + 9) * SAMPLES * SEQ_LEN
    monkeypatch.setattr(naee, "CACHE_BYTES", 2 * needed - 1)
    run.ok(*prune(checkpoint, text, "naee", "--out", tmp_path / "apart"))
    assert searched == ["|", LAYERS[0], "|", LAYERS[1]]
    assert read(tmp_path / "apart" / "plan.json") == read(finished / "naee" / "plan.json")
    monkeypatch.setattr(naee, "CACHE_BYTES", needed - 1)
    refused = run(*prune(checkpoint, text, "naee", "--out", tmp_path / "no"))
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "--data.samples" in refused.err and f"at most {SAMPLES - 1} windows" in refused.err


@pytest.mark.parametrize(("command", "method"), [("prune", "naee-progressive"), ("compare", "naee")])
def test_killed_it_goes_on_with_the_next_layer(
    command: str,
    method: str,
    run: Commands,
    checkpoint: Path,
    grouped: Path,
    text: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    searched: list[str],
) -> None:
    """And ends with what was never killed: of both commands the same."""
    path = grouped if METHODS[method] else checkpoint
    args = prune(path, text, method, "--out", tmp_path)
    if command == "compare":
        grid = ["--methods", f"[{method}]", "--ratios", "[0.5]", "--scopes", "[layer]", "--out", tmp_path]
        args = ["compare", *on(path, text), "--trainer.accelerator", "cpu", *grid]
    with monkeypatch.context() as patch:
        counted, turns = naee.choose_experts, iter(range(9))

        def killed(shape: Any, *rest: Any) -> ChosenSet:
            if next(turns):
                raise SystemExit(137)
            return counted(shape, *rest)

        patch.setattr(naee, "choose_experts", killed)
        assert run(*args).code == 137
    before = len(searched)
    run.ok(*args)
    first, second = read(finished / method / "plan.json")["keep"]
    assert searched[:before] == ["|", first, *(["|"] if METHODS[method] else [])]
    assert searched[before:] == ["|", second]
    whole = read(finished / method / "plan.json")
    found = read(tmp_path / "plan.json") if command == "prune" else read(tmp_path / "compare.json")["cells"][1]
    assert found["made_by"] == whole["made_by"]
    assert found["keep" if command == "prune" else "plan"] == whole["keep"]
    assert not list(tmp_path.rglob("layers.json"))


# ----------------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_two_ranks_choose_what_one_does(
    checkpoint: Path, grouped: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    """By ddp, where each rank has the model, and split by moe_fsdp; windows fall on either, blanks on one."""
    jobs: dict[str, list[object]] = {
        "naee": [*on(checkpoint, text), "--trainer.strategy", "ddp"],
        "naee-progressive": [*on(grouped, text), "--trainer.strategy", "moe_fsdp"],
    }
    told = [["prune", *args, "--method", method, "--out", tmp_path / method] for method, args in jobs.items()]
    commands_on_ranks(2, told, strategy=[])
    for method in jobs:
        one, two = (read(folder / method / "plan.json") for folder in (finished, tmp_path))
        assert two["keep"] == one["keep"]
        assert two["made_by"]["errors"] == pytest.approx(one["made_by"]["errors"], rel=1e-6)
        assert read(tmp_path / method / "prune.json")["world_size"] == 2
