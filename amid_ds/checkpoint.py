"""Save, find, resume, export. DeepSpeed writes the shards; we decide when a checkpoint is there.

A checkpoint is written into a hidden folder, and exists from the one rename that gives it its name; only then does
`latest` move and an old one go. The teacher is in none of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from amid_ds.config import Recipe, load_recipe
from amid_ds.distributed import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.metrics import write_atomically

STATE_FILE = "amid_ds.json"      # step, tokens, ranks: what we add to DeepSpeed's shards


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def save(engine: Any, folder: Path, state: dict[str, Any], keep: int, world: World) -> None:
    """Save after `state["step"]` steps under `folder`. Collective; on return the checkpoint is committed for all."""
    name = name_of(state["step"])
    aside = folder / f".{name}.tmp"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
    world.barrier()
    engine.save_checkpoint(str(folder), tag=aside.name, save_latest=False, exclude_frozen_parameters=True)
    world.main_first(lambda: _commit(folder, aside, name, {**state, "ranks": world.size}, keep))


def _commit(folder: Path, aside: Path, name: str, state: dict[str, Any], keep: int) -> None:
    write_atomically(aside / STATE_FILE, json.dumps(state, indent=1))
    if (folder / name).exists():      # the same step once more, after a resume: the new one takes its place
        shutil.rmtree(folder / name)
    os.replace(aside, folder / name)
    write_atomically(folder / "latest", name)
    for old in committed(folder)[:-keep]:
        shutil.rmtree(old)


def committed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / STATE_FILE).is_file())


def newest(folder: Path) -> Path | None:
    """The newest committed checkpoint; None where there is none."""
    found = committed(folder)
    return found[-1] if found else None


def load(engine: Any, checkpoint: Path, world: World) -> dict[str, Any]:
    """Bring weights, optimizer and state back. Collective. Returns the saved state."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if state["ranks"] != world.size:
        raise InputError(f"{checkpoint} was saved on {state['ranks']} rank(s), this run has {world.size}",
                         "the same number of ranks; changing it is not supported yet",
                         f"start on {state['ranks']} ranks, or take another output_dir")
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
    if loaded is None:
        raise TrainingError(f"DeepSpeed could not load {checkpoint}")
    return state


def export(source: str | Path, out: str | Path) -> Path:
    """A run or one of its checkpoints -> a folder that `AutoModelForCausalLM.from_pretrained` opens, with tokenizer.

    One process; needs the fp32 student in host memory. Weights are in the dtype that the student trained in.
    """
    from transformers import AutoModelForCausalLM

    from amid_ds.data import load_tokenizer
    from amid_ds.engine import DTYPES, import_deepspeed, model_config

    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint, recipe = _resolve(Path(source))
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"the output {out} is there already and not empty", "a new or empty folder",
                         "choose another name")
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):      # it prints its progress for a person to read
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    config = model_config(recipe.student.model, recipe.student.revision)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[state["student_dtype"]])
    student = {name.removeprefix("student."): tensor for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(student, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied - {name for name, _ in model.named_buffers()}:
        raise TrainingError(f"{checkpoint} does not fit {recipe.student.model}: "
                            f"missing {missing}, unexpected {unexpected}")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    load_tokenizer(recipe.student.model, recipe.student.revision).save_pretrained(aside)
    if out.exists():
        out.rmdir()
    os.replace(aside, out)
    return out


def _resolve(source: Path) -> tuple[Path, Recipe]:
    """(checkpoint, the run's recipe) of a run folder or of a checkpoint in it."""
    run = source if (source / "recipe.yaml").is_file() else source.parent.parent
    checkpoint = newest(source / "checkpoints") if run == source else source
    if not (run / "recipe.yaml").is_file() or checkpoint is None or not (checkpoint / STATE_FILE).is_file():
        raise InputError(f"{source} holds no checkpoint",
                         "a run's folder, or a folder such as RUN/checkpoints/step_00000100",
                         "check the path; a run has a checkpoint after its first `checkpoint.every` steps")
    return checkpoint, load_recipe(run / "recipe.yaml")
