"""The laws of discovery, gating, masking, surgery and checkpoints, over all model families."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lightning_moe
from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import layer_shapes, load_model, save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.experts import IMPLEMENTATION, ExpertHooks, expert_hooks
from lightning_moe.moe.layers import LayerShape, find_moe_layers
from lightning_moe.moe.routing import mask_plan, record_routing
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, HIDDEN, NUM_EXPERTS, TOP_K, tiny_batch, tiny_model
from tests.helpers.plans import Keep, compose, fewest_plan, non_uniform_plan, uniform_plan
from tests.helpers.reference import stock_experts as reference
from tests.helpers.without_us import run_without_us

MOE_LAYERS: dict[str, list[int]] = {
    **{family: [0, 1] for family in FAMILIES},
    **{family: [1, 2] for family in ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe")},
    "jamba": [1, 3],
}
"""The decoder layers that hold experts, as the configs of `families.py` say."""

COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

PLANS: dict[str, Callable[[PreTrainedModel], Keep]] = {
    "uniform": uniform_plan,
    "non-uniform": non_uniform_plan,
    "fewest": fewest_plan,
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
GROUPED = {"n_group": 2, "topk_group": 1}


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor | None = None) -> Tensor:
    return model.eval()(tiny_batch() if input_ids is None else input_ids).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, the non-persistent ones included."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def assert_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def pruned(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    model = copy.deepcopy(model)
    keep_experts(model, keep)
    return model


@contextmanager
def masked(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    with mask_plan(find_moe_layers(model), keep):
        yield


@contextmanager
def our_experts(model: PreTrainedModel, hooks: Mapping[str, ExpertHooks] | None = None) -> Iterator[None]:
    with expert_hooks(model, find_moe_layers(model), hooks or {}):
        yield


def in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, no longer mapped from a file: there tensors lie at odd addresses, where products round
    otherwise (1e-7), and we want to compare exactly."""
    return copy.deepcopy(model).eval()


def stock_load(folder: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return in_memory(model)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def assert_stock(folder: Path, num_experts: int) -> None:
    """Nothing of ours in it: no code, no entry in the config but the count."""
    config = read_config(folder)
    assert not {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
    assert not list(folder.glob("*.py"))
    assert [config[name] for name in COUNT_NAMES if name in config] == [num_experts]
    assert not config["architectures"][0].startswith("NonUniform")


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    config.pop("allow_global_per_layer_attribute_access", None)  # says nothing where layers agree
    return config


def assert_one_line(error: BaseException, *parts: object) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"


# -------------------------------------------------------------------------------------------- discovery


@every_family
def test_discovery_finds_the_moe_layers(family: str) -> None:
    layers = find_moe_layers(tiny_model(family))
    groups = 2 if family == "deepseek_v3" else 1
    for layer, index in zip(layers, MOE_LAYERS[family], strict=True):
        shape = layer.shape
        assert f".layers.{index}." in shape.name
        assert shape == LayerShape(shape.name, index, NUM_EXPERTS, TOP_K, groups, 1)
        assert (layer.num_experts, layer.top_k) == (NUM_EXPERTS, TOP_K)
        assert shape.fewest == (4 if groups == 2 else TOP_K)
        assert layer.router_weight.shape == (NUM_EXPERTS, HIDDEN)
        assert [len(stack) for stack in layer.expert_matrices] == [NUM_EXPERTS] * 3


@every_family
def test_discovery_reads_the_routers_choice(family: str) -> None:
    """Whatever the order of a router's outputs, also where ``top_k`` equals the number of experts."""
    model = tiny_model(family)
    for keep in (None, fewest_plan(model)):
        if keep is not None:
            keep_experts(model, keep)
        layers = find_moe_layers(model)
        parts = [(layer.router, layer.experts) for layer in layers]
        found = {}
        with record_routing(layers, lambda layer, routing, found=found: found.update({layer.name: routing})):
            calls = reference.watch(model, parts, input_ids=tiny_batch())
        for layer, call in zip(layers, calls, strict=True):
            rows, bias = reference.router_rows(layer.router)
            logits_TE = call.router_input_TH.double() @ torch.tensor(rows).double().T + torch.tensor(bias).double()
            routing = found[layer.name]
            torch.testing.assert_close(routing.logits_TE.double(), logits_TE, atol=1e-5, rtol=1e-5)
            assert torch.equal(routing.expert_ids_TK, call.ids_TK)
            assert torch.equal(routing.weights_TK, call.weights_TK)


def test_a_dense_model_is_refused() -> None:
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1)
    with pytest.raises(InputError) as refusal:
        find_moe_layers(AutoModelForCausalLM.from_config(config))
    assert_one_line(refusal.value, "LlamaForCausalLM", "no MoE layers")


def test_llama4_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama4_text",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        moe_layers=[0],
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError) as refusal:
        find_moe_layers(model)
    assert_one_line(refusal.value, "model.layers.0.feed_forward", "Llama 4", "not supported")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as refusal:
        layer_shapes(str(tmp_path))
    assert_one_line(refusal.value, tmp_path, "Llama 4", "not supported")


