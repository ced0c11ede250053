"""``plan``: what it prints and writes, for devices that are not here; and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_moe.cli.plan_table import show_plan
from lightning_moe.evaluation.device import GiB
from lightning_moe.evaluation.job_setup import JOBS
from tests.helpers.checkpoint import Commands, contents, read

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FAR_AWAY = ("--trainer.devices", 8, "--trainer.num_nodes", 2, "--trainer.strategy", "moe_fsdp")
MIXED = ("--trainer.precision", "bf16-mixed", "--data.batch_size", 1)


@pytest.fixture
def alone(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    return folder


def test_a_config_is_enough(run: Commands, alone: Path, tmp_path: Path) -> None:
    """A folder or the file, with the same figures; nothing is written without --out."""
    for number, path in enumerate((alone, alone / "config.json")):
        run.ok("plan", "--model.path", path, "--gpu", "H100", "--out", tmp_path / str(number))
    first, second = (read(tmp_path / str(number) / "estimate.json") for number in range(2))
    assert first["jobs"] == second["jobs"]
    before = contents(tmp_path)
    said = run.ok("plan", "--model.path", alone, "--gpu", "H100").out
    assert contents(tmp_path) == before
    for word in (*JOBS, "prune", "2:4 ", "16 forwards", "weights", "optim", "activ.", "GiB"):
        assert word in said


def test_devices_need_not_be_here(run: Commands, tmp_path: Path) -> None:
    """Mixtral 8x7B on two nodes of H100: 93.4e9 bytes of weights in 16 ranks, and no process is started."""
    config = CONFIGS / "mixtral_8x7b.json"
    run.ok("plan", "--model.path", config, *FAR_AWAY, *MIXED, "--gpu", "H100", "--out", tmp_path)
    found = read(tmp_path / "estimate.json")
    assert not torch.distributed.is_initialized()
    assert found["devices"] == "2 x 8 x H100" and found["strategy"] == "moe_fsdp"
    assert found["parameters"] == 46_702_792_704
    assert found["memory"] == 80 * GiB and found["usable"] == int(0.9 * 80 * GiB)
    jobs = found["jobs"]
    assert jobs["score"]["weights"] == pytest.approx(46.7e9 * 2 / 16, rel=1e-3)
    tuned = jobs["tune all"]
    halved = 46.7e9 - 0.5 * 45.1e9
    assert tuned["weights"] == tuned["gradients"] == pytest.approx(halved * 4 / 16, rel=1e-2)
    assert tuned["optimizer"] == 2 * tuned["weights"] and tuned["fits"] is True
    for row in jobs.values():
        parts = (row.get(name, 0) for name in ("weights", "gradients", "optimizer", "activations", "transient"))
        assert row["bytes"] == sum(parts) + row.get("statistics", 0)
        assert row["seconds"] > 0


def test_what_does_not_fit_is_mended(run: Commands, tmp_path: Path) -> None:
    config = CONFIGS / "mixtral_8x7b.json"
    asked = ("--trainer.devices", 8, "--trainer.strategy", "moe_fsdp", *MIXED, "--device_memory", 80)
    said = run.ok("plan", "--model.path", config, *asked, "--out", tmp_path).out
    row = read(tmp_path / "estimate.json")["jobs"]["tune all"]
    assert row["fits"] is False and row["bytes"] > 72 * GiB
    changes = [one["change"] for one in row["remedies"]]
    assert {"moe_fsdp's activation_checkpointing", "--recovery.train routers+norms", "16 devices (2 x 8)"} <= {*changes}
    assert all(one["total"] <= 72 * GiB for one in row["remedies"])
    assert "tune all does not fit" in said and changes[0] in said
    assert row["seconds"] is None  # nobody said how fast such a device is


def test_figures_follow_the_options(run: Commands, alone: Path, tmp_path: Path) -> None:
    def estimate(*options: object) -> dict[str, dict[str, float]]:
        run.ok("plan", "--model.path", alone, "--out", tmp_path / "out", "--overwrite", "true", *options)
        jobs: dict[str, dict[str, float]] = read(tmp_path / "out" / "estimate.json")["jobs"]
        return jobs

    base = ("--trainer.accelerator", "cpu", "--flops", 1e6, "--data.seq_len", 16)
    plain = estimate(*base)
    longer = estimate(*base, "--updates", 120, "--finetune_tokens", 2_000_000, "--data.samples", 512)
    for job in ("score", "gradients", "scan", "2:4-wanda", "search", "tune all"):
        assert longer[job]["seconds"] == pytest.approx(2 * plain[job]["seconds"], rel=0.1)
        assert longer[job]["bytes"] == plain[job]["bytes"]
    few = estimate(*base, "--model.gradient_memory", 1e-9)
    assert few["gradients"]["statistics"] == plain["gradients"]["statistics"] / 2
    assert few["gradients"]["seconds"] > 1.4 * plain["gradients"]["seconds"]
    assert "2 passes" in str(few["gradients"]["note"]) and "1 pass " in str(plain["gradients"]["note"])
    wider = estimate(*base, "--ratio", 0.25, "--data.batch_size", 16)
    assert wider["tune all"]["weights"] > plain["tune all"]["weights"]
    assert wider["search"]["activations"] > plain["search"]["activations"]
    less = estimate(*base, "--model.gradient_checkpointing", "true", "--model.dtype", "bfloat16")
    assert less["search"]["activations"] < plain["search"]["activations"]
    assert less["score"]["weights"] == plain["score"]["weights"] / 2 and "refused" in less["tune all"]


def test_moe_fsdp_with_its_arguments(run: Commands, alone: Path, tmp_path: Path) -> None:
    """The tiny model's stacks are too narrow to be packed really; a plan only counts."""
    strategy = ("--trainer.strategy", "lightning_moe.strategies.MoEFSDPStrategy")
    asked = (*strategy, "--trainer.strategy.replicas", 2, "--trainer.strategy.quantize", "nf4")
    run.ok("plan", "--model.path", alone, "--trainer.devices", 4, *asked, "--device_memory", 1, "--out", tmp_path)
    jobs = read(tmp_path / "estimate.json")["jobs"]
    assert jobs["score"]["fits"] is True
    for job in ("gradients", "tune all"):
        assert "leave quantize out" in jobs[job]["refused"]


