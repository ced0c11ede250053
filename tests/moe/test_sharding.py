"""Models split over gloo processes: loaded, run and trained as on one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.decoding import decode
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.ranks import check_same, gathered, on_all_ranks, rank
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding, decoder_layers
from lightning_moe.moe.split_tensors import is_sharded, is_split, local
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.sharded import on_ranks, only_rank, same_weights, split_gradients, written


def trains_as_one(path: Path, sharding: Sharding, turns: int = 2) -> None:
    """Weights and buffers bit for bit; logits, hidden states and gradients of a batch of which each rank has a part."""
    ranks = torch.distributed.get_world_size()
    alone, split = load_model(str(path), "float32"), load_sharded(str(path), sharding, "float32")
    assert is_sharded(split) and not is_sharded(alone)
    same_weights(split, alone)
    ids = tiny_batch(batch=2)
    with torch.no_grad():
        torch.testing.assert_close(split(input_ids=ids).logits, alone(input_ids=ids).logits)
        torch.testing.assert_close(decode(split, ids), alone.base_model(input_ids=ids).last_hidden_state)
    for turn in range(turns):
        split.zero_grad()
        alone.zero_grad()
        for number in range(ranks):
            ids = tiny_batch(seed=turn * ranks + number)
            (alone(input_ids=ids, labels=ids).loss / ranks).backward()
        ids = tiny_batch(seed=turn * ranks + rank())
        split(input_ids=ids, labels=ids).loss.backward()
        found = split_gradients(split)
        wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)


def family(name: str, folder: Path, sharding: Sharding) -> None:
    trains_as_one(written(name, folder), sharding, turns=1)


def plain_and_balanced(folder: Path, sharding: Sharding) -> None:
    """Routers and vectors whole on every rank, all else in even parts, though 8 experts do not divide by 3."""
    sizes = {"hidden_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    model = load_sharded(str(written("qwen2_moe", folder, "thirds", **sizes)), sharding)
    layers = find_moe_layers(model)
    routers = {id(parameter) for layer in layers for parameter in layer.router.parameters()}
    for name, parameter in model.named_parameters():
        assert is_split(parameter) == (parameter.dim() > 1 and id(parameter) not in routers), name
    mine = sum(local(p).numel() for p in model.parameters() if is_split(p))
    held = gathered(mine)
    assert max(held) < 1.2 * min(held), held


def layers_of_unlike_size(folder: Path, sharding: Sharding) -> None:
    target = folder / "unlike"
    with only_rank(0) as mine:
        if mine and not target.exists():
            model = tiny_model("mixtral", num_hidden_layers=3)
            names = [layer.name for layer in find_moe_layers(model)]
            keep_experts(model, {names[0]: [0, 3, 5], names[1]: [1, 2, 3, 4, 6], names[2]: [2, 7]})
            save_model(model, target)
    trains_as_one(target, sharding)
    assert [layer.num_experts for layer in find_moe_layers(load_sharded(str(target), sharding))] == [3, 5, 2]


def fewer_experts_than_ranks(folder: Path, sharding: Sharding) -> None:
    trains_as_one(written("mixtral", folder, "two", num_local_experts=2, num_experts_per_tok=1), sharding)


def tied_embeddings(folder: Path, sharding: Sharding) -> None:
    path = written("mixtral", folder, "tied", tie_word_embeddings=True)
    trains_as_one(path, sharding)
    model = load_sharded(str(path), sharding)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def in_memory(folder: Path, sharding: Sharding) -> None:
    """A model split where it lies equals one that is loaded split."""
    path = written("olmoe", folder)
    model = load_model(str(path))
    sharding.shard(model)
    same_weights(model, load_sharded(str(path), sharding))
    ids = tiny_batch()
    with torch.no_grad():
        whole_model = load_model(str(path))
        torch.testing.assert_close(model(input_ids=ids).logits, whole_model(input_ids=ids).logits)


def formats(folder: Path, sharding: Sharding) -> None:
    """Half precision; several files; the files of old."""
    path = written("qwen3_moe", folder)
    several, old = folder / "several", folder / "old"
    with only_rank(0) as mine:
        if mine:
            model = load_model(str(path), "bfloat16")
            model.save_pretrained(several, max_shard_size="40KB")
            assert len(list(several.glob("*.safetensors"))) > 2
            old.mkdir()
            torch.save(load_file(path / "model.safetensors"), old / "pytorch_model.bin")
            (old / "config.json").write_text((path / "config.json").read_text())
    for place in (several, old):
        alone = load_model(str(place))
        split = load_sharded(str(place), sharding)
        assert {p.dtype for p in split.parameters()} == {p.dtype for p in alone.parameters()}
        same_weights(split, alone)
        same_weights(load_sharded(str(place), sharding, "float32"), load_model(str(place), "float32"))


def refusals(folder: Path, sharding: Sharding) -> None:
    path = written("mixtral", folder, "sound")
    tensors = load_file(path / "model.safetensors")
    name = next(one for one in tensors if "experts.3.w2" in one)
    broken = {
        "missing": {key: value for key, value in tensors.items() if key != name},
        "nan": tensors | {name: torch.full_like(tensors[name], torch.nan)},
        "shape": tensors | {"model.norm.weight": torch.ones(7)},
    }
    with only_rank(0) as mine:
        if mine:
            for what, stored in broken.items():
                (folder / what).mkdir()
                save_file(stored, folder / what / "model.safetensors", metadata={"format": "pt"})
                (folder / what / "config.json").write_text((path / "config.json").read_text())
            (folder / "cut").mkdir()
            whole_file = (path / "model.safetensors").read_bytes()
            (folder / "cut" / "model.safetensors").write_bytes(whole_file[: len(whole_file) // 2])
            (folder / "cut" / "config.json").write_text((path / "config.json").read_text())
    for what, said in (
        ("missing", "missing|loaded"),
        ("nan", "not finite"),
        ("shape", "shape"),
        ("cut", "read as weights"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            load_sharded(str(folder / what), sharding)
        assert "\n" not in str(caught.value)


def one_speaks_for_all(folder: Path, sharding: Sharding) -> None:
    """What one rank refuses, all refuse; what they were given apart, all notice."""

    def refuses() -> int:
        if rank() == 1:
            raise InputError("no such file")
        return 5

    with pytest.raises(InputError, match="rank 1: no such file"):
        on_all_ranks(refuses)
    assert on_all_ranks(lambda: 5) == 5
    check_same("the text", "same")
    with pytest.raises(InputError, match="the text: rank 0 has 0, rank 1 has 1"):
        check_same("the text", rank())


def test_on_two(tmp_path: Path) -> None:
    on_ranks(
        2,
        tmp_path,
        *(partial(family, name) for name in FAMILIES),
        layers_of_unlike_size,
        tied_embeddings,
        in_memory,
        formats,
        refusals,
        one_speaks_for_all,
    )


def test_on_three(tmp_path: Path) -> None:
    on_ranks(
        3, tmp_path, plain_and_balanced, layers_of_unlike_size, fewer_experts_than_ranks, partial(family, "gpt_oss")
    )


@pytest.mark.slow
def test_replicas(tmp_path: Path) -> None:
    checks = (partial(family, "mixtral"), layers_of_unlike_size)
    on_ranks(4, tmp_path, *checks, replicas=2)


@pytest.mark.slow
def test_weights_in_the_memory_of_the_cpu(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, partial(family, "qwen2_moe"), offload=True)


def test_decoder_layers_are_all_of_them() -> None:
    """Dense ones too, which hold no experts."""
    model = tiny_model("deepseek_v2")
    assert list(decoder_layers(model)) == [0, 1, 2]
    assert len(find_moe_layers(model)) == 2