# ---------------------------------------------------------------------------------- the experts function


@every_family
@pytest.mark.parametrize("gated", [False, True], ids=["no gates", "gates of one"])
def test_our_experts_equal_the_stock_ones(family: str, gated: bool) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    expected = logits_of(model)
    assert expected.std() > 0.05  # otherwise being equal would say little
    names = [layer.name for layer in find_moe_layers(model)]
    with our_experts(model, {name: ExpertHooks(gates_E=torch.ones(NUM_EXPERTS)) for name in names} if gated else {}):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(model), expected)
    assert set(model.get_experts_implementation().values()) == {"eager"}


@every_family
def test_float64_is_float64(family: str) -> None:
    """A sum in float32 somewhere in the experts would show at 1e-10."""
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    expected = logits_of(model)
    with our_experts(model):
        found = logits_of(model)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@every_family
def test_bfloat16_works(family: str) -> None:
    model = tiny_model(family)
    keep = uniform_plan(model)
    with masked(model, keep):
        exact = logits_of(model)
    model = pruned(model.to(torch.bfloat16), keep)
    stock = logits_of(model)
    with our_experts(model):
        ours = logits_of(model)
    assert ours.dtype == torch.bfloat16 and bool(ours.isfinite().all())
    assert (ours - stock).float().norm() < 0.02 * stock.float().norm()
    # Against float32 a few tokens may take another expert; most must not.
    assert (ours.float() - exact).norm() < 0.35 * exact.norm()


@every_family
def test_gradients_equal_the_stock_ones(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    embeddings = model.get_input_embeddings()(tiny_batch()).detach()
    gates = {layer.name: torch.ones(NUM_EXPERTS, requires_grad=True) for layer in find_moe_layers(model)}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        inputs = embeddings.clone().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        return {"inputs": inputs.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with our_experts(model, {name: ExpertHooks(gates_E=gate) for name, gate in gates.items()}):
        found = gradients()
    assert found.keys() == expected.keys()
    assert sum(".experts." in name for name in expected) >= 2 * len(gates)
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}"
        )
    assert all(bool((gate.grad != 0).any()) for gate in gates.values())


@every_family
def test_gates_scale_each_expert(family: str) -> None:
    """Outputs and gradients of the gates are those of ``sum_k weight * gate * f(x)``, expert by expert."""
    model = tiny_model(family)
    layer = find_moe_layers(model)[0]
    (call, *_) = reference.watch(model, [(layer.router, layer.experts)], input_ids=tiny_batch(length=8))
    generator = torch.Generator().manual_seed(1)
    gates_E = torch.rand(NUM_EXPERTS, generator=generator) * 2
    gates_E[3] = 0.0
    outputs = []
    for run in ("reference", "ours"):
        gates = gates_E.clone().requires_grad_()
        if run == "ours":
            with our_experts(model, {layer.name: ExpertHooks(gates_E=gates)}):
                output = layer.experts(call.hidden_TH, call.ids_TK, call.weights_TK)
        else:
            output = reference.weighted_sum(layer.experts, call.hidden_TH, call.ids_TK, call.weights_TK, gates)
        output.square().sum().backward()
        outputs.append((output.detach(), gates.grad))
    (expected, expected_grad), (found, found_grad) = outputs
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found_grad, expected_grad, atol=1e-6, rtol=1e-4)


