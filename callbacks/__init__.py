"""Callbacks: guests in anybody's Lightning project, imported as ``lightning_moe.callbacks``."""
