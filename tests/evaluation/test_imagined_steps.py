"""Imagined steps: what the real commands' parts hold, to the byte."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.callbacks.router_rebalance import Trained, trained_parameters
from lightning_moe.cli.search import SearchRequest
from lightning_moe.evaluation.imagined_steps import Batch, ImaginedModel
from lightning_moe.modules.causal_lm import MoECausalLM, next_token_loss
from lightning_moe.moe import live_bytes
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.live_bytes import LiveBytes
from lightning_moe.moe.quantisation import Quantisation, quantise_experts
from lightning_moe.moe.weights import weights_of
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.expert_scan import ExpertScan
from lightning_moe.stats.gradients import GradientSums
from lightning_moe.stats.input_norms import InputSums
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.weights import weight_stats
from tests.helpers.families import FAMILIES, tiny_config, tiny_model
from tests.helpers.passages import backward_peak, forward_peak

ARGUMENTS = SearchRequest(0.5).arguments


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_the_buffers_of_an_observation(family: str) -> None:
    observation = Observation(tiny_model(family))
    real = sum(tensor.nbytes for tensor in observation.sums().values())
    blank = sum(tensor.nbytes for stats in observation.stats for tensor in stats._defaults.values())
    assert ImaginedModel(tiny_config(family), torch.float32).statistics() == real + blank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_figures_of_weights_take_what_they_take(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2_moe").to(dtype)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        weight_stats(find_moe_layers(model)[0], stable_ranks=False)
    assert ImaginedModel(tiny_config("qwen2_moe"), dtype).weight_figures() == live.peak


def test_stable_ranks_take_less() -> None:
    """Which is why the estimate looks at the rest alone: one matrix at a time, where the rest has stacks."""
    model = tiny_model("mixtral", intermediate_size=256, hidden_size=128)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        weight_stats(find_moe_layers(model)[0])
        whole = live.peak
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        weight_stats(find_moe_layers(model)[0], stable_ranks=False)
    assert whole == live.peak


def real_search(arguments: dict[str, Any], batch: Batch) -> tuple[int, int]:
    """Peaks of a real batch of the search, forward and backward."""
    model = tiny_model("qwen2_moe", seed=1)
    found: list[int] = []
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        search = DiEPSearch(MoECausalLM().adopt(model), **{**arguments, "accumulate": 2})
        search.configure_model()
        search.on_fit_start()

        def backward(loss: Tensor) -> None:
            found.append(live.peak)
            live.begin()
            loss.backward()

        vars(search)["manual_backward"] = backward
        search.training_step(batch.tensors(), 0)
    return found[0], live.peak


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_search_holds_what_it_holds(preset: str) -> None:
    batch, arguments = Batch(2, 64), SearchRequest(0.5, preset=preset).arguments
    *_, student = ImaginedModel(tiny_config("qwen2_moe"), torch.float32).search(batch, arguments)
    assert (forward_peak(student), backward_peak(student)) == real_search(arguments, batch)


def test_searches_without_a_teacher_make_one_pass() -> None:
    model = ImaginedModel(tiny_config("mixtral"), torch.float32)
    assert len(model.search(Batch(1, 8), ARGUMENTS)) == 2
    assert len(model.search(Batch(1, 8), ARGUMENTS | {"weight": 0.0})) == 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 2), (3,)], ids=str)
def test_a_pass_for_gradients_holds_what_it_holds(layers: tuple[int, ...], recompute: bool) -> None:
    """From the second batch on there are the sums, beside which a gradient is there at a time."""
    batch, model = Batch(2, 64, recompute=recompute), tiny_model("mixtral", num_hidden_layers=4).eval()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = MoECausalLM().adopt(model)
    sums = GradientSums([layer for layer in find_moe_layers(model) if layer.parts.index in layers])

    def backward() -> tuple[int, int]:
        live.begin()
        tensors = batch.tensors()
        with sums.attached(model):
            loss_B, _ = next_token_loss(module(tensors), tensors)
            forward = live.peak
            live.begin()
            sums.backward(loss_B.sum())
        return forward, live.peak

    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        backward()
        held = sum(tensor.nbytes for tensor in sums._sums.values())
        real = [peak - held for peak in backward()]
    step = ImaginedModel(tiny_config("mixtral", num_hidden_layers=4), torch.float32).gradients(batch, layers, False)
    assert [forward_peak(step), backward_peak(step)] == pytest.approx(real, abs=100)  # of losses


def test_gradients_of_a_split_model_stay_until_their_layer_is_done() -> None:
    """Gate and up's joins down's: a third of a layer's matrices more."""
    model = ImaginedModel(tiny_config("mixtral", num_hidden_layers=4), torch.float32)
    summed, whole = (model.gradients(Batch(1, 4), [0, 1, 2, 3], whole=one) for one in (False, True))
    down = find_moe_layers(model.network)[1].experts.get_parameter("down_proj").nbytes
    assert whole.layers[1].backward - summed.layers[1].backward == down
    assert [one.saved for one in whole.layers] == [one.saved for one in summed.layers]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_scan_holds_what_an_evaluation_does_and_what_it_recorded(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, model = Batch(2, 64), tiny_model(family, num_hidden_layers=4).eval()
    tensors, scan = batch.tensors(), ExpertScan(model)
    tensors["input_ids"] = torch.randint(0, 16, (2, 64))
    monkeypatch.setattr(live_bytes, "STAND_INS", {})  # routers are to see what they see
    with LiveBytes([*model.parameters(), *model.buffers(), *tensors.values()]) as live, torch.no_grad():
        with scan.recorded():
            MoECausalLM().adopt(model).decode(tensors)
        recorded = live.now
        scan.add(tensors)
    monkeypatch.undo()
    imagined = ImaginedModel(tiny_config(family, num_hidden_layers=4), torch.float32)
    held = imagined.recorded(batch)
    assert held <= recorded < held + 100
    assert live.peak == pytest.approx(held + forward_peak(imagined.evaluate(batch)), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_for_input_norms_holds_what_it_holds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one expert gets all tokens, here every one, and their squares are made of its inputs."""
    batch, alone = Batch(2, 64), {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 256}
    model = tiny_model("mixtral", num_hidden_layers=4, **alone).to(dtype).eval()
    tensors, sums = batch.tensors(), InputSums(model)
    sums.next_batch(tensors["input_ids"])
    known = [*model.parameters(), *model.buffers(), *sums.sums().values(), *tensors.values()]
    monkeypatch.setattr(live_bytes, "STAND_INS", {})
    with LiveBytes(known) as live, torch.no_grad(), sums.attached(model):
        MoECausalLM().adopt(model).decode(tensors)
    monkeypatch.undo()
    imagined = ImaginedModel(tiny_config("mixtral", num_hidden_layers=4, **alone), dtype)
    watched, seen = forward_peak(imagined.watch(batch)), forward_peak(imagined.observe(batch))
    given = sum(tensor.nbytes for tensor in tensors.values())
    assert live.peak == pytest.approx(watched - given, rel=0.01)
    assert (watched > seen) == (dtype == torch.bfloat16)
    assert imagined.input_sums() == sum(tensor.nbytes for tensor in sums.sums().values())


@pytest.mark.parametrize("train", ["all", "routers", "routers+norms"])
def test_what_learns(train: Trained) -> None:
    """The same weights as in a tuning; of a model in 16 bits they become float32 unless all do."""
    real = tiny_model("deepseek_v3")
    chosen = {id(one) for one in trained_parameters(real, train)}
    model = ImaginedModel(tiny_config("deepseek_v3"), torch.bfloat16)
    learns = model.learn(train)
    assert learns == {name for name, parameter in real.named_parameters() if id(parameter) in chosen}
    stored = {weight.name: weight.dtype for weight in model.weights}
    for name, parameter in model.network.named_parameters():
        wide = train != "all" and name in learns
        assert stored[name] == parameter.dtype == (torch.float32 if wide else torch.bfloat16)
        assert parameter.requires_grad == (name in learns)


def test_another_choice_of_what_learns_undoes_the_first() -> None:
    model, batch = ImaginedModel(tiny_config("mixtral"), torch.bfloat16), Batch(1, 16)
    steps = []
    choices: tuple[Trained, ...] = ("routers", "routers+norms", "all", "routers")
    for train in choices:
        model.learn(train)
        steps.append(model.tune(batch))
    assert steps[0] == steps[-1] and len(set(steps)) == 3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_experts_have_their_size(kind: Quantisation) -> None:
    settings = {"intermediate_size": 64, "hidden_size": 64, "head_dim": 16}
    real = tiny_model("mixtral", **settings)
    for layer in find_moe_layers(real):
        quantise_experts(layer, kind)
    packed = ImaginedModel(tiny_config("mixtral", **settings), torch.float32, quantize=kind)
    assert packed.weights == weights_of(real)
    packed.learn("all")
    assert packed.observe(Batch(1, 16)).layers[1].forward > 0


def test_gathered_layers_compute_in_their_type() -> None:
    """Weights are stored as they are; activations of layers come in the type that is gathered."""
    wide = ImaginedModel(tiny_config("mixtral", num_hidden_layers=4), torch.float32)
    narrow = ImaginedModel(tiny_config("mixtral", num_hidden_layers=4), torch.float32, gathered=torch.bfloat16)
    assert narrow.weights == wide.weights
    saved = []
    for model, autocast in ((wide, None), (narrow, torch.bfloat16)):
        model.learn("all")
        saved.append(model.tune(Batch(2, 64, autocast)).layers[1].saved)
    assert saved[1] < 0.8 * saved[0]


def test_recomputing_saves_little() -> None:
    model = ImaginedModel(tiny_config("mixtral", num_hidden_layers=4), torch.float32)
    model.learn("all")
    kept, recomputed = (model.tune(Batch(2, 64, recompute=recompute)) for recompute in (False, True))
    assert recomputed.layers[1].saved == 2 * 64 * 32 * 4  # what the layer was given
    assert recomputed.layers[1].saved < kept.layers[1].saved / 10
    assert recomputed.layers[1].backward > kept.layers[1].saved
    assert model.tune(Batch(2, 64)) == kept
