"""A cache of the hub's, made by hand: what a download leaves, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path


def publish(cache: Path, model: str, folder: Path, commit: str) -> None:
    """Put `folder` into the cache as the commit (40 hex digits) that main of `model` is now."""
    repository = cache / f"models--{model.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit, dirs_exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def use_cache(cache: Path) -> None:
    """Have huggingface_hub in this process read that cache."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
