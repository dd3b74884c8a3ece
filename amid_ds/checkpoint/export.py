"""A finished (or unfinished) run leaves as an ordinary Hugging Face folder.

One process puts the student together from DeepSpeed's shards of any layout: no engine, no launcher, no accelerator, and
no model in memory either. It works output file by output file, each from the slices of the ranks' files that belong to
it, and so needs memory for one file and one tensor. The folder is written aside and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from amid_ds.checkpoint.manifest import checkpoint_step, list_checkpoints, read_manifest, verify
from amid_ds.checkpoint.zero_shards import ZeroShards
from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Recipe, Student
from amid_ds.data import load_tokenizer
from amid_ds.engine.backend import import_deepspeed
from amid_ds.errors import InputError
from amid_ds.files import fsync, require_disk_space
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.loading import DTYPES, meta_model
from amid_ds.run.warm_start import START_MODEL, find_run, resolve_student

FILE_BYTES = 2 * 10**9      # the most weights in one file, and what memory an export takes


def export(source: str | Path, out: str | Path, dtype: str | None = None, step: int | None = None) -> Path:
    """A run (its newest good checkpoint, or that of `step`) or a checkpoint -> a folder that `from_pretrained` opens.

    dtype: bf16 or fp32; None: what the student trained in. Raises InputError where there is no good checkpoint, where
    `out` is in use, or where the disk has no room.
    """
    import_deepspeed()      # the shards name classes of its
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"the output {out} is there already and not empty", "a new or empty folder",
                         "choose another name")
    checkpoint, recipe = find_checkpoint(Path(source), step)
    write_export(checkpoint, recipe, out, dtype)
    return out


def write_export(checkpoint: Path, recipe: Recipe, out: Path, dtype: str | None = None) -> None:
    """The export of a good checkpoint, in place of what `out` held. What is in the way is gone only when it is done."""
    state = read_manifest(checkpoint)["state"]
    name = dtype or state["student_dtype"]
    student = resolve_student(recipe, checkpoint.parent.parent)
    shell: Any = meta_model(student.model, **student.hub_kwargs)
    shapes = {name: parameter.shape for name, parameter in shell.named_parameters()}
    try:
        needed = sum(shape.numel() for shape in shapes.values()) * DTYPES[name].itemsize
        there = next(parent for parent in out.absolute().parents if parent.is_dir())
        require_disk_space(there, needed, f"exporting {checkpoint} to {out}", "choose a folder elsewhere")
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with freed_memory_given_back():
                _write_weights(checkpoint, shell, shapes, DTYPES[name], aside)
            _write_configs(student, shell, DTYPES[name], aside)
            (aside / "README.md").write_text(model_card(checkpoint, recipe, state, name), encoding="utf-8")
            _put_in_place(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise InputError(f"the export to {out} could not be written: {error}",
                         "a folder that can be written, with room",
                         "make room there, or choose a folder elsewhere; what was there is untouched") from None


def start_from(recipe: Recipe) -> None:
    """Where `student.model` names a run or a checkpoint: its fp32 weights into this run's folder, once."""
    start = Path(recipe.output_dir) / START_MODEL
    if find_run(recipe.student.model) is not None and not start.is_dir():
        import_deepspeed()
        checkpoint, theirs = find_checkpoint(Path(recipe.student.model))
        write_export(checkpoint, theirs, start, "fp32")
        print(f"{recipe.output_dir} begins with the weights of {checkpoint}", flush=True)


