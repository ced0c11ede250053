"""``prune`` in rounds: what it writes, what the records say, what it refuses, and what tuning may change."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.cli import lottery as command
from lightning_moe.cli.main import main
from lightning_moe.cli.recovery import default_lr
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.pruning.round_record import RoundRecord, read_records
from tests.helpers.checkpoint import Commands, contents, read, save_checkpoint

LAYERS = [f"model.layers.{index}.mlp" for index in range(2)]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN, BATCH_SIZE, VAL_SAMPLES = 16, 2, 6
TOKENS = 4 * SEQ_LEN
TUNED = ("--rounds", 2, "--finetune_tokens", TOKENS)
ITERATIVE = ("--rounds", 2)
ROUTER_KD = ("--rounds", 2, "--finetune_tokens", 8 * SEQ_LEN, "--recovery.kind", "router-kd")
MOMENTS = ["before_prune", "after_prune", "after_finetune"]


def model_args(checkpoint: Path) -> list[object]:
    return [*QUIET, "--model.path", checkpoint]


def text_args(text: Path) -> list[object]:
    """Windows of one file to calibrate and tune on, of the other to measure."""
    calibration = ["--data.path", text / "harbour.txt", "--data.seq_len", SEQ_LEN, "--data.samples", 8]
    validation = ["--data.val_path", text / "island.txt", "--data.val_samples", VAL_SAMPLES]
    return [*calibration, *validation, "--data.batch_size", BATCH_SIZE]


def prune_args(checkpoint: Path, text: Path, *more: object) -> list[object]:
    return ["prune", *model_args(checkpoint), *text_args(text), "--method", "ean", *more]


def records_of(folder: Path) -> list[RoundRecord]:
    return read_records(folder / "rounds.jsonl")


def tensors(folder: Path) -> dict[str, Tensor]:
    """The weights on disk, whatever files they lie in."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def loaded(folder: Path, **kwargs: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return model


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


def cut_by_plan(run: Commands, checkpoint: Path, folder: Path, out: Path) -> Path:
    """The checkpoint as ``prune --plan`` cuts it."""
    run.ok("prune", *model_args(checkpoint), "--plan", folder / "plan.json", "--out", out)
    return out / "model"


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


class Trained:
    """The windows that each batch of tuning saw, by the text's own numbers, and the types of the weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[list[int]] = []
        self.tokens: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()
        stock = MoECausalLM.training_step

        def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.windows.append(batch["window"].tolist())
            self.tokens += list(batch["input_ids"])
            self.dtypes |= {parameter.dtype for parameter in module.parameters()}
            return stock(module, batch, batch_idx)

        monkeypatch.setattr(MoECausalLM, "training_step", step)


def test_windows_of_a_round(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is enough text, there are as many as all rounds need; no round sees one twice, each has its order."""
    trained = Trained(monkeypatch)
    run.ok(*prune_args(checkpoint, text, *TUNED, "--out", tmp_path))
    data = TextDataModule(str(text / "harbour.txt"), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=12)
    seen = [window for batch in trained.windows for window in batch]
    assert len(seen) == len(data.text) == 12 and set(seen) <= set(range(12))
    for window, row in zip(seen, trained.tokens, strict=True):
        assert row.tolist() == data.text.tokens_NS[window].tolist()
    first, second = seen[:4], seen[4:]
    assert len(set(first)) == 4 and len(set(second)) == 8
    assert first != second[:4]


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


@pytest.mark.parametrize(("batch_tokens", "steps"), [(2 * SEQ_LEN, [2, 4]), (4 * SEQ_LEN, [1, 2])])
def test_tokens_per_step(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, batch_tokens: int, steps: list[int]
) -> None:
    run.ok(*prune_args(checkpoint, text, *TUNED, "--recovery.batch_tokens", batch_tokens, "--out", tmp_path))
    records = records_of(tmp_path)
    assert [record.steps for record in records] == steps
    assert [record.tokens for record in records] == [TOKENS, 2 * TOKENS]


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


# ------------------------------------------------------------------------------------------------- the weights


