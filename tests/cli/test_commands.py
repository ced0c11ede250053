"""The main job through the commands: score, prune, evaluate, and what lies in the run folder after each."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.criteria import Direction, criteria
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.moe import compaction
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.pruning.scores import score_experts
from lightning_moe.stats.layer_stats import TENSORS
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.store import ModelStats, load_stats
from tests.helpers.checkpoint import Commands, contents, read

NUM_EXPERTS, NUM_LAYERS = 8, 2
LAYERS = [f"model.layers.{index}.mlp" for index in range(NUM_LAYERS)]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN, SAMPLES = 32, 20
SUMS_OF_FLOATS = {"probability_E", "soft_count_E", "norm_E", "norm_sq_E", "gated_norm_E"} | {
    "output_sum_EH",
    "output_sq_EH",
    "unit_sum_EH",
    "hsic_EE",
    "logit_products_EE",
    "own_hsic_EE",
    "layer_cosine",
    "block_cosine",
}


def model_args(checkpoint: Path) -> list[object]:
    return [*QUIET, "--model.path", checkpoint]


def text_args(text: Path, samples: int = SAMPLES, batch_size: int = 4) -> list[object]:
    sampling = ["--data.seq_len", SEQ_LEN, "--data.samples", samples, "--data.batch_size", batch_size]
    return ["--data.path", text, *sampling]


def windows(checkpoint: Path, text: Path, samples: int = SAMPLES) -> TextDataModule:
    return TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=SEQ_LEN, samples=samples)


def some_ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(folder)(some_ids()).logits
    return logits


def masked_logits(folder: Path, keep: dict[str, list[int]]) -> Tensor:
    """Of the full model, routed as if only the kept experts existed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with mask_plan(find_moe_layers(model), keep), torch.no_grad():
        logits: Tensor = model(some_ids()).logits
    return logits


def assert_equal_stats(one: ModelStats, other: ModelStats, *, exact: bool) -> None:
    assert (one.model_id, one.data_fingerprint) == (other.model_id, other.data_fingerprint)
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.shape == right.shape
        for name in TENSORS:
            a, b = getattr(left, name), getattr(right, name)
            if name == "ratio_R" and not exact:  # rounding may carry a token over the edge of its bin, no further
                below, other_below = a.cumsum(0), b.cumsum(0)
                assert below[-1] == other_below[-1]
                assert bool((below[1:] >= other_below[:-1]).all() and (below[:-1] <= other_below[1:]).all())
            elif exact or name not in SUMS_OF_FLOATS:
                assert torch.equal(a, b), f"{left.shape.name}: {name}"
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=f"{left.shape.name}: {name}")


