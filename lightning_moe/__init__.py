"""Find out which experts of a Mixture-of-Experts model matter, drop the rest, save what loads everywhere.

Importing this package lets ``AutoModelForCausalLM`` load its non-uniform checkpoints.
"""

from lightning_moe.moe.checkpoints import register_non_uniform
from lightning_moe.version import __version__

__all__ = ["__version__", "register_non_uniform"]

register_non_uniform()
