"""ExpertPruning as a guest: in somebody else's fit, experts go at their moment, by their score, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_moe.callbacks import ExpertObservation, ExpertPruning
from lightning_moe.criteria import criteria
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.round_record import read_records
from lightning_moe.pruning.scores import score_experts
from lightning_moe.search.presets import PRESETS
from lightning_moe.stats.store import ModelStats
from tests.callbacks.foreign_fit import (
    TOKENS,
    Batches,
    Foreign,
    Look,
    assert_rows_of,
    calibration,
    counts,
    fit,
    loader,
    small_model,
    state_of,
    steps_of,
    still,
)
from tests.callbacks.metric_logs import Logs
from tests.helpers.families import tiny_batch

FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"]

# --------------------------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_experts_are_those_of_the_whole_model(tmp_path: Path, family: str, scope: Any) -> None:
    """With a learning rate of 0, two rounds leave the planned number of experts, and these bit by bit."""
    model = small_model(family)
    whole = state_of(model)
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", scope, every=2)
    fit(Foreign(model, still), tmp_path, pruning)
    assert [len(ids) for ids in pruning.keep.values()] == counts(model)
    assert counts(model) == [4, 4] if scope == "layer" else sum(counts(model)) == 8
    assert list(pruning.keep) == [layer.name for layer in find_moe_layers(model)]
    assert_rows_of(model, whole, pruning.keep)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_whole_one_masked(tmp_path: Path, family: str, scope: Any) -> None:
    model, whole = small_model(family), small_model(family).eval()
    pruning = ExpertPruning(calibration(), 0.5, method="reap", scope=scope, start=1)
    fit(Foreign(model, still), tmp_path, pruning)
    with torch.no_grad():
        found = model.eval()(tiny_batch()).logits
        with mask_plan(find_moe_layers(whole), pruning.keep):
            torch.testing.assert_close(found, whole(tiny_batch()).logits, rtol=1e-4, atol=1e-5)
        keep_experts(whole, pruning.keep)
        assert torch.equal(found, whole(tiny_batch()).logits)
    assert model.config.to_dict() == whole.config.to_dict()


def test_one_round_at_the_start_is_as_if_cut_before(tmp_path: Path) -> None:
    """The whole fit after it: same losses, same weights."""
    model, other = small_model(), small_model()
    pruning = ExpertPruning(calibration(), 0.5, scope="global")
    one, two = Foreign(model), Foreign(other)
    fit(one, tmp_path, pruning)
    keep_experts(other, pruning.keep)
    fit(two, tmp_path)
    assert one.losses == two.losses
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# ---------------------------------------------------------------------------------------------- the moments


@pytest.mark.parametrize(
    ("moments", "steps"),
    [
        ({"every": 2}, [0, 2, 4]),
        ({"start": 1, "every": 1}, [1, 2, 3]),
        ({"start": 1, "every": 1, "growth": 2.0}, [1, 2, 4]),
        ({"start": 1, "every": 2, "growth": 0.5}, [1, 3, 4]),
        ({"at": [2, 3, 6]}, [2, 3, 6]),
        ({"at": [0, 5, 6]}, [0, 5, 6]),
        ({"start": 3, "every": 3}, [3, 6]),  # the fit ends before the third
        ({"unit": "tokens", "start": TOKENS, "every": TOKENS + 1}, [1, 3, 4]),
        ({"unit": "tokens", "start": 1, "every": 1}, [1, 2, 3]),  # one round per step, if several are due
        ({"unit": "tokens", "at": [0, TOKENS, 6 * TOKENS]}, [0, 1, 6]),
    ],
)
def test_rounds_happen_when_due(tmp_path: Path, moments: dict[str, Any], steps: list[int]) -> None:
    """Right after the batch that made the moment, before the next one."""
    pruning = ExpertPruning(calibration(), 0.375, 3, "rwn", **moments)
    look = Look(lambda trainer, module: (len(pruning.records), counts(module.inner)))
    fit(Foreign(small_model()), tmp_path, pruning, look)
    done = [sum(step <= batch for step in steps) for batch in range(1, 7)]
    assert look.seen == [(rounds, [8 - rounds] * 2) for rounds in done]
    assert steps_of(pruning) == steps
    assert [record.ratio for record in pruning.records] == [0.125, 0.25, 0.375][: len(steps)]


@pytest.mark.parametrize(
    ("moments", "done"),
    [
        ({"every": 1}, [1, 2, 2, 3, 3, 3, 3, 3, 3, 3]),
        ({"at": [1, 3, 4]}, [0, 1, 1, 1, 2, 2, 3, 3, 3, 3]),
        ({"unit": "tokens", "at": [1, 2 * TOKENS + 1, 5 * TOKENS + 1]}, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
    ],
)
def test_gradients_in_the_making_are_not_lost(tmp_path: Path, moments: dict[str, Any], done: list[int]) -> None:
    """Steps end with batches 2, 4 and 5 of either epoch; a round waits for that, whatever its unit."""
    pruning = ExpertPruning(calibration(), 0.375, 3, "rwn", **moments)
    look = Look(lambda trainer, module: len(pruning.records))
    fit(Foreign(small_model()), tmp_path, pruning, look, data=loader(5), max_epochs=2, accumulate_grad_batches=2)
    assert look.seen == done
    assert pruning.tokens == 10 * TOKENS


@pytest.mark.parametrize(("moments", "steps"), [({"start": 1, "every": 1}, [2, 4]), ({"every": 2}, [0, 4])])
def test_epochs_count_when_they_have_ended(tmp_path: Path, moments: dict[str, Any], steps: list[int]) -> None:
    pruning = ExpertPruning(calibration(), 0.25, 2, "rwn", unit="epochs", **moments)
    fit(Foreign(small_model()), tmp_path, pruning, data=loader(2), max_epochs=3)
    assert steps_of(pruning) == steps


def test_padding_is_no_token(tmp_path: Path) -> None:
    data = Batches(4)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 4:] = 0
    pruning = ExpertPruning(calibration(), 0.25, method="rwn", unit="tokens", start=3 * (TOKENS - 8))
    fit(Foreign(small_model()), tmp_path, pruning, data=DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    assert steps_of(pruning) == [3]
    assert pruning.tokens == 4 * (TOKENS - 8)


# ------------------------------------------------------------------------------------------------ the scores


@pytest.mark.parametrize("method", ["reap-sum", "ecc", "random", "eas"])
def test_scores_are_those_of_an_ordinary_observation(tmp_path: Path, method: str) -> None:
    """Of the model as it is at that moment, in both rounds, bit by bit; and the lowest go."""
    moments: list[Any] = []
    before = Look(lambda trainer, module: moments.append(copy.deepcopy(module.inner)))
    pruning = ExpertPruning(calibration(), 0.5, 2, method, "layer", start=2, every=2, seed=3)
    fit(Foreign(small_model()), tmp_path, before, pruning)
    kept = {layer.name: list(range(8)) for layer in find_moe_layers(moments[0])}
    for turn, step in enumerate((2, 4)):
        observation = ExpertObservation()
        plain = Foreign(moments[step - 1])
        plain.predict_step = lambda batch, batch_idx, plain=plain: plain.inner(batch["input_ids"])  # type: ignore[assignment]
        Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            callbacks=[observation],
        ).predict(plain, calibration())
        expected = score_experts(ModelStats("", "", observation.layers), method, None, 3 + 1009 * turn)
        record = pruning.records[turn]
        for name, score_E in expected.scores.items():
            assert record.scores[name] == dict(zip(map(str, kept[name]), score_E.tolist(), strict=True))
        keep = make_plan(expected, record.ratio, "layer", whole=tuple(pruning._log.whole)).keep
        kept = {name: [kept[name][place] for place in ids] for name, ids in keep.items()}
        assert record.keep == kept


@pytest.mark.parametrize("method", [*(one.name for one in criteria()), *(f"diep-{name}" for name in PRESETS), "diep"])
def test_every_method_runs(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PRESETS:
        monkeypatch.setitem(PRESETS, name, PRESETS[name] | {"updates": 4})
    model = small_model()
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], method, every=1)
    fit(Foreign(model), tmp_path, pruning, max_steps=2)
    assert counts(model) == [4, 4]
    assert [record.method for record in pruning.records] == [method] * 2
    if method != "ego":  # gradients of eight neurons may have no outlier at all
        assert all(len(set(scores.values())) > 1 for record in pruning.records for scores in record.scores.values())


@pytest.mark.parametrize("direction", ["min", "max"])
def test_direction(tmp_path: Path, direction: Any) -> None:
    """The two ends of one criterion, half of the experts each."""
    pruning = ExpertPruning(calibration(), 0.5, method="man", direction=direction)
    fit(Foreign(small_model()), tmp_path, pruning, max_steps=1)
    (record,) = pruning.records
    default = ExpertPruning(calibration(), 0.5, method="man")
    fit(Foreign(small_model()), tmp_path, default, max_steps=1)
    assert (record.keep == default.keep) == (direction == "min")
    assert (record.keep == default.records[0].dropped) == (direction == "max")


# ---------------------------------------------------------------------------------------------- the records


def test_records_say_what_happened(tmp_path: Path) -> None:
    model = small_model()
    sizes = [model.num_parameters()]
    look = Look(lambda trainer, module: sizes.append(module.inner.num_parameters()))
    pruning = ExpertPruning(
        calibration(), 0.5, 2, "ean", "global", at=[1, 3], evaluation=loader(2, seed=9), folder=tmp_path / "new" / "out"
    )
    logs = Logs("expert_pruning")
    fit(Foreign(model), tmp_path, pruning, look, logger=logs, data=loader(5), log_every_n_steps=100)
    first, second = pruning.records
    assert [(one.round, one.ratio, one.method) for one in (first, second)] == [(1, 0.25, "ean"), (2, 0.5, "ean")]
    assert [one.made_by for one in (first, second)] == [
        {"method": "ean", "direction": "min", "ratio": ratio, "scope": "global", "floor": None, "step": step}
        for ratio, step in ((0.25, 1), (0.5, 3))
    ]
    assert (first.steps, first.tokens, second.steps, second.tokens) == (2, 2 * TOKENS, 2, 2 * TOKENS)
    assert [first.parameters, second.parameters] == [sizes[1], sizes[3]] and sizes[0] > sizes[1] > sizes[3]
    for before, record in ((None, first), (first, second)):
        for name, ids in record.keep.items():
            had = list(range(8)) if before is None else before.keep[name]
            assert sorted(ids + record.dropped[name]) == had
            assert list(record.scores[name]) == [str(expert) for expert in had]
        assert record.seconds.keys() == {"estimate", "prune"}
        assert list(record.perplexity) == list(record.load) == ["before_prune", "after_prune", "after_finetune"]
        assert all(one["tokens"] == 2 * (TOKENS - 2) for one in record.perplexity.values())
    assert first.perplexity["after_finetune"] == second.perplexity["before_prune"]
    assert first.perplexity["after_finetune"] != first.perplexity["after_prune"]
    assert read_records(tmp_path / "new" / "out" / "rounds.jsonl") == pruning.records
    for (step, logged), record, experts in zip(logs.metrics, (first, second), (12.0, 8.0), strict=True):
        assert step == record.made_by["step"]
        assert logged == {
            "expert_pruning/experts": experts,
            "expert_pruning/ratio": record.ratio,
            "expert_pruning/perplexity_before_prune": record.perplexity["before_prune"]["all"],
            "expert_pruning/perplexity_after_prune": record.perplexity["after_prune"]["all"],
        }


def test_perplexity_is_the_plain_one(tmp_path: Path) -> None:
    model = small_model()
    data = Batches(2, seed=9)
    data[1]["attention_mask"] = torch.ones_like(data[1]["input_ids"])
    data[1]["attention_mask"][0, 5:] = 0
    pruning = ExpertPruning(calibration(), 0.5, evaluation=data)
    fit(Foreign(model, still), tmp_path, pruning, max_steps=1)
    for moment, network in (("before_prune", small_model().eval()), ("after_finetune", model.eval())):
        losses = []
        for batch in data:
            for ids, mask in zip(batch["input_ids"], batch.get("attention_mask", batch["input_ids"] > 0), strict=True):
                ids = ids[mask.bool()]
                with torch.no_grad():
                    log_p = network(ids[None]).logits[0].double().log_softmax(-1)
                losses += [-float(log_p[position, ids[position + 1]]) for position in range(len(ids) - 1)]
        found = pruning.records[0].perplexity[moment]
        assert found["tokens"] == len(losses) == 3 * 11 + 4
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    load = pruning.records[0].load["after_finetune"]
    assert all(sum(load[name]["counts"]) == 2 * (3 * 12 + 5) for name in pruning.keep)


def test_the_file_is_whole_after_each_round(tmp_path: Path) -> None:
    pruning = ExpertPruning(calibration(), 0.5, 2, "rwn", start=1, every=2, folder=str(tmp_path / "out"))
    file = tmp_path / "out" / "rounds.jsonl"
    look = Look(lambda trainer, module: [json.loads(line)["round"] for line in file.read_text().splitlines()])
    fit(Foreign(small_model()), tmp_path, pruning, look)
    assert look.seen == [[1], [1], [1, 2], [1, 2], [1, 2], [1, 2]]
