"""ExpertUsageMonitor as a guest: the load it logs and writes is that of the routers' outputs, each token once."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.callbacks.usage_panels import MOST_BARS, load_before_and_after
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.usage import FIGURES, load_figures, mean_load
from tests.helpers.families import TOP_K, VOCAB, tiny_model
from tests.helpers.plans import non_uniform_plan

LENGTH = 12
STEPS = 4
Counts = dict[str, list[float]]


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of us, and which we ask what its routers did in the first forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})
        self.batches: list[tuple[str, Counts]] = []

    @property
    def inner(self) -> Any:
        return self.wrapped["inner"][0]  # type: ignore[index]

    def run(self, batch: dict[str, Tensor], kind: str) -> Tensor:
        routings: dict[str, Routing] = {}
        with record_routing(find_moe_layers(self.inner), lambda layer, one: routings.update({layer.name: one})):
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            logits: Tensor = self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
        self.batches.append((kind, slow_counts(routings, mask)))
        return logits.float().square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.run(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.run(batch, "sanity" if self.trainer.sanity_checking else "val")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def slow_counts(routings: dict[str, Routing], mask: Tensor | None) -> Counts:
    """Tokens that each expert got, token by token."""
    counts: Counts = {}
    for name, routing in routings.items():
        ids = routing.expert_ids_TK.tolist()
        real = [1] * len(ids) if mask is None else mask.flatten().tolist()
        count_E = counts[name] = [0.0] * routing.logits_TE.shape[-1]
        for token, chosen in enumerate(ids):
            for expert in chosen:
                count_E[expert] += real[token]
    return counts


def summed(batches: list[tuple[str, Counts]], kind: str) -> Counts:
    counts = [counts for own, counts in batches if own == kind]
    return {name: [sum(column) for column in zip(*(one[name] for one in counts), strict=True)] for name in counts[0]}


class Windows(Dataset[dict[str, Tensor]]):
    """8 sequences; the odd ones end in padding, unless there is no mask at all."""

    def __init__(self, masked: bool, seed: int) -> None:
        self.ids = torch.randint(3, VOCAB, (2 * STEPS, LENGTH), generator=torch.Generator().manual_seed(seed))
        self.masked = masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones(LENGTH, dtype=torch.long)
        if index % 2:
            mask[-5:] = 0
        item = {"input_ids": self.ids[index]}
        return item | {"attention_mask": mask} if self.masked else item


def loader(masked: bool = True, seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    """4 batches of 2."""
    return DataLoader(Windows(masked, seed), batch_size=2)


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | kwargs
    return Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )


def training_model(family: str = "mixtral", pruned: bool = False, recompute: bool = False) -> PreTrainedModel:
    model = tiny_model(family)
    if pruned:
        keep_experts(model, non_uniform_plan(model))
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def figures_of(counts: Counts, prefix: str) -> dict[str, float]:
    """The names under which a look is logged."""
    logged = {f"{prefix}/{name}": value for name, value in mean_load(counts).items()}
    for layer, count_E in counts.items():
        logged |= {f"{prefix}/{layer}/{name}": value for name, value in load_figures(count_E).items()}
    return logged


class Logs(Logger):
    """Somebody's logger: keeps what it is given."""

    name, version = "logs", 0

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:  # type: ignore[override]
        own = {name: float(value) for name, value in metrics.items() if name.startswith("expert_usage")}
        if own:
            self.metrics.append((step, own))

    def under(self, prefix: str) -> list[dict[str, float]]:
        return [metrics for _, metrics in self.metrics if all(name.startswith(f"{prefix}/") for name in metrics)]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def traces(module: Any) -> dict[str, Any]:
    """Everything a guest could have left behind."""
    return {
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in module.named_modules()
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        },
        "attributes": {name: sorted(part.__dict__) for name, part in module.wrapped.named_modules()},
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "expert_usage.csv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
def test_looks_are_the_counts_of_the_routers(tmp_path: Path, masked: bool, pruned: bool, recompute: bool) -> None:
    """Every step a look, of the tokens of that step alone, padding left out, each token once."""
    module, monitor = Foreign(training_model(pruned=pruned, recompute=recompute)), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader(masked))
    assert [(kind, step) for kind, step, _ in monitor.looks] == [("train", step) for step in range(1, STEPS + 1)]
    assert [("train", counts) for _, _, counts in monitor.looks] == module.batches
    sizes = [4, 6] if pruned else [8, 8]
    assert [len(count_E) for count_E in monitor.last.values()] == sizes
    tokens = 2 * LENGTH - (5 if masked else 0)
    assert all(sum(count_E) == TOP_K * tokens for count_E in monitor.last.values())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "ernie4_5_moe", "jamba"])
