"""SameTokenCKA: the CKA of outputs that were collected expert by expert, on tokens where they are said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape, find_moe_layers
from lightning_moe.report.findings import inter_layer
from lightning_moe.report.findings_figure import inter_layer_figure
from lightning_moe.stats import same_token_cka
from lightning_moe.stats.same_token_cka import SameTokenCKA, check_sample
from tests.helpers.families import FAMILIES, HIDDEN, tiny_batch, tiny_model
from tests.helpers.reference import similarity as reference
from tests.helpers.thinning import thinned

LENGTHS = [12, 12, 5, 2]
"""Of four windows of 12."""


def shown() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(4, 12, dtype=torch.long)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[:length] = 1
    return tiny_batch(4, 12), mask


@torch.no_grad()
def filled(model: PreTrainedModel, num_tokens: int, batches: list[list[int]]) -> SameTokenCKA:
    """``batches`` are numbers of windows, -1 for a blank one."""
    cka = SameTokenCKA(model, LENGTHS, num_tokens)
    ids, mask = shown()
    with cka.attached():
        for windows in batches:
            cka.next_batch(windows, 12)
            model(ids[windows], attention_mask=mask[windows], use_cache=False)
    return cka


@torch.no_grad()
def slow_cka(model: PreTrainedModel, positions: list[list[int]]) -> Tensor:
    """Run every expert alone on the inputs of its layer, by the model's own loop; compare the outputs two by two."""
    ids, mask = shown()
    rows, centred = [row * 12 + place for row, places in enumerate(positions) for place in places], []
    for layer in find_moe_layers(model):
        inputs: list[Any] = []
        handle = layer.experts.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        model(ids, attention_mask=mask, use_cache=False)
        handle.remove()
        hidden_TH = inputs[0].reshape(-1, HIDDEN)[rows]
        for expert in range(layer.num_experts):
            ids_T1 = torch.full((len(rows), 1), expert)
            outputs_TH = layer.experts(hidden_TH, ids_T1, torch.ones(len(rows), 1)).double()
            centred.append(reference.u_centred(outputs_TH @ outputs_TH.T).flatten())
    unit = torch.stack([one / one.norm() for one in centred])
    return (unit @ unit.T).clamp(min=0.0)


@pytest.mark.parametrize("family", thinned(FAMILIES, 4))
def test_equals_collected_outputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few experts are held at a time, and however the windows are batched."""
    model = tiny_model(family)
    cka = filled(model, 20, [[0, 1, 2, 3]])
    assert [len(one) for one in cka.positions] == [5, 5, 5, 2] and cka.num_tokens == 17
    assert cka.positions[0] == [1, 3, 6, 8, 10] and cka.positions[2] == [0, 1, 2, 3, 4]
    model.set_experts_implementation("eager")
    expected = slow_cka(model, cka.positions)
    for rows, batches in ((8192, [[0, 1, 2, 3]]), (17 * 3, [[3, -1], [1, 0], [2]])):
        monkeypatch.setattr(same_token_cka, "ROWS", rows)
        found = filled(model, 20, batches).compute()
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


def test_copies_are_alike_wherever_they_are_and_a_constant_is_like_nothing() -> None:
    model = tiny_model("mixtral")
    first, second = find_moe_layers(model)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(first.experts, name)[3] = getattr(first.experts, name)[6]
        second.experts.down_proj[5] = 0.0  # type: ignore[index, operator]
    found = filled(model, 20, [[0, 1, 2, 3]]).compute()
    assert found is not None
    assert found[3, 6] == pytest.approx(1.0, abs=1e-5) and float(found[3, 4]) < 0.9
    assert bool(found[8 + 5].isnan().all()) and bool(found[:, 8 + 5].isnan().all())
    assert int(found.isnan().sum()) == 31
    torch.testing.assert_close(found, found.T, equal_nan=True)
    assert filled(model, 20, [[0, 1, 2, 3]]).compute(writes=False) is None


def test_means_of_layers_leave_each_expert_itself_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 2 and 3 experts, the last of which is unknown."""
    cka = torch.tensor(
        [
            [1.0, 0.5, 0.1, 0.2, torch.nan],
            [0.5, 1.0, 0.3, 0.4, torch.nan],
            [0.1, 0.3, 1.0, 0.7, torch.nan],
            [0.2, 0.4, 0.7, 1.0, torch.nan],
            [torch.nan] * 5,
        ]
    )
    shapes = [LayerShape("one", 0, 2, 1), LayerShape("two", 1, 3, 1)]
    found = inter_layer(cka, shapes, 20)
    assert found["layers"] == {"one": [0.5, 0.25], "two": [0.25, 0.7]}
    assert (found["within"], found["between"], found["tokens"]) == (0.6, 0.25, 20)
    assert found["pairs"][0] == [1.0, 0.5, 0.1, 0.2, None] and found["pairs"][4] == [None] * 5
    monkeypatch.setattr("lightning_moe.report.findings.MOST_EXPERTS", 4)
    assert inter_layer(cka, shapes, 20) == {**found, "pairs": None}
    inter_layer_figure(found, cka).canvas.draw()


def test_a_sample_that_memory_does_not_hold_is_refused() -> None:
    check_sample(512, 58 * 256)
    for tokens, experts, most in ((-1, 48, "9459"), (600, 58 * 256, "537")):
        with pytest.raises(InputError, match=f"--similarity_tokens {tokens}: between 4 and {most} for {experts}"):
            check_sample(tokens, experts)
