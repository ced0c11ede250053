"""Models split over gloo processes: loaded, run and trained as on one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.decoding import decode
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.ranks import check_same, check_shared, gathered, on_all_ranks, rank
from lightning_moe.moe.semi_structured import Pattern, zero_in_model
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding
from lightning_moe.moe.split_tensors import is_sharded, is_split, local
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.input_norms import InputSums
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
        losses = [model(input_ids=ids, labels=ids).loss for model in (split, alone)]
        torch.testing.assert_close(losses[0], losses[1])
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


def in_half_precision(name: str, folder: Path, sharding: Sharding) -> None:
    """With what the family keeps in float32: loaded split and split where it lies, it computes bit by bit what one
    process does, and gradients come back in the weights' own types."""
    target = folder / f"{name}-half"
    with only_rank(0) as mine:
        if mine:
            save_model(tiny_model(name), target, dtype="bfloat16")
    ids = tiny_batch(seed=rank())
    alone = load_model(str(target))
    wanted = alone(input_ids=ids, labels=ids)
    for split in (load_sharded(str(target), sharding), load_model(str(target))):
        if not is_sharded(split):
            sharding.shard(split)
        same_weights(split, alone)
        found = split(input_ids=ids, labels=ids)
        assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
        found.loss.backward()
        for one, other in zip(split.parameters(), alone.parameters(), strict=True):
            assert one.dtype == other.dtype and (one.grad is None or one.grad.dtype == one.dtype)
    kept = {"ernie4_5_moe", "hunyuan_v1_moe"}
    assert len({parameter.dtype for parameter in alone.parameters()}) == (2 if name in kept else 1)


def plain_and_balanced(model: PreTrainedModel, ranks: int) -> None:
    """Routers and vectors are whole and the same on every rank; experts in even parts, all else in parts that differ
    by a few rows at the most."""
    layers = find_moe_layers(model)
    routers = {id(parameter) for layer in layers for parameter in layer.router.parameters()}
    for name, parameter in model.named_parameters():
        assert is_split(parameter) == (parameter.dim() > 1 and id(parameter) not in routers), name
        if not is_split(parameter):
            assert len(set(gathered(float(parameter.detach().double().sum())))) == 1, name
    for layer in layers:
        for name, stack in stacked_parameters(layer.experts).items():
            assert len(set(gathered(local(stack).numel()))) == 1, f"{layer.name}: {name}"
    split = [parameter for parameter in model.parameters() if is_split(parameter)]
    uneven = [p.shape[1] for p in split if all(size % ranks for size in p.shape)]
    held = gathered(sum(local(parameter).numel() for parameter in split))
    assert max(held) - min(held) <= (ranks - 1) * sum(uneven), held


