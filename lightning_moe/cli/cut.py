"""Cut: which experts to drop, as ``prune`` is asked, and what that left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_moe.cli.methods import get_method
from lightning_moe.cli.request import checkpoint_size, seed
from lightning_moe.criteria import Direction, get_criterion
from lightning_moe.errors import InputError
from lightning_moe.files import remove
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import resolve
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.ranks import on_all_ranks
from lightning_moe.pruning.budget import Scope


@dataclass(frozen=True)
class Cut:
    """Which experts to drop: the options of ``prune`` that decide it."""

    method: str = "reap-sum"
    ratio: float = 0.5
    scope: Scope = "layer"
    direction: Direction | None = None
    floor: int | None = None

    def asked(self) -> dict[str, Any]:
        method, direction = get_method(self.method), self.direction
        if method.criterion:
            direction = direction or get_criterion(self.method).direction
        elif direction is not None:
            raise InputError(f"--direction {direction}: {self.method} is no criterion; leave it out.")
        method.check_scope(self.scope)
        if method.drops != "experts" and self.floor is not None:
            raise InputError(f"--floor {self.floor}: {self.method} drops whole layers; leave it out.")
        return {**vars(self), "direction": direction} | ({"seed": seed()} if method.seeded else {})


ROUND_FILES = ("rounds.jsonl", "figures/rounds.png", "figures/expert_usage.png")
"""What a prune in rounds leaves that others do not replace."""


def target_of(out: str, path: str) -> Path:
    """Where the pruned model goes. Raises ``InputError`` when the model to prune lies there."""
    target = Path(out) / "model"
    if target.resolve() == resolve(path).resolve():
        raise InputError(f"--out {out}: {target} is the model to prune and would be replaced; give another folder.")
    return target


def cut_on_disk(
    trainer: Trainer, model: MoECausalLM, source: str, keep: Mapping[str, Sequence[int]], folder: Path
) -> None:
    """Let ``model`` hold these experts of the checkpoint at ``source``: cut into ``folder``, loaded, and removed."""
    on_all_ranks(lambda: compact_checkpoint(source, keep, folder) if trainer.is_global_zero else None)
    model.load(str(folder))
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        remove(folder)


def reduction(
    path: str,
    target: Path,
    shapes: list[LayerShape],
    keep: Mapping[str, list[int]],
    blocks: Collection[str] = (),
) -> dict[str, Any]:
    """What a cut left, in experts, layers, parameters and bytes; of those in ``blocks`` the decoder layer is gone."""
    before, after = checkpoint_size(path), checkpoint_size(str(target))
    kept = {shape.name: len(keep.get(shape.name, range(shape.num_experts))) for shape in shapes}
    gone = [name for name, count in kept.items() if count == 0]
    return {
        "kept_experts": kept,
        "uniform": len({count for name, count in kept.items() if name not in blocks}) == 1,
        "experts_before": sum(shape.num_experts for shape in shapes),
        "experts_after": sum(kept.values()),
        **({"layers_dropped": gone, "layers_before": len(kept), "layers_after": len(kept) - len(gone)} if gone else {}),
        "dropped_fraction": round(1 - sum(kept.values()) / sum(shape.num_experts for shape in shapes), 4),
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
    }


def note_order(method: str, scope: Scope, comparable: bool) -> None:
    """Say so where global scope compares what tells nothing across layers."""
    if scope == "global" and not comparable:
        Console(stderr=True, soft_wrap=True).print(
            f"note: {method} is an order of dropping within each layer, so --scope global compares the places in these "
            "orders, not how much the experts of two layers matter."
        )