def test_hooks_go_when_the_forward_fails() -> None:
    model = tiny_model("mixtral")
    expected, layers = logits_of(model), find_moe_layers(model)
    hooks = {layers[0].name: ExpertHooks(gates_E=torch.zeros(NUM_EXPERTS))}
    with pytest.raises(RuntimeError, match="stop"), our_experts(model, hooks):
        raise RuntimeError("stop")
    assert IMPLEMENTATION not in model.get_experts_implementation().values()
    assert not hasattr(layers[0].experts, "lightning_moe_hooks")
    assert torch.equal(logits_of(model), expected)


# ----------------------------------------------------------------------------------- surgery and masking


@every_family
def test_pruning_nothing_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    expected, weights, config = logits_of(model), snapshot(model), model.config.to_dict()
    for keep in ({}, {layer.name: range(NUM_EXPERTS) for layer in find_moe_layers(model)}):
        keep_experts(model, keep)
        assert torch.equal(logits_of(model), expected)
        assert_identical(snapshot(model), weights)
        assert model.config.to_dict() == config


@every_family
@every_plan
def test_a_pruned_model_equals_the_masked_one(family: str, plan: Callable[[PreTrainedModel], Keep]) -> None:
    model = tiny_model(family)
    keep = plan(model)
    expected, weights = logits_of(model), snapshot(model)
    with masked(model, keep):
        without = logits_of(model)
    assert (without - expected).abs().max() > 1e-3  # the plan matters
    assert_identical(snapshot(model), weights)
    assert torch.equal(logits_of(model), expected)
    smaller = pruned(model, keep)
    torch.testing.assert_close(logits_of(smaller), without, atol=1e-5, rtol=1e-5)
    assert [layer.num_experts for layer in find_moe_layers(smaller)] == [len(ids) for ids in keep.values()]
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@every_family
@pytest.mark.parametrize("num_experts", [16, HIDDEN])
def test_a_count_that_equals_a_width_confuses_nothing(family: str, num_experts: int, tmp_path: Path) -> None:
    """16 is also the width of many experts, 32 that of the model."""
    name = next(name for name in COUNT_NAMES if name in FAMILIES[family])
    model = tiny_model(family, **{name: num_experts})
    layers = find_moe_layers(model)
    half = num_experts // 2
    keep = {layer.name: [*range(1, half), *range(half + turn, num_experts)] for turn, layer in enumerate(layers)}
    if family == "deepseek_v3":
        keep = {name: [*range(turn, half), *range(half + turn, num_experts)] for turn, name in enumerate(keep)}
    with masked(model, keep):
        expected = logits_of(model)
    smaller = pruned(model, keep)
    torch.testing.assert_close(logits_of(smaller), expected, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    loaded = stock_load(tmp_path / "out")
    assert_identical(loaded.state_dict(), smaller.state_dict())


@every_family
def test_a_mask_goes_when_the_forward_fails(family: str) -> None:
    model = tiny_model(family)
    expected, weights = logits_of(model), snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), masked(model, uniform_plan(model)):
        raise RuntimeError("stop")
    assert_identical(snapshot(model), weights)
    assert torch.equal(logits_of(model), expected)


