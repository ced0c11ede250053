"""Semi-structured weights on disk: a checkpoint with two of every four weights of its experts zero, never loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.files import replaced_folder
from lightning_moe.moe.block_cuts import EXPERT, FIRST, cut_of, find_cuts
from lightning_moe.moe.checkpoints import load_model, resolve, skeleton, weight_files, write_model
from lightning_moe.moe.compaction import copy_companions
from lightning_moe.moe.disk_layout import DiskLayout
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.neuron_order import NeuronAxis
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.semi_structured import (
    Matrix,
    Pattern,
    check_type,
    check_widths,
    zero_in_matrix,
    zero_in_model,
    zero_in_stack,
)
from lightning_moe.moe.tensor_reader import finite, opened
from lightning_moe.moe.weight_shards import SHARD_BYTES, write_shards

Places = Mapping[str, tuple[MoELayer, NeuronAxis]]
"""What each tensor of the experts' matrices on disk is, by its name; of experts one by one, by that of expert 0."""


def zero_in_checkpoint(source: str, pattern: Pattern, target: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Copy the checkpoint at ``source`` to ``target`` with the weights that go set to zero.

    All else is copied bit by bit, the config too: it is the same architecture at the same size. The folder is complete
    or not there at all. Returns how many weights of the experts are zero now. Raises ``InputError`` before writing
    where ``check_prunable`` does.
    """
    model, folder = skeleton(source), resolve(source)
    files = weight_files(folder)
    if files[0].suffix == ".bin":  # old checkpoints: no reading by tensor, so through memory
        loaded = load_model(source)
        zeros = [zero_in_model(loaded, pattern)]
        with replaced_folder(target) as beside:
            copy_companions(folder, beside)
            write_model(loaded, beside)
        return sum(zeros)
    places = _places(files, model)
    zeros = []
    with replaced_folder(target) as beside:
        copy_companions(folder, beside)
        write_shards(_thinned(files, places, pattern, zeros), beside, shard_bytes)
    return sum(zeros)


def check_prunable(source: str) -> None:
    """Raise ``InputError`` when no weights of the checkpoint at ``source`` can be set to zero.

    That is where inputs do not come in fours, for quantised experts, and where names on disk do not tell which matrix a
    tensor is.
    """
    model, files = skeleton(source), weight_files(resolve(source))
    check_widths(find_moe_layers(model))
    if files[0].suffix != ".bin":
        _places(files, model)


def _places(files: Sequence[Path], model: PreTrainedModel) -> Places:
    """Find every matrix of the experts on disk; refuse what ``check_prunable`` refuses."""
    layers = find_moe_layers(model)
    check_widths(layers)
    cuts = find_cuts(files, {one.parts.index: (one.num_experts, range(one.num_experts)) for one in layers})
    by_index = {layer.parts.index: layer for layer in layers}
    layout = DiskLayout(model)
    places: dict[str, tuple[MoELayer, NeuronAxis]] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                cut = cut_of(name, cuts)
                part = tensors.get_slice(name)
                one_by_one = EXPERT.search(name) is not None
                if cut is None or not (one_by_one or ".experts." in name or len(part.get_shape()) >= 3):
                    continue
                check_type(name, part.get_dtype())
                first = EXPERT.sub(FIRST, name)
                if first in places or len(part.get_shape()) != (2 if one_by_one else 3):
                    continue  # the matrix of another expert, or a bias
                layer = next(by_index[index] for index, one in cuts.items() if one is cut)
                place = _place(layout, first, layer, one_by_one)
                if place is not None:
                    places[first] = layer, place
    for layer in layers:
        found = [axis.place[0] for owner, axis in places.values() if owner is layer for _ in range(axis.parts)]
        fused = [name for name in stacked_parameters(layer.experts) for _ in range(2 if "gate_up" in name else 1)]
        if sorted(found) != sorted(fused):
            raise InputError(
                f"{files[0].parent}: its names do not tell what each tensor of {layer.name} is, so the inputs of its "
                "weights are not known."
            )
    return places


def _place(layout: DiskLayout, name: str, layer: MoELayer, one_by_one: bool) -> NeuronAxis | None:
    try:
        return layout.axis(name, layer.experts, one_by_one)
    except InputError as error:
        raise InputError(
            f"{name} is stored in another order than the model computes in, so the inputs of its weights are not "
            "known on disk; load the model with transformers, save it, and prune that."
        ) from error


def _thinned(files: Sequence[Path], places: Places, pattern: Pattern, zeros: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, as it is or with zeros, of which the numbers are added to ``zeros``."""
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = finite(name, tensors.get_tensor(name))
                place = places.get(EXPERT.sub(FIRST, name))
                if place is not None:
                    tensor = tensor.clone()  # what is read may be the file itself
                    layer, (stack, piece) = place[0], place[1].place
                    expert = EXPERT.search(name)
                    if expert is None:
                        zeros.append(zero_in_stack(tensor, layer, stack, pattern))
                    else:  # the matrix of a linear map, (out, in)
                        matrix = Matrix(layer.name, stack, piece, int(expert.group(1)))
                        zeros.append(zero_in_matrix(tensor, matrix, pattern))
                yield name, tensor
