"""The commands on models split over two processes: what one process finds, they find."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_moe.cli.main import main
from lightning_moe.moe.checkpoints import load_model
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.stats.layer_stats import GRADIENTS, TENSORS
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, save_checkpoint
from tests.helpers.commands_on_ranks import commands_on_ranks
from tests.helpers.shared_work import shared_folder

LOTTERY = ("--method", "ean", "--ratio", 0.5, "--finetune_tokens", 128, "--finetune_lr", 0.01)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def jobs(checkpoint: Path, text: Path) -> dict[str, list[object]]:
    """11 windows over 2 ranks with 2 each: the last batch of a pass has blanks."""
    data = ["--model.path", checkpoint, "--data.path", text, "--data.seq_len", 16, "--data.samples", 11]
    data += ["--trainer.enable_progress_bar", "false"]
    full = ["--model.path", checkpoint, "--data.path", text, "--data.seq_len", 16, "--data.samples", 12]
    full += ["--trainer.enable_progress_bar", "false"]
    rounds = ["--methods", "[ean]", "--scopes", "[layer]", "--ratios", "[0.25,0.5]", "--seeds", 1]
    rounds += ["--strategies", "[one-shot,iterative,lottery]", "--finetune_tokens", 128, "--finetune_lr", 0.001]
    return {
        "score": ["score", *data, "--gradients", "true", "--model.gradient_memory", 1e-5] + ["--similarity_tokens", 24],
        "evaluate": ["evaluate", *data],
        "scan": ["scan", *data],
        "search": ["search", *full, "--updates", 4, "--optimizer", "sgd", "--lr", 1.0, "--score", "frequency"],
        "one-shot": ["prune", *data, "--method", "reap", "--ratio", 0.5, "--scope", "global"],
        "iterative": ["prune", *data, "--method", "reap", "--ratio", 0.5, "--scope", "global", "--rounds", 3],
        "lottery": ["prune", *full, *LOTTERY, "--rounds", 2],
        "router-kd": ["prune", *full, *LOTTERY, "--recovery.kind", "router-kd"],
        "bf16": ["prune", *full, *LOTTERY, "--recovery.train", "routers+norms", "--model.dtype", "bfloat16"]
        + ["--trainer.precision", "bf16-mixed"],
        "compare": ["compare", *full, *rounds],
    }


def fit_into(folder: Path, checkpoint: Path, text: Path) -> list[object]:
    fit: list[object] = ["fit", "--model.path", checkpoint, "--data.path", text, "--data.seq_len", 16]
    fit += ["--data.samples", 12, "--trainer.max_steps", 3, "--model.lr", 0.01, "--trainer.gradient_clip_val", 1.0]
    fit += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    fit += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    return [*fit, "--trainer.callbacks+=lightning_moe.callbacks.HFCheckpoint", "--trainer.callbacks.folder", folder]


SIZES = {"one": 4, "two": 2}
"""Windows of a batch on each rank: the same number over all ranks."""


@pytest.fixture(scope="module")
def folder(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, by one process and by two."""
    return shared_folder(tmp_path_factory, "split", partial(carry_out, checkpoint, text))


def carry_out(checkpoint: Path, text: Path, folder: Path) -> None:
    asked = jobs(checkpoint, text)
    for name, command in asked.items():
        own = ["--trainer.accelerator", "cpu", "--data.batch_size", SIZES["one"], "--out", folder / "one" / name]
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PL_GLOBAL_SEED", raising=False)
            main([str(word) for word in (*command, *own)])
    two = [
        [*command, "--data.batch_size", SIZES["two"], "--out", folder / "two" / name] for name, command in asked.items()
    ]
    for name in ("score", "scan"):
        by_name = two[list(asked).index(name)]
        two.append([*by_name[:-1], folder / "two" / f"{name}-ddp", "--trainer.strategy", "ddp"])
    fits = [[*fit_into(folder / ranks / "fit", checkpoint, text), "--data.batch_size", SIZES[ranks]] for ranks in SIZES]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        main([*map(str, fits[0]), "--trainer.accelerator", "cpu"])
    commands_on_ranks(2, [*two, fits[1]])


