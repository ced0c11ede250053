"""Input norms: shards add up, padding is nothing, watching changes nothing, and what is stored is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.stats.input_norms import InputSums, StoredNorms, load_norms
from tests.helpers.families import tiny_batch, tiny_model


def summed(model: torch.nn.Module, sums: InputSums, ids: torch.Tensor, mask: torch.Tensor | None = None) -> InputSums:
    sums.next_batch(ids, mask)
    with torch.no_grad(), sums.attached(model):  # type: ignore[arg-type]
        model(input_ids=ids, attention_mask=mask)
    return sums


def assert_close(one: InputSums, other: InputSums) -> None:
    right = other.sums()
    for name, tensor in one.sums().items():
        assert tensor.dtype == torch.float64 and float(tensor.sum()) > 0
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_shards_add_up_and_padding_is_nothing(family: str) -> None:
    """Windows one by one, and padded ones beside blanks, are the windows together; a saved pass goes on."""
    model = tiny_model(family)
    ids = tiny_batch(batch=3)
    together = summed(model, InputSums(model), ids)
    shards = summed(model, InputSums(model), ids[:1])
    resumed = InputSums(model)
    resumed.load_sums(shards.sums())
    assert_close(summed(model, resumed, ids[1:]), together)
    assert_close(together, resumed)

    padded = torch.cat([ids, torch.zeros(3, 5, dtype=torch.long)], 1)
    padded = torch.cat([padded, torch.zeros(1, padded.shape[1], dtype=torch.long)])
    mask = torch.zeros_like(padded)
    mask[:3, : ids.shape[1]] = 1
    assert_close(summed(model, InputSums(model), padded, mask), together)

    norms = together.norms()
    for layer in find_moe_layers(model):
        for name, norm_EI in norms[layer.name].items():
            assert torch.equal(norm_EI, together.sums()[f"{layer.name}:{name}"].sqrt().float())
            assert norm_EI.shape[0] == layer.num_experts


def test_watching_changes_no_output_and_leaves_no_trace() -> None:
    model = tiny_model("gpt_oss")
    before = model.get_experts_implementation()
    ids = tiny_batch()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        sums = InputSums(model)
        sums.next_batch(ids)
        with sums.attached(model):
            watched = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    torch.testing.assert_close(watched, plain)
    assert torch.equal(again, plain) and model.get_experts_implementation() == before


def test_what_is_stored_is_read_again_or_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    norms = summed(model, InputSums(model), tiny_batch()).norms()
    file = tmp_path / "norms.safetensors"
    StoredNorms("m@1", "text", "auto", norms, 1.5).save(file)
    found = load_norms(file)
    assert (found.model_id, found.data_fingerprint, found.dtype, found.seconds) == ("m@1", "text", "auto", 1.5)
    assert found.norms.keys() == norms.keys()
    for layer, stacks in norms.items():
        assert all(torch.equal(found.norms[layer][name], norm) for name, norm in stacks.items())
    save_file(load_file(file), tmp_path / "newer.safetensors", metadata={"version": "99"})
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:100])
    for name, told in (("newer", "version 99"), ("broken", "not a file of input norms")):
        with pytest.raises(InputError, match=told):
            load_norms(tmp_path / f"{name}.safetensors")


def test_inputs_that_are_not_finite_are_said() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        find_moe_layers(model)[1].experts.gate_up_proj[:] = torch.inf
    sums = summed(model, InputSums(model), tiny_batch())
    with pytest.raises(InputError, match=r"down_proj of experts .* not finite"):
        sums.norms()
