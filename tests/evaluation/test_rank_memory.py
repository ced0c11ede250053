"""RankMemory: the moments of a small job worked by hand, and laws of larger ones."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.evaluation.gathering import Layout
from lightning_moe.evaluation.rank_memory import Moment, RankMemory
from lightning_moe.moe.layer_passages import Passage, StepBytes
from lightning_moe.moe.live_bytes import LiveBytes
from lightning_moe.moe.weights import Weight

F32, BF16 = torch.float32, torch.bfloat16

WEIGHTS = [
    Weight("embedding", None, (10, 4), F32, looked_up=True),
    Weight("0.experts", 0, (4, 4, 4), F32, routed=0.5, stack=True, made=0),
    Weight("0.norm", 0, (4,), F32, split=False),
    Weight("1.experts", 1, (4, 4, 4), F32, routed=0.5, stack=True, made=0),
    Weight("1.norm", 1, (4,), F32, split=False),
    Weight("head", None, (10, 4), F32),
]
ALL = frozenset(weight.name for weight in WEIGHTS)
STEP = StepBytes(100, (Passage(10, 30, 50), Passage(20, 40, 60)), head=7, head_backward=9, end=5)


def by_name(memory: RankMemory, backward: bool = True) -> dict[str, Moment]:
    return {moment.at: moment for moment in memory.moments(STEP, backward)}


def test_one_rank() -> None:
    """Weights: 4 * (40 + 64 + 4 + 64 + 4 + 40) = 864 bytes; gradients as many, the optimizer twice."""
    memory = RankMemory(WEIGHTS, Layout(), ALL)
    assert (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes) == (864, 864, 1728)
    moments = by_name(memory)
    assert list(moments) == [
        "forward of layer 0",
        "forward of layer 1",
        "head",
        "backward of the head",
        "backward of layer 1",
        "backward of layer 0",
        "end of the backward",
        "step of the optimizer",
    ]
    # Gradients of the step before are there through the forward.
    assert moments["forward of layer 1"] == Moment("forward of layer 1", 864, 864, 1728, 100 + 10 + 40)
    assert moments["head"] == Moment("head", 864, 864, 1728, 100 + 10 + 20 + 7)
    assert moments["backward of the head"] == Moment("backward of the head", 864, 0, 1728, 130 + 9)
    # The head's gradient, then with that of layer 1; those of the embedding are still to come.
    assert moments["backward of layer 1"] == Moment("backward of layer 1", 864, 160, 1728, 110 + 60)
    assert moments["backward of layer 0"] == Moment("backward of layer 0", 864, 160 + 272, 1728, 100 + 50)
    assert moments["end of the backward"] == Moment("end of the backward", 864, 160 + 544, 1728, 105)
    # Matrices are decayed, so they come first: two of layer 1's experts, one of layer 0's.
    assert moments["step of the optimizer"] == Moment("step of the optimizer", 864, 864, 1728, transient=3 * 256)
    assert moments["head"].total == 864 + 864 + 1728 + 137


def test_two_ranks_in_mixed_precision() -> None:
    """A layer's split weights are 64: stored 256 bytes, 128 on a rank, gathered 128, cast 64, reduced in 256."""
    memory = RankMemory(WEIGHTS, Layout(2, split=True, gathered=BF16, gpu=True), ALL)
    own = 80 + 128 + 16 + 128 + 16 + 80
    assert memory.weight_bytes == memory.gradient_bytes == own
    root, moments = 320, by_name(memory)
    assert moments["gathering of layer 0"].transient == root + 256  # buffer and copy
    assert moments["gathering of layer 1"].transient == root + 128 + 256  # the buffer before is still there
    assert moments["forward of layer 1"].transient == root + 128 + 256  # what buffers had serves nothing else
    assert moments["head"].transient == root + 128
    assert moments["backward of the head"].transient == root + root  # its buffer, larger than that of layer 1
    assert moments["gathering of layer 1 for its backward"].transient == root + 128 + 192  # filled from a cast part
    assert moments["backward of layer 1"].transient == root + 128 + 128
    assert moments["reduction of layer 1"].transient == root + 128 + 256 + 128  # with gradients in bfloat16
    assert moments["reduction of layer 1"].gradients == 160 + 144  # whole of the head, own part of the layer
    assert moments["backward of layer 0"].transient == root + 128 + 256
    assert moments["end of the backward"].transient == root + 256 + 320
    assert moments["step of the optimizer"].transient == own  # on a GPU of all weights at once


def test_gloo_takes_copies() -> None:
    gpu, cpu = (by_name(RankMemory(WEIGHTS, Layout(2, split=True, gpu=gpu), ALL)) for gpu in (True, False))
    at = "gathering of layer 1 for its backward"
    assert cpu[at].transient - gpu[at].transient == 256
    assert cpu["reduction of layer 0"].transient == gpu["reduction of layer 0"].transient
    # Nothing else serves another purpose on a GPU, so a forward there has a buffer more.
    assert gpu["forward of layer 1"].transient - cpu["forward of layer 1"].transient == 256


