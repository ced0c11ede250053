"""``prune`` in one cut: from text, statistics or a plan, by every criterion, it writes the full model masked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.criteria import Direction, criteria
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.pruning.scores import score_experts
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, contents, read
from tests.helpers.command_runs import LAYERS, NUM_EXPERTS, QUIET, logits_of, model_args, some_ids, text_args


def masked_logits(folder: Path, keep: dict[str, list[int]]) -> Tensor:
    """Of the full model, routed as if only the kept experts existed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with mask_plan(find_moe_layers(model), keep), torch.no_grad():
        logits: Tensor = model(some_ids()).logits
    return logits


@pytest.mark.parametrize(("method", "ratio", "scope"), [("ean", 0.5, "layer"), ("ecc", 0.25, "global")])
def test_prune_by_statistics_equals_prune_from_text(
    run: Commands,
    checkpoint: Path,
    text: Path,
    stats_file: Path,
    tmp_path: Path,
    method: str,
    ratio: float,
    scope: str,
) -> None:
    cut = ("--method", method, "--ratio", ratio, "--scope", scope)
    run.ok("prune", *model_args(checkpoint), *text_args(text), *cut, "--out", tmp_path / "text")
    run.ok("prune", *model_args(checkpoint), "--stats", stats_file, *cut, "--out", tmp_path / "stats")
    run.ok("prune", *model_args(checkpoint), "--stats", stats_file.parent, *cut, "--out", tmp_path / "folder")
    for other in ("stats", "folder"):
        assert read(tmp_path / "text" / "plan.json") == read(tmp_path / other / "plan.json")
        found, expected = (read(tmp_path / place / "scores.json") for place in (other, "text"))
        found["methods"] = {one: found["methods"][one] for one in expected["methods"]}  # it has gradients besides
        assert found == expected
        files = contents(tmp_path / "text" / "model")
        assert files.keys() == contents(tmp_path / other / "model").keys()
        for name in files:
            assert (tmp_path / "text" / "model" / name).read_bytes() == (tmp_path / other / "model" / name).read_bytes()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_model_is_the_masked_full_one(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path, scope: str
) -> None:
    cut = ("--method", "reap", "--ratio", 0.5, "--scope", scope)
    run.ok("prune", *model_args(checkpoint), "--stats", stats_file, *cut, "--out", tmp_path)
    expected = masked_logits(checkpoint, read(tmp_path / "plan.json")["keep"])
    torch.testing.assert_close(logits_of(tmp_path / "model"), expected, rtol=1e-5, atol=1e-6)


def test_a_plan_edited_by_hand_is_followed(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    keep = {LAYERS[0]: [1, 6], LAYERS[1]: [0, 2, 3, 5, 7]}
    (tmp_path / "mine.json").write_text(json.dumps({"keep": keep}))
    run.ok("prune", *model_args(checkpoint), "--plan", tmp_path / "mine.json", "--out", tmp_path / "run")
    assert read(tmp_path / "run" / "plan.json")["keep"] == keep
    torch.testing.assert_close(
        logits_of(tmp_path / "run" / "model"), masked_logits(checkpoint, keep), rtol=1e-5, atol=1e-6
    )


def test_a_layer_the_plan_does_not_name_stays_whole(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"keep": {LAYERS[1]: [0, 3]}}))
    run.ok("prune", *model_args(checkpoint), "--plan", tmp_path / "mine.json", "--out", tmp_path / "run")
    assert read(tmp_path / "run" / "prune.json")["kept_experts"] == {LAYERS[0]: NUM_EXPERTS, LAYERS[1]: 2}


def test_pruning_twice_prunes_the_pruned(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    cut = ("--method", "euf", "--ratio", 0.25)
    run.ok("prune", *model_args(checkpoint), *text_args(text), *cut, "--out", tmp_path / "once")
    again = [*model_args(tmp_path / "once" / "model"), *text_args(text)]
    run.ok("prune", *again, "--method", "euf", "--ratio", 0.5, "--out", tmp_path / "twice")
    assert read(tmp_path / "twice" / "prune.json")["kept_experts"] == dict.fromkeys(LAYERS, 3)


def test_the_model_pruned_is_never_overwritten(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path
) -> None:
    """``--out`` whose ``model/`` is the model itself would replace the user's only copy."""
    shutil.copytree(checkpoint, tmp_path / "model")
    before = contents(tmp_path / "model")
    run("prune", *model_args(tmp_path / "model"), "--stats", stats_file, "--out", tmp_path)
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize("method", sorted(criterion.name for criterion in criteria()))
def test_every_method_runs(run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path, method: str) -> None:
    """In both directions and scopes, and what it keeps are the highest of the scores it wrote."""
    default = next(criterion.direction for criterion in criteria() if criterion.name == method)
    other: Direction = "max" if default == "min" else "min"
    for scope, direction in (("layer", None), ("global", other)):
        out = tmp_path / scope
        cut = ["--method", method, "--scope", scope, "--ratio", 0.5, *(["--direction", direction] if direction else [])]
        run.ok("prune", *model_args(checkpoint), "--stats", stats_file, *cut, "--out", out)
        assert read(out / "prune.json")["direction"] == (direction or default)
        keep, written = read(out / "plan.json")["keep"], read(out / "scores.json")["methods"][method]
        assert written["direction"] == (direction or default)
        expected = score_experts(load_stats(stats_file), method, direction)
        assert {name: scores.tolist() for name, scores in expected.scores.items()} == written["scores"]
        assert sum(map(len, keep.values())) == NUM_EXPERTS
        assert all(len(ids) == 4 if scope == "layer" else len(ids) >= 2 for ids in keep.values())
        for name, scores in written["scores"].items():
            dropped = set(range(NUM_EXPERTS)) - set(keep[name])
            assert min(scores[expert] for expert in keep[name]) >= max(scores[expert] for expert in dropped)


def test_pair_criteria_say_what_global_compares(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path
) -> None:
    args = ["prune", *model_args(checkpoint), "--stats", stats_file, "--scope", "global"]
    assert "order of dropping" in run.ok(*args, "--method", "ecc", "--out", tmp_path / "ecc").err
    assert run.ok(*args, "--method", "ean", "--out", tmp_path / "ean").err == ""


def test_random_state_of_the_caller_is_not_what_decides(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        random.seed(number)
        torch.manual_seed(number)
        args = ["prune", *model_args(checkpoint), "--stats", stats_file, "--method", "random"]
        run.ok(*args, "--out", tmp_path / str(number))
    assert read(tmp_path / "1" / "plan.json") == read(tmp_path / "2" / "plan.json")
    assert load_file(tmp_path / "1" / "model" / "model.safetensors").keys()


def test_a_plan_leaves_no_other_choice(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"keep": {}}))
    said = run("prune", *QUIET, "--model.path", checkpoint, "--plan", plan, "--ratio", 0.25, "--out", tmp_path / "out")
    assert said.code == 2 and "--ratio" in said.err and not (tmp_path / "out").exists()
