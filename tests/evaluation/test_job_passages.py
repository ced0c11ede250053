"""How often jobs go through layers: as often as the real ones do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.evaluation.job_passages import gradient_chunks, note_on, passages, scanned_experts
from lightning_moe.evaluation.job_setup import Setup
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.layers import LayerShape, find_moe_layers
from lightning_moe.moe.weights import Weight, weights_of
from lightning_moe.search.expert_scan import ExpertScan
from lightning_moe.search.in_memory import gradient_figures
from lightning_moe.stats.gradients import GradientSums, sum_bytes
from tests.helpers.families import tiny_batch, tiny_model

GiB = 1 << 30
IDS = tiny_batch()
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def counted(model: PreTrainedModel) -> tuple[Counter[int], Counter[int]]:
    """Where forwards and backwards of each decoder layer are counted, that of the last norm and the head as -1."""
    forward: Counter[int] = Counter()
    backward: Counter[int] = Counter()

    def watch(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, given: Any, output: Any) -> None:
            forward[number] += 1
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: backward.update([number]))

        return after

    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(watch(number))
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    head.register_forward_hook(watch(-1))
    return forward, backward


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_gradients_go_through_layers_as_the_passes_do(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, one, two or all of them at once."""
    model = tiny_model("mixtral", num_hidden_layers=3)
    memory = (at_once + 0.5) * sum_bytes(find_moe_layers(model))[0] / GiB
    forward, backward = counted(model)
    made: Counter[str] = Counter()
    adder = GradientSums._adder

    def counting(sums: GradientSums, key: tuple[str, str]) -> Callable[[Tensor], None]:
        add = adder(sums, key)
        return lambda stack: (made.update([f"{key[0]}.experts.{key[1]}"]), add(stack))[1]

    monkeypatch.setattr(GradientSums, "_adder", counting)
    gradient_figures(model, [BATCH], memory)
    weights = weights_of(model)
    step = passages("gradients", Setup(gradient_memory=memory), weights, [])
    for weight in weights:
        number = -1 if weight.layer is None else weight.layer
        found = step(weight)
        assert (found.forward, found.backward) == (forward[number], backward[number])
        assert found.gradients == made[weight.name]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_scan_runs_as_many_layers_at_most(family: str) -> None:
    """Where weights are shares of a softmax over all experts it runs them all; the first pass is the whole model's."""
    settings = {"norm_topk_prob": False} if family == "qwen2_moe" else {"first_k_dense_replace": 1}
    model = tiny_model(family, num_hidden_layers=3, **settings).eval()
    forward, _ = counted(model)
    scan = ExpertScan(model)
    with torch.no_grad(), scan.recorded():
        MoECausalLM().adopt(model).decode(BATCH)
    scan.add(BATCH)
    shapes, weights = [layer.shape for layer in find_moe_layers(model)], weights_of(model)
    step = passages("scan", Setup(), weights, shapes)
    for weight in weights:
        number = -1 if weight.layer is None else weight.layer
        most = step(weight).forward
        assert forward[number] == most if family == "qwen2_moe" else 0 < forward[number] <= most
    assert scanned_experts(shapes, None) == sum(shape.num_experts for shape in shapes)


def test_a_layer_that_can_spare_none_is_not_scanned() -> None:
    shapes = [LayerShape("a", 0, 4, 2), LayerShape("b", 1, 2, 2), LayerShape("c", 3, 8, 2)]
    assert [scanned_experts(shapes, layer) for layer in (0, 1, 2, 3, None)] == [4, 4, 4, 12, 12]
    weights = [Weight("head", None, (4, 4), torch.float32), Weight("3", 3, (4, 4), torch.float32)]
    said = note_on("scan", Setup(), weights, shapes)
    assert said is not None and "12 forwards" in said and "through 2.0 of 4 layers" in said


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_chunks_are_those_of_the_sums(ranks: int) -> None:
    """Of 8 experts three ranks hold 3 at most."""
    model = tiny_model("mixtral", num_hidden_layers=3)
    whole = sum_bytes(find_moe_layers(model))[0]
    each = whole * -(-8 // ranks) // 8 if ranks < 3 else whole // 3
    setup = Setup(ranks, strategy="moe_fsdp", gradient_memory=2.5 * each / GiB)
    assert gradient_chunks(weights_of(model), setup) == [{0: each, 1: each}, {2: each}]
    said = note_on("gradients", setup, weights_of(model), [])
    assert said is not None and "2 passes" in said and f"{2 * each / (1 << 20):.3g} MiB" in said
