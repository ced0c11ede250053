"""Criteria of three tokens at three experts, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_moe.criteria import get_criterion
from lightning_moe.stats.layer_stats import LayerStats
from tests.helpers.random_layers import assert_scores, stats_of
from tests.helpers.reference.raw_layers import RawLayer, SeenToken, Visit


def by_hand() -> LayerStats:
    """Three tokens at a layer of 3 experts, top-2, width 2.

    token  expert: weight, output
    A      0: 0.6, (3, 4)     1: 0.2, (0, 2)
    B      0: 0.5, (6, 8)     1: 0.5, (1, 0)
    C      0: 0.3, (0, 5)     2: 0.1, (5, 12)

    Gradients of their two neurons: 0: (3, 0), (5, 0); 1: (0, 1), (0, 3); 2: none.
    """
    tokens = [
        SeenToken(1, [0.6, 0.2, 0.2], [Visit(0, 0.6, [3, 4]), Visit(1, 0.2, [0, 2])]),
        SeenToken(2, [0.5, 0.5, 0.0], [Visit(0, 0.5, [6, 8]), Visit(1, 0.5, [1, 0])]),
        SeenToken(1, [0.3, 0.6, 0.1], [Visit(0, 0.3, [0, 5]), Visit(2, 0.1, [5, 12])]),
    ]
    eye = torch.eye(2)
    gradients = [
        [torch.tensor([[3.0, 0.0], [5.0, 0.0]])],
        [torch.tensor([[0.0, 1.0], [0.0, 3.0]])],
        [torch.zeros(2, 2)],
    ]
    rows = [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]
    return stats_of(RawLayer(3, 4, tokens, rows, [[eye], [2 * eye], [eye]], gradients))


HANDS: dict[str, list[float]] = {
    # tokens routed: 0 gets A, B, C; 1 gets A, B; 2 gets C
    "euf": [3, 2, 1],
    # weights renormalised over the two experts of a token: A 3/4, 1/4; B 1/2, 1/2; C 3/4, 1/4
    # expert 0: (3/4 * 5 + 1/2 * 10 + 3/4 * 5) / 3 = 12.5 / 3; expert 1: (1/4 * 2 + 1/2 * 1) / 2 = 1/2
    # expert 2: 1/4 * 13 / 1
    "reap": [12.5 / 3, 0.5, 3.25],
    "reap-sum": [12.5, 1.0, 3.25],
    # expert 0: dimension 0 holds 3, 6, 0 -> sqrt 45; dimension 1 holds 4, 8, 5 -> sqrt 105
    # expert 1: 0, 1 -> 1; 2, 0 -> 2. expert 2: 5; 12
    "ean": [math.sqrt(45) + math.sqrt(105), 3, 17],
    # (5 + 10 + 5) / 3; (2 + 1) / 2; 13
    "man": [20 / 3, 1.5, 13],
    # (25 + 100 + 25) / 3; (4 + 1) / 2; 169
    "msan": [50, 2.5, 169],
    # of 4 token ids: 0 saw 1 and 2, 1 saw 1 and 2, 2 saw 1
    "evc": [0.5, 0.5, 0.25],
    # probabilities of routed tokens: .6 + .5 + .3; .2 + .5; .1
    "seer": [1.4, 0.7, 0.1],
    # of all tokens: (.6 + .5 + .3) / 3; (.2 + .5 + .6) / 3; (.2 + 0 + .1) / 3
    "trimming": [1.4 / 3, 1.3 / 3, 0.1],
    # mean unit vectors: 0: ((.6, .8) + (.6, .8) + (0, 1)) / 3 = (.4, 2.6 / 3); 1: ((0, 1) + (1, 0)) / 2 = (.5, .5)
    # 2: (5, 12) / 13. Cosines 01: .2 + 1.3 / 3 = 1.9 / 3; 02: (2 + 31.2 / 3) / 13 = 12.4 / 13; 12: 8.5 / 13
    # The most alike is dropped first, so the score is the negative sum.
    "eas": [-(1.9 / 3 + 12.4 / 13), -(1.9 / 3 + 8.5 / 13), -20.9 / 13],
    # rows (1, 0), (0, 2), (3, 4), and the largest is dropped first
    "rwn": [-1, -2, -5],
    # identities: 0 and 2 alike, 1 twice as large; all point the same way, each sum of cosines is 2
    "ewn": [math.sqrt(2), math.sqrt(8), math.sqrt(2)],
    "ews": [-2, -2, -2],
    "wsr": [-2, -2, -2],
    # gradients of 0 and 1 have no dimension in common, 2 has none
    "egs": [0, 0, 0],
    # std of 3 and 5 is 1, of 1 and 3 is 1, of what does not vary 1e-30
    "ege": [math.log(1e-30), math.log(1e-30), 2 * math.log(1e-30)],
    "egn": [math.sqrt(34), math.sqrt(10), 0],
    # two entries are never 3 std apart
    "ego": [0, 0, 0],
    # shared tokens: 01: 2, 02: 1, 12: 0. Pair 01 goes first and loses 1 (2 < 3); then 02 loses 2 (1 < 3)
    "ecc": [2 / 3, 0, 1 / 3],
    # shared ids: 01: {1, 2}, 02: {1}, 12: {1}. Pair 01 loses 1, pair 02 loses 2
    "ets": [2 / 3, 0, 1 / 3],
}


@pytest.mark.parametrize("name", HANDS)
def test_numbers_worked_by_hand(name: str) -> None:
    assert_scores(get_criterion(name).scores(by_hand()), HANDS[name])
