"""The presets: all run, and ``paper`` is what is printed."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.importance import beta_profile
from lightning_moe.search.presets import PRESETS, preset
from tests.helpers.families import tiny_model
from tests.search.tiny_search import History, batches, fit, learned, search_in, wrapped


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name: str) -> None:
    search = DiEPSearch(wrapped(tiny_model("mixtral")), **(preset(name) | {"updates": 2}))
    history = History()
    fit(search, batches(2), history)
    assert history.moved() == ("bb" if name == "beta-frequency" else "aa")
    scores = torch.cat(list(search.scores().values()))
    assert scores.isfinite().all() and scores.std() > 0


def test_paper_is_what_is_printed() -> None:
    """Eq. 5-7 and 10; 128 windows, 10 epochs, batches of 16; lr 5e-3, cosine; 3:1; lambda 0.01, not squared."""
    search = DiEPSearch(MoECausalLM(), **preset("paper"))
    assert search.relaxation == "literal"
    assert (search.task, search.weight, search.relative, search.pressure) == ("ce", 0.01, False, 0.0)
    assert (search.lr, search.min_lr_ratio, search.optimizer_name) == (5e-3, 0.0, "adam")
    assert (search.updates, search.accumulate) == (10 * 128 // 16, 1)
    assert (search.learn_alpha, search.betas, search.score, search.floor) == (True, "learned", "raw", None)
    history = History()
    search = search_in(tiny_model("mixtral"), **(preset("paper") | {"updates": 8}))
    fit(search, batches(2), history)
    assert history.moved() == "aaabaaab"


@pytest.mark.parametrize("name", ["1:2", "2:1", "3:1", "random"])
def test_fixed_profiles_stay(name: str) -> None:
    search = search_in(tiny_model("deepseek_v3"), **(preset(name) | {"updates": 2, "seed": 5}))
    fit(search, batches(1))
    assert torch.equal(learned(search)[-1], beta_profile(name, 2, seed=5))


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--preset papr: no such preset\. Did you mean 'paper'\? Known: default, "):
        preset("papr")
