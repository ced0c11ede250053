"""``prune`` and ``compare`` by 2:4: the checkpoint is stock, the cells are that very model, two processes are one."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.cli.cut import Cut
from lightning_moe.cli.grid import make_grid
from lightning_moe.cli.input_pass import InputObservation
from lightning_moe.cli.main import main
from lightning_moe.cli.weight_pruning import prune_weights
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.semi_structured import Pattern, zero_in_model
from lightning_moe.moe.semi_structured_disk import zero_in_checkpoint
from lightning_moe.stats.input_norms import load_norms
from tests.helpers.checkpoint import Commands, contents, read
from tests.helpers.commands_on_ranks import commands_on_ranks
from tests.helpers.families import NUM_EXPERTS

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
METHODS = ("2:4-random", "2:4-magnitude", "2:4-wanda")


def text_args(text: Path) -> list[object]:
    """11 windows: over two ranks the last batch of a pass has blanks."""
    return ["--data.path", text, "--data.seq_len", 32, "--data.samples", 11]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder for each method; only Wanda is given text."""
    folder = tmp_path_factory.mktemp("pruned")
    for method in METHODS:
        args = ["prune", *QUIET, "--model.path", checkpoint, "--method", method, "--seed_everything", 4]
        args += text_args(text) if method == "2:4-wanda" else []
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PL_GLOBAL_SEED", raising=False)
            main([str(arg) for arg in (*args, "--out", folder / method)])
    return folder


