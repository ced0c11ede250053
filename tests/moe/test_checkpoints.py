"""Ids tell checkpoints apart; files are found where transformers finds them."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import all_finite, load_model, model_id, same_model
from tests.helpers.checkpoint import save_checkpoint


def test_any_changed_weight_changes_the_id_and_a_copy_does_not(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "one")
    copy = Path(shutil.copytree(source, tmp_path / "two"))
    assert same_model(model_id(str(source)), model_id(str(copy)))
    weights = load_file(source / "model.safetensors")
    for name in [name for name in weights if "gate.weight" in name or "experts.3.w2" in name]:
        changed = {key: tensor.clone() for key, tensor in weights.items()}
        changed[name][0] *= 2
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        assert not same_model(model_id(str(source)), model_id(str(copy))), name


DAMAGED = {
    "model.safetensors.index.json": [b"", b"{", b"[]", b"{}", b'{"weight_map": [1]}'],
    "model.safetensors": [b"", b"0" * 100],
    "pytorch_model.bin": [b"", b"junk", b"\x80\x04junk", pickle.dumps(shutil.rmtree)],
}


@pytest.mark.parametrize(("name", "content"), [(name, one) for name, many in DAMAGED.items() for one in many])
def test_damaged_weights_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (save_checkpoint(tmp_path / "one") / "model.safetensors").unlink()
    (tmp_path / "one" / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path / "one"))
    assert "\n" not in str(caught.value) and str(tmp_path / "one") in str(caught.value)


def test_finite_also_where_a_sum_overflows() -> None:
    large = torch.full((64, 64), 3e38)
    assert all_finite(large) and all_finite(large.bfloat16())
    for broken in (float("nan"), float("inf"), float("-inf")):
        tensor = torch.zeros(1000)
        tensor[123] = broken
        assert not all_finite(tensor)
