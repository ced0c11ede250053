"""Plugins: criteria and methods of other packages, which the commands then know by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from lightning_moe.errors import InputError, describe

GROUP = "lightning_moe"
"""The group of entry points under which a package names its modules."""


def plugins() -> list[EntryPoint]:
    """The modules that installed packages name, in the order of their names."""
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def load_plugins() -> None:
    """Import them; what they register is then known. Raises ``InputError`` for one that cannot be imported."""
    for entry in plugins():
        try:
            entry.load()
        except Exception as error:
            raise InputError(
                f"the plugin {entry.name} ({entry.value}) cannot be loaded: {describe(error)}; mend or uninstall it."
            ) from error