def test_other_families(tmp_path: Path, family: str) -> None:
    module, monitor = Foreign(training_model(family, pruned=True)), ExpertUsageMonitor(every_n_steps=2)
    trainer(tmp_path, monitor).fit(module, loader())
    assert [step for _, step, _ in monitor.looks] == [2, 4]
    assert monitor.looks[0][2] == summed(module.batches[:2], "train")
    assert monitor.looks[1][2] == summed(module.batches[2:], "train")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_look_sees_all_tokens_since_the_last(tmp_path: Path, accumulate: int) -> None:
    """Steps are those of the optimiser."""
    module, monitor = Foreign(training_model()), ExpertUsageMonitor(every_n_steps=2)
    trainer(tmp_path, monitor, max_epochs=2, accumulate_grad_batches=accumulate).fit(module, loader())
    assert [step for _, step, _ in monitor.looks] == ([2, 4, 6, 8] if accumulate == 1 else [2, 4])
    for turn, (_, _, counts) in enumerate(monitor.looks):
        assert counts == summed(module.batches[turn * 2 * accumulate : (turn + 1) * 2 * accumulate], "train")


def test_reentrant_recomputing_is_counted_once(tmp_path: Path) -> None:
    model = training_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    module, monitor = Foreign(model), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader())
    assert [("train", counts) for _, _, counts in monitor.looks] == module.batches


def test_a_model_in_evaluation_mode_is_seen_too(tmp_path: Path) -> None:
    module, monitor = Foreign(tiny_model("mixtral")), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader())
    assert [("train", counts) for _, _, counts in monitor.looks] == module.batches


