"""Settings for every test: no network, and no output that no test asked for."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
