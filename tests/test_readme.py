"""Every command in the README runs, on the bundled model, as written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from lightning_moe.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def bash_lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"`make (\w+)", README)
    assert bash_lines()[:2] == ["make demo", "make test"]
    assert set(named) <= set(targets)


@pytest.mark.slow
def test_the_tour_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_moe").symlink_to(ROOT / "lightning_moe")
    monkeypatch.chdir(tmp_path)
    commands = [line for line in bash_lines() if line.startswith("lightning-moe ")]
    assert len(commands) == 16
    for command in commands:
        # On less text: the last of equal options counts.
        less = ["--data.samples", "24", "--data.seq_len", "256"] if "--data.path" in command else []
        less += ["--data.val_samples", "12"] if "--data.val_path" in command else []
        own = {"search": ["--updates", "2"], "compare": ["--seeds", "1"], "scan": ["--data.samples", "2"]}
        less += own.get(command.split()[1], [])
        less += ["--model.dtype", "float32"]  # which any CPU has instructions for
        main([*shlex.split(command)[1:], *less])
    for python in re.findall(r"```python\n(from transformers.*?)```", README, flags=re.DOTALL):
        exec(compile(python, "README.md", "exec"), {})
    tour = json.loads((tmp_path / "runs/tour/summary.json").read_text())
    assert tour["command"] == "evaluate" and tour["perplexity"] < 200
    skipping = json.loads((tmp_path / "runs/tour-skipping/summary.json").read_text())
    assert 0 < skipping["skipped"]["all"] < 0.5
    plans = [json.loads((tmp_path / f"runs/{name}/plan.json").read_text())["keep"] for name in ("tour", "tour-plan")]
    assert plans[0] == plans[1]


def test_the_plan_in_the_readme_fits_the_bundled_model(tmp_path: Path) -> None:
    from lightning_moe.moe.checkpoints import layer_shapes
    from lightning_moe.pruning.plan import load_plan
    from lightning_moe.reference import MODEL

    (written,) = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "plan.json").write_text(written)
    plan = load_plan(tmp_path / "plan.json")
    plan.check(layer_shapes(str(MODEL)), "")
    assert [len(ids) for ids in plan.keep.values()] == [0, 4, 0] and plan.blocks == ["model.layers.4.mlp"]


def test_every_criterion_is_in_the_readme_with_its_direction() -> None:
    from lightning_moe.criteria import criteria

    rows = {
        name: row.split("|")[2].strip()
        for row in README.partition("## Methods")[2].partition("## Results")[0].splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([\w-]+)`", row.split("|")[1])
    }
    for criterion in criteria():
        assert criterion.name in rows
        assert rows[criterion.name] in (criterion.direction, "")


def test_the_reference_models_are_small_and_complete() -> None:
    from lightning_moe.moe.checkpoints import load_model
    from lightning_moe.reference import FINE_GRAINED, FOLDER, MODEL, TEXT

    for folder in (MODEL, FINE_GRAINED):
        assert sum(file.stat().st_size for file in folder.iterdir()) < 17e6
        assert load_model(str(folder)).dtype == torch.bfloat16
        assert (FOLDER / f"PROVENANCE-{folder.name}.md").is_file()
    domains = {file.name for file in (TEXT / "validation").iterdir()}
    assert len(domains) >= 5 and domains == {file.name for file in (TEXT / "calibration").iterdir()}
    assert any((FOLDER / "LICENSES").iterdir())
