"""A finished (or unfinished) run leaves as an ordinary Hugging Face folder.

One process puts the student together from DeepSpeed's shards of any layout: no engine, no launcher, no accelerator.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from amid_ds.checkpoint import committed, damage, read_manifest
from amid_ds.config import Recipe, load_recipe
from amid_ds.errors import InputError, TrainingError
from amid_ds.shards import Shards


def export(source: str | Path, out: str | Path) -> Path:
    """A run or one of its checkpoints -> a folder that `AutoModelForCausalLM.from_pretrained` opens, with tokenizer.

    One process; needs the fp32 student in host memory. Weights are in the dtype that the student trained in.
    """
    from transformers import AutoModelForCausalLM

    from amid_ds.data import load_tokenizer
    from amid_ds.engine import DTYPES, import_deepspeed, model_config

    import_deepspeed()      # the shards name classes of its
    checkpoint, recipe = _resolve(Path(source))
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"the output {out} is there already and not empty", "a new or empty folder",
                         "choose another name")
    state = read_manifest(checkpoint)["state"]
    config = model_config(recipe.student.model, recipe.student.revision)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[state["student_dtype"]])
    shards = Shards(checkpoint, {name: parameter.shape for name, parameter in model.named_parameters()})
    student = {name: shards.whole(name) for name in shards.shapes}
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
    """(good checkpoint, the run's recipe) of a run folder, or of a checkpoint in it."""
    run = source if (source / "recipe.yaml").is_file() else source.parent.parent
    candidates = committed(source / "checkpoints")[::-1] if run == source else [source]
    if not (run / "recipe.yaml").is_file() or not candidates:
        raise InputError(f"{source} holds no checkpoint",
                         "a run's folder, or a folder such as RUN/checkpoints/step_00000100",
                         "check the path; a run has a checkpoint after its first `checkpoint.every` steps")
    verdicts = []
    for checkpoint in candidates:
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, load_recipe(run / "recipe.yaml")
        verdicts.append(f"{checkpoint.name}: {wrong}")
    raise InputError(f"{source} holds no good checkpoint: {'; '.join(verdicts)}",
                     "one whose files are as they were written",
                     "`amid-ds checkpoints RUN` lists them; restore one from a copy")
