"""The main job through the commands: score, prune, evaluate, and what lies in the run folder after each."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_moe.cli.main import quiet
from lightning_moe.criteria import criteria
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, read
from tests.helpers.command_runs import (
    LAYERS,
    NUM_EXPERTS,
    NUM_LAYERS,
    QUIET,
    SAMPLES,
    SEQ_LEN,
    assert_equal_stats,
    assert_true_prune_figures,
    logits_of,
    model_args,
    text_args,
)


def windows(checkpoint: Path, text: Path, samples: int = SAMPLES) -> TextDataModule:
    return TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=samples)


def test_the_whole_job(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model, data = model_args(checkpoint), text_args(text)

    said = run.ok("score", *model, *data, "--out", out)
    assert str(out) in said.out
    files = {"stats.safetensors", "scores.json", "findings.json", "figures", "score.json", "summary.json"}
    assert {file.name for file in out.iterdir()} == files
    assert read(out / "findings.json").keys() == {"rank_correlation", "frequency", "similarity"}
    summary = read(out / "summary.json")
    assert summary["command"] == "score"
    assert summary == read(out / "score.json")
    assert summary["tokens"] == windows(checkpoint, text).text.num_tokens
    assert summary["experts"] == NUM_EXPERTS * NUM_LAYERS
    assert summary["world_size"] == 1
    scores = read(out / "scores.json")
    assert set(scores["methods"]) == {criterion.name for criterion in criteria() if not criterion.gradients}
    for method in scores["methods"].values():
        assert list(method["scores"]) == LAYERS
        assert all(len(values) == NUM_EXPERTS for values in method["scores"].values())

    run.ok("prune", *model, *data, "--method", "ean", "--ratio", 0.5, "--scope", "layer", "--out", out)
    assert_true_prune_figures(out, checkpoint)
    assert read(out / "prune.json")["kept_experts"] == dict.fromkeys(LAYERS, 4)
    assert read(out / "score.json") == summary  # the earlier command's stay

    second = tmp_path / "second"
    cut = ("--method", "reap", "--ratio", 0.25, "--scope", "global")
    run.ok("prune", *model, "--stats", out / "stats.safetensors", *cut, "--out", second)
    assert_true_prune_figures(second, checkpoint)
    assert read(second / "prune.json")["experts_after"] == 12
    assert (out / "stats.safetensors").is_file()

    third = tmp_path / "third"
    run.ok("prune", *model, "--plan", out / "plan.json", "--out", third)
    assert_true_prune_figures(third, checkpoint)
    assert read(third / "plan.json")["keep"] == read(out / "plan.json")["keep"]
    assert torch.equal(logits_of(third / "model"), logits_of(out / "model"))

    run.ok("evaluate", *model_args(out / "model"), *data, "--out", out)
    figures = read(out / "summary.json")
    assert figures["command"] == "evaluate"
    assert figures["parameters"] == read(out / "prune.json")["parameters_after"]
    for command in ("score", "prune", "evaluate"):
        result = read(out / f"{command}.json")
        assert result["command"] == command
        assert result["seconds"] > 0
        assert {"python", "torch", "transformers", "lightning-moe"} <= set(result["versions"])
        assert result["data_fingerprint"]
        assert result["request"]
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name or file.name.endswith(".old")]


def reference_losses(folder: Path, data: TextDataModule) -> dict[str, tuple[float, int]]:
    """Summed next-token loss and count of each domain, token by token, window by window, with stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    sums = dict.fromkeys(data.text.domains, (0.0, 0))
    for row in range(len(data.text)):
        ids = data.text.tokens_NS[row, : int(data.text.lengths_N[row])].long()
        with torch.no_grad():
            log_p = model(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        domain = data.text.domains[int(data.text.domain_N[row])]
        for place in range(len(ids) - 1):
            loss, count = sums[domain]
            sums[domain] = loss - float(log_p[place, ids[place + 1]]), count + 1
    return sums


@pytest.mark.parametrize("pruned", [False, True])
def test_perplexity_equals_a_slow_reference(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, pruned: bool
) -> None:
    folder = checkpoint
    if pruned:
        run.ok("prune", *model_args(checkpoint), "--stats", stats_file, "--scope", "global", "--out", tmp_path)
        folder = tmp_path / "model"
    run.ok("evaluate", *model_args(folder), *text_args(text, samples=200, batch_size=3), "--out", tmp_path)
    found = read(tmp_path / "evaluate.json")
    sums = reference_losses(folder, windows(checkpoint, text, samples=200))
    assert set(found["domains"]) == {"harbour", "island"}
    for domain, (loss, count) in sums.items():
        assert found["domains"][domain] == pytest.approx(math.exp(loss / count), rel=1e-5)
    loss, tokens = (sum(column) for column in zip(*sums.values(), strict=True))
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_seed_changes_random_only(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        args = ["score", "--seed_everything", seed, *model_args(checkpoint), *text_args(text)]
        run.ok(*args, "--out", tmp_path / str(seed))
    scores = [read(tmp_path / str(seed) / "scores.json")["methods"] for seed in (0, 1, 2)]
    stats = [load_stats(tmp_path / str(seed) / "stats.safetensors") for seed in (0, 1, 2)]
    for other in (1, 2):
        assert_equal_stats(stats[0], stats[other], exact=True)
        for name, method in scores[0].items():
            assert (method["scores"] == scores[other][name]["scores"]) == (name != "random")


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_the_statistics(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, batch_size: int
) -> None:
    run.ok("score", *model_args(checkpoint), *text_args(text, batch_size=batch_size), "--out", tmp_path)
    assert_equal_stats(load_stats(tmp_path / "stats.safetensors"), load_stats(stats_file), exact=False)


@pytest.mark.slow
def test_train_py_is_the_same_program(checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    args = [str(arg) for arg in ("score", *model_args(checkpoint), *text_args(text))]
    console = Path(sys.executable).with_name("lightning-moe")
    programs = {"script": [sys.executable, str(root / "train.py")], "console": [str(console)]}
    if not console.exists():
        pytest.skip("lightning-moe is not installed beside this Python")
    for name, program in programs.items():
        done = subprocess.run(
            [*program, *args, "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert_equal_stats(load_stats(tmp_path / name / "stats.safetensors"), load_stats(stats_file), exact=True)
    assert read(tmp_path / "script" / "scores.json") == read(tmp_path / "console" / "scores.json")
    bad = subprocess.run(
        [*programs["script"], *args, "--out", str(tmp_path / "bad"), "--model.path", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1
    # No log folder, no training checkpoints.
    assert {entry.name for entry in tmp_path.iterdir()} == {"script", "console"}


def test_less_text_by_a_trainer_option_is_refused(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for command, option in (("evaluate", "limit_val_batches"), ("score", "limit_predict_batches")):
        args = ("--model.path", checkpoint, "--data.path", text, "--out", tmp_path / "out")
        said = run(command, *QUIET, *args, f"--trainer.{option}", 1)
        assert said.code == 2 and option in said.err
    assert not (tmp_path / "out").exists()


def test_a_domain_without_a_window_has_no_figure(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("--model.path", checkpoint, "--data.path", text, "--data.samples", 1, "--out", out)
    run.ok("evaluate", *QUIET, *args)
    assert "NaN" not in (out / "summary.json").read_text()
    assert len(json.loads((out / "summary.json").read_text())["domains"]) == 1


def test_only_our_own_warnings_are_seen() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        quiet()
        for module in ("lightning.pytorch.trainer", "lightning_moe.callbacks.hf_checkpoint"):
            warnings.warn_explicit("something", UserWarning, "file.py", 1, module=module)
    assert len(seen) == 1
