"""ExpertObservation as a guest: in somebody else's LightningModule, in each loop, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.stats.layer_stats import TENSORS, LayerStats
from lightning_moe.stats.observation import Observation
from tests.helpers.families import HIDDEN, VOCAB, tiny_model

LOOPS = ("validate", "test", "predict")


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of us: the model lies deep inside, under its own names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})

    @property
    def inner(self) -> Any:
        return self.wrapped["inner"][0]  # type: ignore[index]

    def run(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.inner(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.run(batch).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.run(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.run(batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.run(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Windows(Dataset[dict[str, Tensor]]):
    """9 sequences; the odd ones end in padding, unless there is no mask at all."""

    def __init__(self, masked: bool = True) -> None:
        self.ids = torch.randint(3, VOCAB, (9, 12), generator=torch.Generator().manual_seed(0))
        self.masked = masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones(12, dtype=torch.long)
        if index % 2:
            mask[-4:] = 0
        item = {"input_ids": self.ids[index]}
        return item | {"attention_mask": mask} if self.masked else item


def loader(masked: bool = True) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Windows(masked), batch_size=2)


def trainer(folder: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )


def direct(model: PreTrainedModel, masked: bool = True) -> list[LayerStats]:
    """The same statistics without Lightning."""
    observation = Observation(model.eval())
    with observation.attached(model), torch.no_grad():
        for batch in loader(masked):
            observation.next_batch(batch["input_ids"], batch.get("attention_mask"))
            model(**batch)
    return observation.compute()


def assert_equal(one: list[LayerStats], other: list[LayerStats]) -> None:
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        assert left.shape == right.shape
        for name in TENSORS:
            assert torch.equal(getattr(left, name), getattr(right, name)), name


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """Everything a guest could have left behind."""
    return {
        "implementation": model.get_experts_implementation(),
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        },
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("loop", LOOPS)
def test_each_loop_gives_the_statistics(tmp_path: Path, loop: str, family: str) -> None:
    model = tiny_model(family)
    expected = direct(model)
    before = traces(model)
    observation = ExpertObservation()
    getattr(trainer(tmp_path, observation), loop)(Foreign(model), loader())
    assert_equal(observation.layers, expected)
    assert int(observation.layers[0].tokens) == 9 * 12 - 4 * 4
    assert observation.layers[0].output_sum_EH.shape[1] == HIDDEN
    assert traces(model) == before


def test_a_batch_without_a_mask_counts_whole(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    observation = ExpertObservation()
    trainer(tmp_path, observation).predict(Foreign(model), loader(masked=False))
    assert_equal(observation.layers, direct(model, masked=False))
    assert int(observation.layers[0].tokens) == 9 * 12


def test_watching_changes_no_output(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    plain: Any = trainer(tmp_path).predict(Foreign(model), loader())
    watched: Any = trainer(tmp_path, ExpertObservation()).predict(Foreign(model), loader())
    for left, right in zip(plain, watched, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-6)


def test_one_callback_serves_one_loop_after_another(tmp_path: Path) -> None:
    """Each loop starts from nothing."""
    model = tiny_model("mixtral")
    observation = ExpertObservation()
    expected = direct(model)
    for loop in LOOPS:
        getattr(trainer(tmp_path, observation), loop)(Foreign(model), loader())
        assert_equal(observation.layers, expected)


def test_validation_inside_a_fit(tmp_path: Path) -> None:
    """Only validation counts; the training steps around it run unwatched."""
    model = tiny_model("mixtral")
    observation = ExpertObservation()
    before = traces(model)
    module = Foreign(model)
    implementations: list[Any] = []
    train = module.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        implementations.append(model.get_experts_implementation())
        return train(batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign]
    trainer(tmp_path, observation, max_epochs=2).fit(module, loader(), loader())
    assert_equal(observation.layers, direct(model))
    assert implementations == [before["implementation"]] * 10
    assert traces(model) == before


@pytest.mark.parametrize("loop", LOOPS)
def test_an_exception_leaves_no_trace(tmp_path: Path, loop: str) -> None:
    model = tiny_model("mixtral")
    before = traces(model)
    module = Foreign(model)
    calls: list[int] = []

    def run(batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return Foreign.run(module, batch)

    module.run = run  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        getattr(trainer(tmp_path, ExpertObservation()), loop)(module, loader())
    assert traces(model) == before


class Dense(Foreign):
    def run(self, batch: dict[str, Tensor]) -> Tensor:
        return self.before(torch.zeros(1, 2))


@pytest.mark.parametrize("loop", LOOPS)
def test_no_model_inside_is_said(tmp_path: Path, loop: str) -> None:
    with pytest.raises(TypeError, match="Dense holds no Hugging Face model"):
        getattr(trainer(tmp_path, ExpertObservation()), loop)(Dense(nn.Identity()), loader())


@pytest.mark.parametrize("make", [lambda: torch.zeros(4, 2, dtype=torch.long), lambda: [{"ids": torch.zeros(2)}] * 2])
def test_other_batches_are_said(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = tiny_model("mixtral")
    before = traces(model)
    with pytest.raises(TypeError, match="input_ids"):
        trainer(tmp_path, ExpertObservation()).predict(Foreign(model), DataLoader(make()))
    assert traces(model) == before


def test_a_killed_pass_goes_on(tmp_path: Path) -> None:
    """With ``partial`` what was summed is on disk, and ``resume`` says how much that is."""
    model = tiny_model("mixtral")
    partial = tmp_path / "partial"
    module = Foreign(model)
    calls: list[int] = []

    def run(batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Foreign.run(module, batch)

    module.run = run  # type: ignore[method-assign]
    starts: list[int] = []
    first = ExpertObservation(partial, starts.append, save_every=2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, first).predict(module, loader())
    second = ExpertObservation(partial, starts.append, save_every=2)
    rest = [batch for number, batch in enumerate(loader()) if number >= 2]
    trainer(tmp_path, second).predict(Foreign(model), DataLoader(rest, batch_size=None))  # type: ignore[arg-type]
    assert_equal(second.layers, direct(model))
    assert starts == [0, 2]


def test_nothing_is_written_without_partial(tmp_path: Path) -> None:
    trainer(tmp_path, ExpertObservation(save_every=1)).predict(Foreign(tiny_model("mixtral")), loader())
    assert list(tmp_path.iterdir()) == []
