"""A run's checkpoint as an ordinary Hugging Face folder, or as the folder of its adapters.

One process puts the student together from DeepSpeed's shards of any layout: no engine, no launcher,
no accelerator, and no model in memory either. It works output file by output file, each from the
slices of the ranks' files that belong to it, and so needs memory for one file and one tensor. The
folder is written under a hidden name and renamed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from amid_ds.checkpoint.adapter_export import write_adapter
from amid_ds.checkpoint.card import CARD_FILE, LICENSE_FILES, model_card
from amid_ds.checkpoint.manifest import Manifest, checkpoint_step, list_checkpoints, verify
from amid_ds.checkpoint.whole_student import WholeStudent
from amid_ds.checkpoint.zero_shards import trained_shapes
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe, Student
from amid_ds.data import load_tokenizer, save_tokenizer
from amid_ds.errors import InputError
from amid_ds.files.atomic import require_disk_space
from amid_ds.files.ownership import new_folder, replacing_folder, require_new_folder
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.loading import DTYPES, meta_model
from amid_ds.models.trained import choose_trained
from amid_ds.models.weight_writer import write_weights
from amid_ds.run.folder import RunFolder
from amid_ds.run.warm_start import find_run, kept_student, resolve_student

logger = logging.getLogger(__name__)


def export(source: str | Path, out: str | Path, dtype: str | None = None,
           step: int | None = None, trust_remote_code: bool = False,
           merge: bool = False) -> Path:
    """Export a run or a checkpoint to the folder `out`; of a run with `student.lora` its adapters.

    Of a run: its newest good checkpoint, or that of `step`. dtype: bf16 or fp32; None: the one that
    the student trained in. trust_remote_code: run the code that came with the student. merge: the
    whole model, the adapters added to its weights. Raises InputError where there is no good
    checkpoint, or no adapter to merge, where `out` is in use, or where the disk has no room.
    """
    checkpoint, recipe = checkpoint_for(source, out, step, merge)
    write_export(checkpoint, recipe.trusting(trust_remote_code), Path(out), dtype, new_folder,
                 whole=merge)
    return Path(out)


def checkpoint_for(source: str | Path, out: str | Path, step: int | None, merge: bool
                   ) -> tuple[Path, Recipe]:
    """`find_checkpoint` for an export to the folder `out`, with adapters merged or as they are.

    Raises InputError where there is none, none to merge, or where `out` is no place for it.
    """
    require_new_folder(out, "the output")
    checkpoint, recipe = find_checkpoint(Path(source), step)
    if merge and recipe.student.lora is None:
        raise InputError(f"--merge, and {source} has no adapters: its recipe has no student.lora",
                         "a run with student.lora", "leave --merge out: its export is whole")
    if checkpoint.parent.resolve() in Path(out).resolve().parents:
        raise InputError(f"the output {out} is inside {checkpoint.parent}",
                         "a folder apart from the run's checkpoints", "choose another folder")
    return checkpoint, recipe


def write_export(checkpoint: Path, recipe: Recipe, out: Path, dtype: str | None = None,
                 open_folder: Callable[[Path], AbstractContextManager[Path]] = replacing_folder,
                 whole: bool = False) -> None:
    """Export a good checkpoint to `out`, which keeps what it held until the new is complete.

    open_folder: new_folder for a folder that anybody may write, replacing_folder for a run's own.
    whole: adapters merged, where there are any; else they alone are exported.
    """
    manifest = Manifest.read(checkpoint)
    dtype = dtype or manifest.layout.student_dtype
    run = RunFolder(checkpoint.parent.parent)
    student, own = kept_student(recipe, run), resolve_student(recipe, run.path)
    model: Any = meta_model(student.model, **student.hub_kwargs)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    is_adapter = student.lora is not None and not whole
    if is_adapter:
        trained = meta_model(student.model, **student.hub_kwargs)
        choose_trained(trained, student)
        exported = trained_shapes(trained)
    else:
        weights, exported = WholeStudent.of(checkpoint, student, own, DTYPES[dtype]), shapes
    try:
        needed = sum(shape.numel() for shape in exported.values()) * DTYPES[dtype].itemsize
        existing = next(parent for parent in out.absolute().parents if parent.is_dir())
        require_disk_space(existing, needed, f"exporting {checkpoint} to {out}",
                           "choose a folder elsewhere")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open_folder(out) as staging:
            if is_adapter:
                write_adapter(checkpoint, exported, DTYPES[dtype], model, own, staging)
                _write_companions(student, staging)
            else:
                with freed_memory_given_back():
                    _write_weights(weights, model, shapes, staging)
                write_model_configs(student, model, DTYPES[dtype], staging)
            card = model_card(checkpoint, recipe, manifest.state, dtype, is_adapter)
            (staging / CARD_FILE).write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the export to {out} could not be written: {error}",
                         "a folder that can be written, with room",
                         "make room there, or choose a folder elsewhere; "
                         "what was there is untouched") from None


def keep_student(recipe: Recipe) -> None:
    """Copy what an export needs beside the weights into the run's folder, once, with the card that
    names the student's license.

    So a run can be exported after its student's folder has moved. Not of a student with Python code
    of its own: that is trusted where the user has it, not in a folder that others may write into.
    """
    kept = RunFolder(Path(recipe.output_dir)).student_files
    if kept.is_dir() or recipe.student.trust_remote_code:
        return
    student = resolve_student(recipe)
    model: Any = meta_model(student.model, **student.hub_kwargs)
    with replacing_folder(kept) as staging:
        write_model_configs(student, model, model.dtype, staging)
        card = own_card(student)
        if card is not None:
            shutil.copy(card, staging / CARD_FILE)


def start_from(recipe: Recipe) -> None:
    """Export the run or checkpoint that `student.model` names into this run, once, whole and in
    fp32."""
    start = RunFolder(Path(recipe.output_dir)).start_model
    if find_run(recipe.student.model) is not None and not start.is_dir():
        checkpoint, its_recipe = find_checkpoint(Path(recipe.student.model))
        write_export(checkpoint, its_recipe.trusting(recipe.student.trust_remote_code), start,
                     "fp32", whole=True)
        logger.info("%s begins with the weights of %s", recipe.output_dir, checkpoint)


def _write_weights(weights: WholeStudent, model: Any, shapes: Mapping[str, torch.Size],
                   out: Path) -> None:
    """Write the weight files, each from the slices of the shards that belong to it."""
    buffers = model.state_dict().keys() - shapes.keys() - set(model.all_tied_weights_keys)
    hollow = {name: torch.empty(shape, dtype=weights.dtype, device="meta")
              for name, shape in shapes.items()}
    hollow |= {name: model.get_buffer(name) for name in sorted(buffers)}

    def read(names: Sequence[str]) -> Iterator[torch.Tensor]:
        # Opened for each file anew, so that the pages mapped for the last one are released.
        opened = weights.open()
        for name in names:
            yield (opened.buffer(name) if name in buffers
                   else opened.whole(name, shapes[name]))

    write_weights(model, hollow, read, out)


def write_model_configs(student: Student, model: Any, dtype: torch.dtype, out: Path) -> None:
    """Write config.json of `model`, and `student`'s generation settings, code, tokenizer
    and license."""
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
    _write_companions(student, out)


def _write_companions(student: Student, out: Path) -> None:
    """Write `student`'s tokenizer, and the files of its license."""
    from transformers.utils.hub import cached_files

    save_tokenizer(load_tokenizer(student.model, **student.hub_kwargs), out, student.revision)
    for file in cached_files(student.model, [*LICENSE_FILES], revision=student.revision,
                             _raise_exceptions_for_missing_entries=False,
                             _raise_exceptions_for_connection_errors=False) or ():
        shutil.copy(file, out)


def own_card(student: Student) -> Path | None:
    """The card that lies beside `student`'s weights, on the hub or here; None without one."""
    from transformers.utils import cached_file

    card = cached_file(student.model, CARD_FILE, revision=student.revision,
                       _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)
    return None if card is None else Path(card)


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
