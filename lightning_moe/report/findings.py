"""What a pass says of the experts themselves: which criteria agree, how often experts work, how alike they are."""

# E experts, C criteria

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.stats.similarity import measured_pairs, similarity
from lightning_moe.stats.store import ModelStats


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
