"""Statistics on disk: they come back as they were, and files that are none are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_moe.errors import InputError
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.layer_drop import layer_scores
from lightning_moe.stats.layer_stats import TENSORS
from lightning_moe.stats.similarity import router_similarity
from lightning_moe.stats.store import ModelStats, load_stats
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.observed_stats import observe
from tests.helpers.plans import non_uniform_plan


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    model = tiny_model("gpt_oss")
    keep_experts(model, non_uniform_plan(model))
    stats = ModelStats("tiny@0123", "data@4567", observe(model, [tiny_batch()]))
    stats.save(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def test_statistics_come_back_from_disk(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    stats = ModelStats("tiny@0123", "data@4567", observe(model, [tiny_batch()]))
    stats.save(tmp_path / "deep" / "stats.safetensors")
    loaded = load_stats(tmp_path / "deep" / "stats.safetensors")
    assert (loaded.model_id, loaded.data_fingerprint) == ("tiny@0123", "data@4567")
    for found, expected in zip(loaded.layers, stats.layers, strict=True):
        assert found.shape == expected.shape
        for name in TENSORS:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert getattr(found, name).dtype == getattr(expected, name).dtype, name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["stats.safetensors"]


def rewrite(file: Path, **changes: str | None) -> None:
    """Change entries of a safetensors file's metadata; None takes one out."""
    with safe_open(file, "pt") as stored:
        metadata = dict(stored.metadata())
    for name, value in changes.items():
        metadata.pop(name)
        if value is not None:
            metadata[name] = value
    save_file(load_file(file), file, metadata=metadata)


def refusal_of(file: Path) -> str:
    with pytest.raises(InputError) as refusal:
        load_stats(file)
    message = str(refusal.value)
    assert "\n" not in message and str(file) in message
    return message


def test_missing_statistics_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal_of(tmp_path / "stats.safetensors")


@pytest.mark.parametrize("version", ["2", "3"])
def test_an_older_version_is_read_and_lacks_what_it_did_not_have(version: str, stored: Path) -> None:
    whole = load_stats(stored)
    lacking = ("cosine", "logit_products_EE") if version == "2" else ("cosine",)
    tensors = {name: tensor for name, tensor in load_file(stored).items() if not name.endswith(lacking)}
    with safe_open(stored, "pt") as file:
        metadata = dict(file.metadata())
    save_file(tensors, stored, metadata=metadata | {"version": version})
    older = load_stats(stored)
    for layer, expected in zip(older.layers, whole.layers, strict=True):
        assert all(getattr(layer, name).shape == getattr(expected, name).shape for name in TENSORS)
        assert all(torch.equal(getattr(layer, name), getattr(expected, name)) for name in ("count_E", "hsic_EE"))
        if version == "2":
            with pytest.raises(InputError, match="older version"):
                router_similarity(layer)
    for drops in ("layers", "blocks"):
        with pytest.raises(InputError, match="older version"):
            layer_scores(older, "layer-drop", drops)
    rewrite(stored, version="4")
    refusal_of(stored)


def test_a_newer_version_is_refused_with_its_number(stored: Path) -> None:
    rewrite(stored, version="7")
    assert "version 7" in refusal_of(stored)


@pytest.mark.parametrize("name", ["version", "model_id", "data_fingerprint", "layers"])
def test_statistics_without_their_origin_are_refused(name: str, stored: Path) -> None:
    rewrite(stored, **{name: None})
    refusal_of(stored)


@pytest.mark.parametrize("layers", ["", "[]x", '[{"name": "a"}]', '[{"colour": 1}]', "3"])
def test_statistics_with_other_layers_are_refused(layers: str, stored: Path) -> None:
    rewrite(stored, layers=layers)
    refusal_of(stored)


def test_statistics_without_a_tensor_are_refused(stored: Path) -> None:
    with safe_open(stored, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(stored)
    tensors.pop(next(name for name in tensors if name.endswith("count_E")))
    save_file(tensors, stored, metadata=metadata)
    refusal_of(stored)


def test_foreign_files_are_refused(stored: Path, tmp_path: Path) -> None:
    whole = stored.read_bytes()
    foreign = {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "json": json.dumps({}).encode()}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        refusal_of(tmp_path / name)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "version" in refusal_of(tmp_path / "model.safetensors")
