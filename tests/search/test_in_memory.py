"""score_in_memory: what a Trainer would have found, and a model that never knew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_moe.callbacks import ExpertObservation
from lightning_moe.criteria import criteria
from lightning_moe.errors import InputError
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.scores import ExpertScores, score_experts
from lightning_moe.search import in_memory
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.in_memory import check_method, score_in_memory
from lightning_moe.search.presets import PRESETS, preset
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.store import ModelStats
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan
from tests.search.tiny_search import assert_same, batch_of, batches, fit, learned, uneven_model, wrapped

UPDATES = 5


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PRESETS:
        monkeypatch.setitem(PRESETS, name, PRESETS[name] | {"updates": UPDATES})


def small_model(family: str = "mixtral") -> PreTrainedModel:
    """With narrow experts, since statistics look at their spectra."""
    return tiny_model(family, **({"intermediate_size": 8} if family == "mixtral" else {}))


def padded() -> list[dict[str, Tensor]]:
    """Three batches: whole without a mask, whole with one, and with padding on either side."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:], mask[1, :3] = 0, 0
    ids = [tiny_batch(2, 12, seed) for seed in range(3)]
    return [{"input_ids": ids[0]}, batch_of(ids[1]), batch_of(ids[2], mask)]


def assert_equal(one: ExpertScores, other: ExpertScores, tolerance: float = 0.0) -> None:
    assert one.scores.keys() == other.scores.keys()
    assert list(one.shapes) == list(other.shapes)
    assert_same(list(one.scores.values()), list(other.scores.values()), tolerance)


# ---------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "jamba"])
def test_a_criterion_is_that_of_an_observation(family: str) -> None:
    """Of the plain loop that everybody would write, for every criterion."""
    model = small_model(family)
    observation = Observation(model)
    with observation.attached(model), torch.no_grad():
        for batch in padded():
            observation.next_batch(batch["input_ids"], batch.get("attention_mask"))
            model(**batch)
    stats = ModelStats("", "", observation.compute())
    one_pass = [one.name for one in criteria() if not one.gradients]
    for name in ("reap-sum", "ecc", "random", "trimming") if family != "mixtral" else one_pass:
        found = score_in_memory(model, padded(), name, seed=4)
        expected = score_experts(stats, name, seed=4)
        assert_equal(found, expected)
        assert found.as_json() == expected.as_json()


@pytest.mark.parametrize("direction", ["min", "max"])
def test_a_criterion_is_that_of_the_trainers_path(direction: Any) -> None:
    """ExpertObservation in a predict loop, as the commands run it."""
    model = uneven_model("mixtral")
    observation = ExpertObservation()
    Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[observation]
    ).predict(wrapped(model), DataLoader([batch for batch in padded() if len(batch) == 2], batch_size=None))  # type: ignore[arg-type]
    expected = score_experts(ModelStats("", "", observation.layers), "man", direction)
    assert_equal(score_in_memory(model, padded()[1:], "man", direction), expected)


