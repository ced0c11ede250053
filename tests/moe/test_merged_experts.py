"""The laws of merging: in memory and on disk alike, over all model families."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import save_model
from lightning_moe.moe.compaction import check_mergeable, compact_checkpoint
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.merged_experts import NO_MERGE, Merge, merged_tensor
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, NUM_EXPERTS, tiny_batch, tiny_model
from tests.helpers.plans import Keep, non_uniform_plan, some_merge, uniform_plan
from tests.helpers.reference import merging as reference

every_family = pytest.mark.parametrize("family", FAMILIES)
NUM_FILES = 5


def cut(model: PreTrainedModel, keep: Keep, merge: Merge = NO_MERGE) -> PreTrainedModel:
    model = copy.deepcopy(model)
    keep_experts(model, keep, merge)
    return model


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_scattered(model: PreTrainedModel, folder: Path) -> None:
    """Write a checkpoint in which neighbours lie in different files, the experts of a layer among them."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::NUM_FILES]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def bits_of(model: PreTrainedModel) -> dict[str, bytes]:
    return bits({name: tensor.detach() for name, tensor in model.state_dict().items()})


@every_family
@pytest.mark.parametrize("plan", [uniform_plan, non_uniform_plan])
def test_merged_in_memory_equals_a_slow_reference(family: str, plan: Callable[[PreTrainedModel], Keep]) -> None:
    """Experts in groups become their mean, biases included; all else is as plain pruning leaves it, bit by bit."""
    model = tiny_model(family)
    before = bits_of(model)
    keep = plan(model)
    merge = some_merge(keep)
    plain, merged = cut(model, keep), cut(model, keep, merge)
    assert bits_of(model) == before
    assert bits_of(plain).keys() == bits_of(merged).keys()
    changed = {name for name, data in bits_of(merged).items() if data != bits_of(plain)[name]}
    assert changed and all(".experts." in name for name in changed)
    layers = zip(*(find_moe_layers(one) for one in (model, plain, merged)), strict=True)
    for full_layer, plain_layer, merged_layer in layers:
        groups = merge.groups[full_layer.name]
        assert sum(len(group) - 1 for group in groups.values()) == NUM_EXPERTS - len(keep[full_layer.name])
        plain_tensors = dict(plain_layer.experts.named_parameters(recurse=False))
        assert ("down_proj_bias" in plain_tensors) == (family == "gpt_oss")
        for name, tensor in merged_layer.experts.named_parameters(recurse=False):
            assert tensor.requires_grad
            for position, expert in enumerate(keep[full_layer.name]):
                if expert in groups:
                    expected = reference.mean_experts(full_layer.experts, groups[expert])[name]
                    torch.testing.assert_close(tensor[position].double(), expected, atol=1e-7, rtol=1e-6)
                    assert not torch.equal(tensor[position], plain_tensors[name][position])
                else:
                    assert torch.equal(tensor[position], plain_tensors[name][position])
    with torch.no_grad():
        assert bool(merged(tiny_batch()).logits.isfinite().all())


