"""Export by all ranks together: what ``save_model`` would write, though no rank holds the model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lightning_moe.moe.export
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.export import export_model
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.ranks import rank
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding
from lightning_moe.moe.skip_tables import SkipTable, set_skipping
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.sharded import on_ranks, only_rank, same_weights, written


def same_folders(one: Path, other: Path) -> None:
    """The same tensors under the same names, the same config but for what transformers counts by itself."""
    mine, yours = (
        {k: v for file in place.glob("*.safetensors") for k, v in load_file(file).items()} for place in (one, other)
    )
    assert mine.keys() == yours.keys()
    assert [name for name in mine if not torch.equal(mine[name], yours[name])] == []
    assert {tensor.dtype for tensor in mine.values()} == {tensor.dtype for tensor in yours.values()}
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    names = [{file.name for file in place.iterdir() if "safetensors" not in file.name} for place in (one, other)]
    assert names[0] == names[1]


def exported(name: str, folder: Path, sharding: Sharding) -> None:
    path = written(name, folder)
    split = load_sharded(str(path), sharding)
    target = folder / f"{name}-exported"
    export_model(split, target)
    with only_rank(0) as mine:
        if mine:
            save_model(load_model(str(path)), folder / f"{name}-saved")
            same_folders(target, folder / f"{name}-saved")
            stock = AutoModelForCausalLM.from_pretrained(target)
            same_weights(stock, load_model(str(path)))


def other_types(folder: Path, sharding: Sharding) -> None:
    """Saved in another type than it is held in, and tied weights once."""
    path = written("mixtral", folder, "tied", tie_word_embeddings=True)
    export_model(load_sharded(str(path), sharding), folder / "half", dtype="bfloat16")
    with only_rank(0) as mine:
        if mine:
            save_model(load_model(str(path)), folder / "half-saved", dtype="bfloat16")
            same_folders(folder / "half", folder / "half-saved")
            assert "lm_head.weight" not in load_file(folder / "half" / "model.safetensors")


def unlike_layers(folder: Path, sharding: Sharding) -> None:
    """A model whose layers differ stays one, and skips as before."""
    target = folder / "unlike"
    with only_rank(0) as mine:
        if mine:
            model = tiny_model("qwen3_moe")
            layers = find_moe_layers(model)
            set_skipping(model, {one.parts.index: SkipTable(0.3, torch.full((8, 8), 0.5)) for one in layers})
            keep_experts(model, {layers[0].name: [0, 2, 5], layers[1].name: [1, 2, 3, 4, 7]})
            save_model(model, target)
    export_model(load_sharded(str(target), sharding), folder / "unlike-exported")
    with only_rank(0) as mine:
        if mine:
            same_folders(folder / "unlike-exported", target)


def masked(name: str, split: bool, folder: Path, sharding: Sharding) -> None:
    """Experts that are only masked are left out, and the folder computes what the masked model does."""
    path = written(name, folder)
    model = load_sharded(str(path), sharding) if split else load_model(str(path))
    layers = find_moe_layers(model)
    keep = {layer.name: [0, 2, 5, 7] if number else [0, 3, 4, 6] for number, layer in enumerate(layers)}
    target = folder / f"{name}-{split}-masked"
    ids = tiny_batch()
    with mask_plan(layers, keep), torch.no_grad():
        export_model(model, target)
        logits = model(input_ids=ids).logits
    with only_rank(0) as mine:
        if mine:
            cut = load_model(str(path))
            keep_experts(cut, keep)
            save_model(cut, folder / f"{name}-{split}-cut")
            same_folders(target, folder / f"{name}-{split}-cut")
            with torch.no_grad():
                torch.testing.assert_close(load_model(str(target))(input_ids=ids).logits, logits)


def one_layer_at_a_time(folder: Path, sharding: Sharding) -> None:
    """What rank 0 has gathered and not yet handed on is never more than a layer."""
    model = load_sharded(str(written("mixtral", folder, "deep", num_hidden_layers=6)), sharding)
    sizes: list[int] = []
    stock = lightning_moe.moe.export.revert_weight_conversion

    def watched(model: Any, gathered: dict[str, Any]) -> Any:
        sizes.append(sum(tensor.numel() for tensor in gathered.values()))
        return stock(model, gathered)

    lightning_moe.moe.export.revert_weight_conversion = watched
    try:
        export_model(model, folder / "deep-exported")
    finally:
        lightning_moe.moe.export.revert_weight_conversion = stock
    if rank() == 0:
        assert len(sizes) >= 6
        assert max(sizes) < 0.2 * sum(sizes)
    else:
        assert sum(sizes) == 0


def killed(folder: Path, sharding: Sharding) -> None:
    """What is written beside goes, what was there stays."""
    model = load_sharded(str(written("olmoe", folder)), sharding)
    target = folder / "kept"
    with only_rank(0) as mine:
        if mine:
            target.mkdir()
            (target / "old").write_text("old")
    stock = lightning_moe.moe.export.add_modelling_file

    def fails(*args: Any) -> None:
        raise OSError("No space left on device")

    lightning_moe.moe.export.add_modelling_file = fails
    try:
        if rank() == 0:
            with pytest.raises(OSError, match="No space"):
                lightning_moe.moe.export._export_by_layer(model, target, None, None)
            assert [file.name for file in target.iterdir()] == ["old"]
            assert [file for file in folder.iterdir() if "kept" in file.name] == [target]
        else:
            lightning_moe.moe.export._export_by_layer(model, target, None, None)
    finally:
        lightning_moe.moe.export.add_modelling_file = stock


def test_on_two(tmp_path: Path) -> None:
    on_ranks(
        2,
        tmp_path,
        *(partial(exported, name) for name in FAMILIES),
        other_types,
        unlike_layers,
        *(partial(masked, name, split) for name in ("mixtral", "gpt_oss", "ernie4_5_moe") for split in (True, False)),
        one_layer_at_a_time,
        killed,
    )
