"""The origin of a run's result: versions, code, models, tokenizer; kept in its provenance.json."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.data import TargetFolder, tokenizer_fingerprint
from amid_ds.data.locate import is_hub_id
from amid_ds.data.manifest import PREPARED_MANIFEST, read_prepared_manifest
from amid_ds.distributed.devices import allocator_settings
from amid_ds.run.folder import RunFolder
from amid_ds.run.warm_start import frozen_models, resolve_student

PACKAGES = ("amid-ds", "torch", "deepspeed", "transformers", "peft", "datasets", "sentencepiece",
            "triton")
# Bytes at each end of a weight file that go into its hash.
SAMPLE_BYTES = 1 << 20


class SourceHashes(NamedTuple):
    """SHA-256 of what a run begins with; None for a model of the hub.

    frozen: of each of `frozen_models`, by its key; under `teacher` also where a cache stands for
    it. cache: of what that holds; None without one.
    """

    student: str | None
    frozen: Mapping[str, str | None]
    tokenizer: str
    cache: str | None = None


def hash_sources(recipe: Recipe, tokenizer: Any) -> SourceHashes:
    """The hashes. Rank 0 makes them, once a start, for all: they read a part of every file."""
    student = model_hash(resolve_student(recipe).model)
    cached, of_cache = recipe.cached_teacher, None
    frozen = {key: model_hash(model.model) for key, model in frozen_models(recipe).items()}
    if cached is not None:
        frozen["teacher"] = TargetFolder.open(cached.cached).manifest.teacher_sha256
        of_cache = cache_hash(Path(cached.cached))
    return SourceHashes(student, frozen, tokenizer_fingerprint(tokenizer), of_cache)


def provenance(recipe: Recipe, hashes: SourceHashes, ranks: int, optimizer: Mapping[str, object],
               placement: Mapping[str, object], trained: Mapping[str, object]) -> str:
    """The text of a run's provenance.json.

    optimizer: its name and groups of parameters; placement: facts of the teacher's; trained: what
    of the student trains.
    """
    frozen = {key: _model_facts(model, hashes.frozen[key])
              for key, model in frozen_models(recipe).items()}
    facts = {
        "versions": versions(),
        "git_revision": code_revision(),
        "ranks": ranks,
        "gpu_allocator": allocator_settings(),
        "student": {**_model_facts(recipe.student, hashes.student), **trained},
        "teacher": ({**frozen.pop("teacher"), **placement} if frozen
                    else _cache_facts(recipe, hashes)),
        **frozen,
        "hub_data": sorted({source.path for part in recipe.data.parts().values()
                            for source in part.train if is_hub_id(source.path)}),
        "tokenizer_sha256": hashes.tokenizer,
        "optimizer": optimizer,
    }
    return json.dumps(facts, indent=1) + "\n"


def read_provenance(run: RunFolder) -> dict[str, Any]:
    """The content of the run's provenance.json; {} where it cannot be read."""
    try:
        facts = json.loads(run.provenance.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _cache_facts(recipe: Recipe, hashes: SourceHashes) -> dict[str, object] | None:
    """Which teacher a cache is of, and which cache; None without one."""
    if recipe.cached_teacher is None:
        return None
    cache = TargetFolder.open(recipe.cached_teacher.cached).manifest
    return {"model": cache.teacher, "revision": cache.revision,
            "files_sha256": hashes.frozen["teacher"], "cached": recipe.cached_teacher.cached,
            "cache_sha256": hashes.cache, "method": cache.method, "kept": cache.layout.entries}


def versions() -> dict[str, str | None]:
    """The versions of Python and of PACKAGES by name; None for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def code_revision() -> str | None:
    """The git revision of this code, with `+changes` if the tree differs from it.

    None for an installed wheel.
    """
    revision, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return f"{revision}+changes" if revision and changes else revision


def uncommitted_changes() -> str | None:
    """The difference of this code's tree from its revision as a patch; None without a tree."""
    return _git("diff", "HEAD")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip("\n")


def _model_facts(model: Student | Teacher, sha256: str | None) -> dict[str, str | None]:
    return {"model": model.model, "revision": model.revision, "files_sha256": sha256}


def prepared_hash(folder: Path) -> str:
    """The sha256 of prepared data, over its shards' sizes and checksums.

    These follow from the rows and nothing else.
    """
    manifest = read_prepared_manifest(folder)
    assert manifest is not None, f"{folder} holds prepared data"
    return hashlib.sha256(json.dumps(manifest["shards"], sort_keys=True).encode()).hexdigest()


def cache_hash(folder: Path) -> str:
    """The sha256 of a cache, over its manifest: what it is of, its shards' sizes and checksums."""
    return hashlib.sha256((folder / PREPARED_MANIFEST).read_bytes()).hexdigest()


def model_hash(model: str) -> str | None:
    """The sha256 over a local model's config and weight files: name, size, first and last MiB.

    Quick for any size, and any retraining changes it. None for a hub id, which its revision names.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            digest.update(_name_size_and_ends(path))
    return digest.hexdigest()


def _name_size_and_ends(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(SAMPLE_BYTES)
        file.seek(max(0, size - SAMPLE_BYTES))
        return f"{path.name}:{size}:".encode() + start + file.read(SAMPLE_BYTES)
