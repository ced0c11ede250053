"""ExpertScan: the loss without an expert is that of the masked model, however much the forwards share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.modules.causal_lm import Batch, next_token_loss, padding_mask
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_experts, record_routing
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.search.expert_scan import ExpertScan, ScannedExperts
from tests.helpers.families import FAMILIES, NUM_EXPERTS, tiny_batch, tiny_model


def padded(length: int = 10) -> Batch:
    """Five sequences: three whole, one that is cut short, one that is blank."""
    mask = torch.ones(5, length, dtype=torch.long)
    mask[2, length // 2 :], mask[3] = 0, 0
    return {"input_ids": tiny_batch(5, length), "attention_mask": mask}


def rows(batch: Batch, some: slice) -> Batch:
    return {name: tensor[some] for name, tensor in batch.items()}


@torch.no_grad()
def scanned(model: PreTrainedModel, batches: Sequence[Batch], scan: ExpertScan | None = None) -> ScannedExperts:
    scan = scan or ExpertScan(model)
    for batch in batches:
        with scan.recorded():
            model.base_model(batch["input_ids"], attention_mask=padding_mask(batch), use_cache=False)
        scan.add(batch)
    return scan.result()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batch: Batch) -> float:
    logits: Tensor = model(batch["input_ids"], attention_mask=padding_mask(batch), use_cache=False).logits
    loss_B, count_B = next_token_loss(logits, batch)
    return float(loss_B.double().sum() / count_B.sum())


def slow_losses(model: PreTrainedModel, batch: Batch) -> dict[str, list[float]]:
    """As anybody would: mask the expert, run the model."""
    losses: dict[str, list[float]] = {}
    for layer in find_moe_layers(model):
        for expert in range(layer.num_experts):
            with mask_experts(layer, [one for one in range(layer.num_experts) if one != expert]):
                losses.setdefault(layer.name, []).append(mean_loss(model, batch))
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_is_that_of_the_masked_model(family: str) -> None:
    model, batch = tiny_model(family), padded()
    found = scanned(model, [batch])
    assert found.loss == pytest.approx(mean_loss(model, batch), rel=1e-6)
    expected = slow_losses(model, batch)
    assert found.losses.keys() == expected.keys()
    for name, losses in expected.items():
        assert found.losses[name] == pytest.approx(losses, rel=1e-6)
        assert found.rises(name) == pytest.approx([loss - found.loss for loss in losses], abs=1e-5)
        assert max(found.rises(name)) > 1e-4


def routed_rows(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The sequences in which a real token is sent to an expert, by layer, ``(E,)``."""
    real_T, count = batch["attention_mask"].bool().flatten(), len(batch["input_ids"])
    found: dict[str, Tensor] = {}

    def see(layer: Any, routing: Any) -> None:
        sent_TE = torch.zeros(len(real_T), NUM_EXPERTS, dtype=torch.bool)
        for token, experts in enumerate(routing.expert_ids_TK.tolist()):
            sent_TE[token, experts] = bool(real_T[token])
        found[layer.name] = sent_TE.view(count, -1, NUM_EXPERTS).any(1).sum(0)

    with torch.no_grad(), record_routing(find_moe_layers(model), see):
        model.base_model(batch["input_ids"], attention_mask=padding_mask(batch), use_cache=False)
    return found


@pytest.mark.parametrize(("family", "renormalised"), [("mixtral", True), ("gpt_oss", True), ("qwen2_moe", False)])
def test_only_what_changes_is_run(family: str, renormalised: bool) -> None:
    """Layers before the expert's never; sequences that never see it only where all weights hang together."""
    model, batch = tiny_model(family), padded(4)
    found = scanned(model, [batch])
    assert [found.losses[name] for name in found.losses] == [
        pytest.approx(losses, rel=1e-6) for losses in slow_losses(model, batch).values()
    ]
    run = 0
    for index, sent_E in enumerate(routed_rows(model, batch).values()):
        assert int((sent_E < 4).sum()) > 0  # else the case says nothing
        run += (2 - index) * (int(sent_E.sum()) if renormalised else 4 * NUM_EXPERTS)  # one is blank
    assert found.work == pytest.approx(run / (2 * 2 * NUM_EXPERTS * 4))


def test_sums_go_on_where_they_were_saved_and_batches_add_up() -> None:
    model, batch = tiny_model("deepseek_v3"), padded()
    first, second = rows(batch, slice(0, 2)), rows(batch, slice(2, 5))
    whole, apart = scanned(model, [batch]), scanned(model, [first, second])
    begun, going_on = ExpertScan(model), ExpertScan(model)
    scanned(model, [first], begun)
    going_on.load_sums(begun.sums)
    assert scanned(model, [second], going_on) == apart
    for name, losses in apart.losses.items():
        assert losses == pytest.approx(whole.losses[name], rel=1e-6)
    assert apart.tokens == whole.tokens and apart.work == pytest.approx(whole.work)


def test_a_layer_that_can_spare_none_is_left_out() -> None:
    model, batch = tiny_model("mixtral"), padded()
    first, second = (layer.name for layer in find_moe_layers(model))
    keep_experts(model, {first: [1, 6], second: [0, 2, 5]})
    found = scanned(model, [batch])
    assert found.losses[first] is None and found.rises(first) == [0.0, 0.0]
    assert found.losses[second] == pytest.approx(slow_losses(model, batch)[second], rel=1e-6)


def test_a_model_that_gives_router_logits_is_scanned_and_left_as_it_was() -> None:
    """Where their loss would be taken over layers that do not run."""
    model, batch = tiny_model("mixtral", output_router_logits=True), padded()
    before = mean_loss(model, batch)
    modules = [(name, id(module), sorted(vars(module))) for name, module in model.named_modules()]
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    found = scanned(model, [batch])
    assert found.loss == pytest.approx(before, rel=1e-6)
    assert mean_loss(model, batch) == before and model.config.output_router_logits
    assert modules == [(name, id(module), sorted(vars(module))) for name, module in model.named_modules()]
    assert hooks == [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
