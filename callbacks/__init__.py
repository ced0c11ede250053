"""Callbacks: guests in anybody's Lightning project, imported as ``lightning_moe.callbacks``."""

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.callbacks.hf_checkpoint import HFCheckpoint
from lightning_moe.callbacks.importance_figures import ImportanceFigures

__all__ = ["ExpertObservation", "HFCheckpoint", "ImportanceFigures"]