def both(folder: Path, job: str, file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return read(folder / "one" / job / file), read(folder / "two" / job / file)


@pytest.mark.parametrize("job", ["score", "score-ddp"])
def test_score(folder: Path, job: str) -> None:
    """Statistics and gradients to the rounding of float64 sums of float32 products; where ranks hold all, too."""
    stats = [load_stats(folder / place / "stats.safetensors") for place in ("one/score", f"two/{job}")]
    for left, right in zip(stats[0].layers, stats[1].layers, strict=True):
        for name in (*TENSORS, *GRADIENTS):
            one, two = getattr(left, name).double(), getattr(right, name).double()
            atol = {"gradient_outliers_E": 2.0, "gradient_log_std_E": 1e-3, "gradient_norm_E": 1e-3}.get(name, 1e-5)
            torch.testing.assert_close(two, one, rtol=1e-5, atol=atol, msg=name)
    one, two = read(folder / "one" / "score" / "score.json"), read(folder / "two" / job / "score.json")
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["request"] == two["request"]


@pytest.mark.parametrize("job", ["score", "score-ddp"])
def test_experts_of_different_layers_are_as_alike(folder: Path, job: str) -> None:
    one, two = (read(folder / place / "findings.json")["inter_layer"] for place in ("one/score", f"two/{job}"))
    assert one["tokens"] == two["tokens"] == 24
    for left, right in zip(one["pairs"], two["pairs"], strict=True):
        assert right == pytest.approx(left, abs=2e-4)


@pytest.mark.parametrize("job", ["scan", "scan-ddp"])
def test_scan(folder: Path, job: str) -> None:
    """Where the model is split, a rank runs with others what none of its own windows asks for."""
    one, two = (read(folder / place / "scan.json") for place in ("one/scan", f"two/{job}"))
    assert two["tokens"] == one["tokens"] and (one["world_size"], two["world_size"]) == (1, 2)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    for left, right in zip(one["layers"].values(), two["layers"].values(), strict=True):
        assert right["perplexity"] == pytest.approx(left["perplexity"], rel=1e-6)


def test_fit(folder: Path, checkpoint: Path) -> None:
    """The tuned models differ from the one they come from, and hardly from one another."""
    before = load_file(checkpoint / "model.safetensors")
    one, two = (load_file(folder / ranks / "fit" / "model.safetensors") for ranks in SIZES)
    assert one.keys() == two.keys() == before.keys()
    for name, tensor in one.items():
        moved = float((tensor - before[name]).norm())
        assert float((tensor - two[name]).norm()) <= 0.05 * moved + 1e-6, name
        assert moved > 0, name


def test_evaluate(folder: Path) -> None:
    one, two = both(folder, "evaluate", "evaluate.json")
    assert two["tokens"] == one["tokens"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert two["domains"] == pytest.approx(one["domains"], rel=1e-6)


def test_search(folder: Path) -> None:
    one, two = both(folder, "search", "importance.json")
    for name, found in one["layers"].items():
        assert two["layers"][name]["alpha"] == pytest.approx(found["alpha"], abs=1e-4)
        assert two["layers"][name]["beta"] == pytest.approx(found["beta"], abs=1e-4)
        assert max(map(abs, found["alpha"])) > 1e-2
    assert both(folder, "search", "plan.json")[0]["keep"] == both(folder, "search", "plan.json")[1]["keep"]


@pytest.mark.parametrize("job", ["one-shot", "iterative"])
def test_prune_without_tuning(folder: Path, job: str) -> None:
    """The same experts, and the very same bytes; layers of unlike sizes between the rounds."""
    one, two = both(folder, job, "plan.json")
    assert two["keep"] == one["keep"]
    assert len({len(ids) for ids in one["keep"].values()}) > 1
    files = [folder / ranks / job / "model" / "model.safetensors" for ranks in SIZES]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((folder / "two" / job).glob(".partial"))


@pytest.mark.parametrize("job", ["lottery", "router-kd", "bf16"])
def test_prune_with_tuning(folder: Path, job: str) -> None:
    """The same experts; figures that differ by the order of summation and the balance loss of each rank's own batch."""
    one, two = both(folder, job, "plan.json")
    assert two["keep"] == one["keep"]
    records = [
        [json.loads(line) for line in (folder / ranks / job / "rounds.jsonl").read_text().splitlines()]
        for ranks in SIZES
    ]
    for mine, yours in zip(records[1], records[0], strict=True):
        assert [mine[name] for name in ("tokens", "steps", "parameters")] == [
            yours[name] for name in ("tokens", "steps", "parameters")
        ]
        for moment, figures in yours["perplexity"].items():
            assert mine["perplexity"][moment]["all"] == pytest.approx(figures["all"], rel=0.02), moment
    assert records[0][0]["perplexity"]["after_finetune"] != records[0][0]["perplexity"]["after_prune"]
    stored = [load_file(folder / ranks / job / "model" / "model.safetensors") for ranks in SIZES]
    assert {name: (t.shape, t.dtype) for name, t in stored[0].items()} == {
        name: (t.shape, t.dtype) for name, t in stored[1].items()
    }
    stock = AutoModelForCausalLM.from_pretrained(folder / "two" / job / "model")
    assert [layer.num_experts for layer in find_moe_layers(stock)] == [4, 4]


def test_tuning_routers_left_all_else_alone(folder: Path, checkpoint: Path) -> None:
    before, after = load_model(str(checkpoint), "bfloat16"), load_model(str(folder / "two" / "bf16" / "model"))
    keep = read(folder / "two" / "bf16" / "plan.json")["keep"]
    for old, new in zip(find_moe_layers(before), find_moe_layers(after), strict=True):
        kept = old.experts.down_proj[keep[old.name]]
        assert torch.equal(kept.to(new.experts.down_proj.dtype), new.experts.down_proj)
        assert not torch.equal(old.router_weight[keep[old.name]].float(), new.router_weight.float())


def test_compare(folder: Path) -> None:
    """Cells of one cut, whose experts are masked where one process cuts them; of rounds, with tuning and without."""
    cells = [
        {(row["method"], row["strategy"], row["ratio"], row["seed"]): row for row in found["cells"]}
        for found in both(folder, "compare", "compare.json")
    ]
    assert cells[0].keys() == cells[1].keys()
    assert {strategy for _, strategy, *_ in cells[0]} >= {"one-shot", "iterative", "lottery"}
    for key, one in cells[0].items():
        two = cells[1][key]
        assert two["status"] == one["status"] == "done", two
        tuned = key[1] in ("lottery", "tuned")
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=0.005 if tuned else 1e-5), key
        assert two["load_cv"] == pytest.approx(one["load_cv"], abs=0.03 if tuned else 1e-6)
        for name in ("plan", "kept_experts", "parameters", "bytes"):
            assert two.get(name) == one.get(name), name


@pytest.mark.scale
def test_fewer_experts_than_ranks_and_replicas(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Two experts on four ranks; then four ranks as two replicas."""
    small = save_checkpoint(tmp_path / "small", num_local_experts=2, num_experts_per_tok=1)
    data = ["--data.path", text, "--data.seq_len", 16, "--data.samples", 8, "--trainer.enable_progress_bar", "false"]
    replicas = ["--trainer.strategy", "lightning_moe.strategies.MoEFSDPStrategy", "--trainer.strategy.replicas", "2"]
    for name, path, how in (("small", small, "moe_fsdp"), ("replicas", checkpoint, replicas)):
        prune = ["prune", "--model.path", path, *data, *LOTTERY, "--rounds", 1]
        one = tmp_path / f"{name}-1"
        run.ok(*prune, "--data.batch_size", 4, "--trainer.accelerator", "cpu", "--out", one)
        commands_on_ranks(4, [[*prune, "--data.batch_size", 1, "--out", tmp_path / f"{name}-4"]], how)
        plans = [read(tmp_path / f"{name}-{ranks}" / "plan.json")["keep"] for ranks in (1, 4)]
        assert plans[0] == plans[1]
        ends = [read(tmp_path / f"{name}-{ranks}" / "prune.json")["perplexity_after"] for ranks in (1, 4)]
        assert ends[1] == pytest.approx(ends[0], rel=0.03)


@pytest.mark.scale
def test_quantised(run: Commands, text: Path, tmp_path: Path) -> None:
    """Scored and searched in 4 bits; tuning is refused."""
    path = save_checkpoint(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    data = ["--model.path", path, "--data.path", text, "--data.seq_len", 16, "--data.samples", 8]
    data += ["--data.batch_size", 2, "--trainer.enable_progress_bar", "false"]
    packed = ["--trainer.strategy", "lightning_moe.strategies.MoEFSDPStrategy", "--trainer.strategy.quantize", "nf4"]
    jobs = [["score", *data, "--out", tmp_path / "4"], ["search", *data, "--updates", 3, "--out", tmp_path / "4"]]
    commands_on_ranks(2, jobs, packed)
    run.ok("score", *data, "--trainer.accelerator", "cpu", "--out", tmp_path / "16")
    four, whole = (load_stats(tmp_path / bits / "stats.safetensors") for bits in ("4", "16"))
    assert "nf4" in four.dtype and four.dtype != whole.dtype
    for one, other in zip(four.layers, whole.layers, strict=True):
        assert not torch.equal(one.norm_E, other.norm_E)
        torch.testing.assert_close(one.weight_norm_E, other.weight_norm_E, rtol=0.1, atol=0)
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", 2]
    refused = run("prune", *data, *LOTTERY, *packed, *cpu, "--out", tmp_path / "no")
    assert refused.code == 2 and "quantize is for what does not tune" in refused.err and refused.err.count("\n") == 1


@pytest.mark.parametrize("command", ["score", "search", "evaluate", "fit"])
def test_fsdp1_is_refused(run: Commands, checkpoint: Path, text: Path, tmp_path: Path, command: str) -> None:
    more = [] if command == "fit" else ["--out", tmp_path]
    refused = run(command, "--model.path", checkpoint, "--data.path", text, "--trainer.strategy", "fsdp", *more)
    assert refused.code == 2
    assert "moe_fsdp" in refused.err and refused.err.count("\n") == 1
