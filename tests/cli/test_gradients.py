"""Criteria on gradients through the commands: asked for, made once, some layers at a time, and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.criteria import criteria, get_criterion
from lightning_moe.errors import InputError
from lightning_moe.modules.gradient_pass import GradientPass
from lightning_moe.moe.checkpoints import load_model
from lightning_moe.pruning.scores import score_experts
from lightning_moe.search.in_memory import gradient_figures
from lightning_moe.stats.gradients import GradientSums
from lightning_moe.stats.layer_stats import GRADIENTS
from lightning_moe.stats.store import ModelStats, load_stats
from tests.helpers.checkpoint import Commands, contents, read, save_checkpoint

ON_GRADIENTS = [criterion.name for criterion in criteria() if criterion.gradients]
ASKED = ("--gradients", "true")
BATCHES = 3
LAYER_BYTES = 8 * 3 * 32 * 8 * 4
ONE_LAYER = ("--model.gradient_memory", LAYER_BYTES / (1 << 30))
"""Of the two."""

Args = list[object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With narrow experts, since statistics look at their spectra."""
    return save_checkpoint(tmp_path_factory.mktemp("narrow") / "tiny", intermediate_size=8)


@pytest.fixture(scope="module")
def args(checkpoint: Path, text: Path) -> Args:
    data = ["--data.path", text, "--data.seq_len", 32, "--data.samples", 11, "--data.batch_size", 4]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return [*quiet, "--model.path", checkpoint, *data]


@pytest.fixture(scope="module")
def scored(args: Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with gradients; read it only."""
    from lightning_moe.cli.main import main

    folder = tmp_path_factory.mktemp("scored")
    main([str(arg) for arg in ("score", *args, *ASKED, "--out", folder)])
    return folder


class Batches:
    """Counts the batches that were observed, and those with a backward; kills at one of the latter."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.observed = self.backward = 0
        self.last: int | None = None
        observe, backward = ExpertObservation._next_batch, GradientPass.predict_step

        def observing(*args: Any) -> None:
            self.observed += 1
            observe(*args)

        def stepping(*args: Any) -> None:
            if self.backward == self.last:
                raise KeyboardInterrupt
            self.backward += 1
            backward(*args)

        patch.setattr(ExpertObservation, "_next_batch", observing)
        patch.setattr(GradientPass, "predict_step", stepping)

    @property
    def counts(self) -> tuple[int, int]:
        """Since they were last asked for."""
        found = self.observed, self.backward
        self.observed = self.backward = 0
        return found


@pytest.fixture
def batches(scored: Path, monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


def gradients_in(folder: Path) -> list[torch.Tensor]:
    stats = load_stats(folder / "stats.safetensors")
    assert stats.has_gradients
    return [getattr(layer, name) for layer in stats.layers for name in GRADIENTS]


def assert_equal(one: Path, other: Path) -> None:
    for mine, yours in zip(gradients_in(one), gradients_in(other), strict=True):
        assert torch.equal(mine, yours)


def test_score_makes_them_when_asked(run: Commands, args: Args, scored: Path, batches: Batches, tmp_path: Path) -> None:
    """Also later, and then it makes only them; what is there is not made again."""
    run.ok("score", *args, "--out", tmp_path)
    assert batches.counts == (BATCHES, 0)
    assert set(read(tmp_path / "scores.json")["methods"]).isdisjoint(ON_GRADIENTS)
    said = run.ok("score", *args, *ASKED, "--out", tmp_path)
    assert "gradients of 2 layers: 1 pass of forward and backward over the text, 2 layers at once" in said.out
    assert "holding 0.0469 MiB" in said.out
    assert batches.counts == (0, BATCHES)
    assert set(read(tmp_path / "scores.json")["methods"]) >= set(ON_GRADIENTS)
    assert read(tmp_path / "scores.json") == read(scored / "scores.json")
    assert_equal(tmp_path, scored)
    for more in (ASKED, ()):
        run.ok("score", *args, *more, "--out", tmp_path)
        assert batches.counts == (0, 0)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in scored.iterdir()}


def test_they_are_those_of_a_plain_loop(args: Args, scored: Path, checkpoint: Path, text: Path) -> None:
    from lightning_moe.data.datamodule import TextDataModule

    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=32, samples=11)
    windows = [data.text[index] for index in range(len(data.text))]
    figures = gradient_figures(load_model(str(checkpoint)), [{k: v[None] for k, v in w.items()} for w in windows], 8.0)
    for layer in load_stats(scored / "stats.safetensors").layers:
        for name, expected in figures[layer.shape.name].items():
            atol = 2.0 if "outliers" in name else 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(getattr(layer, name), expected, rtol=1e-4, atol=atol)


def test_one_layer_at_a_time_is_the_same(
    run: Commands, args: Args, scored: Path, batches: Batches, tmp_path: Path
) -> None:
    said = run.ok("score", *args, *ASKED, *ONE_LAYER, "--out", tmp_path)
    assert "2 passes of forward and backward over the text, 1 layers at once, holding 0.0234 MiB" in said.out
    assert batches.counts == (BATCHES, 2 * BATCHES)
    assert_equal(tmp_path, scored)


