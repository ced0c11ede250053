"""The laws of discovery: MoE layers and their routers' choices are found in all model families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.layers import LayerShape, find_moe_layers
from lightning_moe.moe.routing import record_routing
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, HIDDEN, NUM_EXPERTS, TOP_K, tiny_batch, tiny_model
from tests.helpers.plans import fewest_plan
from tests.helpers.reference import stock_experts as reference
from tests.moe.pruned_models import assert_one_line, every_family

MOE_LAYERS: dict[str, list[int]] = {
    **{family: [0, 1] for family in FAMILIES},
    **{family: [1, 2] for family in ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe")},
    "jamba": [1, 3],
}
"""The decoder layers that hold experts, as the configs of `families.py` say."""


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
