"""What is shipped for models of 16 to 141 billion parameters: configs, scripts, surgery at real dimensions."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lightning_moe.cli.main import main
from lightning_moe.moe.block_cuts import find_cuts
from lightning_moe.moe.checkpoints import weight_files
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.pruned_size import pruned_size
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.scores import ExpertScores
from tests.helpers.real_models import PARAMETERS, real_config, real_model, sparse_checkpoint

ROOT = Path(__file__).parents[1]
SCALE = ROOT / "configs" / "scale"
JOBS = {"search": "search", "lottery": "prune", "evaluate": "evaluate"}
SCRIPTS = sorted((ROOT / "scripts").iterdir())
GB = 10**9


def global_plan(model: torch.nn.Module, ratio: float) -> dict[str, list[int]]:
    """By random scores over all layers: each keeps another number."""
    shapes = [layer.shape for layer in find_moe_layers(model)]
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.num_experts, generator=generator, dtype=torch.float64) for s in shapes}
    return make_plan(ExpertScores("", "", "random", shapes, scores), ratio, "global").keep


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_real_dimensions(name: str) -> None:
    """Parameters as published; every MoE layer is found; half of the experts leave, alike or not."""
    model = real_model(name)
    assert model.num_parameters() == PARAMETERS[name]
    layers = find_moe_layers(model)
    config = model.config
    dense = len(getattr(config, "mlp_only_layers", None) or ())
    assert len(layers) == config.num_hidden_layers - dense
    experts = layers[0].num_experts
    per_expert = sum(stack[0].numel() for stack in layers[0].expert_matrices)
    keep_experts(model, {layer.name: list(range(0, experts, 2)) for layer in layers})
    gone = len(layers) * experts // 2
    assert PARAMETERS[name] - model.num_parameters() == gone * (per_expert + config.hidden_size)
    assert not getattr(model.config, "is_heterogeneous", False)

    uneven = real_model(name)
    keep = global_plan(uneven, 0.5)
    keep_experts(uneven, keep)
    counts = [layer.num_experts for layer in find_moe_layers(uneven)]
    assert counts == [len(ids) for ids in keep.values()] and len(set(counts)) > 1
    assert PARAMETERS[name] - uneven.num_parameters() == gone * (per_expert + config.hidden_size)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_export_at_real_size(name: str, tmp_path: Path) -> None:
    """Where every tensor lies, and what stays of it, is known of a checkpoint of hundreds of gigabytes."""
    folder = sparse_checkpoint(name, tmp_path)
    files = weight_files(folder)
    assert sum(file.stat().st_size for file in files) > 2 * PARAMETERS[name]
    assert sum(file.stat().st_blocks for file in files) * 512 < 0.01 * GB
    model = real_model(name)
    layers = find_moe_layers(model)
    cuts = find_cuts(files, {one.parts.index: (one.num_experts, range(one.num_experts)) for one in layers})
    assert sorted(cuts) == [one.parts.index for one in layers]
    for keep in ({one.name: list(range(one.num_experts // 2)) for one in layers}, global_plan(model, 0.25)):
        cut = real_model(name)
        keep_experts(cut, keep)
        size = pruned_size(str(folder), keep)
        assert size == {"parameters": cut.num_parameters(), "bytes": 2 * cut.num_parameters()}


def models() -> list[str]:
    return sorted(file.stem for file in SCALE.glob("*.yaml") if file.stem not in JOBS)


def test_every_model_has_a_config() -> None:
    assert models() == sorted(PARAMETERS)


@pytest.mark.parametrize("job", sorted(JOBS))
@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_model_and_a_job_make_a_command(name: str, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--config", str(SCALE / f"{name}.yaml"), "--config", str(SCALE / f"{job}.yaml")]
    with pytest.raises(SystemExit) as left:
        main([JOBS[job], *files, "--out", "runs/x", "--print_config"])
    said = capsys.readouterr()
    assert left.value.code in (0, None), said.err
    found = re.search(r"strategy:\n\s+class_path: (\S+)", said.out)
    assert found is not None and found[1] == "lightning_moe.strategies.MoEFSDPStrategy"
    path = re.search(r"^model:\n  path: (\S+)", said.out, re.MULTILINE)
    assert path is not None and path[1] != "null"
    assert "path: c4/" in said.out


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_heads_say_the_memory(name: str) -> None:
    """The gigabytes in the comments are those of the model."""
    text = (SCALE / f"{name}.yaml").read_text().replace("\n#", "")
    stored = PARAMETERS[name] * 2 / GB
    tuned = PARAMETERS[name] * 16 / GB
    said = [float(value.replace(",", "")) for value in re.findall(r"([\d.,]+) GB", text)]
    said += [float(value) * 1000 for value in re.findall(r"([\d.]+) TB", text)]
    assert any(abs(value - stored) < 1 for value in said), (stored, said)
    assert any(abs(value - tuned) < 1 for value in said), (tuned, said)


def test_sparse_models_have_their_config(tmp_path: Path) -> None:
    assert real_config("deepseek_moe_16b").model_type == "qwen2_moe"
    config = json.loads((sparse_checkpoint("mixtral_8x7b", tmp_path) / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_scripts_are_whole(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert script.name in (ROOT / "docs" / "scale.md").read_text()


def on_the_reference_model(out: Path) -> Sequence[str]:
    reference = ROOT / "lightning_moe" / "reference"
    return (
        *("evaluate", "--model.path", str(reference / "model")),
        *("--data.path", str(reference / "text" / "validation"), "--data.seq_len", "64", "--data.samples", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.strategy", "moe_fsdp", "--out", str(out)),
    )


def beside_python() -> dict[str, str]:
    """The environment in which torchrun is found."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.scale
def test_two_nodes(tmp_path: Path) -> None:
    """Both on this machine, of one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = {"HEAD": f"127.0.0.1:{free.getsockname()[1]}", "NODES": "2"}
    script = [str(ROOT / "scripts" / "torchrun_nodes.sh"), "1", *on_the_reference_model(tmp_path)]
    nodes = [subprocess.Popen(script, stderr=subprocess.PIPE, text=True, env=beside_python() | settings) for _ in "12"]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads((tmp_path / "evaluate.json").read_text())["world_size"] == 2


def test_slurm_is_told_the_size_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3", "SLURM_JOB_ID": "7"}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "prune", "--out", "runs/a"]
    said = subprocess.run(script, capture_output=True, text=True, env=environment, check=True).stdout
    command = ".venv/bin/python train.py prune --out runs/a --trainer.devices 4 --trainer.num_nodes 3"
    assert said == f"--kill-on-bad-exit=1 {command}\n"


@pytest.mark.scale
def test_launchers(tmp_path: Path) -> None:
    """By torchrun's script and by Lightning itself, two processes each."""
    script = [str(ROOT / "scripts" / "torchrun_one_node.sh"), "2", *on_the_reference_model(tmp_path / "torchrun")]
    alone = [sys.executable, str(ROOT / "train.py"), *on_the_reference_model(tmp_path / "lightning")]
    for command in (script, [*alone, "--trainer.devices", "2"]):
        run = subprocess.run(command, capture_output=True, text=True, env=beside_python())
        assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / how / "evaluate.json").read_text()) for how in ("torchrun", "lightning"))
    assert one["world_size"] == two["world_size"] == 2
    assert one["perplexity"] == two["perplexity"]