def test_the_model_is_let_go_before_another_is_written(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a CPU would hold it beside the file that is written: nearly twice as much."""
    holding: list[bool] = []

    def watched(*args: Any) -> int:
        modules = [one for one in gc.get_objects() if type(one) is MoECausalLM]
        holding.append(any(module.model is not None for module in modules) or not modules)
        return zero_in_checkpoint(*args)

    monkeypatch.setattr("lightning_moe.cli.weight_pruning.zero_in_checkpoint", watched)
    args = ("prune", *QUIET, "--model.path", checkpoint, "--method", "2:4-wanda", *text_args(text))
    run.ok(*args, "--out", tmp_path)
    assert holding == [False]


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_is_stock_and_says_what_it_is(method: str, pruned: Path, checkpoint: Path) -> None:
    said = read(pruned / method / "prune.json")
    assert (said["method"], said["ratio"], said["pattern"]) == (method, 0.5, "2:4")
    assert said["dropped_fraction"] == 0 and said["experts_after"] == said["experts_before"] == 2 * NUM_EXPERTS
    assert said["parameters_after"] == said["parameters_before"] and said["bytes_after"] == said["bytes_before"]
    before = load_file(checkpoint / "model.safetensors")
    in_experts = sum(tensor.numel() for name, tensor in before.items() if ".experts." in name)
    assert said["nonzero_parameters"] == said["parameters_after"] - in_experts // 2
    assert said.get("seed") == (4 if method == "2:4-random" else None)
    assert said.get("experts_without_tokens") == (0 if method == "2:4-wanda" else None)
    assert (said["data_fingerprint"] is None) == (method != "2:4-wanda")
    assert not (pruned / method / "plan.json").exists()

    expected = AutoModelForCausalLM.from_pretrained(checkpoint)
    norms = load_norms(pruned / method / "input_norms.safetensors").norms if method == "2:4-wanda" else {}
    zero_in_model(expected, Pattern(method.removeprefix("2:4-"), said.get("seed", 0), norms))  # type: ignore[arg-type]
    found = AutoModelForCausalLM.from_pretrained(pruned / method / "model").state_dict()
    assert same(found, expected.state_dict())
    for name in ("config.json", "tokenizer.json"):
        assert (pruned / method / "model" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_cells_are_what_prune_and_evaluate_give(
    run: Commands, pruned: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """One cell for each method, two for what is random, whatever else is asked; each finds a whole model."""
    args = ["compare", *QUIET, "--model.path", checkpoint, *text_args(text), "--seed_everything", 4, "--seeds", 2]
    args += ["--methods", f"[{','.join(METHODS)}]", "--ratios", "[0.25,0.5]", "--out", tmp_path / "compare"]
    said = run.ok(*args)
    assert "it drops no expert and no byte" in said.out and "None" not in said.out
    rows: dict[tuple[Any, ...], dict[str, Any]] = {
        (row["method"], row["scope"], row["ratio"], row["seed"]): row
        for row in read(tmp_path / "compare" / "compare.json")["cells"]
    }
    mine = {key for key in rows if key[0] in METHODS}
    assert mine == {("2:4-random", None, 0.5, 4), ("2:4-random", None, 0.5, 5)} | {
        (method, None, 0.5, None) for method in METHODS[1:]
    }
    assert len(rows) == len(mine) + 1
    full = rows["full", None, 0.0, None]
    for method in METHODS:
        row = rows[method, None, 0.5, 4 if method == "2:4-random" else None]
        done = read(pruned / method / "prune.json")
        assert row["nonzero_parameters"] == done["nonzero_parameters"] < row["parameters"] == full["parameters"]
        assert row["bytes"] == full["bytes"] and row["experts"] == 2 * NUM_EXPERTS and row["plan"] == {}
        assert row["made_by"] == {name: done[name] for name in row["made_by"]}
        assert row["perplexity"] != full["perplexity"]
        if method == "2:4-random":
            continue
        evaluate = ["evaluate", *QUIET, "--model.path", pruned / method / "model", *text_args(text)]
        run.ok(*evaluate, "--out", tmp_path / method)
        measured = read(tmp_path / method / "evaluate.json")["perplexity"]
        assert row["perplexity"] == pytest.approx(measured, rel=1e-5)
    assert "nonzero_parameters" in (tmp_path / "compare" / "compare.csv").read_text().splitlines()[0].split(",")


def test_a_repeated_request_is_not_carried_out_again(run: Commands, pruned: Path, checkpoint: Path, text: Path) -> None:
    args = ["prune", *QUIET, "--model.path", checkpoint, "--method", "2:4-wanda", *text_args(text)]
    before = contents(pruned / "2:4-wanda")
    assert "carried out here before" in run.ok(*args, "--out", pruned / "2:4-wanda").out
    assert contents(pruned / "2:4-wanda") == before


def test_what_does_not_apply_is_printed_as_a_dash(run: Commands, pruned: Path, checkpoint: Path) -> None:
    """By magnitude no text is looked at."""
    args = ["prune", *QUIET, "--model.path", checkpoint, "--method", "2:4-magnitude", "--out", pruned / "2:4-magnitude"]
    said = run.ok(*args).out
    assert re.search(r"data_fingerprint\W+ - ", said) and "None" not in said


def test_norms_in_the_folder_are_taken_for_this_model_and_text_alone(
    run: Commands, pruned: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """Under --overwrite too, which replaces results: a pass is known by model, text and precision."""
    norms = load_norms(pruned / "2:4-wanda" / "input_norms.safetensors")
    zeros = {name: {stack: 0 * norm for stack, norm in one.items()} for name, one in norms.norms.items()}
    args = ["prune", *QUIET, "--model.path", checkpoint, *text_args(text), "--method", "2:4-wanda", "--out", tmp_path]
    for fingerprint, taken in ((norms.data_fingerprint, True), ("another", False)):
        replace(norms, norms=zeros, data_fingerprint=fingerprint).save(tmp_path / "input_norms.safetensors")
        run.ok(*args, "--overwrite")
        assert same(weights(tmp_path), weights(pruned / "2:4-wanda")) is not taken


def test_a_killed_pass_goes_on(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last save; and the norms are those of a pass that nobody killed."""
    args = ["prune", *QUIET, "--model.path", checkpoint, "--method", "2:4-wanda", "--data.path", text]
    args += ["--data.seq_len", 16, "--data.samples", 30, "--data.batch_size", 1]
    stock, seen = InputObservation._next_batch, []

    def killed(self: InputObservation, batch: Any) -> None:
        seen.append(batch)
        if len(seen) == 28:
            raise KeyboardInterrupt
        stock(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(InputObservation, "_next_batch", killed)
        stopped = run(*args, "--out", tmp_path / "out")
    assert stopped.code != 0 and not (tmp_path / "out" / "model").exists()
    assert "Going on from batch 25" in run.ok(*args, "--out", tmp_path / "out").out
    run.ok(*args, "--out", tmp_path / "whole")
    one, two = (load_norms(tmp_path / name / "input_norms.safetensors").norms for name in ("out", "whole"))
    assert all(same(dict(one[layer]), dict(two[layer])) for layer in two)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_refused_in_one_line(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    wanda = ["prune", *QUIET, "--model.path", checkpoint, "--method", "2:4-wanda"]
    for args, told in (
        (["--stats", tmp_path], "--stats"),
        (["--finetune_tokens", 64, *text_args(text)], "in one cut"),
    ):
        refused = run(*wanda, *args, "--out", tmp_path / "out")
        assert refused.code == 2 and len(refused.err.splitlines()) == 1 and told in refused.err, refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cut", "options", "told"),
    [
        (Cut("2:4-wanda", 0.25), {}, "--ratio 0.25: 2:4-wanda sets two of every four"),
        (Cut("2:4-wanda", scope="global"), {}, "--scope global: 2:4-wanda drops no expert"),
        (Cut("2:4-wanda", direction="max"), {}, "--direction max"),
        (Cut("2:4-wanda", floor=2), {}, "--floor 2"),
        (Cut("2:4-wanda"), {"merge": True}, "--merge true"),
        (Cut("2:4-wanda"), {"skipping": True}, "--skipping true"),
        (Cut("2:4-wanda"), {"skipping": "naee"}, "--skipping naee"),
        (Cut("2:4-wanda"), {"--stats": "a"}, "give --data.path instead"),
        (Cut("2:4-magnitude"), {"--stats": "a"}, "leave it out"),
        (Cut("2:4-random"), {"--scores": "a"}, "--scores a: 2:4-random drops no expert"),
        (Cut("2:4-random"), {"--plan": "a"}, "--plan a"),
        (Cut("2:4-wanda"), {}, "no text"),
    ],
)
def test_options_of_experts_are_refused(
    cut: Cut, options: dict[str, Any], told: str, checkpoint: Path, tmp_path: Path
) -> None:
    sources = {name: options.pop(name) for name in list(options) if name.startswith("--")}
    rest = {"skipping": None, "merge": False} | options
    trainer, model, data = Trainer(accelerator="cpu", logger=False), MoECausalLM(str(checkpoint)), TextDataModule()
    with pytest.raises(InputError, match=re.escape(told)):
        prune_weights(trainer, model, data, str(tmp_path / "out"), cut, {"--data.path": None} | sources, False, **rest)
    assert not (tmp_path / "out").exists()


def test_the_grid_names_each_cell_once() -> None:
    """The same cells whatever scopes are asked, so that a folder finds them again."""
    grids = [make_grid(["2:4-random", "2:4-wanda"], [0.5], scopes, 2, 0) for scopes in (["layer"], ["global", "layer"])]
    assert [cell.file_name for cell in grids[0]] == [cell.file_name for cell in grids[1]]
    assert [cell.settings for cell in grids[0]] == [cell.settings for cell in grids[1]]
    assert [cell.file_name for cell in grids[0]] == ["2-4-random-0.5-seed0", "2-4-random-0.5-seed1", "2-4-wanda-0.5"]
    for ratios, strategies, told in (([0.75], ["one-shot"], "name that too"), ([0.5], ["iterative"], "in one cut")):
        with pytest.raises(InputError, match=told):
            make_grid(["2:4-random"], ratios, ["layer"], 1, 0, strategies)


@pytest.mark.scale
def test_two_processes_find_what_one_finds(pruned: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """The very same bytes, and the same cells, with the model on each process and split over both."""
    common = ["--model.path", checkpoint, *text_args(text), "--data.batch_size", 2, "--seed_everything", 4]
    common += ["--trainer.enable_progress_bar", "false"]
    compare = ["compare", *common, "--methods", "[2:4-wanda,2:4-random]", "--ratios", "[0.5]", "--seeds", 1]
    jobs = []
    for strategy in ("moe_fsdp", "ddp"):
        how = ["--trainer.strategy", strategy, "--out"]
        jobs.append(["prune", *common, "--method", "2:4-wanda", *how, tmp_path / strategy])
        jobs.append([*compare, *how, tmp_path / f"compare-{strategy}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        commands_on_ranks(2, jobs)
        main([str(arg) for arg in (*compare, "--trainer.accelerator", "cpu", "--out", tmp_path / "compare-one")])
    wanted = [row["perplexity"] for row in read(tmp_path / "compare-one" / "compare.json")["cells"]]
    assert len(set(wanted)) == 3
    for strategy in ("moe_fsdp", "ddp"):
        assert same(weights(tmp_path / strategy), weights(pruned / "2:4-wanda"))
        rows = read(tmp_path / f"compare-{strategy}" / "compare.json")["cells"]
        assert [row["status"] for row in rows] == ["done"] * 3
        assert [row["perplexity"] for row in rows] == pytest.approx(wanted, rel=1e-5)
