"""The laws of compaction: a checkpoint cut on disk is the model cut in memory, whatever its files are like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.plans import Keep, fewest_plan, non_uniform_plan, uniform_plan
from tests.moe.pruned_models import (
    COUNT_NAMES,
    assert_identical,
    assert_one_line,
    every_family,
    in_memory,
    logits_of,
    pruned,
    read_config,
    snapshot,
    stock_load,
)


@every_family
@pytest.mark.parametrize(
    ("plan", "shard_bytes"),
    [(uniform_plan, 4 << 30), (non_uniform_plan, 4 << 30), (fewest_plan, 4 << 30), (non_uniform_plan, 20_000)],
    ids=["uniform", "non-uniform", "fewest", "non-uniform, many files"],
)
def test_compaction_on_disk_equals_surgery_in_memory(
    family: str, plan: Callable[[PreTrainedModel], Keep], shard_bytes: int, tmp_path: Path
) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path / "full")
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    keep_experts(model, keep := plan(model))
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "compact", shard_bytes)
    save_model(model, tmp_path / "surgery")
    files = list((tmp_path / "compact").glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes < 1 << 20)
    shards = [load_file(file) for file in files]
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_bytes for shard in shards)
    on_disk = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert_identical(on_disk, load_file(tmp_path / "surgery" / "model.safetensors"))
    assert read_config(tmp_path / "compact") == read_config(tmp_path / "surgery")
    assert (tmp_path / "compact" / "tokenizer.json").read_text() == "{}"
    loaded = stock_load(tmp_path / "compact")
    assert_identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_compaction_reads_every_name_of_the_count(tmp_path: Path) -> None:
    """A config on disk may give the number of experts under any alias that its class knows."""
    broken = []
    for family in FAMILIES:
        model = tiny_model(family)
        aliases = [alias for alias, name in type(model.config).attribute_map.items() if name in COUNT_NAMES]
        for alias in aliases:
            source = tmp_path / f"{family}-{alias}"
            save_model(model, source)
            config = read_config(source)
            config[alias] = config.pop(type(model.config).attribute_map[alias])
            (source / "config.json").write_text(json.dumps(config))
            keep = uniform_plan(model)
            compact_checkpoint(str(source), keep, tmp_path / "out")
            try:
                same = torch.equal(
                    logits_of(in_memory(load_model(str(tmp_path / "out")))), logits_of(pruned(model, keep))
                )
            except InputError:
                same = False
            if not same:
                broken.append(f"{family} with {alias}")
    assert not broken


def test_compaction_reads_the_files_transformers_reads(tmp_path: Path) -> None:
    """Weights in another format may lie in the same folder (Mistral's ``consolidated.safetensors``)."""
    model = tiny_model("mixtral")
    source, keep = tmp_path / "full", uniform_plan(model)
    model.save_pretrained(source)
    foreign = {f"layers.{i}.feed_forward.experts.{e}.w1.weight": torch.ones(4, 4) for i in (0, 1) for e in range(8)}
    for name in ("consolidated.safetensors", "original.safetensors"):
        save_file(foreign, source / name)
    compact_checkpoint(str(source), keep, tmp_path / "out")
    smaller = stock_load(tmp_path / "out")
    assert torch.equal(logits_of(smaller), logits_of(pruned(model, keep)))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("mixtral", tie_word_embeddings=True)
    keep = non_uniform_plan(model)
    save_model(model, tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out", shard_bytes=5_000)
    loaded = stock_load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded), logits_of(pruned(model, keep)))


def test_compaction_keeps_half_precision_bit_by_bit(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    keep = non_uniform_plan(model)
    save_model(model, tmp_path / "full", dtype="bfloat16")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    found, expected = stock_load(tmp_path / "out"), pruned(stock_load(tmp_path / "full"), keep)
    assert found.dtype == torch.bfloat16
    assert_identical(snapshot(found), snapshot(expected))
    assert torch.equal(logits_of(found), logits_of(expected))


def test_compaction_can_replace_its_source(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    keep = non_uniform_plan(model)
    save_model(model, tmp_path / "model")
    compact_checkpoint(str(tmp_path / "model"), keep, tmp_path / "model")
    assert torch.equal(logits_of(stock_load(tmp_path / "model")), logits_of(pruned(model, keep)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_old_weight_files_are_cut_as_well(tmp_path: Path) -> None:
    """Also where no tokenizer lies beside them."""
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    save_model(model, tmp_path / "full")
    torch.save(load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "full" / "pytorch_model.bin")
    (tmp_path / "full" / "model.safetensors").unlink()
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    assert torch.equal(logits_of(stock_load(tmp_path / "out")), logits_of(pruned(model, keep)))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    keep = uniform_plan(model)
    save_model(model, tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    weights = load_file(file)
    expert = next(name for name in weights if ".experts.3." in name)
    save_file({name: tensor for name, tensor in weights.items() if name != expert}, file, {"format": "pt"})
    # one matrix of one expert is not there: neither way may write a model without it
    with pytest.raises(InputError) as refusal:
        load_model(str(tmp_path / "full"))
    assert_one_line(refusal.value)
    damaged = {name: tensor.clone() for name, tensor in weights.items()}
    damaged[expert][0, 0] = float("nan")
    save_file(damaged, file, {"format": "pt"})
    for act in (
        lambda: load_model(str(tmp_path / "full")),
        lambda: compact_checkpoint(str(tmp_path / "full"), {**keep, next(iter(keep)): [0, 1, 3, 7]}, tmp_path / "out"),
    ):
        with pytest.raises(InputError) as refusal:
            act()
        assert_one_line(refusal.value, "not finite")
    missing = {
        name: tensor for name, tensor in weights.items() if ".layers.0." not in name or ".experts.3." not in name
    }
    save_file(missing, file, {"format": "pt"})
    with pytest.raises(InputError) as refusal:
        compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    assert_one_line(refusal.value, "layer 0", "incomplete")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