@pytest.fixture(scope="module")
def stats_file(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics that many tests below cut from."""
    from lightning_moe.cli.main import main

    folder = tmp_path_factory.mktemp("stats")
    score = ("score", *model_args(checkpoint), *text_args(text), "--gradients", "true", "--out", folder)
    main([str(arg) for arg in score])
    return folder / "stats.safetensors"


class Passes:
    """Counts the batches that went through an observation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        stock = ExpertObservation._next_batch

        def counting(observation: ExpertObservation, batch: Any) -> None:
            self.batches += 1
            stock(observation, batch)

        monkeypatch.setattr(ExpertObservation, "_next_batch", counting)


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


def assert_true_prune_figures(out: Path, checkpoint: Path) -> None:
    """Kept counts, parameters and bytes are what a look at the files says."""
    figures, keep = read(out / "summary.json"), read(out / "plan.json")["keep"]
    assert figures == read(out / "prune.json")
    pruned = AutoModelForCausalLM.from_pretrained(out / "model")
    counts = {layer.name: layer.num_experts for layer in find_moe_layers(pruned)}
    assert figures["kept_experts"] == counts == {name: len(ids) for name, ids in keep.items()}
    assert figures["experts_before"] == NUM_EXPERTS * NUM_LAYERS
    assert figures["experts_after"] == sum(counts.values())
    assert figures["uniform"] == (len(set(counts.values())) == 1)
    full = AutoModelForCausalLM.from_pretrained(checkpoint)
    for model, folder, when in ((full, checkpoint, "before"), (pruned, out / "model", "after")):
        assert figures[f"parameters_{when}"] == sum(p.numel() for p in model.parameters())
        assert figures[f"bytes_{when}"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert all((out / "model" / name).is_file() for name in ("tokenizer.json", "generation_config.json"))


def test_score_and_prune_in_one_folder_observe_once(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    once = passes.batches
    assert once == math.ceil(SAMPLES / 4)
    run.ok("prune", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    assert passes.batches == once


def test_statistics_of_other_text_are_not_reused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    once = passes.batches
    run.ok("prune", *model_args(checkpoint), *text_args(text / "island.txt"), "--out", tmp_path)
    assert passes.batches > once
    assert read(tmp_path / "prune.json")["data_fingerprint"] != read(tmp_path / "score.json")["data_fingerprint"]


def test_score_repeats_when_a_prune_has_replaced_its_statistics(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """A finished score whose statistics lie there no more is not finished."""
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    run.ok("prune", *model_args(checkpoint), *text_args(text / "island.txt"), "--out", tmp_path)
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    stored = load_stats(tmp_path / "stats.safetensors")
    assert stored.data_fingerprint == read(tmp_path / "score.json")["data_fingerprint"]


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


REQUESTS: dict[str, list[object]] = {
    "score": [],
    "prune": ["--method", "seer", "--ratio", 0.5],
    "evaluate": [],
}
OTHERS: dict[str, list[object]] = {
    "score": ["--data.samples", 7],
    "prune": ["--ratio", 0.25],
    "evaluate": ["--data.seq_len", 16],
}


@pytest.mark.parametrize("command", REQUESTS)
def test_same_request_does_nothing_another_is_refused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, command: str
) -> None:
    args = [command, *model_args(checkpoint), *text_args(text), *REQUESTS[command], "--out", tmp_path]
    run.ok(*args)
    before = contents(tmp_path)
    run.ok(*args)
    assert contents(tmp_path) == before
    run.ok(*args, "--data.batch_size", 7)  # changes no result, so it is no other request
    assert contents(tmp_path) == before
    refused = run(*args, *OTHERS[command])
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert str(tmp_path) in refused.err
    assert "--overwrite" in refused.err
    assert contents(tmp_path) == before
    first = read(tmp_path / f"{command}.json")
    run.ok(*args, *OTHERS[command], "--overwrite", "true")
    assert read(tmp_path / f"{command}.json")["request"] != first["request"]
    assert read(tmp_path / "summary.json") == read(tmp_path / f"{command}.json")
    if command == "prune":
        assert read(tmp_path / "prune.json")["kept_experts"] == dict.fromkeys(LAYERS, 6)
        assert_true_prune_figures(tmp_path, checkpoint)


def test_text_that_changed_is_another_request(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes((text / "harbour.txt").read_bytes())
    args = ["score", *model_args(checkpoint), *text_args(file), "--out", tmp_path / "run"]
    run.ok(*args)
    file.write_text(file.read_text() + " More.")
    assert run(*args).code == 2


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


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_the_statistics(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, batch_size: int
) -> None:
    run.ok("score", *model_args(checkpoint), *text_args(text, batch_size=batch_size), "--out", tmp_path)
    assert_equal_stats(load_stats(tmp_path / "stats.safetensors"), load_stats(stats_file), exact=False)


class Killed(RuntimeError):
    """Stands for a kill: nothing in the package knows it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Saves every 2 batches and, while armed, dies at the start of a given batch."""
    state = {"armed": True, "seen": 0}

    def arm(batches: int) -> dict[str, Any]:
        stock_init, stock_next = ExpertObservation.__init__, ExpertObservation._next_batch

        def init(
            observation: ExpertObservation, partial: Path | None = None, resume: Any = None, **kwargs: Any
        ) -> None:
            stock_init(observation, partial, resume, save_every=2, **kwargs)

        def next_batch(observation: ExpertObservation, batch: Any) -> None:
            if state["armed"] and state["seen"] == batches:
                raise Killed
            state["seen"] += 1
            stock_next(observation, batch)

        monkeypatch.setattr(ExpertObservation, "__init__", init)
        monkeypatch.setattr(ExpertObservation, "_next_batch", next_batch)
        return state

    return arm


@pytest.mark.parametrize("killed_after", [1, 2, 5, 9])
@pytest.mark.parametrize("command", ["score", "prune"])
def test_a_killed_pass_continues(
    run: Commands,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    kill_after: Any,
    command: str,
    killed_after: int,
) -> None:
    args = [command, *model_args(checkpoint), *text_args(text, batch_size=2)]
    run.ok(*args, "--out", tmp_path / "whole")
    state = kill_after(killed_after)
    with pytest.raises(Killed):
        run(*args, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "stats.safetensors").exists()
    state["armed"], state["seen"] = False, 0
    run.ok(*args, "--out", tmp_path / "killed")
    saved = killed_after // 2 * 2  # of 10 batches in all
    assert state["seen"] == 10 - saved
    whole, continued = (load_stats(tmp_path / name / "stats.safetensors") for name in ("whole", "killed"))
    assert_equal_stats(whole, continued, exact=True)
    assert not (tmp_path / "killed" / ".partial").exists()


def test_killed_after_the_last_batch(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, kill_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches are saved; the figures of the weights, which may take long, were not yet."""
    args = ["score", *model_args(checkpoint), *text_args(text, batch_size=2)]
    run.ok(*args, "--out", tmp_path / "whole")
    state = kill_after(99)
    with monkeypatch.context() as patch:

        def die(observation: Observation, *args: Any) -> None:
            raise Killed

        patch.setattr(Observation, "compute", die)
        with pytest.raises(Killed):
            run(*args, "--out", tmp_path / "killed")
    state["seen"] = 0
    run.ok(*args, "--out", tmp_path / "killed")
    assert state["seen"] == 0
    whole, continued = (load_stats(tmp_path / name / "stats.safetensors") for name in ("whole", "killed"))
    assert_equal_stats(whole, continued, exact=True)


def test_a_killed_pass_continues_under_overwrite(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, kill_after: Any
) -> None:
    """The same command again continues, whatever its options."""
    args = ["score", *model_args(checkpoint), *text_args(text, batch_size=2), "--overwrite", "true", "--out", tmp_path]
    state = kill_after(6)
    with pytest.raises(Killed):
        run(*args)
    state["armed"], state["seen"] = False, 0
    run.ok(*args)
    assert state["seen"] == 4


def test_overwrite_does_it_again(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refused repetition promises: not the old statistics under a new date."""
    args = ["score", *model_args(checkpoint), *text_args(text), "--out", tmp_path]
    run.ok(*args)
    passes = Passes(monkeypatch)
    run.ok(*args, "--overwrite", "true")
    assert passes.batches == math.ceil(SAMPLES / 4)


def test_statistics_of_another_dtype_are_not_reused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    passes = Passes(monkeypatch)
    run.ok("prune", *model_args(checkpoint), *text_args(text), "--model.dtype", "bfloat16", "--out", tmp_path)
    assert passes.batches > 0


def test_a_killed_pass_continues_with_another_batch_size(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, kill_after: Any
) -> None:
    """The batch size is no part of the request, so what was done must not be counted in batches of another size."""
    state = kill_after(4)
    args = ["score", *model_args(checkpoint), "--out", tmp_path]
    with pytest.raises(Killed):
        run(*args, *text_args(text, batch_size=2))
    state["armed"] = False
    run.ok(*args, *text_args(text, batch_size=4))
    assert_equal_stats(load_stats(tmp_path / "stats.safetensors"), load_stats(stats_file), exact=False)


def test_another_request_does_not_continue_a_killed_pass(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, kill_after: Any
) -> None:
    state = kill_after(3)
    with pytest.raises(Killed):
        run("score", *model_args(checkpoint), *text_args(text / "island.txt"), "--out", tmp_path)
    state["armed"] = False
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    assert_equal_stats(load_stats(tmp_path / "stats.safetensors"), load_stats(stats_file), exact=True)


def test_killed_while_writing_the_model(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["prune", *model_args(checkpoint), "--stats", stats_file]
    run.ok(*args, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:

        def write_half(tensors: Any, folder: Path, shard_bytes: int) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise Killed

        patch.setattr(compaction, "write_shards", write_half)
        with pytest.raises(Killed):
            run(*args, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "model").exists()
    assert not (tmp_path / "killed" / "prune.json").exists()
    run.ok(*args, "--out", tmp_path / "killed")
    assert_true_prune_figures(tmp_path / "killed", checkpoint)
    assert torch.equal(logits_of(tmp_path / "killed" / "model"), logits_of(tmp_path / "whole" / "model"))


def test_a_real_kill_leaves_no_half_model(run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path) -> None:
    """What SIGKILL leaves beside the target is cleared by the same command."""
    script = (
        "import os, sys\n"
        "from lightning_moe.cli.main import main\n"
        "from lightning_moe.moe import compaction\n"
        "def die(tensors, folder, shard_bytes):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    os._exit(9)\n"
        "compaction.write_shards = die\n"
        "main(sys.argv[1:])\n"
    )
    args = [str(arg) for arg in ("prune", *model_args(checkpoint), "--stats", stats_file, "--out", tmp_path / "run")]
    assert subprocess.run([sys.executable, "-c", script, *args], capture_output=True).returncode == 9
    assert not (tmp_path / "run" / "model").exists()
    run.ok(*args)
    assert_true_prune_figures(tmp_path / "run", checkpoint)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "model",
        "plan.json",
        "scores.json",
        "prune.json",
        "summary.json",
    }


def test_a_replaced_model_is_never_half_there(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwriting keeps the old model until the new one is whole."""
    args = ["prune", *model_args(checkpoint), "--stats", stats_file, "--out", tmp_path]
    run.ok(*args)
    before = logits_of(tmp_path / "model")

    def die(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(compaction, "write_shards", die)
    with pytest.raises(Killed):
        run(*args, "--ratio", 0.25, "--overwrite", "true")
    assert torch.equal(logits_of(tmp_path / "model"), before)


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


def test_text_changed_in_its_middle_is_another_request(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(text, tmp_path / "text"))
    args = ("--model.path", checkpoint, "--data.path", copy, "--out", tmp_path / "out")
    run.ok("evaluate", *QUIET, *args)
    file = copy / "harbour.txt"
    content = file.read_text()
    middle = len(content) // 2
    file.write_text(content[:middle] + "xyzzy" + content[middle + 5 :])
    assert run("evaluate", *QUIET, *args).code == 2


def test_a_bare_overwrite_is_a_yes_and_one_spelling_is_as_good_as_another(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    args = ["evaluate", *QUIET, "--data.path", text, "--out", tmp_path / "out"]
    run.ok(*args, "--model.path", checkpoint, "--data.samples", 2)
    assert run(*args, "--model.path", checkpoint, "--data.samples", 3).code == 2
    run.ok(*args, "--model.path", checkpoint, "--data.samples", 3, "--overwrite")
    again = run.ok(*args, "--model.path", f"{checkpoint}/../{checkpoint.name}", "--data.samples", 3)
    assert "before" in again.out


def test_less_text_by_a_trainer_option_is_refused(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for command, option in (("evaluate", "limit_val_batches"), ("score", "limit_predict_batches")):
        args = ("--model.path", checkpoint, "--data.path", text, "--out", tmp_path / "out")
        said = run(command, *QUIET, *args, f"--trainer.{option}", 1)
        assert said.code == 2 and option in said.err
    assert not (tmp_path / "out").exists()


def test_another_precision_is_another_request(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    args = ("evaluate", *QUIET, "--model.path", checkpoint, "--data.path", text, "--out", tmp_path / "out")
    run.ok(*args, "--trainer.precision", "bf16-true")
    assert "precision" in run(*args).err


def test_a_kill_between_model_and_plan_leaves_no_lie(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("prune", *QUIET, "--model.path", checkpoint, "--data.path", text, "--out", tmp_path / "out")
    run.ok(*args, "--ratio", 0.25)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_moe.pruning.plan.PruningPlan.save", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        run(*args, "--ratio", 0.5, "--overwrite")
    run.ok(*args, "--ratio", 0.25)
    kept = {len(ids) for ids in json.loads((tmp_path / "out" / "plan.json").read_text())["keep"].values()}
    assert (
        kept == {6} and AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.num_local_experts == 6
    )


def test_a_domain_without_a_window_has_no_figure(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("--model.path", checkpoint, "--data.path", text, "--data.samples", 1, "--out", out)
    run.ok("evaluate", *QUIET, *args)
    assert "NaN" not in (out / "summary.json").read_text()
    assert len(json.loads((out / "summary.json").read_text())["domains"]) == 1


def test_a_plan_leaves_no_other_choice(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"keep": {}}))
    said = run("prune", *QUIET, "--model.path", checkpoint, "--plan", plan, "--ratio", 0.25, "--out", tmp_path / "out")
    assert said.code == 2 and "--ratio" in said.err and not (tmp_path / "out").exists()
