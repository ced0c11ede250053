"""prune-save: load, prune and save, over loading and saving the same kept bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.ratios import median_ratio, report
from lightning_moe.files import replaced_folder
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.compaction import compact_checkpoint

GOAL = 1.5


def main(repeats: int = 5) -> None:
    """A Mixtral of 0.5 GB in bf16 cut to half its experts; the floor loads and saves the half with transformers."""
    with tempfile.TemporaryDirectory() as folder:
        full, half, out = (Path(folder) / name for name in ("full", "half", "out"))
        config = AutoConfig.for_model(
            "mixtral",
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=5,
            num_attention_heads=16,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(full)
        keep = {shape.name: [0, 2, 5, 7] for shape in layer_shapes(str(full))}
        compact_checkpoint(str(full), keep, half)

        def ours() -> None:
            compact_checkpoint(str(full), keep, out)

        def floor() -> None:
            with replaced_folder(out) as beside:
                AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(beside)

        report("prune-save", median_ratio(ours, floor, repeats), GOAL)


if __name__ == "__main__":
    main()
