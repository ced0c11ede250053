"""Laws of traces: without content as with it, and one layer of each kind as well as all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import new_model
from lightning_moe.moe.layer_passages import Step, trace_step
from lightning_moe.moe.live_bytes import LiveBytes, imagined
from tests.helpers.families import FAMILIES, tiny_config
from tests.helpers.passages import backward_peak, forward_peak


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")


def tuning(model: PreTrainedModel, length: int = 32, autocast: bool = False) -> Step:
    ids = torch.ones(2, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    module = MoECausalLM().adopt(model)

    def step(backward: Callable[[Tensor], None]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.training_step(batch, 0)
        backward(loss)

    return step


def peaks(model: PreTrainedModel, step: Step) -> tuple[int, int]:
    """Most bytes alive in the forward and in the backward of a step, gradients of weights included."""
    found: list[int] = []
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:

        def backward(loss: Tensor) -> None:
            found.append(live.peak)
            live.begin()
            loss.backward()

        step(backward)
    return found[0], live.peak


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_imagined_and_real_steps_hold_the_same(family: str, autocast: bool) -> None:
    """To the byte; and put together from layers the forward holds what it holds as a whole."""
    found = []
    for context in (contextlib.nullcontext, imagined):
        with context():
            model = new_model(tiny_config(family), torch.float32).train()
            step = tuning(model, autocast=autocast)
            found.append(peaks(model, step))
            model.zero_grad()
            (traced,) = trace_step(model, step)
            assert forward_peak(traced) == found[-1][0]
    assert found[0] == found[1]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_layers_put_together_are_the_whole(recompute: bool) -> None:
    """In a deep and wide model, where a layer's forward or backward is the fullest moment."""
    settings = {"num_hidden_layers": 9, "intermediate_size": 512, "vocab_size": 8, "pad_token_id": 0}
    with imagined():
        model = new_model(tiny_config("mixtral", **settings), torch.float32).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = tuning(model, 64)
        forward, _ = peaks(model, step)
        model.zero_grad()
        for parameter in model.parameters():  # as finished gradients count elsewhere
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        _, backward = peaks(model, step)
        (traced,) = trace_step(model, step)
    assert forward_peak(traced) == forward
    back = backward_peak(traced)
    own = sum(one.numel() * 4 for one in model.get_submodule("model.layers.0").parameters())
    assert backward <= back <= backward + own
    if recompute:
        assert traced.saved < 9 * 2 * 64 * 32 * 4 * 3 and back > traced.saved * 2


def test_kinds_of_layers_are_told_apart() -> None:
    """DeepSeek's first layer is dense, the rest are not."""
    with imagined():
        model = new_model(tiny_config("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=2), torch.float32)
        (traced,) = trace_step(model.train(), tuning(model))
    assert traced.layers[2] == traced.layers[5] != traced.layers[1]
    assert len(traced.layers) == 6


def test_the_first_layer_that_learns_is_told_from_those_above_it() -> None:
    """It asks no gradient of what it is given; those below it save nothing."""
    with imagined():
        model = new_model(tiny_config("mixtral", num_hidden_layers=6), torch.float32).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f"layers.{number}.mlp.experts" in name for number in (2, 3)))
        step = tuning(model)
        forward, _ = peaks(model, step)
        (traced,) = trace_step(model, step)
    saved = [layer.saved for layer in traced.layers]
    assert forward_peak(traced) == forward
    assert saved[1] == 0 < saved[2] < saved[3] and saved[4] == saved[5] < saved[3]
    assert [layer.backward > 0 for layer in traced.layers] == [False, False, True, True, True, True]


def test_a_model_is_left_as_it_was() -> None:
    with imagined():
        model = new_model(tiny_config("qwen2_moe"), torch.float32)
        before = [type(one).__name__ for one in model.modules()]
        trace_step(model, tuning(model))
        assert [type(one).__name__ for one in model.modules()] == before
        with pytest.raises(RuntimeError, match="on the way"):
            trace_step(model, lambda backward: (_ for _ in ()).throw(RuntimeError("on the way")))
        assert [type(one).__name__ for one in model.modules()] == before


def test_without_a_backward_nothing_is_saved() -> None:
    with imagined():
        model = new_model(tiny_config("mixtral", num_hidden_layers=4), torch.float32).eval()

        def step(backward: Callable[[Tensor], None]) -> None:
            with torch.no_grad():
                MoECausalLM().adopt(model).decode(batch)

        ids = torch.ones(2, 16, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        (traced,) = trace_step(model, step)
    hidden = 2 * 16 * 32 * 4  # beside what the first layer gives stays what it was given, the embeddings
    assert [layer.saved for layer in traced.layers[:-1]] == [hidden, 0, 0]
    assert traced.head_backward == traced.end == 0
