"""Put a trained reference model in place: weights, tokenizer, text, and where all of it comes from."""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.callbacks.guests import guests
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.evaluation.perplexity import measure
from lightning_moe.files import replaced_folder
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.weights import readable_count

CURVE_POINTS = 10
SEQ_LEN = 256


def assemble(build: Path, corpus: Path, config: Path, out: Path) -> None:
    """Copy model and text to ``out`` and write a page of provenance from what is measured on them.

    Args:
        build: The folder that training wrote: ``model`` and ``run/log``.
        corpus: The text it was trained on, with what was held out.
        config: The YAML it was trained by.
        out: The model's folder in the package; text and page lie beside it.
    """
    package = out.parent
    with replaced_folder(out) as folder:
        for file in sorted((build / "model").iterdir()):
            shutil.copy(file, folder)
    with replaced_folder(package / "text") as folder:
        for split in ("calibration", "validation"):
            shutil.copytree(corpus / split, folder / split)
    settings = yaml.safe_load(config.read_text())
    tokens = settings["data"]["batch_size"] * settings["data"]["seq_len"]
    figures = _measure(out, package / "text" / "validation") | {"config": str(config), "tokens_per_step": tokens}
    sources = json.loads((corpus / "SOURCES.json").read_text())
    curve = _curve(build / "run" / "log")
    (package / f"PROVENANCE-{out.name}.md").write_text(_provenance(figures, sources, curve))


def _measure(model_folder: Path, validation: Path) -> dict[str, Any]:
    """Perplexity on all validation text; how evenly the routers spread it."""
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, use_distributed_sampler=False
    )
    text = TextDataModule(str(validation), tokenizer=str(model_folder), seq_len=SEQ_LEN, samples="all")
    model = MoECausalLM(str(model_folder))
    figures = measure(trainer, model, text)
    observation = ExpertObservation()
    with guests(trainer, observation):
        trainer.predict(model, datamodule=text, return_predictions=False)
    shares = [layer.count_E / layer.count_E.sum() * layer.shape.num_experts for layer in observation.layers]
    load = torch.stack(shares)
    figures |= {"least_load": load.min(1).values.tolist(), "most_load": load.max(1).values.tolist()}
    shape, config = observation.layers[0].shape, model.network.config
    figures["kind"] = (
        f"A {config.model_type} model ({len(shares)} layers, {shape.num_experts} experts, top-{shape.top_k}, "
        f"width {config.hidden_size})"
    )
    return figures | {"parameters": sum(parameter.numel() for parameter in model.network.parameters())}


def _curve(log: Path) -> list[dict[str, float]]:
    """Validation rows of the training log by step; a run that was killed and resumed has several files."""
    rows: dict[int, dict[str, float]] = {}
    for file in sorted(log.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row.get("val/perplexity"):
                    rows[int(row["step"]) + 1] = {name: float(v) for name, v in row.items() if name and v}
    return [rows[step] | {"step": step} for step in sorted(rows)]


def _provenance(figures: dict[str, Any], sources: dict[str, Any], curve: list[dict[str, float]]) -> str:
    domains = list(figures["domains"])
    steps = int(curve[-1]["step"])
    packages = [
        [
            domain,
            ", ".join(f"{package['name']} {package['version']}" for package in source["packages"]),
            "; ".join(sorted({package["licence"] for package in source["packages"]})),
            f"{source['files']['train']['bytes'] / 1e6:.1f}",
        ]
        for domain, source in sources.items()
    ]
    stride = math.ceil(len(curve) / CURVE_POINTS)
    points = [
        [f"{row['step']:.0f}", *(f"{row[f'val/perplexity/{d}']:.1f}" for d in domains), f"{row['val/perplexity']:.1f}"]
        for row in [*curve[:-1:stride], curve[-1]]
    ]
    final = [*(f"{figures['domains'][domain]:.1f}" for domain in domains), f"{figures['perplexity']:.1f}"]
    loads = zip(figures["least_load"], figures["most_load"], strict=True)
    return f"""# Where this reference model comes from

{figures["kind"]} of {readable_count(figures["parameters"])} parameters, trained from
random weights on the domains below and on nothing else. `make reference` rebuilds it: it fetches the text, trains
the tokenizer, runs `lightning-moe fit --config {figures["config"]}` and puts the results here.

Tokens seen: {steps * figures["tokens_per_step"] / 1e6:.1f} million, in {steps} steps. Weights are saved in bf16.

## Text

Calibration and validation text (`text/`) are whole documents held out from training; no paragraph of them is in the
training text. Licences are in `LICENSES/`.

{_table(["domain", "packages", "licence", "training MB"], packages)}

## Perplexity on validation text while training

Windows of 256 tokens; float32.

{_table(["step", *domains, "all"], points)}

## Perplexity of the shipped weights

All validation text, windows of {SEQ_LEN} tokens; bf16.

{_table([*domains, "all"], [final])}

## Router load on validation text

Assignments of the least and the most used expert of each layer, as a multiple of an even share.

{_table(["layer", "least", "most"], [[str(i), f"{a:.2f}", f"{b:.2f}"] for i, (a, b) in enumerate(loads)])}
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder of the training's run and model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the text")
    parser.add_argument("--config", type=Path, required=True, help="the YAML the model was trained by")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder in this package")
    arguments = parser.parse_args()
    assemble(arguments.build, arguments.corpus, arguments.config, arguments.out)


if __name__ == "__main__":
    main()
