"""``prune`` in rounds: what it writes, what the records say, and what rounds are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lightning_moe.cli import lottery as command
from lightning_moe.cli.main import main
from lightning_moe.cli.recovery import default_lr
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.pruning.round_record import RoundRecord
from tests.cli.lottery_runs import (
    BATCH_SIZE,
    ITERATIVE,
    LAYERS,
    SEQ_LEN,
    TOKENS,
    TUNED,
    VAL_SAMPLES,
    Trained,
    cut_by_plan,
    loaded,
    model_args,
    prune_args,
    records_of,
    tensors,
    text_args,
)
from tests.helpers.checkpoint import Commands, contents, read, save_checkpoint

MOMENTS = ["before_prune", "after_prune", "after_finetune"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of ``lottery`` draws."""
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


@pytest.fixture(scope="module")
def lottery(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds with tuning, and their pictures."""
    folder = tmp_path_factory.mktemp("lottery")
    main([str(arg) for arg in prune_args(checkpoint, text, *TUNED, "--out", folder)])
    return folder


@pytest.fixture(scope="module")
def made(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs with some options, each made once."""
    folders: dict[tuple[object, ...], Path] = {}

    def make(*more: object) -> Path:
        if more not in folders:
            folders[more] = tmp_path_factory.mktemp("made")
            main([str(arg) for arg in prune_args(checkpoint, text, *more, "--out", folders[more])])
        return folders[more]

    return make


# --------------------------------------------------------------------------------------------------- files


def test_what_it_writes(lottery: Path, checkpoint: Path) -> None:
    assert {file.name for file in lottery.iterdir()} == {
        "model",
        "plan.json",
        "rounds.jsonl",
        "figures",
        "prune.json",
        "summary.json",
    }
    assert {file.name for file in (lottery / "figures").iterdir()} == {"rounds.png", "expert_usage.png"}
    assert {file.name for file in checkpoint.iterdir()} <= {file.name for file in (lottery / "model").iterdir()}
    summary, records = read(lottery / "prune.json"), records_of(lottery)
    assert summary == read(lottery / "summary.json")
    assert (summary["command"], summary["method"], summary["rounds"]) == ("prune", "ean", 2)
    assert (summary["ratio"], summary["scope"], summary["world_size"]) == (0.5, "layer", 1)
    assert summary["perplexity_before"] == records[0].perplexity["before_prune"]["all"]
    assert summary["perplexity_after"] == records[-1].perplexity["after_finetune"]["all"]
    assert summary["finetune_tokens"] == TOKENS + 2 * TOKENS
    assert summary["kept_experts"] == dict.fromkeys(LAYERS, 4)
    assert read(lottery / "plan.json")["keep"] == records[-1].keep
    pruned = loaded(lottery / "model")
    assert {layer.name: layer.num_experts for layer in find_moe_layers(pruned)} == dict.fromkeys(LAYERS, 4)
    assert pruned.dtype == torch.float32
    assert summary["parameters_after"] == records[-1].parameters == pruned.num_parameters()


def assert_true_records(records: list[RoundRecord], ratios: list[float], tokens: list[int], scope: str) -> None:
    """What holds in any run of rounds on 2 layers of 8 experts."""
    assert [record.round for record in records] == list(range(1, len(ratios) + 1))
    assert [record.ratio for record in records] == pytest.approx(ratios)
    assert [record.tokens for record in records] == tokens
    before = {name: list(range(8)) for name in LAYERS}
    for record, ratio in zip(records, ratios, strict=True):
        assert sum(map(len, record.keep.values())) == 16 - round(16 * ratio)
        for name in LAYERS:
            kept, dropped = set(record.keep[name]), set(record.dropped[name])
            assert kept | dropped == set(before[name]) and not kept & dropped
            assert set(record.scores[name]) == {str(expert) for expert in before[name]}
            scores = {int(expert): score for expert, score in record.scores[name].items()}
            if scope == "layer":
                assert len(record.keep[name]) == 8 - round(8 * ratio)
            if dropped:
                assert min(scores[expert] for expert in kept) >= max(scores[expert] for expert in dropped)
        moments = MOMENTS if record.tokens else MOMENTS[:2]
        assert list(record.perplexity) == list(record.load) == moments
        for moment in moments:
            assert record.perplexity[moment]["all"] > 1
            held = before if moment == "before_prune" else record.keep
            counts = {name: record.load[moment][name]["counts"] for name in LAYERS}
            assert {name: len(count) for name, count in counts.items()} == {n: len(ids) for n, ids in held.items()}
        parts = {"estimate", "measure", "prune"} | ({"tune", "save"} if record.tokens else set())
        assert set(record.seconds) == parts and all(value >= 0 for value in record.seconds.values())
        assert (record.lr is not None and record.lr > 0) == (record.steps > 0) == (record.tokens > 0)
        before = record.keep
    for one, next_one in pairwise(records):
        assert one.last_moment is not None
        assert next_one.perplexity["before_prune"] == one.perplexity[one.last_moment]
        assert next_one.load["before_prune"] == one.load[one.last_moment]


def test_records(lottery: Path) -> None:
    records = records_of(lottery)
    assert len((lottery / "rounds.jsonl").read_text().splitlines()) == 2
    assert_true_records(records, [0.25, 0.5], [TOKENS, 2 * TOKENS], "layer")
    assert [record.steps for record in records] == [2, 4]
    lr = default_lr(read(lottery / "prune.json")["parameters_before"])
    assert [record.lr for record in records] == [lr, lr]
    for record in records:  # so small a model learns within a few steps
        assert record.perplexity["after_finetune"]["all"] < record.perplexity["after_prune"]["all"]


@pytest.mark.parametrize(
    ("options", "ratios", "tokens"),
    [
        (("--rounds", "[0.25, 0.375, 0.5]"), [0.25, 0.375, 0.5], [0, 0, 0]),
        (("--rounds", "[0.5]", "--ratio", 0.5), [0.5], [0]),
        (("--rounds", 3, "--spacing", "cosine", "--ratio", 0.5, "--scope", "global"), [1 / 8, 3 / 8, 1 / 2], [0, 0, 0]),
        (("--rounds", 2, "--finetune_tokens", 64, "--finetune_growth", 0.5), [0.25, 0.5], [64, 32]),
        (("--rounds", 2, "--finetune_tokens", 64, "--scope", "global"), [0.25, 0.5], [64, 128]),
        (("--rounds", 1, "--finetune_tokens", 64, "--finetune_lr", 1e-3), [0.5], [64]),
    ],
)
def test_schedules(
    made: Callable[..., Path], options: tuple[object, ...], ratios: list[float], tokens: list[int]
) -> None:
    records = records_of(made(*options))
    assert_true_records(records, ratios, tokens, "global" if "global" in options else "layer")
    if "--finetune_lr" in options:
        assert records[0].lr == 1e-3


# --------------------------------------------------------------------------------------------- what rounds are


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_iterative_is_the_checkpoint_cut_by_its_plan(
    run: Commands, made: Callable[..., Path], checkpoint: Path, tmp_path: Path, scope: str
) -> None:
    """No tuning changes no weight: what lies in the folder is what ``prune --plan`` writes, bit by bit."""
    folder = made(*ITERATIVE, "--scope", scope)
    by_plan = cut_by_plan(run, checkpoint, folder, tmp_path)
    files = contents(folder / "model")
    assert files.keys() == contents(by_plan).keys()
    for name in files:
        assert (folder / "model" / name).read_bytes() == (by_plan / name).read_bytes(), name
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    full, keep = loaded(checkpoint), read(folder / "plan.json")["keep"]
    with torch.no_grad():
        with mask_plan(find_moe_layers(full), keep):
            expected = full(ids).logits
        torch.testing.assert_close(loaded(folder / "model")(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_rounds_are_prunes_one_after_the_other(
    run: Commands, made: Callable[..., Path], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """The slow way: prune, then prune what that left; the second estimate is one of the smaller model."""
    folder = made(*ITERATIVE)
    model = checkpoint
    for turn, ratio in enumerate((0.25, 1 / 3)):  # 2 of 8, then 2 of 6
        calibration = text_args(text)[: text_args(text).index("--data.val_path")]
        cut = ("--method", "ean", "--ratio", ratio, "--out", tmp_path / str(turn))
        run.ok("prune", *model_args(model), *calibration, *cut)
        model = tmp_path / str(turn) / "model"
        by_hand = read(tmp_path / str(turn) / "scores.json")["methods"]["ean"]["scores"]
        in_rounds = records_of(folder)[turn].scores
        for name in LAYERS:
            assert list(in_rounds[name].values()) == pytest.approx(by_hand[name], rel=1e-5)
    one, other = tensors(model), tensors(folder / "model")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_later_rounds_estimate_on_the_tuned_model(lottery: Path, made: Callable[..., Path]) -> None:
    tuned, iterative = records_of(lottery), records_of(made(*ITERATIVE))
    assert tuned[0].scores == iterative[0].scores
    assert tuned[1].scores != iterative[1].scores


def test_one_round_with_tokens_tunes(
    run: Commands, made: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    folder = made("--rounds", 1, "--finetune_tokens", TOKENS)
    untuned, tuned = tensors(cut_by_plan(run, checkpoint, folder, tmp_path)), tensors(folder / "model")
    assert {name: tensor.shape for name, tensor in tuned.items()} == {n: t.shape for n, t in untuned.items()}
    assert all(not torch.equal(tuned[name], untuned[name]) for name in tuned)


@pytest.mark.parametrize("options", [TUNED, (*TUNED, "--scope", "global"), (*ITERATIVE, "--scope", "global")])
def test_the_last_perplexity_is_that_of_the_model_on_disk(
    run: Commands, made: Callable[..., Path], text: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    folder = made(*options)
    on = ("--data.path", text / "island.txt", "--data.seq_len", SEQ_LEN, "--data.samples", VAL_SAMPLES)
    run.ok("evaluate", *model_args(folder / "model"), *on, "--data.batch_size", BATCH_SIZE, "--out", tmp_path)
    found, last = read(tmp_path / "evaluate.json"), records_of(folder)[-1]
    assert last.last_moment is not None
    noted = last.perplexity[last.last_moment]
    assert (noted["all"], noted["loss"], noted["domains"]) == (found["perplexity"], found["loss"], found["domains"])
    assert last.load[last.last_moment] == found["load"]


@pytest.mark.parametrize("options", [TUNED, ITERATIVE])
def test_layers_of_different_sizes_load_again(made: Callable[..., Path], options: tuple[object, ...]) -> None:
    folder = made(*options, "--scope", "global")
    keep = read(folder / "plan.json")["keep"]
    assert len({len(ids) for ids in keep.values()}) == 2, "else this test says nothing"
    model = loaded(folder / "model")
    assert {layer.name: layer.num_experts for layer in find_moe_layers(model)} == {n: len(i) for n, i in keep.items()}


def test_text_of_its_own_to_tune_on(
    run: Commands, lottery: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration and measures stay where they were."""
    trained = Trained(monkeypatch)
    args = prune_args(checkpoint, text, *TUNED, "--finetune_path", text / "island.txt", "--out", tmp_path)
    run.ok(*args)
    data = TextDataModule(str(text / "island.txt"), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=12)
    there = {tuple(row) for row in data.text.tokens_NS.tolist()}
    assert {tuple(row.tolist()) for row in trained.tokens} <= there
    mine, other = records_of(tmp_path), records_of(lottery)
    assert mine[0].scores == other[0].scores
    assert mine[0].load["after_prune"] == other[0].load["after_prune"]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_other_families(run: Commands, text: Path, tmp_path: Path, family: str) -> None:
    """Shared experts, groups and correction biases, biases of experts: they lose experts, learn, and load again."""
    folder = save_checkpoint(tmp_path / "whole", family)
    run.ok(*prune_args(folder, text, *TUNED, "--recovery.z_loss", 1e-3, "--out", tmp_path / "out"))
    on = ("--data.path", text / "island.txt", "--data.seq_len", SEQ_LEN, "--data.samples", VAL_SAMPLES)
    out = ("--data.batch_size", BATCH_SIZE, "--out", tmp_path / "out")
    run.ok("evaluate", *model_args(tmp_path / "out" / "model"), *on, *out)
    figures = read(tmp_path / "out" / "evaluate.json")
    assert figures["perplexity"] == pytest.approx(records_of(tmp_path / "out")[-1].final_perplexity, rel=1e-6)
    for layer in find_moe_layers(loaded(tmp_path / "out" / "model")):
        assert layer.num_experts == 4
        if family == "deepseek_v3":
            assert all(bias.abs().max() > 0 for bias in layer.correction_biases) and layer.correction_biases
