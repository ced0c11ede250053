"""Export by all ranks together: what ``save_model`` would write, though no rank holds the model."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException  # type: ignore[attr-defined]
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from lightning_moe.moe.weight_shards import write_shards
from tests.helpers.checkpoint import save_tokenizer
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


@contextmanager
def put(name: str, stand_in: Any) -> Iterator[Any]:
    """Another function in the place of one that ``export`` calls; gives the stock one."""
    stock = getattr(lightning_moe.moe.export, name)
    setattr(lightning_moe.moe.export, name, stand_in)
    try:
        yield stock
    finally:
        setattr(lightning_moe.moe.export, name, stock)


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


def other_types(name: str, folder: Path, sharding: Sharding) -> None:
    """Saved in another type than it is held in, but for what its family keeps in float32; and back."""
    path = written(name, folder)
    half, again = folder / f"{name}-half", folder / f"{name}-again"
    export_model(load_sharded(str(path), sharding), half, dtype="bfloat16")
    export_model(load_sharded(str(half), sharding), again, dtype="float32")
    with only_rank(0) as mine:
        if mine:
            save_model(load_model(str(path)), folder / "saved", dtype="bfloat16")
            same_folders(half, folder / "saved")
            save_model(load_model(str(half)), folder / "saved", dtype="float32")
            same_folders(again, folder / "saved")


def tied_with_tokenizer(folder: Path, sharding: Sharding) -> None:
    """Weights that are tied are there once; the tokenizer lies beside them."""
    path = written("mixtral", folder, "tied", tie_word_embeddings=True)
    with only_rank(0) as mine:
        if mine:
            save_tokenizer(path)
    target = folder / "tied-exported"
    export_model(load_sharded(str(path), sharding), target, tokenizer=str(path))
    with only_rank(0) as mine:
        if mine:
            save_model(load_model(str(path)), folder / "tied-saved", tokenizer=str(path))
            same_folders(target, folder / "tied-saved")
            assert "lm_head.weight" not in load_file(target / "model.safetensors")
            text = "The experts of a mixture"
            assert AutoTokenizer.from_pretrained(target)(text) == AutoTokenizer.from_pretrained(path)(text)


def several_files(folder: Path, sharding: Sharding) -> None:
    """Large models are several files and their index, which stock transformers loads."""
    path, target = written("deepseek_v3", folder), folder / "several"
    with put("write_shards", partial(write_shards, shard_bytes=20_000)):
        export_model(load_sharded(str(path), sharding), target)
    with only_rank(0) as mine:
        if mine:
            index = json.loads((target / "model.safetensors.index.json").read_text())
            files = {file.name: load_file(file) for file in target.glob("*.safetensors")}
            assert len(files) > 3 and set(index["weight_map"].values()) == files.keys()
            assert all(name in files[file] for name, file in index["weight_map"].items())
            sizes = [tensor.nbytes for tensors in files.values() for tensor in tensors.values()]
            assert sum(sizes) == index["metadata"]["total_size"]
            save_model(load_model(str(path)), folder / "saved")
            same_folders(target, folder / "saved")
            same_weights(AutoModelForCausalLM.from_pretrained(target), load_model(str(path)))


def unlike_layers(folder: Path, sharding: Sharding) -> None:
    """A model whose layers differ stays one, and skips as before."""
    target = folder / "unlike"
    with only_rank(0) as mine:
        if mine:
            model = tiny_model("qwen3_moe")
            layers = find_moe_layers(model)
            table_EE = torch.arange(64).view(8, 8) / 64  # no two alike
            set_skipping(model, {one.parts.index: SkipTable(0.3, table_EE) for one in layers})
            keep_experts(model, {layers[0].name: [0, 2, 5], layers[1].name: [1, 2, 3, 4, 7]})
            save_model(model, target)
    split = load_sharded(str(target), sharding)
    export_model(split, folder / "unlike-exported")
    same_weights(load_sharded(str(folder / "unlike-exported"), sharding), split)
    layers = find_moe_layers(split)
    keep = {layers[0].name: [0, 2], layers[1].name: [1, 3, 4]}
    with mask_plan(layers, keep):
        export_model(split, folder / "unlike-masked")
    with only_rank(0) as mine:
        if mine:
            same_folders(folder / "unlike-exported", target)
            cut = load_model(str(target))
            keep_experts(cut, keep)
            save_model(cut, folder / "unlike-cut")
            same_folders(folder / "unlike-masked", folder / "unlike-cut")
            tables = json.loads((folder / "unlike-masked" / "config.json").read_text())["expert_skipping"]["layers"]
            assert [len(table["gamma2"]) for table in tables.values()] == [2, 3]


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


def live_bytes() -> int:
    """Of all plain tensors of this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def one_layer_at_a_time(folder: Path, sharding: Sharding) -> None:
    """What rank 0 has gathered and not yet handed on is never more than a layer, and with what it writes never more
    than a few; other ranks keep nothing of it."""
    model = load_sharded(str(written("mixtral", folder, "deep", num_hidden_layers=12)), sharding)
    sizes: list[int] = []
    live = [live_bytes()]

    def watched(model: Any, gathered: dict[str, Any]) -> Any:
        sizes.append(sum(tensor.nbytes for tensor in gathered.values()))
        live.append(live_bytes())
        return stock(model, gathered)

    with (
        put("revert_weight_conversion", watched) as stock,
        put("write_shards", partial(write_shards, shard_bytes=100_000)),
    ):
        export_model(model, folder / "deep-exported")
    layer = max(sizes)
    if rank() == 0:
        assert len(sizes) >= 12
        assert layer < 0.1 * sum(sizes)
        assert max(live) - live[0] < 2 * layer + 2 * 100_000
    else:
        assert sum(sizes) == 0
        assert max(live) - live[0] < 100_000


