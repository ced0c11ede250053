"""Layer Drop and Block Drop: a model without some MoE blocks or decoder layers, in memory, on disk and loaded again.

The reference is the full model with a hook that makes the block add zeros, or the decoder layer return its input.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.export import export_model
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.left_out import layers_left_out
from lightning_moe.moe.non_uniform import COUNT_NAMES
from lightning_moe.moe.pruned_size import pruned_size
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.skip_tables import SkipTable, set_skipping
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.reference.stock_experts import zeros_like
from tests.helpers.thinning import thinned

DEEP: dict[str, dict[str, Any]] = {
    **{family: {"num_hidden_layers": config.get("num_hidden_layers", 2) + 1} for family, config in FAMILIES.items()},
    "minimax": {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "qwen3_next": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"num_hidden_layers": 4},
}
"""One layer more than in `families.py`, so that some are left behind the dropped one."""

SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "every second layer": ("qwen2_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2}),
    "dense by number": ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [2]}),
    "a first and a last": (
        "ernie4_5_moe",
        {"num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
    ),
    "sliding windows": (
        "qwen2_moe",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
"""Configs that say in their own way which layer is of which kind."""

MODELS = {family: (family, overrides) for family, overrides in DEEP.items()} | SPECIAL
ORDER = ["mixtral", "every second layer", "gpt_oss", "deepseek_v3", *MODELS]


def made(name: str) -> PreTrainedModel:
    family, overrides = MODELS[name]
    return tiny_model(family, **overrides)


def dropped_name(model: PreTrainedModel, name: str) -> str:
    """The first MoE layer; of Jamba's the last, without which its periods still hold."""
    return find_moe_layers(model)[-1 if name == "jamba" else 0].name


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Of a copy: tensors that are mapped from a file lie at odd addresses, where products round otherwise."""
    logits: Tensor = copy.deepcopy(model).eval()(tiny_batch(), use_cache=False).logits
    return logits


@contextmanager
def hooked(model: PreTrainedModel, zero: Sequence[str] = (), pass_by: Sequence[str] = ()) -> Iterator[None]:
    """The reference: these MoE blocks add zeros, and the decoder layers of those return their input."""
    with ExitStack() as hooks:
        for name in zero:
            block = model.get_submodule(name)
            hooks.callback(block.register_forward_hook(lambda _, args, output: zeros_like(output)).remove)
        for name in pass_by:
            decoder = model.get_submodule(name.rpartition(".")[0])
            hooks.callback(decoder.register_forward_hook(lambda _, args, output: args[0]).remove)
        yield


def config_on_disk(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def check_folder(folder: Path, memory: PreTrainedModel, expected: Tensor, tmp_path: Path) -> None:
    """The same tensors as the model cut in memory would save, and the same logits when it is loaded."""
    save_model(memory, tmp_path / "memory")
    one, other = (load_file(file / "model.safetensors") for file in (folder, tmp_path / "memory"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(logits_of(load_model(str(folder))), expected)
    assert torch.equal(logits_of(load_model(str(tmp_path / "memory"))), expected)


@pytest.mark.parametrize("name", thinned(dict.fromkeys(ORDER), 4))
@pytest.mark.parametrize("what", ["layers", "blocks"])
def test_it_is_the_full_model_with_a_hook(name: str, what: str, tmp_path: Path) -> None:
    model, folder = made(name), tmp_path / "full"
    model.save_pretrained(folder)
    gone = dropped_name(model, name)
    keep, blocks = {gone: []}, [gone] if what == "blocks" else []
    with hooked(model, [] if blocks else [gone], blocks):
        expected = logits_of(model)
    assert not torch.equal(expected, logits_of(model))

    before = len(find_moe_layers(model))
    with layers_left_out(model, find_moe_layers(model), keep, blocks):
        assert torch.equal(logits_of(model), expected)
        assert len(find_moe_layers(model)) == before - 1
    cut = copy.deepcopy(model)
    keep_experts(cut, keep, blocks=blocks)
    assert torch.equal(logits_of(cut), expected)
    assert len(find_moe_layers(cut)) == before - 1
    numbers = [vars(module)["layer_idx"] for module in cut.modules() if "layer_idx" in vars(module)]
    assert set(numbers) == set(range(cut.config.num_hidden_layers)), "each layer has its place in the cache"

    target = tmp_path / "cut"
    compact_checkpoint(str(folder), keep, target, blocks=blocks)
    check_folder(target, cut, expected, tmp_path)
    tensors = load_file(target / "model.safetensors").values()
    size = {"parameters": cut.num_parameters(), "bytes": sum(tensor.nbytes for tensor in tensors)}
    assert pruned_size(str(folder), keep, blocks) == size
    config = config_on_disk(target)
    if blocks:  # a stock checkpoint
        assert not {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
        assert not list(target.glob("*.py"))
        assert config["num_hidden_layers"] == model.config.num_hidden_layers - 1
    else:
        layers = {str(layer.parts.index): 0 if layer.name == gone else 8 for layer in find_moe_layers(model)}
        count_name = next(name for name in COUNT_NAMES if name in config)
        assert config["per_layer_config"] == {index: {count_name: count} for index, count in layers.items()}
        assert config[count_name] == 9, "stock transformers must find no layer as it builds it"
        assert config["auto_map"] and config["num_hidden_layers"] == model.config.num_hidden_layers


# ------------------------------------------------------------------------------------------- cuts in a row


def test_layers_blocks_and_experts_in_one_cut_and_one_by_one(tmp_path: Path) -> None:
    """What was dropped earlier stays dropped, under its new number."""
    model = tiny_model("mixtral", num_hidden_layers=5)
    names = [layer.name for layer in find_moe_layers(model)]
    keep = {names[0]: list(range(8)), names[1]: [], names[2]: [], names[3]: [], names[4]: [1, 3, 6]}
    blocks = [names[2]]
    once = copy.deepcopy(model)
    keep_experts(once, keep, blocks=blocks)
    with hooked(model, [names[1], names[3]], blocks):
        cut = copy.deepcopy(model)
        keep_experts(cut, {names[4]: [1, 3, 6]})
        expected = logits_of(cut)
    assert torch.equal(logits_of(once), expected)

    model.save_pretrained(tmp_path / "0")
    compact_checkpoint(str(tmp_path / "0"), {names[1]: [], names[3]: []}, tmp_path / "1")
    compact_checkpoint(str(tmp_path / "1"), {}, tmp_path / "2", blocks=blocks)
    assert [layer.parts.index for layer in find_moe_layers(load_model(str(tmp_path / "2")))] == [0, 3]
    compact_checkpoint(str(tmp_path / "2"), {"model.layers.3.mlp": [1, 3, 6]}, tmp_path / "3")
    compact_checkpoint(str(tmp_path / "0"), keep, tmp_path / "once", blocks=blocks)
    for folder in (tmp_path / "3", tmp_path / "once"):
        assert torch.equal(logits_of(load_model(str(folder))), expected)
        assert config_on_disk(folder)["per_layer_config"] == config_on_disk(tmp_path / "once")["per_layer_config"]
    assert config_on_disk(tmp_path / "3") == config_on_disk(tmp_path / "once")


def test_skip_tables_are_cut_along(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_hidden_layers=4)
    names = [layer.name for layer in find_moe_layers(model)]
    generator = torch.Generator().manual_seed(3)
    tables = {index: SkipTable(0.7, 1 + torch.rand(8, 8, generator=generator)) for index in range(4)}
    set_skipping(model, tables)
    model.save_pretrained(tmp_path / "full")
    with hooked(model, names[2:3], names[:1]):
        expected = logits_of(model)
    keep = {names[0]: [], names[2]: []}
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "cut", blocks=names[:1])
    before, after = (config_on_disk(tmp_path / part)["expert_skipping"]["layers"] for part in ("full", "cut"))
    assert after == {"0": before["1"], "2": before["3"]}
    keep_experts(model, keep, blocks=names[:1])
    for cut in (model, load_model(str(tmp_path / "cut"))):
        assert cut.get_experts_implementation()[""] == "expert_skipping"
        assert torch.equal(logits_of(cut), expected)


def test_router_logits_balance_loss_and_the_cache(tmp_path: Path) -> None:
    """Of the layers that are left, as transformers gives them; a cache has a place for each."""
    model = tiny_model("mixtral", num_hidden_layers=3, output_router_logits=True)
    names = [layer.name for layer in find_moe_layers(model)]
    for keep, blocks, left in (({names[0]: []}, [], 2), ({names[1]: []}, names[1:2], 2)):
        cut = copy.deepcopy(model)
        keep_experts(cut, keep, blocks=blocks)
        save_model(cut, tmp_path / f"{len(blocks)}")
        loaded = load_model(str(tmp_path / f"{len(blocks)}"))
        inputs = {"input_ids": tiny_batch(), "labels": tiny_batch(), "output_router_logits": True}
        with torch.no_grad():
            one, other = (network.eval()(**inputs) for network in (cut, loaded))
        assert [logits.shape[-1] for logits in one.router_logits] == [8] * left
        assert float(one.aux_loss) > 0
        torch.testing.assert_close(other.loss, one.loss, atol=1e-6, rtol=1e-6)
        ids = tiny_batch(1, 6)
        grown = loaded.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(grown, loaded.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_old_checkpoints_go_through_memory(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "old")
    torch.save(load_file(tmp_path / "old" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    names = [layer.name for layer in find_moe_layers(model)]
    compact_checkpoint(str(tmp_path / "old"), {names[2]: []}, tmp_path / "cut", blocks=names[:1])
    with hooked(model, names[2:], names[:1]):
        assert torch.equal(logits_of(load_model(str(tmp_path / "cut"))), logits_of(model))


@pytest.mark.parametrize("left", [8, 4])
def test_what_older_versions_wrote_is_read_and_written_as_it_is_now(left: int, tmp_path: Path) -> None:
    """They left the count for all layers as it was, and stock transformers loaded the layers that were left."""
    model, keep = tiny_model("mixtral", num_hidden_layers=3), [0, 2, 3, 5]
    names = [layer.name for layer in find_moe_layers(model)]
    keep_experts(model, {names[0]: keep, names[1]: [], names[2]: keep} if left == 4 else {names[1]: []})
    expected = logits_of(model)
    save_model(model, tmp_path / "old")
    now = config_on_disk(tmp_path / "old")
    old = now | {"num_local_experts": left, "per_layer_config": {"1": {"num_local_experts": 0}}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    assert torch.equal(logits_of(load_model(str(tmp_path / "old"))), expected)
    save_model(load_model(str(tmp_path / "old")), tmp_path / "saved")
    compact_checkpoint(str(tmp_path / "old"), {}, tmp_path / "compacted")
    for folder in (tmp_path / "saved", tmp_path / "compacted"):
        assert config_on_disk(folder) == now
        assert torch.equal(logits_of(load_model(str(folder))), expected)


def test_experts_are_masked_out_of_what_is_left(tmp_path: Path) -> None:
    """An export that leaves masked experts out does not forget the layers that were dropped before."""
    model = tiny_model("mixtral", num_hidden_layers=4)
    names = [layer.name for layer in find_moe_layers(model)]
    keep_experts(model, {names[1]: []})
    with mask_plan(find_moe_layers(model), {names[2]: [0, 4, 5]}):
        expected = logits_of(model)
        export_model(model, tmp_path / "cut")
    assert config_on_disk(tmp_path / "cut")["per_layer_config"] == {
        str(index): {"num_local_experts": count} for index, count in enumerate((8, 0, 3, 8))
    }
    torch.testing.assert_close(logits_of(load_model(str(tmp_path / "cut"))), expected, atol=1e-5, rtol=1e-5)


def test_gradients_pass_by() -> None:
    """A layer without its block trains on."""
    model = tiny_model("gpt_oss", num_hidden_layers=3)
    keep_experts(model, {find_moe_layers(model)[1].name: []})
    model(tiny_batch(), labels=tiny_batch()).loss.backward()
    gradient = model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad
    assert gradient is not None and float(gradient.norm()) > 0


# ------------------------------------------------------------------------------------------------ refusals

INEXPRESSIBLE: dict[str, tuple[str, dict[str, Any], int, list[str]]] = {
    "jamba": ("jamba", {}, 0, ["expert_layer_period=2", "attn_layer_period=2", "layers 1"]),
    "ernie": (
        "ernie4_5_moe",
        {"num_hidden_layers": 6, "moe_layer_interval": 2, "moe_layer_start_index": 0},
        0,
        ["moe_layer_interval=2", "layers 1"],
    ),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_a_config_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    """And nothing is changed. The same layer can lose its MoE block alone."""
    family, overrides, place, parts = INEXPRESSIBLE[case]
    model = tiny_model(family, **overrides)
    name = find_moe_layers(model)[place].name
    model.save_pretrained(tmp_path / "full")
    config, weights = model.config.to_dict(), dict(model.named_parameters())
    for cut in (
        lambda: keep_experts(model, {name: []}, blocks=[name]),
        lambda: compact_checkpoint(str(tmp_path / "full"), {name: []}, tmp_path / "cut", blocks=[name]),
    ):
        with pytest.raises(InputError) as refused:
            cut()
        message = str(refused.value)
        assert "\n" not in message and len(message) < 500 and all(part in message for part in parts), message
    assert model.config.to_dict() == config
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert not (tmp_path / "cut").exists()
    keep_experts(model, {name: []})
    assert bool(logits_of(model).isfinite().all())


@pytest.mark.parametrize(
    ("keep", "blocks", "said"),
    [
        ({"model.layers.0.mlp": [], "model.layers.1.mlp": []}, [], "all 2 MoE layers"),
        ({"model.layers.0.mlp": []}, ["model.layers.1.mlp"], "all 2 MoE layers"),
        ({}, ["model.layers.0.mlp", "model.layers.1.mlp"], "all 2 MoE layers"),
        ({}, ["model.layers.7.mlp"], "model.layers.7.mlp"),
        ({"model.layers.0.mlp": [0, 1]}, ["model.layers.0.mlp"], "`blocks`"),
    ],
)
def test_each_fault_is_one_line(keep: dict[str, list[int]], blocks: list[str], said: str) -> None:
    model = tiny_model("mixtral")
    expected = logits_of(model)
    with pytest.raises(InputError) as refused:
        keep_experts(model, keep, blocks=blocks)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert torch.equal(logits_of(model), expected)


def test_stock_modules_are_found_by_what_they_return() -> None:
    """Only GPT-OSS's block returns a tuple among our families."""
    for family, tuples in (("gpt_oss", True), ("mixtral", False)):
        model: nn.Module = tiny_model(family)
        layer = find_moe_layers(model)[0]
        keep_experts(model, {layer.name: []})  # type: ignore[arg-type]
        output = model.get_submodule(layer.name)(torch.ones(1, 2, 32))
        assert isinstance(output, tuple) == tuples
        assert torch.equal(output[0] if tuples else output, torch.zeros(1, 2, 32))
