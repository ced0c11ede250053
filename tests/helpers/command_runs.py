"""Arguments of commands on the tiny checkpoint, and what must hold of the files they leave."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.stats.layer_stats import TENSORS
from lightning_moe.stats.store import ModelStats
from tests.helpers.checkpoint import read
from tests.helpers.observed_stats import assert_near_bins

NUM_EXPERTS, NUM_LAYERS = 8, 2
LAYERS = [f"model.layers.{index}.mlp" for index in range(NUM_LAYERS)]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN, SAMPLES = 32, 20
SUMS_OF_FLOATS = {"probability_E", "soft_count_E", "norm_E", "norm_sq_E", "gated_norm_E"} | {
    "output_sum_EH",
    "output_sq_EH",
    "unit_sum_EH",
    "hsic_EE",
    "logit_products_EE",
    "own_hsic_EE",
    "layer_cosine",
    "block_cosine",
}


def model_args(checkpoint: Path) -> list[object]:
    return [*QUIET, "--model.path", checkpoint]


def text_args(text: Path, samples: int = SAMPLES, batch_size: int = 4) -> list[object]:
    sampling = ["--data.seq_len", SEQ_LEN, "--data.samples", samples, "--data.batch_size", batch_size]
    return ["--data.path", text, *sampling]


def some_ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(folder)(some_ids()).logits
    return logits


def assert_equal_stats(one: ModelStats, other: ModelStats, *, exact: bool) -> None:
    assert (one.model_id, one.data_fingerprint) == (other.model_id, other.data_fingerprint)
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.shape == right.shape
        for name in TENSORS:
            a, b = getattr(left, name), getattr(right, name)
            if name == "ratio_R" and not exact:
                assert_near_bins(a, b)
            elif exact or name not in SUMS_OF_FLOATS:
                assert torch.equal(a, b), f"{left.shape.name}: {name}"
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=f"{left.shape.name}: {name}")


def assert_true_prune_figures(out: Path, checkpoint: Path) -> None:
    """Kept counts, parameters and bytes are what a look at the files says."""
    figures, keep = read(out / "summary.json"), read(out / "plan.json")["keep"]
    assert figures == read(out / "prune.json")
    pruned = AutoModelForCausalLM.from_pretrained(out / "model")
    counts = {layer.name: layer.num_experts for layer in find_moe_layers(pruned)}
    assert figures["kept_experts"] == counts == {name: len(ids) for name, ids in keep.items()}
    assert figures["experts_before"] == NUM_EXPERTS * NUM_LAYERS
    assert figures["experts_after"] == sum(counts.values())
    assert figures["uniform"] == (len(set(counts.values())) == 1)
    full = AutoModelForCausalLM.from_pretrained(checkpoint)
    for model, folder, when in ((full, checkpoint, "before"), (pruned, out / "model", "after")):
        assert figures[f"parameters_{when}"] == sum(p.numel() for p in model.parameters())
        assert figures[f"bytes_{when}"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert all((out / "model" / name).is_file() for name in ("tokenizer.json", "generation_config.json"))
