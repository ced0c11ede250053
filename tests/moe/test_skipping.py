"""Adaptive skipping: the rule equals a slow reference, skips nothing by default, and goes with guests and gates."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe import skipping
from lightning_moe.moe.experts import ExpertHooks, expert_hooks
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skip_tables import SkipTable, count_only, reset_skipped, set_skipping, skipped, switch_skipping
from lightning_moe.stats.observation import Observation
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.reference import stock_experts as reference
from tests.moe.pruned_models import logits_of
from tests.moe.skip_thresholds import tables_of

ALL_THREE: dict[str, Any] = {"num_experts_per_tok": 3, "moe_k": 3, "moe_topk": 3}
"""Three experts per token, under any name; Phimoe knows two only."""


def tiny(family: str) -> PreTrainedModel:
    return tiny_model(family, **({} if family == "phimoe" else ALL_THREE))


class Slowly:
    """Takes the place of every experts module: one token, one expert at a time, written from the papers."""

    def __init__(self, model: PreTrainedModel, tables: dict[int, SkipTable], rule: str) -> None:
        self.skipped = self.seen = 0
        for layer in find_moe_layers(model):
            table = tables[layer.parts.index]

            def forward(
                hidden: Tensor, ids: Tensor, weights: Tensor, experts: Any = layer.experts, table: Any = table
            ) -> Tensor:
                rows = [self._token(experts, table, rule, *row) for row in zip(hidden, ids, weights, strict=True)]
                return torch.stack(rows)

            layer.experts.forward = forward

    def _token(self, experts: Any, table: SkipTable, rule: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = list(zip(ids.tolist(), weights.tolist(), strict=True))
        first, largest = max(chosen, key=lambda pair: pair[1])
        stay = []
        for expert, weight in chosen:
            gamma2 = 1.0 if rule == "naee" else float(table.gamma2_EE[first, expert])
            if expert == first or not weight < table.gamma1 * gamma2 * largest:
                stay.append((expert, weight))
        self.skipped += len(chosen) - len(stay)
        self.seen += len(chosen)
        scale = sum(weight for _, weight in chosen) / sum(weight for _, weight in stay)
        output = torch.zeros_like(hidden)
        for expert, weight in stay:
            output = output + scale * weight * reference.run_alone(experts, expert, hidden[None])[0]
        return output


@pytest.mark.parametrize("rule", ["diep", "naee"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_equals_a_slow_reference(family: str, rule: Literal["diep", "naee"]) -> None:
    model = tiny(family)
    tables = tables_of(model)
    slow_model = copy.deepcopy(model)
    slow = Slowly(slow_model, tables, rule)
    expected = logits_of(slow_model)
    set_skipping(model, tables, rule)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    counts = skipped(model).values()
    assert (sum(one for one, _ in counts), sum(all_ for _, all_ in counts)) == (slow.skipped, slow.seen)
    assert 0 < slow.skipped < slow.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_gamma1_of_zero_skips_nothing(family: str) -> None:
    model = tiny(family)
    expected = logits_of(model)
    with expert_hooks(model, find_moe_layers(model), {}):
        same_function = logits_of(model)
    set_skipping(model, tables_of(model, gamma1=0.0))
    assert torch.equal(logits_of(model), same_function)
    torch.testing.assert_close(same_function, expected, atol=1e-5, rtol=1e-5)
    assert all(one == 0 and total > 0 for one, total in skipped(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_experts_are_not_computed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    stock = skipping._outputs

    def counting(experts: Any, inputs: Tensor, *rest: Any) -> Tensor:
        rows.append(inputs.shape[0])
        return stock(experts, inputs, *rest)

    monkeypatch.setattr(skipping, "_outputs", counting)
    model = tiny(family)
    set_skipping(model, tables_of(model))
    logits_of(model)
    assert rows == [seen - left_out for left_out, seen in skipped(model).values()]


def test_one_expert_per_token_has_nothing_to_skip() -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1)
    set_skipping(model, tables_of(model, gamma1=0.0))
    expected = logits_of(model)
    set_skipping(model, tables_of(model, gamma1=9.0))
    assert torch.equal(logits_of(model), expected)
    assert all(one == 0 for one, _ in skipped(model).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_skip(dtype: torch.dtype) -> None:
    model = tiny("qwen2_moe").to(dtype)
    set_skipping(model, tables_of(model))
    assert bool(logits_of(model).isfinite().all())
    assert all(0 < one < total for one, total in skipped(model).values())


def test_a_model_that_skips_can_train() -> None:
    """Gradients equal those of the slow reference's weights: of the experts, of the router, of what lies below."""
    model = tiny("qwen2_moe")
    tables = tables_of(model)
    set_skipping(model, tables)
    model(tiny_batch(), labels=tiny_batch()).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    monkey = skipping.compute_rows
    # Everything is computed and skipped experts get weight 0: another path to the same gradients.
    try:
        skipping.compute_rows = lambda experts, hidden, ids, keep=None: monkey(experts, hidden, ids)
        model(tiny_batch(), labels=tiny_batch()).loss.backward()
    finally:
        skipping.compute_rows = monkey
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert any("gate.weight" in name and bool(gradient.abs().sum() > 0) for name, gradient in found.items())