@every_family
def test_a_pruned_model_generates_what_the_masked_one_does(family: str) -> None:
    model, prompt = tiny_model(family), tiny_batch(length=6)
    keep = non_uniform_plan(model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with masked(model, keep):
        expected = model.generate(prompt, **settings)
    assert torch.equal(pruned(model, keep).generate(prompt, **settings), expected)


@every_family
def test_pruning_twice_is_pruning_once(family: str) -> None:
    model = tiny_model(family)
    first = non_uniform_plan(model)
    once = pruned(model, first)
    names = list(first)
    uniform = {names[1]: [0, 1, 4, 5]}
    other = {names[1]: [0, 1, 3, 5]} if family == "deepseek_v3" else {names[0]: [1, 2, 3], names[1]: [0, 2, 4, 5]}
    for second in (uniform, other):
        twice, direct = pruned(once, second), pruned(model, compose(first, second))
        assert_identical(snapshot(twice), snapshot(direct))
        assert torch.equal(logits_of(twice), logits_of(direct))
        assert config_of(twice) == config_of(direct)


@every_family
def test_the_models_own_balance_loss_survives_pruning(family: str) -> None:
    """A uniformly pruned model in memory trains like the same model saved and loaded."""
    model = pruned(tiny_model(family), uniform_plan(tiny_model(family)))
    if not hasattr(model.config, "router_aux_loss_coef"):
        pytest.skip("this family has no balance loss of its own")
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    inputs = {"input_ids": tiny_batch(), "labels": tiny_batch(), "output_router_logits": True}
    with torch.no_grad():
        expected, found = fresh.eval()(**inputs), model.eval()(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=0)


# -------------------------------------------------------------------------------------------- refusals

FAULTS: dict[str, tuple[list[int], str]] = {
    "below top_k": ([4], "top_k=2"),
    "an id out of range": ([0, 1, 8], "expert 8"),
    "a negative id": ([-1, 0, 1], "expert -1"),
    "the same id twice": ([0, 1, 1, 2], "ascending"),
    "ids out of order": ([2, 0, 1], "ascending"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plan_changes_nothing(fault: str, tmp_path: Path) -> None:
    """All or nothing: the first layer of the plan is sound, the second is not."""
    model = tiny_model("mixtral")
    ids, said = FAULTS[fault]
    first, second = (layer.name for layer in find_moe_layers(model))
    weights, config = snapshot(model), model.config.to_dict()
    with pytest.raises(InputError) as refusal:
        keep_experts(model, {first: [0, 1, 2], second: ids})
    assert_one_line(refusal.value, second, said)
    assert_identical(snapshot(model), weights)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(InputError) as refusal:
        compact_checkpoint(str(tmp_path / "full"), {first: [0, 1, 2], second: ids}, tmp_path / "out")
    assert_one_line(refusal.value, second, said)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_layer_that_is_not_there_changes_nothing() -> None:
    model = tiny_model("mixtral")
    first = find_moe_layers(model)[0].name
    weights = snapshot(model)
    with pytest.raises(InputError) as refusal:
        keep_experts(model, {first: [0, 1, 2], "model.layers.7.mlp": [0, 1, 2]})
    assert_one_line(refusal.value, "model.layers.7.mlp", first)
    assert_identical(snapshot(model), weights)


def test_group_limited_routers_want_equal_groups() -> None:
    model = tiny_model("deepseek_v3")
    name = find_moe_layers(model)[0].name
    weights = snapshot(model)
    for ids, counts in (([0, 1, 2, 4, 5], "[3, 2]"), ([0, 1, 2, 3, 5, 6], "[4, 2]"), ([0, 1, 2, 3], "[4, 0]")):
        with pytest.raises(InputError) as refusal:
            keep_experts(model, {name: ids})
        assert_one_line(refusal.value, name, "2 groups", counts)
    assert_identical(snapshot(model), weights)
    for ids in ([0, 1, 2, 5, 6, 7], [2, 3, 4, 6]):
        keep = {layer.name: ids if layer.name == name else list(range(8)) for layer in find_moe_layers(model)}
        with masked(model, keep):
            expected = logits_of(model)
        torch.testing.assert_close(logits_of(pruned(model, keep)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "groups", "topk_group", "top_k", "fewest"),
    [(16, 2, 1, 4, 4), (16, 2, 2, 4, 2), (16, 4, 2, 6, 3), (16, 4, 2, 2, 2), (16, 4, 3, 4, 2)],
)
def test_each_group_keeps_enough_for_the_router(
    num_experts: int, groups: int, topk_group: int, top_k: int, fewest: int
) -> None:
    """``topk_group`` groups must hold ``top_k`` experts, and a group is ranked by its two best."""
    model = tiny_model(
        "deepseek_v3",
        n_routed_experts=num_experts,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
    )
    size = num_experts // groups

    def plan(per_group: int) -> Keep:
        ids = [group * size + 1 + i for group in range(groups) for i in range(per_group)]
        return {layer.name: ids for layer in find_moe_layers(model)}

    with pytest.raises(InputError) as refusal:
        keep_experts(model, plan(fewest - 1))
    assert_one_line(refusal.value, f"needs {fewest * groups}", f"top_k={top_k}", f"{groups} groups")
    with masked(model, plan(fewest)):
        expected = logits_of(model)
    torch.testing.assert_close(logits_of(pruned(model, plan(fewest))), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ checkpoints


@every_family
@every_plan
def test_a_saved_model_gives_the_same_logits(
    family: str, plan: Callable[[PreTrainedModel], Keep], tmp_path: Path
) -> None:
    """Through ``AutoModelForCausalLM``; non-uniform ones because lightning_moe is imported."""
    assert lightning_moe.__version__
    model = pruned(tiny_model(family), plan(tiny_model(family)))
    save_model(model, tmp_path / "saved")
    counts = {layer.num_experts for layer in find_moe_layers(model)}
    if len(counts) == 1:
        assert_stock(tmp_path / "saved", counts.pop())
    loaded = stock_load(tmp_path / "saved")
    assert_identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert layer_shapes(str(tmp_path / "saved")) == [layer.shape for layer in find_moe_layers(model)]


@every_family
@pytest.mark.parametrize(
    ("plan", "shard_bytes"),
    [(uniform_plan, 4 << 30), (non_uniform_plan, 4 << 30), (fewest_plan, 4 << 30), (non_uniform_plan, 20_000)],
    ids=["uniform", "non-uniform", "fewest", "non-uniform, many files"],
)
def test_compaction_on_disk_equals_surgery_in_memory(
    family: str, plan: Callable[[PreTrainedModel], Keep], shard_bytes: int, tmp_path: Path
) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path / "full")
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    keep_experts(model, keep := plan(model))
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "compact", shard_bytes)
    save_model(model, tmp_path / "surgery")
    files = list((tmp_path / "compact").glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes < 1 << 20)
    shards = [load_file(file) for file in files]
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_bytes for shard in shards)
    on_disk = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert_identical(on_disk, load_file(tmp_path / "surgery" / "model.safetensors"))
    assert read_config(tmp_path / "compact") == read_config(tmp_path / "surgery")
    assert (tmp_path / "compact" / "tokenizer.json").read_text() == "{}"
    loaded = stock_load(tmp_path / "compact")
    assert_identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits_of(loaded), logits_of(model))


