"""Experts in 4 or 8 bits: they compute what their unpacked weights would, and take the memory of packed ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import save_model
from lightning_moe.moe.experts import IMPLEMENTATION, ExpertHooks, expert_hooks
from lightning_moe.moe.export import export_model
from lightning_moe.moe.layers import UNPACK, find_moe_layers
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.quantisation import Quantisation, quantise_experts
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding
from lightning_moe.moe.split_tensors import local, whole
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.sharded import on_ranks, written

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
BITS: dict[Quantisation, int] = {"nf4": 4, "int8": 8}


def packed(family: str, kind: Quantisation) -> PreTrainedModel:
    model = tiny_model(family, **SIZES)
    for layer in find_moe_layers(model):
        quantise_experts(layer, kind)
    model.set_experts_implementation(IMPLEMENTATION)
    return model


def unpacked(family: str, kind: Quantisation) -> PreTrainedModel:
    """The same model with the rounded weights in the place of the packed ones."""
    model, source = tiny_model(family, **SIZES), packed(family, kind)
    for layer, other in zip(find_moe_layers(model), find_moe_layers(source), strict=True):
        for name, unpack in vars(other.experts)[UNPACK].items():
            getattr(layer.experts, name).data.copy_(unpack())
    model.set_experts_implementation(IMPLEMENTATION)
    return model


def run(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a batch, and the gradients that reach gates on the experts and, through them, the embeddings."""
    layers, gates_E = find_moe_layers(model), torch.ones(8, requires_grad=True)
    with expert_hooks(model, layers, {layer.name: ExpertHooks(gates_E=gates_E) for layer in layers}):
        logits = model(input_ids=tiny_batch()).logits
        logits.float().square().mean().backward()
    below = model.get_input_embeddings().weight.grad
    assert gates_E.grad is not None and below is not None
    return logits.detach(), gates_E.grad, whole(below)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_computes_with_its_own_weights(family: str, kind: Quantisation) -> None:
    found = run(packed(family, kind))
    for mine, yours in zip(found, run(unpacked(family, kind)), strict=True):
        assert torch.equal(mine, yours) and float(mine.abs().max()) > 0
    stock = run(tiny_model(family, **SIZES))[0]
    assert 0 < float((found[0] - stock).norm() / stock.norm()) < (0.5 if kind == "nf4" else 0.15)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_takes_the_memory_of_packed_weights(kind: Quantisation) -> None:
    stock, model = tiny_model("mixtral", **SIZES), packed("mixtral", kind)
    for layer, before in zip(find_moe_layers(model), find_moe_layers(stock), strict=True):
        assert layer.shape == before.shape
        for name, stack in stacked_parameters(layer.experts).items():
            assert stack.nbytes * 8 == getattr(before.experts, name).numel() * BITS[kind]
            assert not stack.requires_grad
        for matrix, stored in zip(layer.expert_matrices, before.expert_matrices, strict=True):
            assert matrix.shape == stored.shape
            assert float(((matrix - stored).norm() / stored.norm()).detach()) < (0.15 if kind == "nf4" else 0.02)


def test_nothing_unpacked_is_kept_for_backward() -> None:
    """Each stack is unpacked once for the forward and once more for the backward; none is among what is saved."""
    model = packed("mixtral", "nf4")
    sizes = {stack[0].numel() * stack.shape[0] for layer in find_moe_layers(tiny_model("mixtral", **SIZES))
             for stack in stacked_parameters(layer.experts).values()}  # fmt: skip
    calls = []
    for layer in find_moe_layers(model):
        table = vars(layer.experts)[UNPACK]
        for name, unpack in list(table.items()):
            table[name] = lambda unpack=unpack: (calls.append(1), unpack())[1]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        loss = model(input_ids=tiny_batch()).logits.square().mean()
    assert not sizes & set(saved)
    forward = len(calls)
    loss.backward()
    assert forward == 4 and len(calls) == 8


def test_what_cannot_be_packed_is_refused() -> None:
    layer = find_moe_layers(tiny_model("mixtral", hidden_size=36, intermediate_size=9))[0]
    with pytest.raises(InputError, match="no multiple of 64"):
        quantise_experts(layer, "nf4")


def test_packed_experts_can_be_neither_saved_nor_cut(tmp_path: Path) -> None:
    model = packed("mixtral", "int8")
    with pytest.raises(InputError, match=r"packed experts .* cannot be saved; leave quantize out"):
        save_model(model, tmp_path / "out")
    with pytest.raises(InputError, match=r"packed experts .* cannot be cut; leave quantize out"):
        keep_experts(model, {find_moe_layers(model)[0].name: [0, 1]})
    assert not (tmp_path / "out").exists()


def load_packed(kind: Quantisation, folder: Path, sharding: Sharding) -> PreTrainedModel:
    path = written("mixtral", folder, "packable", **SIZES)
    split = load_sharded(str(path), sharding, prepare=lambda layer: quantise_experts(layer, kind))
    split.set_experts_implementation(IMPLEMENTATION)
    return split


def split_as_one(kind: Quantisation, folder: Path, sharding: Sharding) -> None:
    """Each rank holds its part of the packed bytes; discovery, logits and gradients are those of one process."""
    split, alone = load_packed(kind, folder, sharding), packed("mixtral", kind)
    for mine, yours in zip(run(split), run(alone), strict=True):
        torch.testing.assert_close(mine, yours)
    for one, other in zip(find_moe_layers(split), find_moe_layers(alone), strict=True):
        assert one.shape == other.shape
        for mine, yours in zip(one.expert_matrices, other.expert_matrices, strict=True):
            assert torch.equal(mine, yours)
        for name, stack in stacked_parameters(one.experts).items():
            assert local(stack).dtype == torch.uint8
            assert sharding.ranks * local(stack).numel() <= getattr(other.experts, name).numel() * 9 // 8


def in_mixed_precision(kind: Quantisation, folder: Path, sharding: Sharding) -> None:
    """Weights are gathered in 16 bits, packed bytes as they are."""
    split = load_packed(kind, folder, replace(sharding, gathered=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(split)
    for mine, yours in zip(found, run(packed("mixtral", kind)), strict=True):
        assert float((mine - yours).norm() / yours.norm()) < 0.1


def no_export(folder: Path, sharding: Sharding) -> None:
    """Whose weights would be bytes without their scales."""
    with pytest.raises(InputError, match=r"packed experts"):
        export_model(load_packed("nf4", folder, sharding), folder / "exported")
    assert not (folder / "exported").exists()


def test_split_over_two(tmp_path: Path) -> None:
    checks = [partial(check, kind) for kind in BITS for check in (split_as_one, in_mixed_precision)]
    on_ranks(2, tmp_path, *checks, no_export)


@pytest.mark.scale
def test_split_over_three(tmp_path: Path) -> None:
    """Packed bytes, of which 8 experts have a power of two, divide by no dimension."""
    on_ranks(3, tmp_path, *(partial(split_as_one, kind) for kind in BITS))
