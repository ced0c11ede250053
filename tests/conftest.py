"""Settings for every test: no network, and no output that no test asked for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import transformers
from hypothesis import settings
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.cli.plugins import load_plugins
from lightning_moe.moe import skipping

# What a helper asserts is told in as much detail as what a test does.
pytest.register_assert_rewrite(
    *(f"tests.{folder.name}" for folder in Path(__file__).parent.iterdir() if folder.is_dir())
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

settings.register_profile("laws", deadline=None, derandomize=True, database=None)  # the same examples every time
settings.load_profile("laws")
load_plugins()  # whose criteria obey the same laws

gc.freeze()  # the libraries stay; commands, which collect often, need not look through a million of their objects


@pytest.fixture(autouse=True)
def _own_remote_code() -> Iterator[None]:
    """The package of remote code stays with the folder it was first imported from; the next test may have another."""
    path = list(sys.path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    sys.path[:] = path
    ALL_EXPERTS_FUNCTIONS.register(skipping.IMPLEMENTATION, skipping.skipping_forward)  # remote code puts its own there