@every_family
def test_a_pruned_checkpoint_can_be_pruned_again(family: str, tmp_path: Path) -> None:
    """From non-uniform to uniform, which leaves a stock checkpoint, and to non-uniform once more."""
    model = tiny_model(family)
    first = non_uniform_plan(model)
    keep_experts(model, first)
    save_model(model, tmp_path / "first")
    assert (tmp_path / "first" / "modeling_non_uniform_moe.py").is_file()
    names = list(first)
    uniform = {names[1]: [0, 1, 4, 5]}
    other = {names[0]: [0, 1, 2, 3], names[1]: [0, 2, 3, 5]} if family == "deepseek_v3" else {names[0]: [0, 2]}
    for turn, second in enumerate((uniform, other)):
        again = pruned(stock_load(tmp_path / "first"), second)
        assert_identical(again.state_dict(), pruned(model, second).state_dict())
        save_model(again, tmp_path / f"memory-{turn}")
        compact_checkpoint(str(tmp_path / "first"), second, tmp_path / f"disk-{turn}")
        for folder in (tmp_path / f"memory-{turn}", tmp_path / f"disk-{turn}"):
            assert torch.equal(logits_of(stock_load(folder)), logits_of(again))
            if turn == 0:
                assert_stock(folder, 4)
        memory, disk = (read_config(tmp_path / f"{place}-{turn}") for place in ("memory", "disk"))
        assert memory == disk