@pytest.mark.parametrize(("last", "left"), [(1, 6), (BATCHES + 1, 3)])
def test_a_killed_pass_is_made_again_those_before_are_not(
    run: Commands, args: Args, scored: Path, batches: Batches, tmp_path: Path, last: int, left: int
) -> None:
    command = ["score", *args, *ASKED, *ONE_LAYER, "--out", tmp_path]
    batches.last = last
    stopped = run(*command)
    assert stopped.code != 0 and not (tmp_path / "score.json").exists()
    assert ("the same command goes on" in stopped.err) == (last > BATCHES)
    batches.last = None
    assert batches.counts == (BATCHES, last)
    run.ok(*command)
    assert batches.counts == (0, left)
    assert_equal(tmp_path, scored)
    assert not (tmp_path / ".partial").exists()


def test_prune_makes_them_when_its_method_needs_them(
    run: Commands, args: Args, scored: Path, batches: Batches, checkpoint: Path, tmp_path: Path
) -> None:
    """From text, and from statistics that have them, in both directions."""
    stats = load_stats(scored / "stats.safetensors")
    for direction in ("min", "max"):
        cut = ["--method", "egs", "--direction", direction, "--scope", "global"]
        run.ok("prune", *args, *cut, "--out", tmp_path / f"text-{direction}")
        assert batches.counts == (BATCHES, BATCHES)
        given = ["--model.path", checkpoint, "--stats", scored]
        run.ok("prune", *args[:4], *given, *cut, "--out", tmp_path / f"stats-{direction}")
        plans = [read(tmp_path / f"{source}-{direction}" / "plan.json")["keep"] for source in ("text", "stats")]
        scores = score_experts(stats, "egs", direction).scores  # type: ignore[arg-type]
        assert plans[0] == plans[1]
        for name, keep in plans[0].items():
            dropped = [expert for expert in range(8) if expert not in keep]
            assert not dropped or scores[name][keep].min() >= scores[name][dropped].max()
    run.ok("prune", *args, "--method", "ean", "--out", tmp_path / "ean")
    assert batches.counts == (BATCHES, 0)


def test_statistics_without_them_are_refused(run: Commands, args: Args, scored: Path, tmp_path: Path) -> None:
    stats = load_stats(scored / "stats.safetensors")
    bare = [layer.__class__(**{**vars(layer), **dict.fromkeys(GRADIENTS)}) for layer in stats.layers]
    ModelStats(stats.model_id, stats.data_fingerprint, bare, stats.dtype).save(tmp_path / "bare.safetensors")
    prune = ["prune", *args[:6], "--stats", tmp_path / "bare.safetensors"]
    refused = run(*prune, "--method", "ege", "--out", tmp_path / "out")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "no gradients, which ege needs" in refused.err and "--gradients true" in refused.err
    assert contents(tmp_path / "out") == {}
    run.ok(*prune, "--method", "ean", "--out", tmp_path / "out")


@pytest.mark.parametrize("memory", ["0", "-1"])
def test_no_memory_is_refused(run: Commands, args: Args, tmp_path: Path, memory: str) -> None:
    refused = run("score", *args, *ASKED, "--model.gradient_memory", memory, "--out", tmp_path)
    assert refused.code == 2 and "gradient_memory" in refused.err and refused.err.count("\n") == 1


def test_compare_and_rounds_share_one_pass(run: Commands, args: Args, batches: Batches, tmp_path: Path) -> None:
    """One observation and one pass for the whole model, one of each for each later round."""
    grid = ["--ratios", "[0.25,0.5]", "--scopes", "[layer]", "--strategies", "[one-shot,iterative]"]
    run.ok("compare", *args, "--methods", "[ean,ege]", *grid, "--out", tmp_path / "run")
    # both go on from the shared statistics, and look anew at what their first round left
    assert batches.counts == (BATCHES * (1 + 2), BATCHES * (1 + 1))
    found = read(tmp_path / "run" / "compare.json")
    assert found["observation_seconds"] > 0 and found["gradient_seconds"] > 0
    cells = {(row["method"], row["strategy"], row["ratio"]): row for row in found["cells"]}
    assert all(row["status"] == "done" for row in cells.values()) and len(cells) == 9
    stats = load_stats(tmp_path / "run" / "stats.safetensors")
    for name, scores in score_experts(stats, "ege").scores.items():
        assert cells["ege", "one-shot", 0.5]["plan"][name] == sorted(scores.topk(4).indices.tolist())
    for more in ([], ["--overwrite", "true"]):  # cells are computed again then; the statistics are still those
        run.ok(
            "compare", *args, "--methods", "[egn]", "--ratios", "[0.5]", *grid[2:4], *more, "--out", tmp_path / "run"
        )
        assert batches.counts == (0, 0)


def test_gradients_that_fail_leave_the_other_methods(
    run: Commands, args: Args, batches: Batches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(sums: GradientSums) -> Any:
        raise InputError("not finite")

    monkeypatch.setattr(GradientSums, "figures", broken)
    grid = ["--methods", "[ege,ean,egn]", "--ratios", "[0.5]", "--scopes", "[layer]"]
    failed = run("compare", *args, *grid, "--out", tmp_path)
    assert failed.code == 1 and batches.counts == (BATCHES, BATCHES)
    rows = {row["method"]: row for row in read(tmp_path / "compare.json")["cells"]}
    assert rows["ean"]["status"] == "done"
    assert rows["egn"]["reason"] == "the gradients could not be made: not finite"


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_methods_say_that_they_need_them(name: str) -> None:
    from lightning_moe.cli.methods import get_method

    assert get_method(name).gradients and get_criterion(name).gradients
    assert not get_method("diep").gradients and not get_method("ean").gradients
