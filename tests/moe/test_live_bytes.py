"""LiveBytes: every storage once, as long as it lives; the same for tensors without content."""

from __future__ import annotations

import torch

from lightning_moe.moe.live_bytes import LiveBytes, imagined


def test_counts_what_lives() -> None:
    weight = torch.ones(100)
    with LiveBytes([weight]) as live:
        first = weight * 2
        assert (live.now, live.peak) == (400, 400)
        view = first.view(10, 10)
        view += 1
        assert live.now == 400  # one storage
        second = first.double()
        assert (live.now, live.peak) == (1200, 1200)
        del first
        assert live.now == 1200  # a view keeps it
        del view
        assert (live.now, live.peak) == (800, 1200)
        live.begin()
        assert live.peak == 800
        del second
    assert live.now == 0


def test_does_not_count_what_was_there() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes([weight]) as live:
        weight.t()
        assert live.now == 0


def test_what_autograd_saves_lives_until_the_backward() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes([weight]) as live:
        loss = (weight.exp() + 1).sum()
        assert live.now == 400 + 4  # what exp gave is needed, the sum of 1 is not
        loss.backward()
        assert live.now == 400 + 4  # the gradient, and the loss
        del loss
        weight.grad = None
    assert live.now == 0


def test_imagined_tensors_cost_nothing() -> None:
    with imagined():
        vast = torch.ones(1 << 20, 1 << 20)
        with LiveBytes([vast]) as live:
            product = vast @ vast
            assert live.now == 4 << 40
            assert bool((product > 0).all()) and product[0, 0].item() == 1
    assert vast.device.type == "cpu"


def test_an_imagined_model_lives_on_in_its_mode() -> None:
    with imagined() as mode:
        one = torch.ones(3)
    with imagined(mode):
        assert (one + torch.ones(3)).shape == (3,)


def test_stand_ins_have_the_shapes_of_real_results() -> None:
    inputs, offsets = torch.randn(12, 8), torch.tensor([4, 12], dtype=torch.int32)
    stack = torch.randn(2, 8, 16)
    forward = torch.nn.functional.grouped_mm(inputs, stack, offs=offsets)
    backward = torch.nn.functional.grouped_mm(inputs.t(), forward, offs=offsets)
    ids = torch.tensor([0, 1, 1])
    with imagined(), LiveBytes([]):
        fake = torch.empty(12, 8)
        ends = torch.empty(2, dtype=torch.int32)
        imagined_forward = torch.nn.functional.grouped_mm(fake, torch.empty(2, 8, 16), offs=ends)
        imagined_backward = torch.nn.functional.grouped_mm(fake.t(), imagined_forward, offs=ends)
        counts = torch.bincount(torch.empty(3, dtype=torch.long), minlength=5)
    assert imagined_forward.shape == forward.shape and imagined_backward.shape == backward.shape
    assert counts.shape == torch.bincount(ids, minlength=5).shape