def test_what_is_not_split_along_its_first_dimension_is_copied_twice() -> None:
    even, uneven = (RankMemory(WEIGHTS, Layout(ranks, split=True)) for ranks in (2, 8))
    assert WEIGHTS[1].split_dimension(8) == 0 and WEIGHTS[1].on_rank(8) == 16  # unevenly: 4 of 8 ranks hold one
    odd = [Weight("0.experts", 0, (6, 4, 4), F32, stack=True), *WEIGHTS[2:]]
    assert odd[0].split_dimension(4) == 1 and odd[0].on_rank(4) == 24
    across = RankMemory(odd, Layout(4, split=True))
    assert by_name(across)["gathering of layer 0"].transient == 320 - 160 + 3 * 96 * 4
    assert by_name(even)["gathering of layer 0"].transient == by_name(uneven)["gathering of layer 0"].transient


def test_frozen_models_have_no_gradients() -> None:
    moments = by_name(RankMemory(WEIGHTS, Layout(2, split=True)))
    assert all(moment.gradients == moment.optimizer == 0 for moment in moments.values())
    assert not any("reduction" in name or "optimizer" in name for name in moments)


def test_summed_gradients_pass_through() -> None:
    """Nothing of the head or of a layer that is done is left, but the sums; a rank's part while it is added."""
    stacks = frozenset(("0.experts", "1.experts"))
    one = by_name(RankMemory(WEIGHTS, Layout(), statistics=512, summed=stacks))
    assert {moment.gradients + moment.optimizer for moment in one.values()} == {0}
    assert {moment.statistics for moment in one.values()} == {512} and "step of the optimizer" not in one
    assert one["backward of layer 0"] == Moment("backward of layer 0", 864, 0, 0, 100 + 50, 512)
    layout = Layout(2, split=True, gpu=True)
    two, tuned = (by_name(RankMemory(WEIGHTS, layout, summed=stacks))), by_name(RankMemory(WEIGHTS, layout, stacks))
    assert two["reduction of layer 1"].gradients == 128 and two["backward of layer 0"].gradients == 0
    for name, moment in two.items():  # what is gathered and reduced is what it is when they learn
        assert moment.transient == tuned[name].transient


def test_ddp_holds_gradients_twice() -> None:
    plain, ddp = (by_name(RankMemory(WEIGHTS, Layout(buckets=buckets), ALL)) for buckets in (False, True))
    assert all(ddp[name].gradients == moment.gradients + 864 for name, moment in plain.items())


def test_offloading_moves_what_is_split() -> None:
    """To the CPU's memory, where a layer as a whole passes through, too."""
    layout = Layout(2, split=True, gpu=True)
    here, there = (RankMemory(WEIGHTS, one, ALL) for one in (layout, Layout(2, split=True, gpu=True, offload=True)))
    assert there.weight_bytes == there.gradient_bytes == 32  # the norms
    moved = sum(getattr(here, f"{name}_bytes") - getattr(there, f"{name}_bytes") for name in NAMES)
    assert there.host_bytes - here.host_bytes == moved


NAMES = ("weight", "gradient", "optimizer")


def test_loading() -> None:
    """A whole layer beside the parts, 272 bytes; as its stack is made of 256 its pieces are there, too."""
    split = RankMemory(WEIGHTS, Layout(2, split=True))
    assert split.loading().total == split.weight_bytes + 272 + 256
    assert split.host_bytes == 0
    plain = RankMemory(WEIGHTS, Layout())
    assert plain.loading().total == 864 + 256 and plain.host_bytes == 0


def test_loading_on_the_way_to_a_gpu() -> None:
    """Layers are made in the CPU's memory."""
    split = RankMemory(WEIGHTS, Layout(2, split=True, gpu=True))
    assert split.loading().total == split.weight_bytes + 272 and split.host_bytes == 272 + 256
    plain = RankMemory(WEIGHTS, Layout(gpu=True))
    assert plain.loading().total == 864 and plain.host_bytes == 864 + 256


@pytest.mark.parametrize(("order", "beside"), [((0, 1), 200), ((1, 0), 400), ((None, None), 0)])
def test_stacks_are_made_one_after_the_other(order: tuple[int | None, int | None], beside: int) -> None:
    """Of 400 and 200 bytes: where the large one comes first, the other is not there yet while its pieces are."""
    shapes = ((4, 5, 5), (2, 5, 5))
    weights = [
        Weight(str(made), 0, shape, F32, stack=True, made=made) for shape, made in zip(shapes, order, strict=True)
    ]
    assert RankMemory(weights, Layout()).loading().transient == beside


def test_statistics_stay() -> None:
    memory = RankMemory(WEIGHTS, Layout(), statistics=77)
    assert {moment.statistics for moment in memory.moments(STEP)} == {77}
    assert memory.observing(5, 6) == Moment("statistics of a layer", 864, 0, 0, 5, 77, 6)
    assert memory.figures(8) == Moment("figures of the weights", 864, 0, 0, 0, 77, 8)


@pytest.mark.parametrize("sizes", [(1000, 10), (100, 100), (300, 500, 400)])
def test_adamw_makes_two_of_a_weight_beside_one_of_another(sizes: tuple[int, ...]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = torch.optim.AdamW(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        states = [one for state in optimizer.state.values() for one in state.values()]
        with LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None), *states]) as live:
            optimizer.step()
    weights = [Weight(str(number), 0, (size,), F32) for number, size in enumerate(sizes)]
    memory = RankMemory(weights, Layout(), frozenset(weight.name for weight in weights))
    step = StepBytes(0, (Passage(0, 0),), 0)
    expected = next(moment for moment in memory.moments(step, True) if "optimizer" in moment.at).transient
    assert expected <= live.peak < expected + 100
