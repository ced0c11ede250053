"""Adaptive skipping through the commands: tables from statistics, on and off, measured and stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_moe.cli.main import main
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skip_tables import set_skipping, skipped, stored_entry
from lightning_moe.stats.similarity import skip_tables
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, read
from tests.helpers.families import tiny_batch

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


def text_args(text: Path, batch_size: int = 4) -> list[object]:
    return ["--data.path", text, "--data.seq_len", 32, "--data.samples", 20, "--data.batch_size", batch_size]


def model_args(folder: Path) -> list[object]:
    return [*QUIET, "--model.path", folder]


def in_memory(folder: Path) -> Any:
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder)).eval()


@pytest.fixture(scope="module")
def scored(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    main([str(arg) for arg in ("score", *model_args(checkpoint), *text_args(text), "--out", folder)])
    return folder


def test_a_full_model_skips_by_its_statistics(
    run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path
) -> None:
    args = ["evaluate", *model_args(checkpoint), *text_args(text)]
    run.ok(*args, "--out", tmp_path / "full")
    full = read(tmp_path / "full" / "evaluate.json")
    assert full["skipped"] == {"all": 0.0} and "skipping" not in full["request"]
    found = {}
    for rule in ("true", "naee"):
        said = run.ok(*args, "--skipping", rule, "--stats", scored, "--out", tmp_path / rule)
        found[rule] = read(tmp_path / rule / "evaluate.json")
        assert "skipped: all" in said.out
        assert list(found[rule]["skipped"]) == [*LAYERS, "all"]
        # Half of the tokens lie under the median: about a quarter of two experts per token.
        assert all(0.1 < fraction < 0.4 for fraction in found[rule]["skipped"].values())
        assert found[rule]["perplexity"] != full["perplexity"]
        assert found[rule]["request"]["skipping"] == (True if rule == "true" else "naee")
    assert found["true"]["perplexity"] != found["naee"]["perplexity"]
    run.ok(*args, "--skipping", "false", "--out", tmp_path / "off")
    assert read(tmp_path / "off" / "evaluate.json")["perplexity"] == full["perplexity"]
    refused = run(*args, "--skipping", "naee", "--stats", scored, "--out", tmp_path / "true")
    assert refused.code == 2 and "another `evaluate` (other skipping)" in refused.err


@pytest.mark.parametrize("batch_size", [1, 7])
def test_padding_and_batches_do_not_change_the_fraction(
    run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path, batch_size: int
) -> None:
    args = ["evaluate", *model_args(checkpoint), "--skipping", "naee", "--stats", scored]
    fractions = []
    for size in (4, batch_size):
        run.ok(*args, *text_args(text, size), "--out", tmp_path / str(size))
        fractions.append(read(tmp_path / str(size) / "evaluate.json")["skipped"])
    assert fractions[0] == pytest.approx(fractions[1], abs=2e-3)  # rounding may carry a token over the threshold


def test_a_pruned_model_holds_its_tables(
    run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path
) -> None:
    """Inactive unless asked; the same tables, cut, whether from text, from statistics, or with a plan."""
    cut = ["--method", "ean", "--ratio", 0.25, "--scope", "global"]
    sources: dict[str, list[object]] = {"text": text_args(text), "stats": ["--stats", scored]}
    for name, source in sources.items():
        run.ok("prune", *model_args(checkpoint), *source, *cut, "--out", tmp_path / name)
    on = ["--skipping", "true"]
    run.ok("prune", *model_args(checkpoint), *sources["stats"], *cut, *on, "--out", tmp_path / "on")
    models = {name: in_memory(tmp_path / name / "model") for name in (*sources, "on")}
    entries = {name: stored_entry(model.config) for name, model in models.items()}
    assert entries["text"] == entries["stats"] == {**entries["on"], "active": False}
    assert entries["on"]["active"] and entries["on"]["rule"] == "diep"
    keep = read(tmp_path / "on" / "plan.json")["keep"]
    tables = skip_tables(load_stats(scored / "stats.safetensors").layers)
    for layer in find_moe_layers(models["on"]):
        ids = keep[layer.name]
        expected = tables[layer.parts.index].gamma2_EE[ids][:, ids]
        found = torch.tensor(entries["on"]["layers"][str(layer.parts.index)]["gamma2"], dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        logits = {name: model(tiny_batch()).logits for name, model in models.items()}
    assert torch.equal(logits["text"], logits["stats"]) and not torch.equal(logits["on"], logits["stats"])
    assert all(one > 0 for one, _ in skipped(models["on"]).values())

    run.ok("evaluate", *model_args(tmp_path / "on" / "model"), *text_args(text), "--out", tmp_path / "a")
    run.ok("evaluate", *model_args(tmp_path / "stats" / "model"), *text_args(text), *on, "--out", tmp_path / "b")
    one, other = (read(tmp_path / name / "evaluate.json") for name in "ab")
    assert one["skipped"] == other["skipped"] and one["perplexity"] == other["perplexity"]

    run.ok("prune", *model_args(checkpoint), "--plan", tmp_path / "on" / "plan.json", "--out", tmp_path / "plain")
    assert stored_entry(in_memory(tmp_path / "plain" / "model").config) is None
    with_tables = AutoModelForCausalLM.from_pretrained(checkpoint)
    set_skipping(with_tables, tables, active=False)
    with_tables.config.save_pretrained(tmp_path / "with-tables")
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (tmp_path / "with-tables" / file.name).write_bytes(file.read_bytes())
    plan = tmp_path / "mine.json"
    plan.write_text((tmp_path / "on" / "plan.json").read_text().replace('"model_id"', '"was_for"'))
    run.ok("prune", *model_args(tmp_path / "with-tables"), "--plan", plan, *on, "--out", tmp_path / "c")
    assert stored_entry(in_memory(tmp_path / "c" / "model").config) == entries["on"]


def test_no_tables_no_skipping(run: Commands, checkpoint: Path, text: Path, scored: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"keep": {"model.layers.0.mlp": [0, 3]}}')
    evaluate = ["evaluate", *model_args(checkpoint), *text_args(text), "--out", tmp_path / "out"]
    prune = ["prune", *model_args(checkpoint), "--plan", tmp_path / "mine.json", "--out", tmp_path / "out"]
    for args, told in (
        ([*evaluate, "--skipping", "true"], "score"),
        ([*evaluate, "--stats", scored], "--skipping"),
        ([*evaluate, "--skipping", "sometimes"], "--skipping"),
        ([*prune, "--skipping", "naee"], "score"),
    ):
        refused = run(*args)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1 and told in refused.err, refused.err
    assert not (tmp_path / "out").exists()
