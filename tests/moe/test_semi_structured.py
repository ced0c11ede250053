"""Laws of 2:4: two of every four inputs go, the right ones, in memory and on disk alike, and nothing else changes."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.semi_structured import InputNorms, Pattern, Rule, largest_two, zero_in_model
from lightning_moe.moe.semi_structured_disk import check_prunable, zero_in_checkpoint
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.input_norms import InputSums
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.reference import stock_experts as reference
from tests.helpers.sharded import same_weights

FEW = ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"]
"""Experts on disk one by one; stacked, transposed, gate and up by turns, with biases; stacked; with shared experts."""

families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FEW else [pytest.mark.scale]) for name in FAMILIES]
)
RULES: tuple[Rule, ...] = ("random", "magnitude", "wanda")


def norms_of(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> InputNorms:
    sums = InputSums(model)
    sums.next_batch(ids, mask)
    with torch.no_grad(), sums.attached(model):
        model(input_ids=ids, attention_mask=mask)
    return sums.norms()


def pattern_of(rule: Rule, model: PreTrainedModel) -> Pattern:
    return Pattern(rule, seed=3, norms=norms_of(model, tiny_batch()) if rule == "wanda" else {})


def with_zeros(model: PreTrainedModel, pattern: Pattern) -> PreTrainedModel:
    model = copy.deepcopy(model)
    zero_in_model(model, pattern)
    return model


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, int, int, Tensor]]:
    """Layer, expert, place (gate, up, down) and matrix of each, a row for each output and a column for each input."""
    for layer in find_moe_layers(model):
        for expert in range(layer.num_experts):
            for place, matrix in enumerate(reference.expert_matrices(layer.experts, expert)):
                transposed = "GptOss" in type(layer.experts).__name__
                yield layer.name, expert, place, matrix.T if transposed else matrix


def rest(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that is no matrix of a routed expert."""
    stacks = {id(p) for layer in find_moe_layers(model) for p in layer.experts.parameters() if p.dim() == 3}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if id(tensor) not in stacks}


def slow_wanda(weight_OI: Tensor, norm_I: list[float] | None) -> list[list[float]]:
    """Group by group, in Python numbers; by magnitude without norms, and for an expert without tokens."""
    norm_I = norm_I if norm_I and any(norm_I) else None
    rows = []
    for row in weight_OI.tolist():
        kept = [0.0] * len(row)
        for start in range(0, len(row), 4):
            importance = {i: abs(row[i]) * (norm_I[i] if norm_I else 1.0) for i in range(start, start + 4)}
            for i in sorted(importance, key=lambda i: (-importance[i], i))[:2]:
                kept[i] = row[i]
        rows.append(kept)
    return rows


