"""NAEE by ``prune`` and ``compare``: the sets of the slow reference, in rounds, on two ranks, and after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from lightning_moe.cli import naee
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.moe.checkpoints import load_model
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.search.naee import ChosenSet, choose_experts, remove_experts
from tests.helpers.checkpoint import Commands, damaged_copy, read, save_checkpoint
from tests.helpers.commands_on_ranks import commands_on_ranks
from tests.helpers.plans import compose
from tests.search.naee_reference import chosen_sets

METHODS = {"naee": False, "naee-progressive": True}
QUIET = ("--trainer.enable_progress_bar", "false")
SEQ_LEN, SAMPLES = 16, 7
LAYERS = [f"model.layers.{index}.mlp" for index in range(2)]


def on(checkpoint: Path, text: Path) -> list[object]:
    """Seven windows, two at a time: the last batch is smaller, and of two ranks one has a blank."""
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


# ------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "sets"), [("mixtral", 70), ("deepseek_v3", 36)])
def test_prune_keeps_the_sets_of_the_reference(
    family: str, sets: int, method: str, run: Commands, checkpoint: Path, grouped: Path, text: Path, tmp_path: Path
) -> None:
    path = checkpoint if family == "mixtral" else grouped
    said = run.ok(*prune(path, text, method, "--out", tmp_path))
    keep, moved = chosen_sets(loaded(path), windows(path, text), 4, METHODS[method])
    plan = read(tmp_path / "plan.json")
    assert plan["keep"] == keep
    assert plan["made_by"]["errors"] == pytest.approx(moved, rel=1e-6)
    assert plan["made_by"]["search"] == f"exact, all {sets} sets in 2 layers"
    assert f"{method}: {plan['made_by']['search']}.\n" in said.out
    assert read(tmp_path / "prune.json")["uniform"]


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
    assert run(*args, "--scopes", "[layer,global]").code == 1
    cells = {
        (row["strategy"], row["ratio"], row["scope"]): row for row in read(tmp_path / "compare/compare.json")["cells"]
    }
    assert cells["iterative", 0.25, "layer"]["plan"] == cells["one-shot", 0.25, "layer"]["plan"] == first
    assert cells["iterative", 0.5, "layer"]["plan"] == plan["keep"]
    assert cells["one-shot", 0.5, "layer"]["plan"] == chosen_sets(loaded(checkpoint), shown, 4, False)[0]
    for strategy in ("one-shot", "iterative"):
        failed = cells[strategy, 0.5, "global"]
        assert failed["status"] == "failed" and "give --scope layer" in failed["reason"]


def test_rounds_that_spare_a_layer(run: Commands, text: Path, tmp_path: Path) -> None:
    """Of 6 experts in steps of a tenth: 1, then none."""
    path = save_checkpoint(tmp_path / "six", num_local_experts=6)
    out = tmp_path / "run"
    refused = run(*prune(path, text, "naee", "--ratio", 0.2, "--rounds", 2, "--out", out))
    assert refused.code == 2 and "round 2 of 2" in refused.err
    run.ok(*prune(path, text, "naee", "--ratio", 0.34, "--rounds", 2, "--out", out))
    assert [len(ids) for ids in read(out / "plan.json")["keep"].values()] == [4, 4]


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


def test_scores_serve_their_ratio_alone(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run.ok(*prune(checkpoint, text, "naee", "--out", tmp_path / "one"))
    again = ["prune", *QUIET, "--model.path", checkpoint, "--scores", tmp_path / "one", "--method", "naee"]
    run.ok(*again, "--out", tmp_path / "two")
    assert read(tmp_path / "two/plan.json")["keep"] == read(tmp_path / "one/plan.json")["keep"]
    refused = run(*again, "--ratio", 0.25, "--out", tmp_path / "three")
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
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: list[str]
) -> None:
    """36 products and up to 9 words for each of 7 windows of 16 in a layer."""
    needed = 8 * (36 + 9) * SAMPLES * SEQ_LEN
    plans = []
    for number, room in enumerate((2 * needed, 2 * needed - 1, needed)):
        monkeypatch.setattr(naee, "CACHE_BYTES", room)
        run.ok(*prune(checkpoint, text, "naee", "--out", tmp_path / str(number)))
        plans.append(read(tmp_path / str(number) / "plan.json"))
    assert searched == ["|", *LAYERS, *2 * ["|", LAYERS[0], "|", LAYERS[1]]]
    assert plans[0] == plans[1] == plans[2]
    monkeypatch.setattr(naee, "CACHE_BYTES", needed - 1)
    refused = run(*prune(checkpoint, text, "naee", "--out", tmp_path / "no"))
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "--data.samples" in refused.err and "at most 6 windows" in refused.err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("command", ["prune", "rounds", "compare"])
def test_killed_it_goes_on_with_the_next_layer(
    command: str,
    method: str,
    run: Commands,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    searched: list[str],
) -> None:
    commands: dict[str, Callable[[], list[object]]] = {
        "prune": lambda: prune(checkpoint, text, method),
        "rounds": lambda: prune(checkpoint, text, method, "--rounds", "[0.5]", "--finetune_tokens", 32),
        "compare": lambda: (
            ["compare", *on(checkpoint, text), "--trainer.accelerator", "cpu", "--methods", f"[{method}]"]
            + ["--ratios", "[0.5]", "--scopes", "[layer]"]
        ),
    }
    args = commands[command]()
    run.ok(*args, "--out", tmp_path / "whole")
    whole, searched[:] = list(searched), []
    with monkeypatch.context() as patch:
        counted = naee.choose_experts

        def killed(shape: Any, *rest: Any) -> ChosenSet:
            if shape.name == LAYERS[1]:
                raise SystemExit(137)
            return counted(shape, *rest)

        patch.setattr(naee, "choose_experts", killed)
        assert run(*args, "--out", tmp_path / "parts").code == 137
    before = list(searched)
    run.ok(*args, "--out", tmp_path / "parts")
    assert before + searched[len(before) + 1 :] == [*whole[:2], *(["|"] if METHODS[method] else []), LAYERS[1]]
    assert searched[len(before) :] == ["|", LAYERS[1]]
    file = "compare.json" if command == "compare" else "plan.json"
    one, two = (read(tmp_path / name / file) for name in ("whole", "parts"))
    if command == "compare":
        assert [row.get("made_by") for row in one["cells"]] == [row.get("made_by") for row in two["cells"]]
        assert [row["plan"] for row in one["cells"]] == [row["plan"] for row in two["cells"]]
    else:
        assert one == two
    assert not list((tmp_path / "parts").rglob("layers.json"))


# ----------------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_two_ranks_choose_what_one_does(
    run: Commands, checkpoint: Path, grouped: Path, text: Path, tmp_path: Path
) -> None:
    """By ddp, where each rank has the model, and split by moe_fsdp; windows and blanks fall on either."""
    jobs = {
        f"{family}-{method}": [
            *("prune", *on(path, text), "--method", method),
            *(("--rounds", 2) if family == "grouped" else ()),
        ]
        for family, path in (("mixtral", checkpoint), ("grouped", grouped))
        for method in METHODS
    }
    for name, args in jobs.items():
        run.ok(*args, "--trainer.accelerator", "cpu", "--out", tmp_path / "one" / name)
    for strategy in ("ddp", "moe_fsdp"):
        told = [[*args, "--out", tmp_path / strategy / name] for name, args in jobs.items()]
        commands_on_ranks(2, tmp_path, told, strategy)
        for name in jobs:
            one, two = (read(tmp_path / ranks / name / "plan.json") for ranks in ("one", strategy))
            assert two["keep"] == one["keep"]
            assert two["made_by"]["errors"] == pytest.approx(one["made_by"]["errors"], rel=1e-6)
