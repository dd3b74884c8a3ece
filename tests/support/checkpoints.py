"""Checkpoints that somebody has changed: sealed anew, so that every checksum is right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

OLD_RUNS = Path(__file__).parent.parent / "fixtures" / "old_runs"


class Call:
    """An object that makes the file `path` when it is unpickled without restraint."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


def copy_old_runs(folder: Path) -> Path:
    """Copy the small runs of tests/fixtures, whose recipes' paths start from their folder."""
    return Path(shutil.copytree(OLD_RUNS, folder / "old_runs"))


def poison(file: Path, marker: Path) -> None:
    """Put a `Call` that makes `marker` beside what `file` holds, as torch.save writes it."""
    from amid_ds.engine.backend import import_deepspeed

    import_deepspeed()
    content = torch.load(file, weights_only=False)
    torch.save({**content, "call": Call(marker)} if isinstance(content, dict)
               else [*content, Call(marker)], file)


def reseal(checkpoint: Path, change: Callable[[dict], object] = lambda content: None) -> None:
    """Write the manifest anew, with the sizes and checksums of what the files hold now.

    change: what to do to its content before that.
    """
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())["content"]
    for name in content["files"]:
        data = (checkpoint / name).read_bytes()
        content["files"][name] = {"bytes": len(data),
                                  "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    change(content)
    signature = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "xxh3_128": signature}))


def fp32_state(checkpoint: Path) -> list[torch.Tensor]:
    """fp32 weights and moments of every rank, in file order."""
    from amid_ds.engine.backend import import_deepspeed

    import_deepspeed()
    tensors = []
    for path in sorted(checkpoint.glob("*optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        tensors += list(state["fp32_flat_groups"])
        tensors += [value for group in state["optimizer_state_dict"]["state"].values()
                    for value in group.values()
                    if torch.is_tensor(value)]
    return tensors


def saving_rank(other: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that resumes, and saves into the folder `other` without a step."""
    from amid_ds.checkpoint.saver import Saver
    from amid_ds.training.trainer import Trainer
    from support.ranks import rank_main

    def save(trainer):
        saver = Saver(trainer.engine, Path(other), trainer.recipe.checkpoint,
                      trainer.saver.identity)
        saver.start(trainer.state)
        saver.finish()

    Trainer.run = save
    rank_main(argv, variables, log)


def tensors_of(checkpoint: Path, model: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every trained tensor of a checkpoint, by its name in the folder `model` and its kind."""
    from amid_ds.checkpoint.zero_shards import ZeroShards, trained_shapes
    from amid_ds.engine.backend import import_deepspeed
    from amid_ds.models.loading import meta_model

    import_deepspeed()
    shards = ZeroShards(checkpoint, trained_shapes(meta_model(str(model))))
    return {(name, kind): shards.whole(name, kind) for name in shards.shapes
            for kind in shards.kinds(name)}
