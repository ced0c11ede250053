"""Find out which experts of a Mixture-of-Experts model matter, drop the rest, save what loads everywhere."""

from lightning_moe.version import __version__

__all__ = ["__version__"]