def test_a_16_bit_checkpoint_is_tuned_in_float32_and_saved_as_it_was(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bf16"
    save_checkpoint(folder)
    loaded(folder, dtype=torch.bfloat16).save_pretrained(folder)
    trained = Trained(monkeypatch)
    run.ok(*prune_args(folder, text, *TUNED, "--out", tmp_path / "out"))
    assert trained.dtypes == {torch.float32}
    before, after = tensors(folder), tensors(tmp_path / "out" / "model")
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert read(tmp_path / "out" / "model" / "config.json")["dtype"] == "bfloat16"
    untuned = tensors(cut_by_plan(run, folder, tmp_path / "out", tmp_path / "plan"))
    assert any(not torch.equal(after[name], untuned[name]) for name in after)
    run.ok(*prune_args(folder, text, *ITERATIVE, "--out", tmp_path / "iterative"))
    assert {tensor.dtype for tensor in tensors(tmp_path / "iterative" / "model").values()} == {torch.bfloat16}


def routers(weights: dict[str, Tensor]) -> set[str]:
    names = {name for name in weights if ".gate." in name}
    assert len(names) == len(LAYERS)
    return names


@pytest.mark.parametrize("options", [ROUTER_KD, (*TUNED, "--recovery.train", "routers")])
def test_only_routers_learn(
    run: Commands, made: Callable[..., Path], checkpoint: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    folder = made(*options)
    untuned, tuned = tensors(cut_by_plan(run, checkpoint, folder, tmp_path)), tensors(folder / "model")
    assert tuned.keys() == untuned.keys()
    changed = {name for name in tuned if not torch.equal(tuned[name], untuned[name])}
    assert changed == routers(tuned)


def divergence(whole: Path, other: Path, data: TextDataModule) -> float:
    """Mean KL from the whole model over all places of the text, with the whole vocabulary."""
    ids = data.text.tokens_NS.long()
    with torch.no_grad():
        p, q = (loaded(folder)(ids).logits.double().log_softmax(-1) for folder in (whole, other))
    real = torch.arange(ids.shape[1]) < data.text.lengths_N[:, None]
    return float((p.exp() * (p - q)).sum(-1)[real].mean())


def with_twins(source: Path, target: Path) -> Path:
    """A copy in which experts 4 to 7 are 0 to 3 once more, and all matter: routers can make up for lost ones."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for name, number in [(name, re.search(r"\.experts\.(\d)\.", name)) for name in weights]:
        if number is not None:
            twin = name.replace(number[0], f".experts.{int(number[1]) % 4}.")
            weights[name] = load_file(source / "model.safetensors")[twin] * (4 if ".w2." in name else 1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_router_kd_comes_nearer_to_the_whole_model(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    whole = with_twins(checkpoint, tmp_path / "whole")
    tuning = ("--finetune_tokens", 60 * SEQ_LEN, "--finetune_lr", 0.03, "--recovery.kind", "router-kd")
    run.ok(*prune_args(whole, text, "--rounds", 2, *tuning, "--method", "ecc", "--out", tmp_path / "kd"))
    untuned = cut_by_plan(run, whole, tmp_path / "kd", tmp_path / "plan")
    data = TextDataModule(str(text / "harbour.txt"), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=60)
    far, near = (divergence(whole, folder, data) for folder in (untuned, tmp_path / "kd" / "model"))
    assert math.isfinite(near) and near < 0.95 * far
    assert records_of(tmp_path / "kd")[-1].made_by["recovery"] == "router-kd"


def test_the_checkpoint_is_never_touched(run: Commands, text: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    before = contents(folder)
    run.ok(*prune_args(folder, text, *TUNED, "--out", tmp_path / "out"))
    assert contents(folder) == before
    refused = run(*prune_args(folder, text, *TUNED, "--out", tmp_path))
    assert refused.code == 2 and "would be replaced" in refused.err
    assert contents(folder) == before


# ------------------------------------------------------------------------------------------------- asking again


def test_asking_again_does_nothing_and_another_request_is_refused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = prune_args(checkpoint, text, *TUNED, "--out", tmp_path)
    run.ok(*args)
    before = contents(tmp_path)
    trained = Trained(monkeypatch)
    for same in ((), ("--scope", "layer", "--recovery.kind", "finetune")):
        assert "This very request was carried out here before" in run.ok(*args, *same).out
    for option, value, word in (
        ("--rounds", 1, "rounds"),
        ("--spacing", "cosine", "spacing"),
        ("--finetune_tokens", 128, "finetune_tokens"),
        ("--finetune_growth", 1.0, "finetune.growth"),
        ("--finetune_lr", 0.1, "finetune.lr"),
        ("--finetune_path", text / "island.txt", "finetune.content"),
        ("--recovery.train", "routers", "finetune.train"),
        ("--recovery.batch_tokens", 64, "finetune.batch_tokens"),
        ("--recovery.load_balance", 0, "finetune.load_balance"),
        ("--recovery.entropy", 0.01, "finetune.entropy"),
        ("--seed_everything", 1, "seed"),
        ("--data.batch_size", 4, "data.batch_size"),
        ("--data.val_samples", 2, "data.val_samples"),
        ("--data.val_path", text / "harbour.txt", "data.val_path"),
        ("--trainer.precision", "bf16-mixed", "precision"),
        ("--finetune_tokens", 0, "finetune_tokens"),
    ):
        refused = run(*args, option, value)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1, (option, refused.err)
        assert word in refused.err and "--overwrite" in refused.err, refused.err
    assert contents(tmp_path) == before and not trained.windows
    run.ok(*args, "--ratio", 0.25, "--overwrite", "true")
    assert len(trained.windows) == 6
    assert {len(ids) for ids in read(tmp_path / "plan.json")["keep"].values()} == {6}
    assert [record.ratio for record in records_of(tmp_path)] == [0.125, 0.25]


# ----------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "stats": (("--rounds", 2, "--stats", "s.safetensors"), ["--stats", "rounds"]),
    "scores": (("--rounds", 2, "--scores", "scores.json"), ["--scores", "rounds"]),
    "plan": ((*TUNED, "--plan", "plan.json"), ["--plan", "rounds"]),
    "merge": ((*TUNED, "--merge", "true"), ["--merge", "rounds"]),
    "skipping": (("--rounds", 2, "--skipping", "naee"), ["--skipping", "rounds"]),
    "tokens and stats": (("--finetune_tokens", 64, "--stats", "s.safetensors"), ["--stats"]),
    "no rounds": (("--rounds", 0), ["--rounds 0"]),
    "rounds below 0": (("--rounds", -2), ["--rounds -2"]),
    "more rounds than experts go": (("--rounds", 9), ["round 1 of 9", "drops nothing"]),
    "list out of order": (("--rounds", "[0.5, 0.25]"), ["--rounds", "ascending"]),
    "list with another end": (("--rounds", "[0.125, 0.25]"), ["--rounds", "0.5"]),
    "empty list": (("--rounds", "[]"), ["--rounds []", "0.5"]),
    "too much": (("--rounds", 2, "--ratio", 0.9), ["--ratio 0.9", "possible ratios"]),
    "ratio": (("--rounds", 2, "--ratio", 1.5), ["--ratio", "between 0 and 1"]),
    "floor": (("--rounds", 2, "--scope", "global", "--floor", 9), ["--floor 9"]),
    "method": (("--rounds", 2, "--method", "eann"), ["'eann'", "'ean'"]),
    "direction": (("--rounds", 2, "--method", "diep", "--direction", "min"), ["--direction min", "diep"]),
    "spacing": (("--rounds", 2, "--spacing", "log"), ["--spacing", "cosine"]),
    "rate without tokens": (("--rounds", 2, "--finetune_lr", 1e-4), ["--finetune_tokens"]),
    "rate without anything": (("--finetune_lr", 1e-4), ["--finetune_tokens"]),
    "text without tokens": (("--finetune_path", "text"), ["--finetune_tokens"]),
    "recovery without tokens": (("--recovery.kind", "router-kd"), ["--finetune_tokens"]),
    "recovery, rounds": (("--rounds", 2, "--recovery.z_loss", 0.1), ["--finetune_tokens"]),
    "what router-kd trains": ((*TUNED, "--recovery.kind", "router-kd", "--recovery.train", "routers"), ["router-kd"]),
    "entropy, router-kd": ((*ROUTER_KD, "--recovery.entropy", 0.1), ["--recovery.entropy 0.1", "router-kd"]),
    "kind": ((*TUNED, "--recovery.kind", "distill"), ["--recovery.kind", "router-kd"]),
    "tokens below 0": (("--rounds", 2, "--finetune_tokens", -5), ["--finetune_tokens -5"]),
    "tokens below 0, one round": (("--finetune_tokens", -5), ["--finetune_tokens -5"]),
    "growth": ((*TUNED, "--finetune_growth", 0), ["--finetune_growth 0"]),
    "growth without end": ((*TUNED, "--finetune_growth", 1e308), ["--finetune_growth 1e+308"]),
    "rate 0": ((*TUNED, "--finetune_lr", 0), ["--finetune_lr 0"]),
    "rate below 0": ((*TUNED, "--finetune_lr", -1e-4), ["--finetune_lr -0.0001"]),
    "batch": ((*TUNED, "--recovery.batch_tokens", 0), ["--recovery.batch_tokens 0"]),
    "load balance": ((*TUNED, "--recovery.load_balance", -1), ["--recovery.load_balance -1.0: 0 or more"]),
    "z loss": ((*TUNED, "--recovery.z_loss", -1), ["--recovery.z_loss -1.0: 0 or more"]),
    "bias step": ((*TUNED, "--recovery.bias_step", -0.1), ["--recovery.bias_step -0.1: 0 or more"]),
    "entropy": ((*TUNED, "--recovery.entropy", -1), ["--recovery.entropy -1.0: 0 or more"]),
    "what learns": ((*TUNED, "--recovery.train", "gates"), ["--recovery.train", "gates", "routers+norms"]),
    "less to calibrate": ((*TUNED, "--trainer.limit_predict_batches", 1), ["--trainer.limit_predict_batches"]),
    "less to measure": ((*ITERATIVE, "--trainer.limit_val_batches", 1), ["--trainer.limit_val_batches"]),
    "less to tune": ((*TUNED, "--trainer.limit_train_batches", 0.5), ["--trainer.limit_train_batches"]),
    "less than a batch in a step": ((*TUNED, "--recovery.batch_tokens", SEQ_LEN), ["--recovery.batch_tokens 16", "32"]),
    "tuning in 16 bits": ((*TUNED, "--trainer.precision", "bf16-true"), ["--trainer.precision bf16-true", "16 bits"]),
    "weights in 16 bits": ((*TUNED, "--model.dtype", "bfloat16"), ["--model.dtype bfloat16", "leave it out"]),
    "spaced list": (("--rounds", "[0.25, 0.5]", "--spacing", "cosine"), ["--spacing cosine", "list of --rounds"]),
    "growth without tokens": (
        ("--rounds", 2, "--finetune_growth", 1.5),
        ["--finetune_growth 1.5", "--finetune_tokens"],
    ),
    "growth without anything": (("--finetune_growth", 1.5), ["--finetune_growth 1.5", "--finetune_tokens"]),
    "text to tune on": ((*TUNED, "--finetune_path", "./nowhere.txt"), ["./nowhere.txt"]),
    "less than a batch": ((*TUNED, "--data.batch_size", 5000), ["--data.batch_size"]),
    "validation": ((*TUNED, "--data.val_path", "./nowhere.txt"), ["./nowhere.txt"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_any_work(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In one line, before a model is loaded, and no file is left."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr("lightning_moe.modules.causal_lm.load_model", load)
    args, words = REFUSED[name]
    said = run(*prune_args(checkpoint, text, "--out", tmp_path / "out", *args))
    assert said.code == 2
    assert len(said.err.splitlines()) == 1, said.err
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "out").exists()


def test_no_text_is_refused(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    said = run("prune", *model_args(checkpoint), *TUNED, "--out", tmp_path / "out")
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert "--data.path" in said.err and not (tmp_path / "out").exists()
