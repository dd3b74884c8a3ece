"""A checkpoint of one layout resumes in any other.

A layout is the number of ranks, tensor parallelism with the cut of its heads, ZeRO stage,
precision, and the parameters that are decayed, which lie in a group of their own: whatever a group
is, a parameter's moments go by its name. One process puts the parameters and their moments together
(zero_shards.py) and keeps them inside the checkpoint, a file for each parameter, so that they are
there for the next start and go when the checkpoint goes. Then every rank maps those files into
memory and reads the pieces that its own layout asks for. The price is disk: 12 bytes per parameter
with AdamW's moments, 4 more for each running mean, once.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from tqdm import tqdm

from amid_ds.checkpoint.manifest import (
    CONSOLIDATED,
    Manifest,
    verify_together,
    write_file,
)
from amid_ds.checkpoint.state import Layout, TrainState
from amid_ds.checkpoint.zero_shards import ZeroShards, trained_shapes
from amid_ds.config.recipe import Student
from amid_ds.distributed.world import World
from amid_ds.engine.engine import Engine
from amid_ds.engine.tensor_files import read_torch_file
from amid_ds.errors import TrainingError
from amid_ds.files.atomic import replace_folder, require_disk_space
from amid_ds.models.loading import meta_model
from amid_ds.models.trained import choose_trained

logger = logging.getLogger(__name__)


def ensure_consolidated(checkpoint: Path, layout: Layout, student: Student,
                        world: World) -> Path | None:
    """The folder of the checkpoint's whole tensors; None where it was saved in `layout`.

    Collective. A good one that an earlier start made is used again. Raises InputError where the
    disk has no room for it.
    """
    saved = world.run_checked(lambda: Manifest.read(checkpoint)).layout
    if saved == layout:
        return None
    folder = checkpoint / CONSOLIDATED
    if verify_together(folder, world) is not None:
        logger.info("%s was saved with %s, this run has %s: converting it once",
                    checkpoint, saved, layout)
        world.run_on_main(lambda: consolidate(checkpoint, student))
    return folder


def consolidate(checkpoint: Path, student: Student) -> None:
    """Write the whole tensors into the checkpoint, in one rename at the end. Needs no engine.

    Those of what is trained: a checkpoint holds nothing else.
    """
    model = meta_model(student.model, **student.hub_kwargs)
    choose_trained(model, student)
    shapes = trained_shapes(model)
    staging = checkpoint / f".{CONSOLIDATED}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    shards = ZeroShards(checkpoint, shapes)
    # All in fp32.
    needed = sum(shape.numel() * len(shards.kinds(name)) * 4 for name, shape in shapes.items())
    require_disk_space(checkpoint, needed, f"converting {checkpoint} to this layout",
                       "start in the layout that it was saved in")
    try:
        staging.mkdir()
        files = {}
        for name in tqdm(shapes, desc="converting", unit="tensor", disable=None):
            tensors = {kind: shards.whole(name, kind) for kind in shards.kinds(name)}
            files[f"{name}.pt"] = write_file(staging / f"{name}.pt", tensors)
        saved = Manifest.read(checkpoint)
        Manifest(saved.state, saved.layout, saved.identity, files).write(staging)
        replace_folder(staging, checkpoint / CONSOLIDATED)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(
            f"{checkpoint} could not be converted to this layout: {error}") from None


def load_checkpoint(engine: Engine, checkpoint: Path, consolidated: Path | None) -> TrainState:
    """Restore weights and optimizer from the checkpoint; returns the saved state. Collective.

    consolidated: the checkpoint's whole tensors, which are read where its layout is another one.
    """
    state = Manifest.read(checkpoint).state
    if consolidated is None:
        engine.load_checkpoint(checkpoint)
    else:
        engine.load_tensors(lambda name: read_torch_file(consolidated / f"{name}.pt", mmap=True),
                            state.step)
    return state