def killed(folder: Path, sharding: Sharding) -> None:
    """What is written beside goes, what was there stays."""
    model = load_sharded(str(written("olmoe", folder)), sharding)
    target = folder / "kept"
    with only_rank(0) as mine:
        if mine:
            target.mkdir()
            (target / "old").write_text("old")

    def fails(*args: Any) -> None:
        raise OSError("No space left on device")

    with put("add_modelling_file", fails):
        if rank() == 0:
            with pytest.raises(OSError, match="No space"):
                lightning_moe.moe.export._export_by_layer(model, target, None, None)
            assert [file.name for file in target.iterdir()] == ["old"]
            assert [file for file in folder.iterdir() if "kept" in file.name] == [target]
        else:
            lightning_moe.moe.export._export_by_layer(model, target, None, None)


def kills_itself(folder: Path, sharding: Sharding) -> None:
    """Rank 0 is gone in the midst of the second layer."""
    model = load_sharded(str(written("olmoe", folder)), sharding)
    turns: list[int] = []

    def dies(*args: Any) -> Any:
        turns.append(1)
        if rank() == 0 and len(turns) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*args)

    with (
        put("revert_weight_conversion", dies) as stock,
        put("write_shards", partial(write_shards, shard_bytes=20_000)),
    ):
        export_model(model, folder / "target")


def exports_anew(folder: Path, sharding: Sharding) -> None:
    export_model(load_sharded(str(folder / "olmoe"), sharding), folder / "target")


def test_on_two(tmp_path: Path) -> None:
    on_ranks(
        2,
        tmp_path,
        *(partial(exported, name) for name in FAMILIES),
        *(partial(other_types, name) for name in ("ernie4_5_moe", "deepseek_v3", "gpt_oss")),
        tied_with_tokenizer,
        several_files,
        unlike_layers,
        *(partial(masked, name, split) for name in ("mixtral", "gpt_oss", "ernie4_5_moe") for split in (True, False)),
        one_layer_at_a_time,
        killed,
    )


@pytest.mark.scale
def test_killed_in_the_midst(tmp_path: Path) -> None:
    """The folder is not there, not in part; the next export takes away what lies beside."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(2, tmp_path, kills_itself)
    beside = tmp_path / ".target.partial"
    assert list(beside.iterdir()) and not (tmp_path / "target").exists()
    (tmp_path / "store-2-1-False").unlink()
    on_ranks(2, tmp_path, exports_anew)
    assert not beside.exists()
    same_weights(load_model(str(tmp_path / "target")), load_model(str(tmp_path / "olmoe")))
