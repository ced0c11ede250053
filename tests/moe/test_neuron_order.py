"""Laws of aligned merging: the order in which an expert holds its neurons means nothing."""

from __future__ import annotations

import copy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.compaction import check_mergeable, compact_checkpoint
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.merged_experts import Merge, merged_row
from lightning_moe.moe.neuron_order import NeuronAxis, best_order
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import Keep, non_uniform_plan, some_merge
from tests.helpers.reference import stock_experts as reference

every_family = pytest.mark.parametrize("family", FAMILIES)


def some_order(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def width_of(model: PreTrainedModel) -> int:
    """Neurons of an expert."""
    experts = find_moe_layers(model)[0].experts
    return experts.down_proj.shape[1 if experts.is_transposed else 2]


def cut(model: PreTrainedModel, keep: Keep, merge: Merge) -> PreTrainedModel:
    model = copy.deepcopy(model)
    keep_experts(model, keep, merge)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tiny_batch()).logits


def assert_equal(one: PreTrainedModel, other: PreTrainedModel) -> None:
    right = other.state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in one.state_dict().items())


@every_family
def test_the_order_of_neurons_means_nothing(family: str) -> None:
    """A permuted copy merges into its original exactly; a permuted expert changes no bit, a kept one no logit."""
    model = tiny_model(family)
    keep, width = non_uniform_plan(model), width_of(model)
    merge = some_merge(keep, align=True)
    first, aligned = find_moe_layers(model)[0], cut(model, keep, merge)

    turned = copy.deepcopy(model)
    for place, layer in enumerate(find_moe_layers(turned)):
        for expert in set(range(layer.num_experts)) - set(keep[layer.name]):
            reference.permuted_neurons(layer.experts, expert, some_order(width, 10 * place + expert))
    torch.testing.assert_close(logits(turned), logits(model))  # the reference knows what it permutes
    assert_equal(cut(turned, keep, merge), aligned)

    kept = next(iter(merge.groups[first.name]))
    turned = copy.deepcopy(model)
    reference.permuted_neurons(find_moe_layers(turned)[0].experts, kept, some_order(width, 77))
    torch.testing.assert_close(logits(cut(turned, keep, merge)), logits(aligned))
    assert not torch.allclose(logits(cut(model, keep, some_merge(keep))), logits(aligned))

    copies = copy.deepcopy(model)
    for place, layer in enumerate(find_moe_layers(copies)):
        for kept, group in merge.groups[layer.name].items():
            for expert in set(group) - {kept}:
                for stack in layer.experts.parameters():
                    stack.data[expert] = stack.data[kept]
                reference.permuted_neurons(layer.experts, expert, some_order(width, 10 * place + expert))
    assert_equal(cut(copies, keep, merge), cut(copies, keep, Merge()))


@settings(max_examples=25)
@given(size=st.integers(1, 5), depth=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_best_order_is_the_nearest_of_all(size: int, depth: int, seed: int) -> None:
    own, other = torch.randn(2, size, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distances = {order: float((own - other[list(order)]).square().sum()) for order in permutations(range(size))}
    found = tuple(best_order(own, other).tolist())
    assert distances[found] == pytest.approx(min(distances.values()), abs=1e-12)


def test_however_it_is_stored_a_neuron_is_the_same() -> None:
    """Two neurons, gate rows 1 2 and 3 4, up rows 5 6 and 7 8: fused by turns, by blocks, and transposed."""
    gate, up = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])
    blocks, turns = torch.cat([gate, up]), torch.stack([gate, up], 1).flatten(0, 1)
    expected = [[1, 2, 5, 6], [3, 4, 7, 8]]
    order = torch.tensor([1, 0])
    for tensor, axis in (
        (blocks, NeuronAxis(("gate_up_proj", 0), 0, 2)),
        (turns, NeuronAxis(("gate_up_proj", 0), 0, 2, interleaved=True)),
        (turns.T.contiguous(), NeuronAxis(("gate_up_proj", 0), 1, 2, interleaved=True)),
        (blocks.T.contiguous(), NeuronAxis(("gate_up_proj", 0), 1, 2)),
    ):
        assert axis.rows(tensor).tolist() == expected
        assert axis.rows(axis.reordered(tensor, order)).tolist() == expected[::-1]


@every_family
@torch.no_grad()
def test_the_router_s_rows_are_averaged(family: str) -> None:
    """Their mean, as long as the kept one; what is one number per expert is only averaged."""
    model = tiny_model(family)
    keep = non_uniform_plan(model)
    merge = some_merge(keep, router="mean")
    plain, merged = cut(model, keep, some_merge(keep)), cut(model, keep, merge)
    for full, one, other in zip(*map(find_moe_layers, (model, plain, merged)), strict=True):
        rows, old = other.router_weight, one.router_weight
        biases = [*zip(full.correction_biases, other.correction_biases, strict=True)]
        if family == "gpt_oss":
            biases.append((full.router.bias, other.router.bias))
        for place, kept in enumerate(keep[full.name]):
            group = merge.groups[full.name].get(kept)
            if group is None:
                assert torch.equal(rows[place], old[place])
                continue
            mean = sum(weight * full.router_weight[i].double() for i, weight in group.items())
            length = full.router_weight[kept].double().norm()
            torch.testing.assert_close(rows[place].double(), mean * length / mean.norm(), rtol=1e-5, atol=1e-6)
            for whole, cut_bias in biases:
                expected = sum(weight * float(whole.flatten()[i]) for i, weight in group.items())
                assert float(cut_bias.flatten()[place]) == pytest.approx(expected, abs=1e-6)
    assert bool(logits(merged).isfinite().all())


def test_rows_by_hand() -> None:
    """The mean of (3, 0) and (0, 4) by 1/2 is (1.5, 2), 2.5 long, and becomes 3 long."""
    own = torch.tensor([3.0, 0.0])
    assert merged_row(own, [(torch.tensor([0.0, 4.0]), 0.5)]).tolist() == pytest.approx([1.8, 2.4])
    assert torch.equal(merged_row(own, [(own.clone(), 0.3), (own.clone(), 0.1)]), own)
    assert merged_row(own, [(-own, 0.5)]).tolist() == [0, 0]
    assert merged_row(torch.tensor(1.0), [(torch.tensor(-3.0), 0.5)]).item() == -1


def test_names_that_tell_nothing_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model("granitemoe")
    keep = non_uniform_plan(model)
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    tensors = {name.replace("input_linear", "first_linear"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    source = str(tmp_path / "full")
    check_mergeable(source)
    merge = some_merge(keep, align=True)
    for act in (
        lambda: check_mergeable(source, align=True),
        lambda: compact_checkpoint(source, keep, tmp_path / "out", merge=merge),
    ):
        with pytest.raises(InputError, match="aligned") as refusal:
            act()
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