@families
def test_two_of_every_four_go_and_nothing_else(family: str, tmp_path: Path) -> None:
    """Kept weights keep their bits. On disk, tensor by tensor and in several files, they are the same bits."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    before, others = [matrix for *_, matrix in matrices(model)], rest(model)
    for rule in RULES:
        pattern = pattern_of(rule, model)
        pruned = copy.deepcopy(model)
        zeros = zero_in_model(pruned, pattern)
        assert zeros == sum(matrix.numel() for matrix in before) // 2
        for old, (*_, new) in zip(before, matrices(pruned), strict=True):
            zero = new == 0
            assert bool((zero.unflatten(1, (-1, 4)).sum(-1) == 2).all())
            assert torch.equal(new[~zero], old[~zero])
        assert all(torch.equal(tensor, others[name]) for name, tensor in rest(pruned).items())

        target = tmp_path / rule
        assert zero_in_checkpoint(str(tmp_path / "model"), pattern, target, shard_bytes=30_000) == zeros
        assert len(list(target.glob("*.safetensors"))) > 1
        assert (target / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
        same_weights(AutoModelForCausalLM.from_pretrained(target), pruned)


@families
def test_the_right_ones_go(family: str) -> None:
    """Against experts run one by one: magnitude keeps the two largest, Wanda those of the largest weight times norm."""
    model = tiny_model(family)
    ids, mask = tiny_batch(seed=4), torch.ones(2, 24, dtype=torch.long)
    mask[1, 15:] = 0
    layers = find_moe_layers(model)
    parts = [(layer.router, layer.experts) for layer in layers]
    calls = reference.watch(model, parts, input_ids=ids, attention_mask=mask)
    norms = norms_of(model, ids, mask)
    slow: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for layer, call in zip(layers, calls, strict=True):
        for expert in range(layer.num_experts):
            tokens = [t for t, chosen in enumerate(call.ids_TK.tolist()) if mask.flatten()[t] and expert in chosen]
            outer = call.hidden_TH[tokens].double()
            inner = reference.inner_activations(layer.experts, expert, outer)
            slow[layer.name, expert] = outer.norm(dim=0).tolist(), inner.norm(dim=0).tolist()
        first, second = (norms[layer.name][name].double() for name in ("gate_up_proj", "down_proj"))
        for found, turn in ((first, 0), (second, 1)):
            wanted = torch.tensor([slow[layer.name, e][turn] for e in range(layer.num_experts)], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    pruned = [with_zeros(model, pattern) for pattern in (Pattern("magnitude"), Pattern("wanda", norms=norms))]
    for (name, expert, place, old), (*_, by_size), (*_, by_norm) in zip(*map(matrices, (model, *pruned)), strict=True):
        assert by_size.tolist() == slow_wanda(old, None)
        assert by_norm.tolist() == slow_wanda(old, slow[name, expert][place == 2])
    assert any(not torch.equal(a, b) for (*_, a), (*_, b) in zip(*map(matrices, pruned), strict=True))


def test_an_expert_without_tokens_goes_by_magnitude() -> None:
    model = tiny_model("mixtral")
    norms = {layer: dict(stacks) for layer, stacks in norms_of(model, tiny_batch()).items()}
    layer = next(iter(norms))
    norms[layer] = {name: norm.index_fill(0, torch.tensor([5]), 0.0) for name, norm in norms[layer].items()}
    pattern = Pattern("wanda", norms=norms)
    assert pattern.experts_without_inputs() == 1
    by_size, by_norm = (with_zeros(model, pattern_of(rule, model)) for rule in ("magnitude", "wanda"))
    models = (with_zeros(model, pattern), by_size, by_norm)
    for (name, expert, _, found), (*_, size), (*_, norm) in zip(*map(matrices, models), strict=True):
        assert not torch.equal(size, norm)
        assert torch.equal(found, size if (name, expert) == (layer, 5) else norm)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=24, max_size=24))
def test_exactly_two_stay_and_ties_fall_to_the_first(values: list[float]) -> None:
    importance = torch.tensor(values).view(3, 8)
    kept = largest_two(importance)
    for row, mask in zip(importance.view(-1, 4).tolist(), kept.view(-1, 4).tolist(), strict=True):
        wanted = sorted(range(4), key=lambda i: (-row[i], i))[:2]
        assert [i for i in range(4) if mask[i]] == sorted(wanted)


def test_random_is_fair_and_follows_the_seed() -> None:
    """Each of the six ways to keep two of four is drawn as often; another seed, matrix or expert draws anew."""
    model = tiny_model("mixtral")
    masks = [[(matrix != 0) for *_, matrix in matrices(with_zeros(model, Pattern("random", s)))] for s in (0, 0, 1)]
    assert all(torch.equal(one, two) for one, two in zip(masks[0], masks[1], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(masks[0], masks[2], strict=True))
    assert len({mask.flatten().numpy().tobytes() for mask in masks[0]}) == len(masks[0])
    drawn = Counter(tuple(group) for mask in masks[0] for group in mask.view(-1, 4).tolist())
    groups = sum(drawn.values())
    assert len(drawn) == 6 and all(abs(count / groups - 1 / 6) < 0.01 for count in drawn.values())


def test_refused_in_one_line(tmp_path: Path) -> None:
    """Inputs that do not come in fours, quantised experts: before anything is changed, in memory and on disk."""
    odd = tiny_model("qwen2_moe", moe_intermediate_size=18)
    odd.save_pretrained(tmp_path / "odd")
    before = copy.deepcopy(odd)
    with pytest.raises(InputError, match="down_proj take 18 inputs, no multiple of 4"):
        zero_in_model(odd, Pattern("magnitude"))
    same_weights(odd, before)
    with pytest.raises(InputError, match="no multiple of 4"):
        check_prunable(str(tmp_path / "odd"))

    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    packed = {name: t.to(torch.float8_e4m3fn) if ".experts." in name else t for name, t in tensors.items()}
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    for refuse in (check_prunable, lambda path: zero_in_checkpoint(path, Pattern("magnitude"), tmp_path / "out")):
        with pytest.raises(InputError, match=r"stored as F8_E4M3.*quantised"):
            refuse(str(tmp_path / "packed"))
    assert not (tmp_path / "out").exists()


def test_an_old_checkpoint_goes_through_memory(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "old")
    torch.save(load_file(tmp_path / "old" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    pattern = pattern_of("wanda", model)
    zero_in_checkpoint(str(tmp_path / "old"), pattern, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.bin"))
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), with_zeros(model, pattern))


def test_the_layers_of_a_non_uniform_model_and_its_16_bits(tmp_path: Path) -> None:
    """Its code travels along; norms and weights meet in float32."""
    from lightning_moe.moe.checkpoints import load_model, save_model

    model = tiny_model("mixtral").bfloat16()
    first, second = (layer.name for layer in find_moe_layers(model))
    keep_experts(model, {first: [0, 3, 5], second: [1, 2]})
    save_model(model, tmp_path / "model")
    pattern = pattern_of("wanda", model)
    zero_in_checkpoint(str(tmp_path / "model"), pattern, tmp_path / "new")
    found = load_model(str(tmp_path / "new"))
    assert found.dtype == torch.bfloat16
    state = with_zeros(model, pattern).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert {file.name for file in (tmp_path / "new").iterdir()} == {f.name for f in (tmp_path / "model").iterdir()}