def test_two_backward_passes_in_a_step(tmp_path: Path) -> None:
    """Manual optimisation: the forward after the first backward pass counts as well."""

    class Manual(Foreign):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            for row in (slice(0, 1), slice(1, 2)):
                self.manual_backward(self.run({"input_ids": batch["input_ids"][row]}, "train"))
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    module, monitor = Manual(training_model(recompute=True)), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, max_steps=1).fit(module, loader(masked=False))
    assert monitor.last == summed(module.batches, "train")


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Weights after training are the same bit by bit."""
    weights = []
    for guests in ([], [ExpertUsageMonitor(every_n_steps=1)]):
        module = Foreign(training_model())
        torch.manual_seed(0)
        trainer(tmp_path, *guests).fit(module, loader())
        weights.append(module.inner.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# --------------------------------------------------------------------------------------------- logging


def test_what_is_logged(tmp_path: Path) -> None:
    """The figures of every look, of each layer and over all, and nothing else."""
    logs, module, monitor = Logs(), Foreign(training_model(pruned=True)), ExpertUsageMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, logger=logs, log_every_n_steps=1)
    run.fit(module, loader(), loader(seed=1))
    trained = logs.under("expert_usage")
    assert len(trained) == STEPS
    for found, (_, counts) in zip(trained, [one for one in module.batches if one[0] == "train"], strict=True):
        assert found == pytest.approx(figures_of(counts, "expert_usage"), rel=1e-5, abs=1e-6)
    validated = logs.under("expert_usage_val")
    assert len(validated) == 1
    expected = figures_of(summed(module.batches, "val"), "expert_usage_val")
    assert validated[0] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(trained) + len(validated) == len(logs.metrics)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if name in expected}
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_every_look_reaches_the_logger(tmp_path: Path) -> None:
    """Also where the trainer logs less often than we look, as it does by default, every 50 steps."""
    logs, monitor = Logs(), ExpertUsageMonitor(every_n_steps=2)
    trainer(tmp_path, monitor, logger=logs).fit(Foreign(training_model()), loader())
    found = logs.under("expert_usage")
    assert len(found) == len(monitor.looks) == STEPS // 2
    for metrics, (_, _, counts) in zip(found, monitor.looks, strict=True):
        assert metrics == pytest.approx(figures_of(counts, "expert_usage"), rel=1e-5, abs=1e-6)


def test_a_logger_of_lightning(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = ExpertUsageMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, logger=logger, log_every_n_steps=1)
    run.fit(Foreign(training_model()), loader())
    with (tmp_path / "metrics.csv").open() as lines:
        found = [float(row["expert_usage/cv"]) for row in csv.DictReader(lines) if row["expert_usage/cv"]]
    assert found == pytest.approx([mean_load(counts)["cv"] for _, _, counts in monitor.looks], rel=1e-5)


# ----------------------------------------------------------------------------------------- validation


def test_a_validation_loop_is_one_look(tmp_path: Path) -> None:
    """Of all its loaders; the sanity check is none, and training counts nothing meanwhile."""
    module, monitor = Foreign(training_model()), ExpertUsageMonitor(every_n_steps=2)
    run = trainer(tmp_path, monitor, val_check_interval=2)
    run.fit(module, loader(), [loader(seed=1), loader(masked=False, seed=2)])
    assert [(kind, step) for kind, step, _ in monitor.looks] == [("train", 2), ("val", 2), ("train", 4), ("val", 4)]
    kinds = [kind for kind, _ in module.batches]
    validations = [kinds.index("val"), len(kinds) - 2 * STEPS]
    assert "sanity" in kinds
    for look, start in zip(monitor.looks[1::2], validations, strict=True):
        assert look[2] == summed(module.batches[start : start + 2 * STEPS], "val")
        assert all(sum(count_E) == TOP_K * STEPS * (19 + 24) for count_E in look[2].values())
    training = [one for one in module.batches if one[0] == "train"]
    assert monitor.looks[0][2] == summed(training[:2], "train")
    assert monitor.looks[2][2] == summed(training[2:], "train")


def test_validation_alone(tmp_path: Path) -> None:
    module, monitor = Foreign(training_model()), ExpertUsageMonitor()
    before = traces(module)
    run = trainer(tmp_path, monitor)
    run.validate(module, loader(), verbose=False)
    assert monitor.looks == [("val", 0, summed(module.batches, "val"))]
    expected = figures_of(monitor.last, "expert_usage_val")
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert traces(module) == before


# ------------------------------------------------------------------------------------------- resuming


def one_batch_again_and_again() -> DataLoader[dict[str, Tensor]]:
    """A plain loader starts from its first batch when a fit goes on in the middle of an epoch."""
    windows = Windows(masked=True, seed=0)
    return DataLoader([windows[index % 2] for index in range(2 * STEPS)], batch_size=2)  # type: ignore[arg-type]


class Killed(Foreign):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.current_epoch == 1 and batch_idx == 3:
            raise RuntimeError("killed")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("every", [2, 3])
def test_a_resumed_fit_has_the_looks_of_one_run(tmp_path: Path, every: int) -> None:
    """Killed in step 8, when the last checkpoint is that of step 6, at which there is a look."""
    data = one_batch_again_and_again()
    whole = ExpertUsageMonitor(tmp_path / "whole", every)
    trainer(tmp_path, whole, max_epochs=2).fit(Foreign(training_model()), data, loader(seed=1))
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, save_on_train_epoch_end=True)
    first = ExpertUsageMonitor(tmp_path / "parts", every)
    with pytest.raises(RuntimeError, match="killed"):
        run = trainer(tmp_path, first, checkpoint, max_epochs=2, enable_checkpointing=True)
        run.fit(Killed(training_model()), data, loader(seed=1))
    assert not (tmp_path / "parts").exists()
    second = ExpertUsageMonitor(tmp_path / "parts", every)
    run = trainer(tmp_path, second, max_epochs=2)
    run.fit(Foreign(training_model()), data, loader(seed=1), ckpt_path=tmp_path / "last.ckpt")
    assert second.looks == whole.looks
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == ["expert_usage.csv", "expert_usage.png"]
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_one_callback_serves_one_fit_after_another(tmp_path: Path) -> None:
    """The second fit is looked at from its first steps on."""
    monitor = ExpertUsageMonitor(tmp_path / "usage", every_n_steps=2)
    for seed in (0, 1):
        module = Foreign(training_model())
        trainer(tmp_path, monitor).fit(module, loader(seed=seed))
        assert [step for _, step, _ in monitor.looks[-2:]] == [2, 4]
        assert monitor.looks[-2][2] == summed(module.batches[:2], "train")
        assert monitor.last == summed(module.batches[2:], "train")


# ---------------------------------------------------------------------------------------------- files


def test_the_files(tmp_path: Path) -> None:
    """A row per look and layer, with the counts themselves; a whole PNG; and nothing half written beside them."""
    monitor = ExpertUsageMonitor(str(tmp_path / "deep" / "usage"), every_n_steps=2)
    trainer(tmp_path, monitor).fit(Foreign(training_model(pruned=True)), loader(), loader(seed=1))
    folder = tmp_path / "deep" / "usage"
    assert sorted(file.name for file in folder.iterdir()) == ["expert_usage.csv", "expert_usage.png"]
    png = (folder / "expert_usage.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB\x60\x82")
    expected = [(look, name, count_E) for look in monitor.looks for name, count_E in look[2].items()]
    found = rows(folder)
    assert len(found) == len(expected) == 3 * 2
    for row, ((kind, step, _), name, count_E) in zip(found, expected, strict=True):
        assert list(row) == ["kind", "step", "layer", *FIGURES, "tokens per expert"]
        assert (row["kind"], int(row["step"]), row["layer"]) == (kind, step, name)
        assert [int(count) for count in row["tokens per expert"].split()] == count_E
        figures = load_figures(count_E)
        assert {name: float(row[name]) for name in FIGURES} == pytest.approx(figures, rel=1e-5, abs=1e-9)


def test_files_of_an_earlier_fit_are_replaced(tmp_path: Path) -> None:
    for steps in (1, 2):
        monitor = ExpertUsageMonitor(tmp_path / "usage", every_n_steps=1)
        trainer(tmp_path, monitor, max_steps=steps).fit(Foreign(training_model()), loader())
        assert len(rows(tmp_path / "usage")) == 2 * steps


def test_nothing_is_written_without_a_folder_or_a_look(tmp_path: Path) -> None:
    trainer(tmp_path, ExpertUsageMonitor(every_n_steps=1)).fit(Foreign(training_model()), loader())
    trainer(tmp_path, ExpertUsageMonitor(tmp_path / "usage")).fit(Foreign(training_model()), loader())  # 4 steps of 50
    assert list(tmp_path.iterdir()) == []


class Board:
    def __init__(self) -> None:
        self.figures: list[tuple[str, Figure, int]] = []

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.figures.append((tag, figure, global_step))


class TakesFigures(Logs):
    def __init__(self) -> None:
        super().__init__()
        self.board = Board()

    @property
    def experiment(self) -> Board:
        return self.board


class TakesImages(Logs):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, Any, int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.extend((key, image, step) for image in images)


def titles(figure: Figure) -> tuple[list[str], list[str]]:
    seen = [axes for axes in figure.axes if axes.get_visible()]
    return [axes.get_ylabel() for axes in seen if axes.get_ylabel()], [axes.get_title() for axes in seen]


@pytest.mark.parametrize("validate", [False, True], ids=["train", "val"])
def test_loggers_get_the_figure(tmp_path: Path, validate: bool) -> None:
    """Of the first and the last look at validation text, or at training text where there was none."""
    board, images = TakesFigures(), TakesImages()
    monitor = ExpertUsageMonitor(every_n_steps=1)
    loaders = (loader(seed=1),) if validate else ()
    run = trainer(tmp_path, monitor, logger=[board, images, Logs()], max_epochs=2)
    run.fit(Foreign(training_model()), loader(), *loaders)
    [(tag, figure, step)] = board.board.figures
    assert (tag, step) == ("expert_usage/before_and_after", 2 * STEPS)
    first, last = ("step 4", "step 8") if validate else ("step 1", "step 8")
    assert titles(figure)[0] == [first, last]
    same = [counts for kind, _, counts in monitor.looks if kind == ("val" if validate else "train")]
    for moment, counts in ((f"{first} cv", same[0]), (f"{last} cv", same[-1])):
        assert f"{moment} {mean_load(counts)['cv']:.2f}" in figure.get_suptitle()
    [(key, image, at)] = images.images
    assert (key, at) == (tag, step)
    assert image.ndim == 3 and image.shape[-1] == 3 and image.std() > 0


@pytest.mark.parametrize("layers", [1, 2, 7, 13])
def test_the_panels(layers: int) -> None:
    """Two rows of one panel per layer; bars are shares over an even share, largest first; sizes may have changed."""
    sizes = [8, MOST_BARS + 1, 4]
    before = {f"layers.{turn}": [float(i % 5) for i in range(8)] for turn in range(layers)}
    after = {f"layers.{turn}": [float(i + 1) for i in range(sizes[turn % 3])] for turn in range(layers)}
    figure = load_before_and_after(before, after, ("start", "end"))
    rows_of_panels = -(-layers // 6)
    labels, names = titles(figure)
    assert labels == ["start", "end"] * rows_of_panels
    assert len(names) == 2 * layers
    assert sum(name.startswith("layer ") for name in names) == layers
    first = next(axes for axes in figure.axes if axes.get_visible())
    # Loads 0 1 2 3 4 0 1 2 of mean 13 / 8.
    expected = sorted([8 / 13 * (i % 5) for i in range(8)], reverse=True)
    assert [bar.get_height() for bar in first.patches] == pytest.approx(expected)


def test_a_panel_of_no_token() -> None:
    nothing = {"layers.0": [0.0, 0.0]}
    assert "cv 1.00" in load_before_and_after(nothing, nothing).get_suptitle()


# --------------------------------------------------------------------------------------------- manners


def test_nothing_stays(tmp_path: Path) -> None:
    module = Foreign(training_model("deepseek_v3"))
    before = traces(module)
    trainer(tmp_path, ExpertUsageMonitor(tmp_path / "usage", 1)).fit(module, loader(), loader(seed=1))
    assert traces(module) == before


@pytest.mark.parametrize("kind", ["train", "val"])
def test_an_exception_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    class Fails(Foreign):
        def run(self, batch: dict[str, Tensor], own: str) -> Tensor:
            if own == kind and len(self.batches) > 2:
                raise RuntimeError("out of memory")
            return super().run(batch, own)

    module = Fails(training_model())
    before = traces(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        run = trainer(tmp_path, ExpertUsageMonitor(tmp_path / "usage", 1), val_check_interval=1)
        run.fit(module, loader(), loader(seed=1))
    assert traces(module) == before
    assert not (tmp_path / "usage").exists()


def test_bad_arguments_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ExpertUsageMonitor: every_n_steps 0: at least 1"):
        ExpertUsageMonitor(every_n_steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file, not a folder"):
        ExpertUsageMonitor(tmp_path / "file")


def test_no_model_inside_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ExpertUsageMonitor: Foreign holds no Hugging Face model"):
        trainer(tmp_path, ExpertUsageMonitor()).fit(Foreign(nn.Linear(2, 2)), loader())
