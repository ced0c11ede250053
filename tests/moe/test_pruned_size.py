"""The size foretold is the size that is then written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lightning_moe.moe.checkpoints import skeleton
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.pruned_size import pruned_size
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.plans import Keep, non_uniform_plan, uniform_plan


def written_size(folder: Path) -> dict[str, int]:
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    parameters = sum(parameter.numel() for parameter in skeleton(str(folder)).parameters())
    return {"parameters": parameters, "bytes": sum(tensor.nbytes for tensor in tensors)}


@pytest.mark.parametrize("plan", [uniform_plan, non_uniform_plan])
@pytest.mark.parametrize("family", FAMILIES)
def test_foretold_is_written(family: str, plan: Callable[[PreTrainedModel], Keep], tmp_path: Path) -> None:
    model = tiny_model(family)
    keep = uniform_plan(model) if family == "deepseek_v3" else plan(model)
    model.save_pretrained(tmp_path / "full")
    assert pruned_size(str(tmp_path / "full"), {}) == written_size(tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "pruned")
    assert pruned_size(str(tmp_path / "full"), keep) == written_size(tmp_path / "pruned")


def test_half_precision_on_disk(tmp_path: Path) -> None:
    model = tiny_model("mixtral").bfloat16()
    model.save_pretrained(tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), uniform_plan(model), tmp_path / "pruned")
    assert pruned_size(str(tmp_path / "full"), uniform_plan(model)) == written_size(tmp_path / "pruned")