@every_family
@pytest.mark.parametrize("plan", [uniform_plan, non_uniform_plan])
def test_merging_on_disk_equals_merging_in_memory(
    family: str, plan: Callable[[PreTrainedModel], Keep], tmp_path: Path
) -> None:
    """Also where the experts of a group lie in different files, and are written to different ones.

    Aligned, with the router's rows; the test of types below does without, and in half precision with.
    """
    model = tiny_model(family)
    keep = plan(model)
    merge = some_merge(keep, align=True, router="mean")
    expected = cut(model, keep, merge)
    save_scattered(model, tmp_path / "full")
    for shard_bytes in (4 << 30, 20_000):
        out = tmp_path / str(shard_bytes)
        compact_checkpoint(str(tmp_path / "full"), keep, out, shard_bytes, merge=merge)
        assert bits_of(loaded(out)) == bits_of(expected)
    save_model(expected, tmp_path / "memory")
    assert bits(weights_of(out)) == bits(weights_of(tmp_path / "memory"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "ernie4_5_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_mean_is_exact_and_rounded_once(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family).to(dtype)
    keep = non_uniform_plan(model)
    merge = some_merge(keep)
    merged = cut(model, keep, merge)
    save_scattered(model, tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", merge=merge)
    on_disk = weights_of(tmp_path / "out")
    stored = {name: tensor.dtype for name, tensor in weights_of(tmp_path / "full").items()}
    assert all(tensor.dtype == stored[name] for name, tensor in on_disk.items())
    save_model(merged, tmp_path / "memory")
    assert bits(on_disk) == bits(weights_of(tmp_path / "memory"))
    step = torch.finfo(dtype).eps
    for full_layer, layer in zip(find_moe_layers(model), find_moe_layers(merged), strict=True):
        for name, tensor in layer.experts.named_parameters(recurse=False):
            assert tensor.dtype == dtype
            for expert, group in merge.groups[full_layer.name].items():
                expected = reference.mean_experts(full_layer.experts, group)[name]
                found = tensor[keep[full_layer.name].index(expert)].double()
                torch.testing.assert_close(found, expected, atol=min(1e-7, step), rtol=step)


def test_the_scattered_checkpoint_is_scattered(tmp_path: Path) -> None:
    """What the tests around it stand on: the same tensor of different experts lies in different files."""
    save_scattered(tiny_model("mixtral"), tmp_path)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert len({weight_map[name.format(expert)] for expert in range(NUM_EXPERTS)}) == NUM_FILES


@every_family
def test_joined_experts_without_weight_change_nothing(family: str, tmp_path: Path) -> None:
    """Plain pruning, bit by bit, whether the rest weighs 0 or is not named."""
    model = tiny_model(family)
    keep = non_uniform_plan(model)
    groups = some_merge(keep).groups
    model.save_pretrained(tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "plain")
    for turn, merge in enumerate(
        Merge(these, align=True, router="mean")
        for these in (
            {name: {k: {i: float(i == k) for i in g} for k, g in of.items()} for name, of in groups.items()},
            {name: {k: {k: 1.0} for k in of} for name, of in groups.items()},
            {},
        )
    ):
        assert bits_of(cut(model, keep, merge)) == bits_of(cut(model, keep))
        compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / str(turn), merge=merge)
        assert bits(weights_of(tmp_path / str(turn))) == bits(weights_of(tmp_path / "plain"))


@every_family
def test_merging_copies_changes_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    keep = non_uniform_plan(model)
    merge = some_merge(keep)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            for stack in layer.experts.parameters(recurse=False):
                for kept, group in merge.groups[layer.name].items():
                    for expert in group:
                        stack[expert] = stack[kept]
    assert bits_of(cut(model, keep, merge)) == bits_of(cut(model, keep))
    model.save_pretrained(tmp_path / "full")
    for name, groups in (("plain", NO_MERGE), ("merged", merge)):
        compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / name, merge=groups)
    assert bits(weights_of(tmp_path / "merged")) == bits(weights_of(tmp_path / "plain"))


def test_a_dropped_expert_in_no_group_is_thrown_away() -> None:
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    name = next(iter(keep))
    merged = cut(model, keep, Merge({name: {2: {2: 0.75, 6: 0.25}}}))
    plain = cut(model, keep)
    changed = {key for key, data in bits_of(merged).items() if data != bits_of(plain)[key]}
    assert {key.rpartition(".experts.")[0] for key in changed} == {name}


def test_what_weighs_nothing_is_not_looked_at() -> None:
    """0 times infinity is not 0."""
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        layer.experts.down_proj[3] = torch.inf
    assert bits_of(cut(model, keep, Merge({layer.name: {0: {0: 1.0, 3: 0.0}}}))) == bits_of(cut(model, keep))


def test_the_order_of_a_group_says_nothing() -> None:
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    merge = some_merge(keep)
    turned = {
        name: {k: dict(reversed(group.items())) for k, group in reversed(groups.items())}
        for name, groups in merge.groups.items()
    }
    assert bits_of(cut(model, keep, Merge(turned))) == bits_of(cut(model, keep, merge))


def test_by_hand() -> None:
    """1 + 0.25 (5 - 1) + 0.25 (-3 - 1) = 1, 2 + 0.25 (0 - 2) + 0.25 (4 - 2) = 2, 0 + 0.25 * 8 + 0.25 * 4 = 3."""
    own, one, other = (torch.tensor(row, dtype=torch.bfloat16) for row in ([1, 2, 0], [5, 0, 8], [-3, 4, 4]))
    assert merged_tensor(own, [(one, 0.25), (other, 0.25)]).tolist() == [1, 2, 3]


def test_old_weight_files_are_merged_as_well(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    merge = some_merge(keep)
    save_model(model, tmp_path / "full")
    torch.save(load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "full" / "pytorch_model.bin")
    (tmp_path / "full" / "model.safetensors").unlink()
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", merge=merge)
    assert bits_of(loaded(tmp_path / "out")) == bits_of(cut(model, keep, merge))
    check_mergeable(str(tmp_path / "full"))


def quantised_copy(folder: Path, part: str, dtype: torch.dtype) -> Path:
    """The checkpoint with its experts' tensors in a type that packs numbers."""
    file = folder / "model.safetensors"
    tensors = {
        name: tensor.to(dtype) if ".experts." in name and part in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_quantised_experts_are_refused(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Plain pruning copies them; merging would have to know what their bits mean."""
    model = tiny_model(family)
    keep = uniform_plan(model)
    merge = some_merge(keep)
    model.save_pretrained(tmp_path / "full")
    check_mergeable(str(tmp_path / "full"))
    source = str(quantised_copy(tmp_path / "full", "down" if family == "gpt_oss" else "w2", dtype))
    for act in (lambda: check_mergeable(source), lambda: compact_checkpoint(source, keep, tmp_path / "m", merge=merge)):
        with pytest.raises(InputError, match="quantised") as refusal:
            act()
        assert "\n" not in str(refusal.value) and ".experts." in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    compact_checkpoint(source, keep, tmp_path / "plain")
    compact_checkpoint(source, keep, tmp_path / "empty", merge=NO_MERGE)

    for layer in find_moe_layers(model):
        layer.experts.down_proj = torch.nn.Parameter(layer.experts.down_proj.to(dtype), requires_grad=False)
    before = bits_of(model)
    with pytest.raises(InputError, match="quantised"):
        keep_experts(model, keep, merge)
    assert bits_of(model) == before


def test_a_missing_tensor_of_a_joined_expert_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if ".experts.3.w2" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="incomplete") as refusal:
        compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", merge=some_merge(keep))
    assert "\n" not in str(refusal.value) and gone in str(refusal.value)
    bad = tensors | {gone: torch.full_like(tensors[gone], torch.nan)}
    save_file(bad, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite") as refusal:
        compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", merge=some_merge(keep))
    assert gone in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("expert", [0, 3])
def test_a_damaged_stack_is_refused(bad: float, expert: int, tmp_path: Path) -> None:
    """Of a kept expert or of one that joins it."""
    model = tiny_model("gpt_oss")
    keep = uniform_plan(model)
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        layer.experts.down_proj_bias[expert, 0] = bad
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(InputError, match="down_proj_bias holds values that are not finite"):
        compact_checkpoint(
            str(tmp_path / "full"), keep, tmp_path / "out", merge=Merge({layer.name: {0: {0: 0.9, 3: 0.1}}})
        )


FAULTS: dict[str, tuple[object, str]] = {
    "unknown expert": ({0: {0: 0.5, 8: 0.5}}, "expert 8"),
    "expert below": ({0: {0: 0.5, -1: 0.5}}, "expert -1"),
    "an id in words": ({0: {0: 0.5, "1": 0.5}}, "expert '1'"),
    "into a dropped one": ({1: {1: 0.5, 3: 0.5}}, "expert 1, which it does not keep"),
    "a kept one": ({0: {0: 0.5, 2: 0.5}}, "expert 2 into 0, but keeps it"),
    "twice": ({0: {0: 0.5, 1: 0.5}, 2: {2: 0.5, 1: 0.5}}, "expert 1 twice"),
    "weights too large": ({0: {0: 0.5, 1: 0.51}}, "sum to 1.01"),
    "weights too small": ({0: {0: 0.5, 1: 0.49}}, "sum to 0.99"),
    "own weight left out": ({0: {1: 0.4}}, "its own weight"),
    "an empty group": ({0: {}}, "sum to 0"),
    "not a number": ({0: {0: 0.5, 1: float("nan")}}, "weight nan"),
    "infinite": ({0: {0: 0.5, 1: float("inf")}}, "weight inf"),
    "below 0": ({0: {0: 1.5, 1: -0.5}}, "weight 1.5"),
    "in words": ({0: {0: 0.5, 1: "half"}}, "'half'"),
    "true": ({0: {0: 0.0, 1: True}}, "True"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_groups_change_nothing(fault: str, tmp_path: Path) -> None:
    groups, said = FAULTS[fault]
    model = tiny_model("mixtral")
    save_model(model, tmp_path / "full")
    keep, before = uniform_plan(model), bits_of(model)
    name = list(keep)[1]
    merge = Merge({name: groups})  # type: ignore[dict-item]
    for act in (
        lambda: keep_experts(model, keep, merge),
        lambda: compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", merge=merge),
    ):
        with pytest.raises(InputError) as refusal:
            act()
        message = str(refusal.value)
        assert "\n" not in message and len(message) < 400 and name in message and said in message
    assert bits_of(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_groups_of_other_layers_are_refused() -> None:
    model = tiny_model("mixtral")
    first, second = (layer.name for layer in find_moe_layers(model))
    for layer, said in (("model.layers.7.mlp", "model.layers.7.mlp"), (second, "keeps it too")):
        with pytest.raises(InputError, match=said):
            keep_experts(model, {first: [0, 1]}, Merge({layer: {0: {0: 0.5, 4: 0.5}}}))
