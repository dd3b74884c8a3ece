"""A run's checkpoint as an ordinary Hugging Face folder.

One process puts the student together from DeepSpeed's shards of any layout: no engine, no launcher,
no accelerator, and no model in memory either. It works output file by output file, each from the
slices of the ranks' files that belong to it, and so needs memory for one file and one tensor. The
folder is written under a hidden name and renamed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from amid_ds.checkpoint.manifest import Manifest, checkpoint_step, list_checkpoints, verify
from amid_ds.checkpoint.state import TrainState
from amid_ds.checkpoint.zero_shards import ZeroShards
from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Recipe, Student
from amid_ds.data import load_tokenizer
from amid_ds.errors import InputError
from amid_ds.files.atomic import require_disk_space
from amid_ds.files.ownership import new_folder, replacing_folder, require_new_folder
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.loading import DTYPES, meta_model
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations, read_metrics
from amid_ds.run.warm_start import find_run, kept_student, resolve_student

# The most weights in one file, and the memory that an export needs.
FILE_BYTES = 2 * 10**9

logger = logging.getLogger(__name__)


def export(source: str | Path, out: str | Path, dtype: str | None = None,
           step: int | None = None, trust_remote_code: bool = False) -> Path:
    """Export a run or a checkpoint to the folder `out`.

    Of a run: its newest good checkpoint, or that of `step`. dtype: bf16 or fp32; None: the one that
    the student trained in. trust_remote_code: run the code that came with the student. Raises
    InputError where there is no good checkpoint, where `out` is in use, or where the disk has no
    room.
    """
    require_new_folder(out, "the output")
    checkpoint, recipe = find_checkpoint(Path(source), step)
    if checkpoint.parent.resolve() in Path(out).resolve().parents:
        raise InputError(f"the output {out} is inside {checkpoint.parent}",
                         "a folder apart from the run's checkpoints", "choose another folder")
    write_export(checkpoint, recipe.trusting(trust_remote_code), Path(out), dtype, new_folder)
    return Path(out)


def write_export(checkpoint: Path, recipe: Recipe, out: Path, dtype: str | None = None,
                 open_folder: Callable[[Path], AbstractContextManager[Path]] = replacing_folder
                 ) -> None:
    """Export a good checkpoint to `out`, which keeps what it held until the new is complete.

    open_folder: new_folder for a folder that anybody may write, replacing_folder for a run's own.
    """
    manifest = Manifest.read(checkpoint)
    dtype = dtype or manifest.layout.student_dtype
    student = kept_student(recipe, RunFolder(checkpoint.parent.parent))
    model: Any = meta_model(student.model, **student.hub_kwargs)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        needed = sum(shape.numel() for shape in shapes.values()) * DTYPES[dtype].itemsize
        existing = next(parent for parent in out.absolute().parents if parent.is_dir())
        require_disk_space(existing, needed, f"exporting {checkpoint} to {out}",
                           "choose a folder elsewhere")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open_folder(out) as staging:
            with freed_memory_given_back():
                _write_weights(checkpoint, model, shapes, DTYPES[dtype], staging)
            _write_configs(student, model, DTYPES[dtype], staging)
            card = model_card(checkpoint, recipe, manifest.state, dtype)
            (staging / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the export to {out} could not be written: {error}",
                         "a folder that can be written, with room",
                         "make room there, or choose a folder elsewhere; "
                         "what was there is untouched") from None


def keep_student(recipe: Recipe) -> None:
    """Copy what an export needs beside the weights into the run's folder, once.

    So a run can be exported after its student's folder has moved. Not of a student with Python code
    of its own: that is trusted where the user has it, not in a folder that others may write into.
    """
    kept = RunFolder(Path(recipe.output_dir)).student_files
    if kept.is_dir() or recipe.student.trust_remote_code:
        return
    student = resolve_student(recipe)
    model: Any = meta_model(student.model, **student.hub_kwargs)
    with replacing_folder(kept) as staging:
        _write_configs(student, model, model.dtype, staging)


def start_from(recipe: Recipe) -> None:
    """Export the run or checkpoint that `student.model` names into this run, once, in fp32."""
    start = RunFolder(Path(recipe.output_dir)).start_model
    if find_run(recipe.student.model) is not None and not start.is_dir():
        checkpoint, its_recipe = find_checkpoint(Path(recipe.student.model))
        write_export(checkpoint, its_recipe.trusting(recipe.student.trust_remote_code), start,
                     "fp32")
        logger.info("%s begins with the weights of %s", recipe.output_dir, checkpoint)


def _write_weights(checkpoint: Path, model: Any, shapes: Mapping[str, torch.Size],
                   dtype: torch.dtype, out: Path) -> None:
    """Write files of at most FILE_BYTES, tied weights once; an index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers.core_model_loading import revert_weight_conversion

    buffers = model.state_dict().keys() - shapes.keys() - set(model.all_tied_weights_keys)
    hollow = {name: torch.empty(shape, dtype=dtype, device="meta")
              for name, shape in shapes.items()}
    hollow |= {name: model.get_buffer(name) for name in sorted(buffers)}
    split = split_torch_state_dict_into_shards(hollow, filename_pattern="model{suffix}.safetensors",
                                               max_shard_size=FILE_BYTES)
    file_of: dict[str, str] = {}
    with tqdm(total=len(hollow), desc="exporting", unit="tensor", disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            # Opened for each file anew, so that the pages mapped for the last one are released.
            shards = ZeroShards(checkpoint, shapes)
            tensors = {}
            for name in names:
                tensors[name] = (shards.buffer(name) if name in buffers
                                 else shards.whole(name).to(dtype))
                bar.update()
            # To the names that the model's family has on disk.
            tensors = revert_weight_conversion(model, tensors)
            save_file(tensors, out / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(tensors, file)
    if split.is_sharded:
        total = sum(shape.numel() for shape in shapes.values())
        index = {"metadata": {**split.metadata, "total_parameters": total}, "weight_map": file_of}
        (out / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_configs(student: Student, model: Any, dtype: torch.dtype, out: Path) -> None:
    """Write config.json, the student's generation settings, and the tokenizer with template."""
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(out)
    own = cached_file(student.model, "generation_config.json", revision=student.revision,
                      _raise_exceptions_for_missing_entries=False)
    if own is not None:
        shutil.copy(own, out / "generation_config.json")
    elif model.can_generate():
        # Older models have them in config.json, from where save_pretrained moves them too.
        settings = GenerationConfig.from_pretrained(
            student.model, config_file_name="config.json", revision=student.revision,
            _from_model_config=True)
        settings.to_json_file(out / "generation_config.json")
    if student.trust_remote_code:
        # A local folder's own code goes with it; for a hub's the config names it.
        for code in Path(student.model).glob("*.py"):
            shutil.copy(code, out)
    load_tokenizer(student.model, **student.hub_kwargs).save_pretrained(out)


def model_card(checkpoint: Path, recipe: Recipe, state: TrainState, dtype: str) -> str:
    """The text of the folder's README.md: what this model is, how it was trained and its scores."""
    run = RunFolder(checkpoint.parent.parent)
    model = recipe.live_teacher
    teacher = f", distilled from `{model.model}`" if model is not None else ""
    logged, evaluated = (_lines_of_last_step(lines, state.step)
                         for lines in (read_metrics(run.path), read_evaluations(run.path)))
    # A slash marks times, speeds and memory.
    metrics = [f"| {key} | {value:g} |" for key, value in (logged[-1] if logged else {}).items()
               if value is not None and "/" not in key]
    parts = ["---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
             "tags: [distillation, amid-ds]\n---",
             f"# {run.path.resolve().name}, step {state.step}",
             f"`{recipe.student.model}`{teacher}, trained by amid_ds: "
             f"{state.step} of {recipe.train.total_steps} steps, "
             f"{state.tokens:,} tokens. Weights in {dtype}.",
             "## Metrics of the last logged step\n\n| | |\n|---|---:|\n" + "\n".join(metrics)]
    if evaluated:
        parts.append("## Evaluation\n\n```json\n"
                     + "\n".join(json.dumps(line) for line in evaluated) + "\n```")
    origin = ""
    if run.provenance.is_file():
        origin = run.provenance.read_text(encoding="utf-8", errors="replace")
    parts.append("## Provenance\n\n```json\n" + origin.strip() + "\n```")
    parts.append("## Recipe\n\n```yaml\n" + dump_recipe(recipe).strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def exported_step(model: Path) -> int | None:
    """The step that the card of an exported model names; None where it cannot be read."""
    try:
        card = (model / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    title = re.search(r"^# .*, step (\d+)$", card, re.MULTILINE)
    return None if title is None else int(title[1])


def _lines_of_last_step(lines: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The last step's lines, up to `step`: one of metrics.jsonl, one per set of eval.jsonl."""
    lines = [line for line in lines if line["step"] <= step]
    return [line for line in lines if line["step"] == lines[-1]["step"]]


def find_checkpoint(source: Path, step: int | None = None) -> tuple[Path, Recipe]:
    """(good checkpoint, the run's recipe) of a run folder, or of a checkpoint in it.

    Reads every file of the checkpoint. Raises InputError where there is none, or none of `step`.
    """
    run = RunFolder(source) if RunFolder(source).exists else RunFolder(source.parent.parent)
    candidates = list_checkpoints(run.checkpoints)[::-1] if run.path == source else [source]
    if not run.exists or not candidates:
        raise InputError(f"{source} holds no checkpoint",
                         "a run's folder, or a folder such as RUN/checkpoints/step_00000100",
                         "check the path; a run has a checkpoint after its first "
                         "`checkpoint.every` steps")
    steps = ", ".join(str(checkpoint_step(checkpoint)) for checkpoint in candidates[::-1])
    if step is not None:
        candidates = [checkpoint for checkpoint in candidates
                      if checkpoint_step(checkpoint) == step]
    if not candidates:
        raise InputError(f"{source} holds no checkpoint of step {step}",
                         f"one of its steps {steps}", "choose --step")
    problems = []
    for checkpoint in candidates:
        problem = verify(checkpoint)
        if problem is None:
            return checkpoint, load_recipe(run.recipe)
        problems.append(f"{checkpoint.name}: {problem}")
    raise InputError(f"{source} holds no good checkpoint: {'; '.join(problems)}",
                     "one whose files are as they were written",
                     "`amid-ds checkpoints RUN` lists them; restore one from a copy")
