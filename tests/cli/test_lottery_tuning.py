"""What tuning after a round sees, in which type, and which weights it may change."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moe.cli import lottery as command
from lightning_moe.data.datamodule import TextDataModule
from tests.cli.lottery_runs import (
    ITERATIVE,
    LAYERS,
    ROUTER_KD,
    SEQ_LEN,
    TOKENS,
    TUNED,
    Trained,
    cut_by_plan,
    loaded,
    prune_args,
    records_of,
    tensors,
)
from tests.helpers.checkpoint import Commands, contents, read, save_checkpoint


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of what rounds write look at pictures."""
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


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


@pytest.mark.parametrize(("batch_tokens", "steps"), [(2 * SEQ_LEN, [2, 4]), (4 * SEQ_LEN, [1, 2])])
def test_tokens_per_step(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, batch_tokens: int, steps: list[int]
) -> None:
    run.ok(*prune_args(checkpoint, text, *TUNED, "--recovery.batch_tokens", batch_tokens, "--out", tmp_path))
    records = records_of(tmp_path)
    assert [record.steps for record in records] == steps
    assert [record.tokens for record in records] == [TOKENS, 2 * TOKENS]


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
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    folder = tmp_path / "tuned"
    run.ok(*prune_args(checkpoint, text, *options, "--out", folder))
    untuned = tensors(cut_by_plan(run, checkpoint, folder, tmp_path / "plan"))
    tuned = tensors(folder / "model")
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
