"""Settings for every test: no network, and no output that no test asked for."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import transformers
from hypothesis import settings

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

settings.register_profile("laws", deadline=None, derandomize=True, database=None)  # the same examples every time
settings.load_profile("laws")
