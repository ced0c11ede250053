"""``prune --merge true`` and the methods that merge: from text, statistics or a plan, in memory and on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.cli.main import main
from lightning_moe.moe.merged_experts import Merge
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.similarity import similarity
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, contents, edited_copy, read
from tests.helpers.families import NUM_EXPERTS
from tests.helpers.reference import merging as reference

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
    assert plan["align"] is True and plan["router"] == "kept"
    keep_experts(expected, plan["keep"], Merge(merge, align=True))
    found_model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "text" / "model"))
    state = found_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())

    plain = read(tmp_path / "plain" / "plan.json")
    assert plain == {key: value for key, value in plan.items() if key not in ("merge", "align", "router")}
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
    unknown, wordy = tmp_path / "unknown.json", tmp_path / "wordy.json"
    merge = {"keep": {LAYERS[0]: [0, 3]}, "merge": {LAYERS[0]: {"0": {"0": 0.5, "1": 0.5}}}}
    unknown.write_text(json.dumps(merge | {"router": "sum"}))
    wordy.write_text(json.dumps(merge | {"align": "yes"}))
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
        ([*prune_args(checkpoint), "--plan", unknown], "kept, mean"),
        ([*prune_args(checkpoint), "--plan", wordy], "align"),
        ([*prune_args(checkpoint), "--stats", old, "--merge", "true"], "score again"),
        ([*prune_args(checkpoint), "--stats", scored, "--method", "m-smoe", "--merge", "true"], "merges as it is"),
        ([*prune_args(checkpoint), "--stats", scored, "--method", "s-smoe", "--direction", "max"], "no criterion"),
        ([*prune_args(checkpoint), "--scores", scored, "--method", "m-smoe"], "merging needs statistics"),
        ([*prune_args(checkpoint), *text_args(text), "--method", "m-smoe", "--rounds", 2], "in one cut"),
        ([*prune_args(checkpoint), "--stats", scored, "--merge", "sometimes"], "--merge"),
        ([*prune_args(packed), *text_args(text), "--merge", "true"], "quantised"),
    ):
        refused = run(*args, "--out", tmp_path / "out")
        assert refused.code == 2 and len(refused.err.splitlines()) == 1 and told in refused.err, refused.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", ["m-smoe", "s-smoe"])
def test_a_method_that_merges(
    method: str, run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path
) -> None:
    """The checkpoint is smaller and stock; its plan makes it again; ``compare`` measures that very model."""
    cut = ["--method", method, "--ratio", 0.5]
    run.ok(*prune_args(checkpoint), "--stats", scored, *cut, "--out", tmp_path / "stats")
    run.ok(*prune_args(checkpoint), "--plan", tmp_path / "stats" / "plan.json", "--out", tmp_path / "plan")
    assert_same_weights(tmp_path / "plan", tmp_path / "stats")
    plan, done = read(tmp_path / "stats" / "plan.json"), read(tmp_path / "stats" / "prune.json")
    assert (plan["align"], plan["router"]) == (True, "mean")
    assert done["merged"] == len(LAYERS) * NUM_EXPERTS / 2 == NUM_EXPERTS
    assert done["bytes_after"] < 0.7 * done["bytes_before"]
    assert "direction" not in read(tmp_path / "stats" / "scores.json")["methods"][method]

    state = AutoModelForCausalLM.from_pretrained(tmp_path / "stats" / "model").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)
    groups = {
        name: {int(kept): {int(i): w for i, w in group.items()} for kept, group in layer.items()}
        for name, layer in plan["merge"].items()
    }
    keep_experts(expected, plan["keep"], Merge(groups, align=True, router="mean"))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())

    args = ["compare", *QUIET, "--model.path", checkpoint, *text_args(text), "--ratios", "[0.5]"]
    args += ["--methods", f"[{method}]", "--out", tmp_path / "compare"]
    run.ok(*args, "--scopes", "[layer,global]")
    cells = {cell["scope"]: cell for cell in read(tmp_path / "compare" / "compare.json")["cells"]}
    assert cells["layer"]["plan"] == plan["keep"] and cells["layer"]["merge"] == plan["merge"]
    assert (cells["layer"]["align"], cells["layer"]["router"]) == (True, "mean")
    assert sum(map(len, cells["global"]["plan"].values())) == NUM_EXPERTS
    said = ["evaluate", *QUIET, "--model.path", tmp_path / "stats" / "model", *text_args(text)]
    run.ok(*said, "--out", tmp_path / "measured")
    measured = read(tmp_path / "measured" / "evaluate.json")["perplexity"]
    assert cells["layer"]["perplexity"] == pytest.approx(measured, rel=1e-5)

    for also, told in (
        (["--strategies", "[one-shot,iterative]"], "in one cut"),
        (["--trainer.strategy", "moe_fsdp"], "moe_fsdp splits"),
    ):
        refused = run(*args, *also)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1 and told in refused.err


def test_older_statistics_lack_what_m_smoe_needs(run: Commands, checkpoint: Path, scored: Path, tmp_path: Path) -> None:
    """Criteria and the other methods go on with them."""
    tensors = load_file(scored / "stats.safetensors")
    with safe_open(scored / "stats.safetensors", "pt") as file:
        metadata = file.metadata() | {"version": "2"}
    old = tmp_path / "old.safetensors"
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(("logit_products_EE", "cosine"))}
    save_file(kept, old, metadata=metadata)
    args = [*prune_args(checkpoint), "--stats", old, "--out", tmp_path / "out"]
    refused = run(*args, "--method", "m-smoe")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and "older version" in refused.err
    assert not (tmp_path / "out" / "plan.json").exists()
    run.ok(*args, "--method", "s-smoe")
    run.ok(*args, "--method", "ean", "--overwrite", "true")