WITHOUT_US = """
import copy, sys
from pathlib import Path


class NoLightningMoE:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning_moe":
            raise ImportError("lightning_moe is not installed here")


sys.meta_path.insert(0, NoLightningMoE())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

try:
    import lightning_moe
except ImportError:
    pass
else:
    raise AssertionError("lightning_moe can be imported")

root = Path(sys.argv[1])
input_ids = load_file(root / "input_ids.safetensors")["input_ids"]
logits = {}
for folder in sorted(path for path in root.iterdir() if (path / "config.json").is_file()):
    trust = {"trust_remote_code": True} if folder.name.endswith("non_uniform") else {}
    if trust:
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), (folder, error)
        else:
            raise AssertionError(f"{folder} was loaded without its code")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, report)
    model = copy.deepcopy(model).eval()  # out of the mapped file, where products round otherwise
    with torch.no_grad():
        logits[folder.name] = model(input_ids).logits
        logits[folder.name + " generated"] = model.generate(input_ids[:, :4], max_new_tokens=3, do_sample=False)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(input_ids).logits, logits[folder.name], atol=1e-5, rtol=1e-5)
save_file(logits, root / "logits.safetensors")
"""


def test_checkpoints_load_where_lightning_moe_is_not_installed(tmp_path: Path) -> None:
    """Uniform ones with nothing but transformers, non-uniform ones with ``trust_remote_code=True`` alone.

    Without it stock transformers refuses these, and does not make up what is missing.
    """
    root, expected = tmp_path / "models", {}
    for family in FAMILIES:
        for kind, plan in (("uniform", uniform_plan), ("non_uniform", non_uniform_plan)):
            model = tiny_model(family)
            keep_experts(model, plan(model))
            save_model(model, root / f"{family}-{kind}")
            expected[f"{family}-{kind}"] = logits_of(model)
            expected[f"{family}-{kind} generated"] = model.generate(
                tiny_batch()[:, :4], max_new_tokens=3, do_sample=False
            )
    for family in FAMILIES:
        kinds = ["without_a_block-non_uniform"]
        if family in ("gpt_oss", "qwen2_moe"):  # one whose block returns a tuple, one with a shared expert
            kinds += ["without_a_block_and_experts-non_uniform", "without_a_layer"]
        for kind in kinds:
            model = tiny_model(family)
            gone, other = (layer.name for layer in find_moe_layers(model))
            cut = {gone: [], other: [0, 1, 4, 5]} if "experts" in kind else {gone: []}
            keep_experts(model, cut, blocks=[gone] if kind == "without_a_layer" else [])
            save_model(model, root / f"{family}-{kind}")
            expected[f"{family}-{kind}"] = logits_of(model)
            expected[f"{family}-{kind} generated"] = model.generate(
                tiny_batch()[:, :4], max_new_tokens=3, do_sample=False
            )
    save_file({"input_ids": tiny_batch()}, root / "input_ids.safetensors")
    run_without_us(WITHOUT_US, root, tmp_path)
    found = load_file(root / "logits.safetensors")
    assert_identical(found, expected)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_a_model_of_remote_code_can_be_pruned_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded by ``trust_remote_code`` its class is another one; what is saved of it must not show that."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(family)
    first = non_uniform_plan(model)
    keep_experts(model, first)
    save_model(model, tmp_path / "first")
    remote = in_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True))
    assert torch.equal(logits_of(remote), logits_of(model))
    save_model(remote, tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(tmp_path / "first")
    assert torch.equal(logits_of(stock_load(tmp_path / "again")), logits_of(model))
    keep_experts(remote, {list(first)[1]: [0, 1, 4, 5]})
    save_model(remote, tmp_path / "uniform")
    assert_stock(tmp_path / "uniform", 4)
    assert torch.equal(logits_of(stock_load(tmp_path / "uniform")), logits_of(remote))


def test_compaction_reads_every_name_of_the_count(tmp_path: Path) -> None:
    """A config on disk may give the number of experts under any alias that its class knows."""
    broken = []
    for family in FAMILIES:
        model = tiny_model(family)
        aliases = [alias for alias, name in type(model.config).attribute_map.items() if name in COUNT_NAMES]
        for alias in aliases:
            source = tmp_path / f"{family}-{alias}"
            save_model(model, source)
            config = read_config(source)
            config[alias] = config.pop(type(model.config).attribute_map[alias])
            (source / "config.json").write_text(json.dumps(config))
            keep = uniform_plan(model)
            compact_checkpoint(str(source), keep, tmp_path / "out")
            try:
                same = torch.equal(
                    logits_of(in_memory(load_model(str(tmp_path / "out")))), logits_of(pruned(model, keep))
                )
            except InputError:
                same = False
            if not same:
                broken.append(f"{family} with {alias}")
    assert not broken


def test_compaction_reads_the_files_transformers_reads(tmp_path: Path) -> None:
    """Weights in another format may lie in the same folder (Mistral's ``consolidated.safetensors``)."""
    model = tiny_model("mixtral")
    source, keep = tmp_path / "full", uniform_plan(model)
    model.save_pretrained(source)
    foreign = {f"layers.{i}.feed_forward.experts.{e}.w1.weight": torch.ones(4, 4) for i in (0, 1) for e in range(8)}
    for name in ("consolidated.safetensors", "original.safetensors"):
        save_file(foreign, source / name)
    compact_checkpoint(str(source), keep, tmp_path / "out")
    smaller = stock_load(tmp_path / "out")
    assert torch.equal(logits_of(smaller), logits_of(pruned(model, keep)))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("mixtral", tie_word_embeddings=True)
    keep = non_uniform_plan(model)
    save_model(model, tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", shard_bytes=5_000)
    loaded = stock_load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded), logits_of(pruned(model, keep)))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_saving_in_another_dtype_is_what_transformers_would_load(family: str, tmp_path: Path) -> None:
    """What a family keeps in float32 (correction biases) stays so."""
    model = tiny_model(family)
    before = snapshot(model)
    save_model(model, tmp_path / "float32")
    save_model(model, tmp_path / "bfloat16", dtype="bfloat16")
    assert_identical(snapshot(model), before)
    found = stock_load(tmp_path / "bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).eval()
    assert_identical(snapshot(found), snapshot(expected))
    assert torch.equal(logits_of(found), logits_of(expected))


def test_compaction_keeps_half_precision_bit_by_bit(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    keep = non_uniform_plan(model)
    save_model(model, tmp_path / "full", dtype="bfloat16")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    found, expected = stock_load(tmp_path / "out"), pruned(stock_load(tmp_path / "full"), keep)
    assert found.dtype == torch.bfloat16
    assert_identical(snapshot(found), snapshot(expected))
    assert torch.equal(logits_of(found), logits_of(expected))


def test_compaction_can_replace_its_source(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    keep = non_uniform_plan(model)
    save_model(model, tmp_path / "model")
    compact_checkpoint(str(tmp_path / "model"), keep, tmp_path / "model")
    assert torch.equal(logits_of(stock_load(tmp_path / "model")), logits_of(pruned(model, keep)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_old_weight_files_are_cut_as_well(tmp_path: Path) -> None:
    """Also where no tokenizer lies beside them."""
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    save_model(model, tmp_path / "full")
    torch.save(load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "full" / "pytorch_model.bin")
    (tmp_path / "full" / "model.safetensors").unlink()
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    assert torch.equal(logits_of(stock_load(tmp_path / "out")), logits_of(pruned(model, keep)))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    save_model(model, tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    weights = load_file(file)
    expert = next(name for name in weights if ".experts.3." in name)
    save_file({name: tensor for name, tensor in weights.items() if name != expert}, file, {"format": "pt"})
    # one matrix of one expert is not there: neither way may write a model without it
    with pytest.raises(InputError) as refusal:
        load_model(str(tmp_path / "full"))
    assert_one_line(refusal.value)
    damaged = {name: tensor.clone() for name, tensor in weights.items()}
    damaged[expert][0, 0] = float("nan")
    save_file(damaged, file, {"format": "pt"})
    for act in (
        lambda: load_model(str(tmp_path / "full")),
        lambda: compact_checkpoint(str(tmp_path / "full"), {**keep, next(iter(keep)): [0, 1, 3, 7]}, tmp_path / "out"),
    ):
        with pytest.raises(InputError) as refusal:
            act()
        assert_one_line(refusal.value, "not finite")
    missing = {
        name: tensor for name, tensor in weights.items() if ".layers.0." not in name or ".experts.3." not in name
    }
    save_file(missing, file, {"format": "pt"})
    with pytest.raises(InputError) as refusal:
        compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    assert_one_line(refusal.value, "layer 0", "incomplete")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
