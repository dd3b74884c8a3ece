"""Where a run came from: versions, code, models, tokenizer. Kept beside the metrics, so a result can be traced."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.data import fingerprint
from amid_ds.run.warm_start import resolve_student

PACKAGES = ("amid-ds", "torch", "deepspeed", "transformers", "datasets", "sentencepiece", "triton")
SAMPLE = 1 << 20      # bytes of a weight file's either end that go into its hash


def provenance(recipe: Recipe, tokenizer: Any, ranks: int) -> str:
    """The text of a run's provenance.json."""
    facts = {
        "versions": versions(),
        "git_revision": code_revision(),
        "ranks": ranks,
        "student": {**_model(recipe.student), "files_sha256": model_hash(resolve_student(recipe).model)},
        "teacher": _model(recipe.teacher) if recipe.teacher is not None else None,
        "tokenizer_sha256": fingerprint(tokenizer),
    }
    return json.dumps(facts, indent=1) + "\n"


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that a result may depend on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def code_revision() -> str | None:
    """The revision of this code, `+changes` where the tree differs from it; None for an installed wheel."""
    revision, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return f"{revision}+changes" if revision and changes else revision


def uncommitted_changes() -> str | None:
    """What the tree of this code differs in from its revision, as a patch; None where there is no tree."""
    return _git("diff", "HEAD")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")
    except (OSError, subprocess.CalledProcessError):
        return None


def _model(model: Student | Teacher) -> dict[str, Any]:
    return {"model": model.model, "revision": model.revision, "files_sha256": model_hash(model.model)}


def prepared_hash(folder: Path) -> str:
    """A hash of prepared data: of their shards' sizes and checksums, which follow from the rows and nothing else."""
    shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def model_hash(model: str) -> str | None:
    """A hash over a local model's config and weight files: name, size, first and last MiB of each, which is quick for
    any size and changes with any retraining. None for a hub id, which its revision names."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.name == "config.json" or p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
