"""How large a checkpoint will be once it is pruned, known without writing it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from safetensors import safe_open

from lightning_moe.moe.block_cuts import EXPERT, cut_of, find_cuts, name_after
from lightning_moe.moe.checkpoints import resolve, skeleton, weight_files
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts


def pruned_size(path: str, keep: Mapping[str, Sequence[int]], blocks: Collection[str] = ()) -> dict[str, int]:
    """Parameters, and bytes of the weights as ``prune`` would save them (the tensors, without the files' headers).

    A layer that ``keep`` does not name stays whole; of those in ``blocks`` the decoder layer goes.
    """
    model = skeleton(path)
    shapes = [layer.shape for layer in find_moe_layers(model)]
    keep_experts(model, keep, blocks=blocks)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    files = weight_files(resolve(path))
    if files[0].suffix != ".safetensors":  # such a checkpoint is saved from memory
        dtype = model.config.dtype
        itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else torch.get_default_dtype().itemsize
        return {"parameters": parameters, "bytes": parameters * itemsize}
    by_index = {shape.index: (shape.num_experts, keep.get(shape.name, range(shape.num_experts))) for shape in shapes}
    cuts, dropped = find_cuts(files, by_index), [shape.index for shape in shapes if shape.name in blocks]
    total = 0.0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name_after(name, cuts, dropped) is None:
                    continue
                part = tensors.get_slice(name)
                shape = list(part.get_shape())
                bits = re.search(r"\d+", part.get_dtype())  # BF16, F8_E4M3, I64; of BOOL 8
                size = (int(bits[0]) if bits else 8) / 8
                cut, expert = cut_of(name, cuts), EXPERT.search(name)
                if cut is not None:
                    if expert is not None:
                        size *= int(expert.group(1)) in cut.keep
                    elif cut.num_experts in shape:
                        shape[shape.index(cut.num_experts)] = len(cut.keep)
                total += torch.Size(shape).numel() * size
    return {"parameters": parameters, "bytes": round(total)}
