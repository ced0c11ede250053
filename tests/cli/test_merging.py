"""``prune --merge true``: dropped experts averaged into kept ones, from text, statistics or a plan."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.cli.main import main
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.similarity import similarity
from lightning_moe.stats.store import load_stats
from tests.helpers import reference
from tests.helpers.checkpoint import Commands, contents, edited_copy, read
from tests.helpers.families import NUM_EXPERTS

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
CUT = ("--method", "ean", "--ratio", 0.25, "--scope", "global")


def text_args(text: Path) -> list[object]:
    return ["--data.path", text, "--data.seq_len", 32, "--data.samples", 20]


def prune_args(folder: Path) -> list[object]:
    return ["prune", *QUIET, "--model.path", folder]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def scored(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    main([str(arg) for arg in ("score", *QUIET, "--model.path", checkpoint, *text_args(text), "--out", folder)])
    return folder


def test_from_text_statistics_or_plan_it_is_the_same_model(
    run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path
) -> None:
    args = prune_args(checkpoint)
    run.ok(*args, *text_args(text), *CUT, "--merge", "true", "--out", tmp_path / "text")
    said = run.ok(*args, "--stats", scored, *CUT, "--merge", "true", "--out", tmp_path / "stats")
    run.ok(*args, "--plan", tmp_path / "text" / "plan.json", "--out", tmp_path / "plan")
    run.ok(*args, "--stats", scored, *CUT, "--out", tmp_path / "plain")

    plan: dict[str, Any] = read(tmp_path / "text" / "plan.json")
    stats = load_stats(scored / "stats.safetensors")
    merge = {}
    for layer in stats.layers:
        groups = reference.merge_groups(plan["keep"][layer.shape.name], similarity(layer).tolist())
        found = {
            int(kept): {int(i): w for i, w in group.items()} for kept, group in plan["merge"][layer.shape.name].items()
        }
        assert found.keys() == groups.keys()
        assert all(found[kept] == pytest.approx(groups[kept]) for kept in groups)
        merge[layer.shape.name] = found
    assert read(tmp_path / "stats" / "plan.json") == plan
    assert read(tmp_path / "plan" / "plan.json")["merge"] == plan["merge"]

    dropped = len(LAYERS) * NUM_EXPERTS - sum(len(ids) for ids in plan["keep"].values())
    for name in ("text", "stats", "plan"):
        assert_same_weights(tmp_path / name, tmp_path / "text")
        assert read(tmp_path / name / "prune.json")["merged"] == dropped == 4
    assert "merged" in said.out
    assert read(tmp_path / "text" / "prune.json")["request"]["merge"] is True
    assert read(tmp_path / "plan" / "prune.json")["request"]["merge"] == plan["merge"]

    expected = AutoModelForCausalLM.from_pretrained(checkpoint)
    keep_experts(expected, plan["keep"], merge)
    found_model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "text" / "model"))
    state = found_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())

    plain = read(tmp_path / "plain" / "plan.json")
    assert plain == {key: value for key, value in plan.items() if key != "merge"}
    assert not {"merge", "merged"} & {
        *read(tmp_path / "plain" / "prune.json"),
        *read(tmp_path / "plain" / "prune.json")["request"],
    }
    stock, merged = weights(tmp_path / "plain"), weights(tmp_path / "text")
    assert stock.keys() == merged.keys()
    changed = {name for name in stock if not torch.equal(stock[name], merged[name])}
    assert changed and all(".experts." in name for name in changed)


def test_merging_is_another_request(run: Commands, checkpoint: Path, scored: Path, tmp_path: Path) -> None:
    args = [*prune_args(checkpoint), "--stats", scored, *CUT, "--out", tmp_path / "out"]
    run.ok(*args)
    before = contents(tmp_path / "out")
    refused = run(*args, "--merge", "true")
    assert refused.code == 2 and "another `prune` (other merge)" in refused.err
    assert contents(tmp_path / "out") == before
    again = run.ok(*args, "--merge", "false")
    assert "carried out here before" in again.out
    run.ok(*args, "--merge", "true", "--overwrite", "true")
    assert read(tmp_path / "out" / "plan.json")["merge"]


def test_a_repeated_plan_is_not_applied_again(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    """The groups of the request are the same after their trip through JSON."""
    value = {"keep": {LAYERS[0]: [0, 3]}, "merge": {LAYERS[0]: {"3": {"3": 0.6, "4": 0.4}}}}
    (tmp_path / "mine.json").write_text(json.dumps(value))
    args = [*prune_args(checkpoint), "--plan", tmp_path / "mine.json", "--out", tmp_path / "out"]
    run.ok(*args)
    assert read(tmp_path / "out" / "prune.json")["merged"] == 1
    assert "carried out here before" in run.ok(*args).out
    value["merge"][LAYERS[0]]["3"] = {"3": 0.7, "4": 0.3}  # type: ignore[assignment]
    (tmp_path / "mine.json").write_text(json.dumps(value))
    assert "other merge" in run(*args).err


def quantised(checkpoint: Path, target: Path) -> Path:
    folder = edited_copy(checkpoint, target)
    tensors = load_file(folder / "model.safetensors")
    packed = {name: t.to(torch.float8_e4m3fn) if ".experts." in name else t for name, t in tensors.items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_refused_in_one_line(run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path) -> None:
    plan = tmp_path / "mine.json"
    plan.write_text(json.dumps({"keep": {LAYERS[0]: [0, 3]}}))
    faulty = tmp_path / "faulty.json"
    faulty.write_text(json.dumps({"keep": {LAYERS[0]: [0, 3]}, "merge": {LAYERS[0]: {"0": {"0": 0.5, "3": 0.5}}}}))
    old = tmp_path / "old.safetensors"
    tensors = {
        name: tensor for name, tensor in load_file(scored / "stats.safetensors").items() if not name.endswith("hsic_EE")
    }
    save_file(tensors, old, metadata={"version": "1"})
    packed = quantised(checkpoint, tmp_path / "packed")
    before = contents(tmp_path)
    for args, told in (
        ([*prune_args(checkpoint), "--plan", plan, "--merge", "true"], "--merge"),
        ([*prune_args(checkpoint), "--plan", faulty], "faulty.json"),
        ([*prune_args(checkpoint), "--stats", old, "--merge", "true"], "score again"),
        ([*prune_args(checkpoint), "--stats", scored, "--merge", "sometimes"], "--merge"),
        ([*prune_args(packed), *text_args(text), "--merge", "true"], "quantised"),
    ):
        refused = run(*args, "--out", tmp_path / "out")
        assert refused.code == 2 and len(refused.err.splitlines()) == 1 and told in refused.err, refused.err
    assert contents(tmp_path) == before
