"""Callbacks: guests in anybody's Lightning project, imported as ``lightning_moe.callbacks``."""

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.callbacks.expert_pruning import ExpertPruning
from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.callbacks.hf_checkpoint import HFCheckpoint
from lightning_moe.callbacks.importance_figures import ImportanceFigures
from lightning_moe.callbacks.router_rebalance import RouterRebalance

__all__ = [
    "ExpertObservation",
    "ExpertPruning",
    "ExpertUsageMonitor",
    "HFCheckpoint",
    "ImportanceFigures",
    "RouterRebalance",
]