def test_a_blank_window_counts_nothing() -> None:
    """Windows of padding alone fill up the last batch of some loaders."""
    blank = batch_of(tiny_batch(1, 12), torch.zeros(1, 12, dtype=torch.long))
    for method, tolerance in (("ean", 1e-5), ("diep", 1e-4)):
        whole = {"input_ids": tiny_batch(2, 12, 1), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
        filled = {name: torch.cat([whole[name], blank[name]]) for name in whole}  # type: ignore[literal-required]
        found, expected = (score_in_memory(small_model(), [batch], method) for batch in (filled, whole))
        assert_equal(found, expected, tolerance)


# ------------------------------------------------------------------------------------------------ the search


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_search_is_that_of_a_trainer(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same batches, again and again: same alpha and beta, same scores, bit by bit."""
    searches: list[DiEPSearch] = []
    plain = in_memory._search

    def recorded(*args: Any) -> DiEPSearch:
        searches.append(plain(*args))
        return searches[-1]

    monkeypatch.setattr(in_memory, "_search", recorded)
    method = "diep" if name == "default" else f"diep-{name}"
    found = score_in_memory(uneven_model(family), batches(2), method, seed=3)
    driven = DiEPSearch(wrapped(uneven_model(family)), seed=3, **preset(name))
    fit(driven, batches(2))
    assert driven.done == searches[0].done == UPDATES
    assert_same(learned(searches[0]), learned(driven))
    assert_same(list(found.scores.values()), list(driven.scores().values()))
    assert list(found.scores) == [shape.name for shape in found.shapes]
    assert found.method == method and found.comparable


def test_a_search_reads_masks() -> None:
    """A batch without a mask is one whose mask is all ones; padding is left out."""
    data = padded()
    with_masks = [batch_of(batch["input_ids"], batch.get("attention_mask")) for batch in data]
    driven = DiEPSearch(wrapped(small_model()), **preset("default"))
    fit(driven, with_masks)
    found = score_in_memory(small_model(), data, "diep")
    assert_same(list(found.scores.values()), list(driven.scores().values()))


def test_in_mixed_precision_too() -> None:
    """Within the fit's own context, which rounds what it must and keeps no old alpha."""
    driven = DiEPSearch(wrapped(small_model()), **preset("default"))
    fit(driven, batches(2), precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        found = score_in_memory(small_model(), batches(2), "diep")
    assert_same(list(found.scores.values()), list(driven.scores().values()), 1e-6)


# ------------------------------------------------------------------------------------------ the model is left


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that could have changed."""
    hooks = [kind for kind in vars(nn.Module()) if "hooks" in kind]
    return {
        "modes": {name: part.training for name, part in model.named_modules()},
        "learns": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "identities": [id(parameter) for parameter in model.parameters()],
        "attributes": {name: sorted(vars(part)) for name, part in model.named_modules()},
        "hooks": [(name, kind) for name, part in model.named_modules() for kind in hooks if getattr(part, kind)],
        "experts": model.get_experts_implementation(),  # type: ignore[operator]
        "config": model.config.to_dict(),  # type: ignore[operator, union-attr]
    }


def mixed_up_model() -> PreTrainedModel:
    """Training, but for one layer; some weights frozen."""
    model = small_model().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.experts.requires_grad_(False)
    return model


METHODS = ["reap", "diep", "diep-paper", "diep-beta-frequency"]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was(method: str) -> None:
    model = mixed_up_model()
    before, weights = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    score_in_memory(model, batches(2), method)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)  # a fit around it draws what it would have drawn
    assert torch.is_grad_enabled()


class Interrupted(list[Any]):
    """Batches of which the second pass, or the first, breaks off after one."""

    def __iter__(self) -> Iterator[Any]:
        yield self[0]
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_puts_everything_back(method: str) -> None:
    model = mixed_up_model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        score_in_memory(model, Interrupted(batches(2)), method)
    assert snapshot(model) == before


def test_gradients_that_were_there_stay() -> None:
    model = small_model()
    model(**batches(1)[0]).logits.square().mean().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for method in ("reap", "diep"):
        score_in_memory(model, batches(2), method)
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys() and all(torch.equal(after[name], grad) for name, grad in before.items())


# ------------------------------------------------------------------------------------------------- refusals


class Counted:
    """Batches that may be gone through only so often: a loop without an end would else never be told."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        assert self.passes < 20, "goes through nothing for ever"
        return iter(self.data)


@pytest.mark.parametrize("method", ["reap", "diep"])
def test_no_batches_are_refused(method: str) -> None:
    """Not scored as if no expert mattered, and not waited for."""
    model = small_model().train()
    before = snapshot(model)
    with pytest.raises(InputError) as said:
        score_in_memory(model, Counted([]), method)  # type: ignore[arg-type]
    assert "batch" in str(said.value) and "\n" not in str(said.value)
    assert snapshot(model) == before


def test_text_that_can_be_read_only_once_is_refused_by_a_search() -> None:
    """A generator is empty the second time."""

    class Once(Counted):
        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            assert self.passes < 20, "goes through nothing for ever"
            return iter(self.data if self.passes == 1 else [])

    with pytest.raises(InputError, match="batch"):
        score_in_memory(small_model(), Once(batches(2)), "diep")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["reap", "diep"])
@pytest.mark.parametrize(
    "bad",
    [tiny_batch(), [1, 2], (tiny_batch(), tiny_batch()), {"ids": tiny_batch()}, {"input_ids": [[3, 4, 5]]}],
    ids=["tensor", "list", "tuple", "other names", "no tensor"],
)
def test_other_batches_are_refused(method: str, bad: Any) -> None:
    model = small_model().train()
    before = snapshot(model)
    with pytest.raises(InputError, match="input_ids"):
        score_in_memory(model, [bad], method)
    assert snapshot(model) == before


@pytest.mark.parametrize(("method", "word"), [("reep", "'reap'"), ("diep-papr", "'paper'"), ("diepp", "Unknown")])
def test_unknown_methods_are_refused(method: str, word: str) -> None:
    for check in (lambda: check_method(method), lambda: score_in_memory(small_model(), batches(1), method)):
        with pytest.raises(InputError, match=word):
            check()


def test_a_cut_model_is_scored_by_its_own_experts() -> None:
    model = small_model()
    keep = non_uniform_plan(model)
    keep_experts(model, keep)
    for method in ("ean", "diep"):
        scores = score_in_memory(model, batches(2), method).scores
        assert [len(score_E) for score_E in scores.values()] == [len(keep[name]) for name in scores] == [4, 6]
