"""ExpertPruning on two processes: experts are masked, and all is as on one process, which cuts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_moe.moe.checkpoints import load_model
from tests.helpers.families import tiny_batch
from tests.helpers.forked_ranks import start_as_torchrun
from tests.helpers.pruning_ranks import work
from tests.helpers.shared_work import shared_folder

Runs = dict[str, dict[str, Any]]
STRATEGIES = {"one": (1, "auto"), "ddp": (2, "ddp_find_unused_parameters_true"), "fsdp": (2, "moe_fsdp")}
"""Of each job, with its number of processes."""
FITS = ("layer", "global", "biased", "random", "stopped", "resumed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fits, on one process and on two."""
    return shared_folder(tmp_path_factory, "pruning", carry_out)


def carry_out(folder: Path) -> None:
    for job, (devices, strategy) in STRATEGIES.items():
        start_as_torchrun(work, devices, job, folder, devices, strategy)


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return {job: json.loads((folder / f"{job}.json").read_text()) for job in STRATEGIES}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("job", ["ddp", "fsdp"])
def test_as_on_one_process(runs: Runs, job: str, fit: str) -> None:
    """Kept experts, scores, load, tokens and sizes of every round, perplexities and losses, what the monitor saw."""
    one, two = runs["one"][fit], runs[job][fit]
    assert len(one["records"]) == len(two["records"]) > 0
    for mine, yours in zip(two["records"], one["records"], strict=True):
        for name in ("round", "ratio", "method", "keep", "dropped", "tokens", "steps", "parameters"):
            if name in yours:
                assert mine[name] == yours[name], name
        assert mine["perplexity"].keys() == yours["perplexity"].keys()
        for moment, figures in yours["perplexity"].items():
            assert mine["perplexity"][moment]["all"] == pytest.approx(figures["all"], rel=3e-3)
            assert mine["perplexity"][moment]["tokens"] == figures["tokens"]
            loads = (side["load"][moment]["mean"] for side in (mine, yours))
            assert next(loads) == pytest.approx(next(loads), abs=0.02)
        for layer, scores in yours["scores"].items():
            values = scores.values() if isinstance(scores, dict) else scores
            own = mine["scores"][layer].values() if isinstance(scores, dict) else mine["scores"][layer]
            assert list(own) == pytest.approx(list(values), rel=5e-3)
    assert two["left"] == one["left"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["logits"] == pytest.approx(one["logits"], abs=5e-3)
    assert {name: len(counts) for name, counts in two["usage"].items()} == dict(
        zip(one["usage"], one["left"], strict=True)
    )


def test_both_strategies_search_alike(runs: Runs) -> None:
    """A search takes a batch of each rank per update, so only these two are the same search."""
    ddp, fsdp = (runs[job]["search"]["records"][0] for job in ("ddp", "fsdp"))
    assert ddp["keep"] == fsdp["keep"]
    assert len(ddp["keep"]["model.layers.0.mlp"]) == 4


def test_resumed_as_if_not_stopped(runs: Runs) -> None:
    for job in runs:
        whole, resumed = runs[job]["layer"], runs[job]["resumed"]
        assert [record["keep"] for record in resumed["records"]] == [record["keep"] for record in whole["records"]]
        assert resumed["losses"] == pytest.approx(whole["losses"][3:], abs=1e-6)
        assert resumed["logits"] == pytest.approx(whole["logits"], abs=1e-5)


@pytest.mark.parametrize("job", ["ddp", "fsdp"])
def test_exports_leave_them_out(runs: Runs, folder: Path, job: str) -> None:
    """What stock transformers loads computes what the masked model did."""
    assert runs[job]["layer"]["left"] == [4, 4]
    stock = AutoModelForCausalLM.from_pretrained(folder / f"{job}-layer")
    assert stock.config.num_local_experts == 4
    uneven = load_model(str(folder / f"{job}-global"))
    for name, model in (("layer", stock), ("global", uneven)):
        with torch.no_grad():
            logits = model.eval()(input_ids=tiny_batch(seed=7)).logits
        torch.testing.assert_close(logits, torch.load(folder / f"{job}-{name}.pt"), rtol=1e-4, atol=1e-5)