# ------------------------------------------------------------------------------------- on, off, and guests


def test_on_and_off() -> None:
    model = tiny("mixtral")
    plain = logits_of(model)
    with pytest.raises(InputError, match="no skip tables"):
        switch_skipping(model, True)
    switch_skipping(model, False)
    set_skipping(model, tables_of(model), active=False)
    assert torch.equal(logits_of(model), plain) and skipped(model) == {}
    logits = {}
    for turn in (True, "naee"):
        switch_skipping(model, turn)
        logits[turn] = logits_of(model)
    assert not torch.equal(logits[True], logits["naee"]) and not torch.equal(logits[True], plain)
    reset_skipped(model)
    assert all(counts == (0, 0) for counts in skipped(model).values())
    switch_skipping(model, False)
    assert torch.equal(logits_of(model), plain)
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


def test_masked_tokens_are_not_counted() -> None:
    model = tiny("mixtral")
    set_skipping(model, tables_of(model))
    logits_of(model)
    whole = skipped(model)
    halves = []
    for mask in (torch.tensor([[1], [0]]), torch.tensor([[0], [1]])):
        reset_skipped(model)
        count_only(model, mask.expand(2, 24))
        logits_of(model)
        halves.append(skipped(model))
    for name, (one, total) in whole.items():
        assert sum(half[name][0] for half in halves) == one
        assert [half[name][1] for half in halves] == [total // 2] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_a_model_that_skips(family: str) -> None:
    """A guest changes no logit, and sees every expert that the router chose."""
    model = tiny(family)
    set_skipping(model, tables_of(model))
    expected = logits_of(model)
    observation = Observation(model)
    observation.next_batch(tiny_batch())
    with observation.attached(model):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits_of(model), expected)
    first, plain = observation.compute()[0], Observation(model)
    switch_skipping(model, False)
    plain.next_batch(tiny_batch())
    with plain.attached(model):
        logits_of(model)
    for name in ("count_E", "norm_E", "gated_norm_E", "hsic_EE"):  # of the first layer, whose inputs are the same
        torch.testing.assert_close(getattr(first, name), getattr(plain.compute()[0], name), msg=name)


def test_gates_work_on_what_skipping_left() -> None:
    model = tiny("mixtral")
    layers = find_moe_layers(model)
    set_skipping(model, tables_of(model))
    expected = logits_of(model)
    ones = {layer.name: ExpertHooks(gates_E=torch.ones(8)) for layer in layers}
    with expert_hooks(model, layers, ones):
        assert torch.equal(logits_of(model), expected)
    # A gate of 0 on all but one expert: the output is that expert's, by its renormalised weight.
    gates_E = torch.zeros(8)
    gates_E[3] = 1.0
    hidden_TH = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), expert_hooks(model, layers, {layers[0].name: ExpertHooks(gates_E=gates_E)}):
        _, weights_TK, ids_TK = layers[0].router(hidden_TH)
        found_TH = layers[0].experts(hidden_TH, ids_TK, weights_TK)
        _, kept_TK = skipping.choose(layers[0].experts, ids_TK, weights_TK)
        share_T = (kept_TK * (ids_TK == 3)).sum(-1)
        torch.testing.assert_close(found_TH, share_T[:, None] * reference.run_alone(layers[0].experts, 3, hidden_TH))
