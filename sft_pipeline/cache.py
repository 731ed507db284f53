"""Where encoded rows and converted models are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`SFT_PIPELINE_CACHE`, or ~/.cache/sft_pipeline."""
    return Path(os.environ.get("SFT_PIPELINE_CACHE", "~/.cache/sft_pipeline")).expanduser()