def test_a_new_model_has_no_path(run: Commands, alone: Path) -> None:
    settings = json.dumps({"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64})
    assert "a new mixtral: " in run.ok("plan", "--model.config", settings, "--data.seq_len", 16, "--gpu", "T4").out


def test_an_estimate_is_not_replaced_by_chance(run: Commands, alone: Path, tmp_path: Path) -> None:
    asked = ("plan", "--model.path", alone, "--gpu", "H100", "--out", tmp_path)
    run.ok(*asked)
    run.ok(*asked)  # the same
    said = run(*asked, "--ratio", 0.25)
    assert said.code == 2 and "another `estimate` (other ratio)" in said.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model.path", "/no/where"), "--model.path /no/where: no such folder or file."),
        (("--model.path", "{here}"), "no config.json in it"),
        (("--model.path", "{file}"), "is not JSON"),
        (("--model.path", "{dense}"), "no MoE layers found"),
        ((), "no model: give --model.path"),
        (("--model.path", "{alone}", "--trainer.devices", "0"), "--trainer.devices 0: at least 1"),
        (("--model.path", "{alone}", "--trainer.accelerator", "gpu"), "no GPU is here to ask; give --gpu"),
        (("--model.path", "{alone}", "--gpu", "H1000"), "--gpu H1000: not known. Known: B200, "),
        (("--model.path", "{alone}", "--gpu", "H100", "--trainer.accelerator", "cpu"), "leave one out"),
        (("--model.path", "{alone}", "--device_memory", "0"), "--device_memory 0.0: above 0"),
        (("--model.path", "{alone}", "--ratio", "0.99"), "possible ratios"),
        (("--model.path", "{alone}", "--data.samples", "all"), "a plan reads no text"),
        (("--model.path", "{alone}", "--data.seq_len", "100000"), "takes at most"),
        (("--model.path", "{alone}", "--finetune_tokens", "-1"), "--finetune_tokens -1: above 0"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(run: Commands, alone: Path, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    (tmp_path / "file.json").write_text("no JSON")
    (tmp_path / "dense.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    places = {"alone": alone, "here": tmp_path, "file": tmp_path / "file.json", "dense": tmp_path / "dense.json"}
    before = contents(tmp_path)
    said = run("plan", *(arg.format(**places) for arg in args), "--out", tmp_path / "out")
    assert said.code == 2 and says in said.err
    assert said.err.startswith("lightning-moe: ") and said.err.count("\n") == 1
    assert contents(tmp_path) == before


def test_the_table_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut, whatever the terminal, nor wider than 100 characters; what is refused says why."""
    much = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "statistics", "transient"), 9999 * GiB)
    row = {"bytes": 59994 * GiB, **much, "host": 9999 * GiB, "fits": False, "at": "head", "seconds": 7190.0}
    rows = {"tune routers+norms": row | {"remedies": []}, "search": {"refused": "it cannot be."}}
    figures = {"model": "m", "parameters": 7_300_000, "active_parameters": 950, "devices": "1 x 8 x H100"}
    figures |= {"strategy": "ddp", "precision": "32-true", "batch": "1 x 2 tokens", "memory": 80 * GiB}
    show_plan(figures | {"usable": 72 * GiB, "jobs": rows, "assumed": {"loading_seconds": 30.0}}, "there")
    said = capsys.readouterr().out
    assert "7.3M parameters, 950 of them active" in said and "120 min" in said and "…" not in said
    lines = said.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("job"))) :]
    assert max(len(line.rstrip()) for line in table[:4]) <= 100 and "59,994" in table[2] and "refused" in table[3]
    assert "tune routers+norms does not fit: 59,994 GiB of 72.0 (head). Nothing that is known here helps." in said
    assert "search: refused: it cannot be." in said and "there/estimate.json" in said
