"""``search`` and ``prune --method diep`` through the commands: files, refusals, and two ranks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.callbacks.importance_figures import ImportanceFigures
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.search.presets import PRESETS
from tests.cli.search_runs import QUIET, UPDATES, on, results, search_args, whole_searches
from tests.helpers.checkpoint import Commands, contents, read, save_checkpoint
from tests.helpers.processes import train_py

LAYERS = [f"model.layers.{index}.mlp" for index in range(2)]


def scores_of(folder: Path, checkpoint: Path) -> ExpertScores:
    written = read(folder / "scores.json")
    shapes = layer_shapes(str(checkpoint))
    return ExpertScores.from_json(written["methods"]["diep"], shapes, written["model_id"], written["data_fingerprint"])


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "figures" / "importance.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is enough, and much faster; the one search of ``searched`` draws."""
    monkeypatch.setattr(ImportanceFigures, "_figures", lambda figures, keep: {})


@pytest.fixture(scope="module")
def searched(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search, with its pictures."""
    return whole_searches(checkpoint, text, tmp_path_factory)()[0]


# --------------------------------------------------------------------------------------------------- files


def test_what_a_search_writes(searched: Path, checkpoint: Path) -> None:
    assert {file.name for file in searched.iterdir()} == {
        "scores.json",
        "plan.json",
        "importance.json",
        "search.json",
        "summary.json",
        "figures",
    }
    names = {file.name for file in (searched / "figures").iterdir()}
    assert names == {"importance.csv"} | {f"importance_{name}.png" for name in ("curves", "distributions", "experts")}
    summary = read(searched / "summary.json")
    assert summary == read(searched / "search.json")
    assert (summary["command"], summary["updates"], summary["stopped_early"]) == ("search", UPDATES, False)
    assert (summary["request"]["updates"], summary["request"]["lr"]) == (UPDATES, 0.05)

    scores, keep = scores_of(searched, checkpoint), read(searched / "plan.json")["keep"]
    assert keep == make_plan(scores, 0.5, "global").keep
    assert summary["kept_experts"] == {name: len(ids) for name, ids in keep.items()}
    importance = read(searched / "importance.json")["layers"]
    last = {row["layer"]: row for row in curve(searched)[-2:]}
    for name in LAYERS:
        alpha_E = torch.tensor(importance[name]["alpha"], dtype=torch.float64)
        beta = importance[name]["beta"]
        assert alpha_E.abs().max() > 0.01 and beta != 1
        torch.testing.assert_close(8 * alpha_E.softmax(0) * beta, scores.scores[name], rtol=1e-12, atol=0)
        assert int(last[name]["step"]) == UPDATES
        assert [float(last[name][f"alpha_{expert}"]) for expert in range(8)] == pytest.approx(alpha_E.tolist())
        assert last[name]["kept"] == " ".join(map(str, keep[name]))


def test_again_it_says_repeated_and_another_search_is_refused(
    run: Commands, searched: Path, checkpoint: Path, text: Path
) -> None:
    before = contents(searched)
    args = search_args(checkpoint, text, "--out", searched)
    for same in ((), ("--preset", "default", "--lr", 0.05, "--schedule", "3:1")):  # what is the preset's anyway
        assert "This very request was carried out here before" in run.ok(*args, *same).out
    for other in (
        ("--lr", 0.01, "lr"),
        ("--preset", "3:1", "betas"),
        ("--ratio", 0.25, "ratio"),
        ("--data.batch_size", 4, "data.batch_size"),
        ("--seed_everything", 7, "seed"),
        ("--trainer.precision", "bf16-true", "precision"),
    ):
        refused = run(*args, *other[:2])
        assert refused.code == 2, other
        assert len(refused.err.splitlines()) == 1, refused.err
        assert f"(other {other[2]});" in refused.err and "--overwrite" in refused.err, refused.err
    assert contents(searched) == before


def test_a_search_stops_when_its_plan_stays(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """With so small a rate that no order changes after the first updates."""
    args = search_args(checkpoint, text, "--lr", 1e-9, "--optimizer", "sgd", "--check_every", 2, "--patience", 1)
    run.ok(*args, "--learn_alpha", "false", "--out", tmp_path)
    summary = read(tmp_path / "summary.json")
    assert (summary["updates"], summary["stopped_early"], summary["plan_overlaps"]) == (4, True, [1.0])
    assert int(curve(tmp_path)[-1]["step"]) == 4


def test_another_seed_is_another_search(
    run: Commands, searched: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """It orders the windows."""
    run.ok(*search_args(checkpoint, text, "--seed_everything", 1, "--out", tmp_path))
    assert results(tmp_path)["importance.json"] != results(searched)["importance.json"]


def test_the_checkpoint_is_never_touched(run: Commands, text: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    before = contents(folder)
    run.ok(*search_args(folder, text, "--preset", "paper", "--out", tmp_path / "out"))
    assert contents(folder) == before


# ----------------------------------------------------------------------------------------------- refusals


BAD: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "preset": (("--preset", "papr"), ["--preset papr", "'paper'"]),
    "schedule": (("--schedule", "3-1"), ["schedule '3-1'", "such as 3:1"]),
    "betas": (("--betas", "rndom"), ["betas 'rndom'"]),
    "nothing to learn": (("--learn_alpha", "false", "--betas", "fixed"), ["nothing to learn"]),
    "ratio": (("--ratio", 0.9), ["--ratio 0.9", "possible ratios"]),
    "ratio above one": (("--ratio", 1.5), ["--ratio 1.5", "between 0 and 1"]),
    "floor": (("--floor", 9), ["--floor 9"]),
    "updates": (("--updates", 0), ["updates 0"]),
    "rate": (("--lr", -1), ["lr -1.0"]),
    "patience": (("--patience", 0), ["--patience 0"]),
    "looks": (("--check_every", 0), ["--check_every 0"]),
    "relaxation": (("--relaxation", "dense"), ["--relaxation", "dense-routed"]),
    "less text": (("--trainer.limit_train_batches", 2), ["--trainer.limit_train_batches", "--data.samples"]),
    "less than a batch": (("--data.batch_size", 100), ["--data.batch_size"]),
    "misspelt": (("--presets", "paper"), ["--preset"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, name: str
) -> None:
    args, words = BAD[name]
    said = run(*search_args(checkpoint, text), "--out", tmp_path / "out", *args)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1, said.err
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "out").exists()


def test_no_text_is_refused(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    said = run("search", *QUIET, "--model.path", checkpoint, "--out", tmp_path / "out")
    assert said.code == 2
    assert len(said.err.splitlines()) == 1 and "--data.path" in said.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--stats", "stats.safetensors"), ["--stats stats.safetensors", "diep", "--data.path"]),
        (("--data.path", "{text}", "--direction", "max"), ["--direction max", "diep"]),
        (("--data.path", "{text}", "--method", "diep-papr"), ["diep-papr", "'diep-paper'"]),
    ],
)
def test_prune_refuses_what_a_search_cannot_use(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, args: tuple[str, ...], words: list[str]
) -> None:
    given = [arg.format(text=text) for arg in args]
    said = run("prune", *QUIET, "--model.path", checkpoint, "--method", "diep", "--out", tmp_path / "out", *given)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- pruning


def some_ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_keeps_what_the_search_says(
    run: Commands,
    searched: Path,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scope: Scope,
) -> None:
    monkeypatch.setitem(PRESETS, "default", {"updates": UPDATES})
    run.ok("prune", *on(checkpoint, text), "--method", "diep", "--ratio", 0.25, "--scope", scope, "--out", tmp_path)
    scores, keep = scores_of(tmp_path, checkpoint), read(tmp_path / "plan.json")["keep"]
    assert keep == make_plan(scores, 0.25, scope).keep
    for name, score_E in scores_of(searched, checkpoint).scores.items():
        assert torch.equal(score_E, scores.scores[name])

    pruned, full = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", checkpoint))
    assert {layer.name: layer.num_experts for layer in find_moe_layers(pruned)} == {
        name: len(ids) for name, ids in keep.items()
    }
    with torch.no_grad(), mask_plan(find_moe_layers(full), keep):
        expected = full(some_ids()).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned(some_ids()).logits, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- two ranks


@pytest.mark.scale
def test_two_ranks_equal_one_with_batches_twice_as_large(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """Full windows, so that a mean over both ranks is the mean over all tokens; counts of the router add up."""
    more = ["--optimizer", "sgd", "--lr", 1.0, "--score", "frequency", "--schedule", "1:1"]
    process = train_py(
        *search_args(checkpoint, text, *more, "--out", tmp_path / "2"),
        *("--trainer.strategy=ddp", "--trainer.devices=2"),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run.ok(*search_args(checkpoint, text, *more, "--data.batch_size", 4, "--out", tmp_path / "1"))
    assert [read(tmp_path / ranks / "search.json")["world_size"] for ranks in "12"] == [1, 2]
    one, two = (read(tmp_path / ranks / "importance.json")["layers"] for ranks in "12")
    for name in LAYERS:
        assert max(map(abs, one[name]["alpha"])) > 1e-2
        assert two[name]["alpha"] == pytest.approx(one[name]["alpha"], abs=1e-4)
        assert two[name]["beta"] == pytest.approx(one[name]["beta"], abs=1e-4)
    scores = [scores_of(tmp_path / ranks, checkpoint).scores for ranks in "12"]
    for name in LAYERS:
        torch.testing.assert_close(scores[1][name], scores[0][name], rtol=1e-3, atol=1e-6)
    refused = run(*search_args(checkpoint, text, *more, "--out", tmp_path / "2"))
    assert refused.code == 2 and "world_size" in refused.err
