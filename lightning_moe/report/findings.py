"""What a pass says of the experts themselves: which criteria agree, how often experts work, how alike they are."""

# E experts of a layer, A experts of all layers, L layers, C criteria

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.stats.similarity import measured_pairs, similarity
from lightning_moe.stats.store import ModelStats

MOST_EXPERTS = 256
"""Of all layers, of which every pair is written: more would be megabytes of text."""


def findings(stats: ModelStats, scores: Sequence[ExpertScores]) -> dict[str, Any]:
    """Side findings of MC-Suite and of DiEP (Fig. 1), in plain values.

    ``rank_correlation`` is that of ``rank_correlations``; ``frequency`` the share of a layer's tokens that each expert
    gets, ``top_k`` in sum; ``similarity`` the CKA between the outputs of two experts of a layer, null where too few
    tokens went to both, with its mean over pairs.
    """
    shares, alike = {}, {}
    for layer in stats.layers:
        tokens = max(float(layer.tokens), 1.0)
        shares[layer.shape.name] = [round(float(count) / tokens, 6) for count in layer.count_E]
        known_EE = measured_pairs(layer)
        cka_EE = similarity(layer)
        pairs = cka_EE[known_EE.clone().fill_diagonal_(False)]
        alike[layer.shape.name] = {
            "mean": round(float(pairs.mean()), 6) if pairs.numel() else None,
            "pairs": [
                [round(float(value), 6) if known else None for value, known in zip(row, knows, strict=True)]
                for row, knows in zip(cka_EE, known_EE, strict=True)
            ],
        }
    return {"rank_correlation": rank_correlations(scores), "frequency": shares, "similarity": alike}


def inter_layer(cka_AA: Tensor, shapes: Sequence[LayerShape], num_tokens: int) -> dict[str, Any]:
    """How alike experts of one layer are, and those of two, by CKA on the same tokens (DiEP, Fig. 1), in plain values.

    ``layers`` is the mean over the pairs of experts of each two layers, ``within`` and ``between`` the means over all
    layers and all pairs of layers, ``pairs`` the matrix itself where there are no more than ``MOST_EXPERTS``. No expert
    is compared with itself; null where nothing is known.
    """
    counts = [shape.num_experts for shape in shapes]
    others_AA = cka_AA.clone().fill_diagonal_(torch.nan)  # each expert is like itself
    blocks = [list(row.split(counts, dim=1)) for row in others_AA.split(counts)]
    means_LL = torch.tensor([[float(block.nanmean()) for block in row] for row in blocks])
    apart_LL = ~torch.eye(len(counts), dtype=torch.bool)
    few = len(cka_AA) <= MOST_EXPERTS
    return {
        "tokens": num_tokens,
        "within": _plain(means_LL.diagonal().nanmean()),
        "between": _plain(means_LL[apart_LL].nanmean()),
        "layers": {shape.name: [_plain(one) for one in row] for shape, row in zip(shapes, means_LL, strict=True)},
        "pairs": [[_plain(one) for one in row] for row in cka_AA] if few else None,
    }


def _plain(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else round(float(value), 4)


def rank_correlations(scores: Sequence[ExpertScores]) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of what each two criteria measure, within a layer, mean over layers.

    Of the measure itself, whichever end of it is dropped; of criteria on pairs, of the order of dropping. Null where
    in no layer both tell experts apart.
    """
    names = [one.method for one in scores]
    layers = []
    for shape in scores[0].shapes:
        ranks_CE = np.stack([rankdata(_measured(one, shape.name)) for one in scores])
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore")
            layers.append(np.corrcoef(ranks_CE))
    found = np.stack(layers)
    known = np.isfinite(found)
    sums, counts = np.where(known, found, 0.0).sum(0), known.sum(0)
    return {
        one: {
            other: round(float(sums[row, column] / counts[row, column]), 4) if counts[row, column] else None
            for column, other in enumerate(names)
        }
        for row, one in enumerate(names)
    }


def _measured(scores: ExpertScores, layer: str) -> Any:
    turned = scores.comparable and scores.settings.get("direction") == "max"
    return (-1 if turned else 1) * scores.scores[layer].numpy()