def thirds(folder: Path, sharding: Sharding) -> None:
    """8 experts do not divide by 3; their other dimensions do."""
    sizes = {"hidden_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    plain_and_balanced(load_sharded(str(written("qwen2_moe", folder, "thirds", **sizes)), sharding), sharding.ranks)


def layers_of_unlike_size(folder: Path, sharding: Sharding) -> None:
    target = folder / "unlike"
    with only_rank(0) as mine:
        if mine and not target.exists():
            model = tiny_model("mixtral", num_hidden_layers=3)
            names = [layer.name for layer in find_moe_layers(model)]
            keep_experts(model, {names[0]: [0, 3, 5], names[1]: [1, 2, 3, 4, 6], names[2]: [2, 7]})
            save_model(model, target)
    trains_as_one(target, sharding)
    model = load_sharded(str(target), sharding)
    assert [layer.num_experts for layer in find_moe_layers(model)] == [3, 5, 2]
    plain_and_balanced(model, sharding.ranks)


def fewer_experts_than_ranks(folder: Path, sharding: Sharding) -> None:
    path = written("mixtral", folder, "two", num_local_experts=2, num_experts_per_tok=1)
    trains_as_one(path, sharding)
    plain_and_balanced(load_sharded(str(path), sharding), sharding.ranks)


def tied_embeddings(folder: Path, sharding: Sharding) -> None:
    path = written("mixtral", folder, "tied", tie_word_embeddings=True)
    trains_as_one(path, sharding)
    model = load_sharded(str(path), sharding)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def learns_in_step(folder: Path, sharding: Sharding) -> None:
    """After steps of an optimiser on unlike batches, what is not split is still the same on every rank."""
    model = load_sharded(str(written("deepseek_v3", folder)), sharding)
    before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for turn in range(3):
        ids = tiny_batch(seed=10 * turn + rank())
        model(input_ids=ids, labels=ids).loss.backward()
        split_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    plain_and_balanced(model, sharding.ranks)
    assert [name for name, p in model.named_parameters() if torch.equal(local(p), before[name])] == [
        name for name, _ in model.named_parameters() if "correction_bias" in name
    ]


def formats(folder: Path, sharding: Sharding) -> None:
    """Half precision; several files; the files of old, one or several."""
    path = written("qwen3_moe", folder)
    several, old, several_old = folder / "several", folder / "old", folder / "several-old"
    with only_rank(0) as mine:
        if mine:
            model = load_model(str(path), "bfloat16")
            model.save_pretrained(several, max_shard_size="40KB")
            assert len(list(several.glob("*.safetensors"))) > 2
            tensors = load_file(path / "model.safetensors")
            files = {name: f"pytorch_model-{number % 3 + 1:05d}-of-00003.bin" for number, name in enumerate(tensors)}
            for place in (old, several_old):
                place.mkdir()
                (place / "config.json").write_text((path / "config.json").read_text())
            torch.save(tensors, old / "pytorch_model.bin")
            for file in set(files.values()):
                torch.save({name: tensors[name] for name in tensors if files[name] == file}, several_old / file)
            index = json.dumps({"metadata": {}, "weight_map": files})
            (several_old / "pytorch_model.bin.index.json").write_text(index)
    for place in (several, old, several_old):
        alone = load_model(str(place))
        split = load_sharded(str(place), sharding)
        assert {p.dtype for p in split.parameters()} == {p.dtype for p in alone.parameters()}
        same_weights(split, alone)
        same_weights(load_sharded(str(place), sharding, "float32"), load_model(str(place), "float32"))


def refusals(folder: Path, sharding: Sharding) -> None:
    """Damaged checkpoints, and such as the config does not fit, by what the one line says of them."""
    path = written("mixtral", folder, "sound")
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    expert, router = (
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
    )
    lists = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": lists}).encode()
    whole_file, legacy = (path / "model.safetensors").read_bytes(), folder / "legacy.bin"
    with only_rank(0) as mine:
        if mine:
            torch.save(tensors, legacy)
            torch.save({"weights": Path("somewhere")}, folder / "unsafe.bin")
    old, unsafe = legacy.read_bytes(), (folder / "unsafe.bin").read_bytes()
    cases: dict[str, tuple[Any, dict[str, Any], list[str]]] = {  # what is stored, settings that change, words said
        "no expert": (
            {k: v for k, v in tensors.items() if k != expert},
            {},
            ["layers.1", "(7, 32, 48)", "(8, 32, 48)"],
        ),
        "no router": ({k: v for k, v in tensors.items() if k != router}, {}, ["1 weights are missing", "layers.1"]),
        "no embedding": ({k: v for k, v in tensors.items() if "embed" not in k}, {}, ["missing", "embed_tokens"]),
        "nan": (tensors | {expert: tensors[expert] * torch.nan}, {}, ["layers.1", "down_proj", "not finite"]),
        "inf": (tensors | {router: tensors[router] * torch.inf}, {}, ["layers.1", "gate.weight", "not finite"]),
        "nan above": (
            tensors | {"lm_head.weight": tensors["lm_head.weight"] * torch.nan},
            {},
            ["lm_head", "not finite"],
        ),
        "shape": (tensors | {"model.norm.weight": torch.ones(7)}, {}, ["norm.weight", "(7,)", "(32,)"]),
        "one expert's shape": (tensors | {expert: tensors[expert][1:].clone()}, {}, ["layers.1", "[31, 48]"]),
        "fewer experts": (tensors, {"num_local_experts": 6}, ["(8, 32, 48)", "(6, 32, 48)"]),
        "more layers": (tensors, {"num_hidden_layers": 3}, ["weights are missing", "layers.2"]),
        "quantised": (tensors, {"quantization_config": {"quant_method": "bitsandbytes"}}, ["quantised already"]),
        "cut": (("model.safetensors", whole_file[: len(whole_file) // 2]), {}, ["cannot be read as weights"]),
        "empty": (("model.safetensors", b""), {}, ["cannot be read as weights"]),
        "cut of old": (("pytorch_model.bin", old[: len(old) // 2]), {}, ["cannot be read as weights"]),
        "empty of old": (("pytorch_model.bin", b""), {}, ["cannot be read as weights"]),
        "unsafe": (("pytorch_model.bin", unsafe), {}, ["cannot be read as weights"]),
        "no file": (("model.safetensors.index.json", index), {}, ["model-00001-of-00001.safetensors is missing"]),
        "no weights": (None, {}, ["no weights"]),
    }
    with only_rank(0) as mine:
        for what, (stored, changes, _) in cases.items() if mine else ():
            place = folder / "refused" / what
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(config | changes))
            if isinstance(stored, dict):
                save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
            elif stored is not None:
                (place / stored[0]).write_bytes(stored[1])
    for what, (_, _, words) in cases.items():
        with pytest.raises(InputError) as caught:
            load_sharded(str(folder / "refused" / what), sharding)
        said = str(caught.value)
        assert "\n" not in said and all(word in said for word in words), f"{what}: {said}"
    with pytest.raises(InputError, match="no such folder"):
        load_sharded(str(folder / "nowhere"), sharding)


def one_speaks_for_all(folder: Path, sharding: Sharding) -> None:
    """What one rank refuses, all refuse; what they were given apart, all notice."""

    def refuses() -> int:
        if rank() == 1:
            raise InputError("no such file")
        return 5

    with pytest.raises(InputError, match="rank 1: no such file"):
        on_all_ranks(refuses)
    assert on_all_ranks(lambda: 5) == 5

    def breaks() -> None:
        if rank() == 1:
            raise OSError("the disk is gone")

    with pytest.raises(OSError if rank() == 1 else InputError, match="the disk is gone"):
        on_all_ranks(breaks)
    check_shared(folder / "new" / "shared")
    torch.distributed.barrier()
    assert not list((folder / "new" / "shared").iterdir())
    with pytest.raises(InputError, match="rank 1 does not see what rank 0 writes there; give a folder that all nodes"):
        check_shared(folder / f"of-{rank()}")
    check_same("the text", "same")
    with pytest.raises(InputError, match="the text: rank 0 has 0, rank 1 has 1"):
        check_same("the text", rank())


def same_zeros(folder: Path, sharding: Sharding) -> None:
    """2:4 by norms that ranks sum up: split over the experts, or otherwise where their number does not divide."""
    for name, experts in (("mixtral", 8), ("gpt_oss", 7)):
        path = written(name, folder, f"{name}-{experts}", num_local_experts=experts)
        alone, split = load_model(str(path), "float32"), load_sharded(str(path), sharding, "float32")
        ids = tiny_batch(batch=torch.distributed.get_world_size())
        summed, wanted = InputSums(split), InputSums(alone)
        for sums, model, rows in ((summed, split, ids[rank()][None]), (wanted, alone, ids)):
            sums.next_batch(rows)
            with torch.no_grad(), sums.attached(model):
                model(input_ids=rows)
        norms = summed.norms()
        for layer, stacks in norms.items():
            for stack, norm_EI in stacks.items():
                torch.testing.assert_close(norm_EI, wanted.sums()[f"{layer}:{stack}"].sqrt().float())
        for pattern in (Pattern("random", 1), Pattern("wanda", norms=norms)):
            assert zero_in_model(split, pattern) == zero_in_model(alone, pattern)
            same_weights(split, alone)
        ids = tiny_batch()
        torch.testing.assert_close(split(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_on_two(tmp_path: Path) -> None:
    on_ranks(
        2,
        tmp_path,
        *(partial(family, name) for name in FAMILIES),
        *(partial(in_half_precision, name) for name in FAMILIES),
        layers_of_unlike_size,
        tied_embeddings,
        learns_in_step,
        formats,
        refusals,
        one_speaks_for_all,
        same_zeros,
    )


def test_on_three(tmp_path: Path) -> None:
    checks = (thirds, layers_of_unlike_size, fewer_experts_than_ranks, partial(family, "gpt_oss"))
    on_ranks(3, tmp_path, *checks)


@pytest.mark.scale
def test_replicas(tmp_path: Path) -> None:
    checks = (partial(family, "mixtral"), layers_of_unlike_size, learns_in_step, tied_embeddings, same_zeros)
    on_ranks(4, tmp_path, *checks, replicas=2)


@pytest.mark.slow
def test_weights_in_the_memory_of_the_cpu(tmp_path: Path) -> None:
    checks = (partial(family, "qwen2_moe"), partial(in_half_precision, "ernie4_5_moe"), layers_of_unlike_size)
    on_ranks(2, tmp_path, *checks, learns_in_step, same_zeros, offload=True)


def test_decoder_layers_are_all_of_them() -> None:
    """Dense ones too, which hold no experts."""
    model = tiny_model("deepseek_v2")
    assert len(decoder_layers(model)) == 3
    assert len(find_moe_layers(model)) == 2