def _write_weights(checkpoint: Path, shell: Any, shapes: Mapping[str, torch.Size], dtype: torch.dtype,
                   out: Path) -> None:
    """Files of at most FILE_BYTES, and an index where there are several. Tied weights are there once."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers.core_model_loading import revert_weight_conversion

    buffers = shell.state_dict().keys() - shapes.keys() - set(shell.all_tied_weights_keys)
    hollow = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    hollow |= {name: shell.get_buffer(name) for name in sorted(buffers)}
    plan = split_torch_state_dict_into_shards(hollow, filename_pattern="model{suffix}.safetensors",
                                              max_shard_size=FILE_BYTES)
    where: dict[str, str] = {}
    with tqdm(total=len(hollow), desc="exporting", unit="tensor", disable=None) as bar:
        for file, names in plan.filename_to_tensors.items():
            shards = ZeroShards(checkpoint, shapes)      # for each file anew: what the last one mapped is let go
            tensors = {}
            for name in names:
                tensors[name] = shards.buffer(name) if name in buffers else shards.whole(name).to(dtype)
                bar.update()
            tensors = revert_weight_conversion(shell, tensors)      # to the names that the model's family has on disk
            save_file(tensors, out / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
    if plan.is_sharded:
        index = {"metadata": {**plan.metadata, "total_parameters": sum(shape.numel() for shape in shapes.values())},
                 "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_configs(student: Student, shell: Any, dtype: torch.dtype, out: Path) -> None:
    """config.json, generation_config.json (the one that the student came with) and the tokenizer, chat template too."""
    from transformers.utils import cached_file

    shell.config.architectures = [type(shell).__name__]
    shell.config.dtype = dtype
    shell.config.save_pretrained(out)
    came_with = cached_file(student.model, "generation_config.json", revision=student.revision,
                            _raise_exceptions_for_missing_entries=False)
    if came_with is not None:
        shutil.copy(came_with, out / "generation_config.json")
    elif shell.can_generate():
        shell.generation_config.save_pretrained(out)
    if student.trust_remote_code:      # a local folder's own code goes with it; the config names a hub's
        for code in Path(student.model).glob("*.py"):
            shutil.copy(code, out)
    load_tokenizer(student.model, **student.hub_kwargs).save_pretrained(out)


def _put_in_place(aside: Path, out: Path) -> None:
    for path in aside.rglob("*"):
        if path.is_file():
            fsync(path)
    fsync(aside)
    before = out.with_name(f".{out.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        os.replace(out, before)
    os.replace(aside, out)
    fsync(out.parent)
    shutil.rmtree(before, ignore_errors=True)


def model_card(checkpoint: Path, recipe: Recipe, state: Mapping[str, Any], dtype: str) -> str:
    """The folder's README.md: what this model is, how it came about and how well it did."""
    run = checkpoint.parent.parent
    teacher = f", distilled from `{recipe.teacher.model}`" if recipe.teacher is not None else ""
    lines = [_last(run / name, state["step"]) for name in ("metrics.jsonl", "eval.jsonl")]
    metrics = [f"| {key} | {value:g} |" for key, value in (lines[0][-1] if lines[0] else {}).items()
               if value is not None and "/" not in key]      # what was learnt, not how fast
    parts = ["---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillation, amid-ds]\n---",
             f"# {run.resolve().name}, step {state['step']}",
             f"`{recipe.student.model}`{teacher}, trained by amid_ds: {state['step']} of {recipe.train.steps} steps, "
             f"{state['tokens']:,} tokens. Weights in {dtype}.",
             "## Metrics of the last logged step\n\n| | |\n|---|---:|\n" + "\n".join(metrics)]
    if lines[1]:
        parts.append("## Evaluation\n\n```json\n" + "\n".join(json.dumps(line) for line in lines[1]) + "\n```")
    parts.append("## Provenance\n\n```json\n" + _text(run / "provenance.json").strip() + "\n```")
    parts.append("## Recipe\n\n```yaml\n" + dump_recipe(recipe).strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def _last(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the last step at or before `step`: one of metrics.jsonl, one for each set of eval.jsonl."""
    lines = [line for line in map(json.loads, _text(path).splitlines()) if line["step"] <= step]
    return [line for line in lines if line["step"] == lines[-1]["step"]]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def find_checkpoint(source: Path, step: int | None = None) -> tuple[Path, Recipe]:
    """(good checkpoint, the run's recipe) of a run folder, or of a checkpoint in it. Reads every file of it."""
    run = source if (source / "recipe.yaml").is_file() else source.parent.parent
    candidates = list_checkpoints(source / "checkpoints")[::-1] if run == source else [source]
    if not (run / "recipe.yaml").is_file() or not candidates:
        raise InputError(f"{source} holds no checkpoint",
                         "a run's folder, or a folder such as RUN/checkpoints/step_00000100",
                         "check the path; a run has a checkpoint after its first `checkpoint.every` steps")
    steps = ", ".join(str(checkpoint_step(checkpoint)) for checkpoint in candidates[::-1])
    if step is not None:
        candidates = [checkpoint for checkpoint in candidates if checkpoint_step(checkpoint) == step]
    if not candidates:
        raise InputError(f"{source} holds no checkpoint of step {step}", f"one of its steps {steps}", "choose --step")
    verdicts = []
    for checkpoint in candidates:
        wrong = verify(checkpoint)
        if wrong is None:
            return checkpoint, load_recipe(run / "recipe.yaml")
        verdicts.append(f"{checkpoint.name}: {wrong}")
    raise InputError(f"{source} holds no good checkpoint: {'; '.join(verdicts)}",
                     "one whose files are as they were written",
                     "`amid-ds checkpoints RUN` lists them; restore one from a copy")
