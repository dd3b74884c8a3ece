"""A run's trained language part inside a copy of the multimodal folder that it came from.

The copy is byte for byte, and then the trained weights are put where the files have the old ones,
in the files' own dtypes: headers, index, towers, processor and every other file stay as they were.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from amid_ds.checkpoint.export import checkpoint_for
from amid_ds.checkpoint.whole_student import WholeStudent
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError
from amid_ds.files.atomic import require_disk_space
from amid_ds.files.ownership import new_folder
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.language_part import is_multimodal
from amid_ds.models.loading import meta_model, open_weights, stored_config, supported_model
from amid_ds.models.weight_patch import WeightPatcher
from amid_ds.models.weight_reader import ParameterSource, WeightReader
from amid_ds.models.weight_writer import FILE_BYTES
from amid_ds.run.folder import RunFolder
from amid_ds.run.warm_start import kept_student, resolve_student

# What a config may say differently of one and the same model.
NO_PART_OF_IT = ("architectures", "dtype", "transformers_version", "_name_or_path", "use_cache",
                 "bos_token_id", "eos_token_id", "pad_token_id")
# The most differences in a message.
MAX_DIFFERENCES = 4


def export_into(source: str | Path, out: str | Path, original: str | Path, step: int | None = None,
                trust_remote_code: bool = False, merge: bool = False) -> Path:
    """Export the language part of a run into a copy of the multimodal folder `original`, at `out`.

    Of a run: its newest good checkpoint, or that of `step`. merge: of a run with adapters, which
    needs it. Takes the memory of one weight, and of FILE_BYTES of the checkpoint's pages. Raises
    InputError where the original is not what the student is a part of, or as `export` does.
    """
    checkpoint, recipe = checkpoint_for(source, out, step, merge)
    original, out = Path(original), Path(out)
    if not (original / "config.json").is_file():
        raise InputError(f"--into {original}, which is no model's folder",
                         "the multimodal folder that the student came from",
                         "download it, and name its folder")
    if original.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"the output {out} is inside {original}", "a folder apart from it",
                         "choose another folder")
    if recipe.student.lora is not None and not merge:
        raise InputError(f"--into, and {source} has adapters: its student has student.lora",
                         "weights, into which the adapters are merged", "add --merge")
    weights, model, reader = _opened(checkpoint, recipe.trusting(trust_remote_code), original)
    size = sum(file.stat().st_size for file in original.rglob("*") if file.is_file())
    try:
        existing = next(parent for parent in out.absolute().parents if parent.is_dir())
        require_disk_space(existing, size, f"exporting {checkpoint} to {out}",
                           "choose a folder elsewhere")
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as staging, freed_memory_given_back():
            _copy(original, staging)
            put_weights(weights, model, reader, staging)
    except OSError as error:
        raise InputError(f"the copy of {original} to {out} could not be made: {error}",
                         "files there that can all be read, and a folder that can be written, with "
                         "room", "mend or take out what cannot be read; make room, or choose a "
                         "folder elsewhere") from None
    return out


def _opened(checkpoint: Path, recipe: Recipe, original: Path
            ) -> tuple[WholeStudent, Any, WeightReader]:
    """(the run's weights, their meta model, where the original's files have the language part's).

    Raises InputError unless that is the student, by its config, names and shapes.
    """
    if not is_multimodal(stored_config(str(original))):
        raise InputError(f"--into {original}, which is not multimodal",
                         "the multimodal folder that the student came from",
                         "leave --into out: the export is an ordinary folder")
    run = RunFolder(checkpoint.parent.parent)
    student, own = kept_student(recipe, run), resolve_student(recipe, run.path)
    model = meta_model(student.model, **student.hub_kwargs)
    require_same(model, original)
    reader = open_weights(str(original))
    if isinstance(reader, str):
        raise InputError(f"the weights of {original} cannot be replaced: {reader}",
                         "safetensors files whose tensors become weights as they are",
                         "save the original anew with save_pretrained")
    dtypes = {box.dtype for source in reader.sources.values() for box in source.boxes}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    return WholeStudent.of(checkpoint, student, own, dtype), model, reader


def require_same(ours: Any, original: Path) -> None:
    """Raise InputError unless the meta model of a student is the original's language part, by its
    config, names and shapes."""
    theirs: Any = supported_model(str(original))
    shapes, wanted = (_shapes_of(model) for model in (ours, theirs))
    found = [f"{name} {list(shapes.get(name, ())) or 'absent'}, there "
             f"{list(wanted.get(name, ())) or 'absent'}"
             for name in sorted(shapes.keys() | wanted.keys())
             if shapes.get(name) != wanted.get(name)]
    if not found:
        mine, its = (model.config.to_dict() for model in (ours, theirs))
        found = [f"{key} {mine.get(key)}, there {its.get(key)}"
                 for key in sorted(mine.keys() | its.keys())
                 if key not in NO_PART_OF_IT and mine.get(key) != its.get(key)]
    if found:
        more = f"; and {len(found) - MAX_DIFFERENCES} more" * (len(found) > MAX_DIFFERENCES)
        raise InputError(f"the student is not the language part of {original}: in the run's "
                         f"{'; '.join(found[:MAX_DIFFERENCES])}{more}",
                         "the multimodal folder that the student came from",
                         "name that folder, or leave --into out")


def _shapes_of(model: Any) -> Mapping[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _copy(original: Path, out: Path) -> None:
    """Copy the bytes of all files, of a link what it points to, but no permissions: a model that
    nobody may write into has a copy that can be written."""
    def stop(error: OSError) -> NoReturn:
        raise error

    for folder, _, files in os.walk(original, onerror=stop, followlinks=True):
        place = out / os.path.relpath(folder, original)
        place.mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(os.path.join(folder, file), place / file)


def put_weights(weights: WholeStudent, model: Any, reader: WeightReader, folder: Path) -> None:
    """Put every weight of the language part, `model`, into the copy of the files in `folder`."""
    shapes = _shapes_of(model)
    buffers = model.state_dict().keys() - shapes.keys() - set(model.all_tied_weights_keys)
    twins: dict[ParameterSource, list[ParameterSource]] = {}
    for name, twin in reader.twins.items():
        twins.setdefault(reader.sources[name], []).append(twin)
    names = sorted({*shapes, *buffers} & reader.sources.keys(),
                   key=lambda name: (reader.sources[name].boxes[0].file,
                                     reader.sources[name].boxes[0].offset))
    with (WeightPatcher(folder, reader.table) as patcher,
          tqdm(total=len(names), desc="writing", unit="tensor", disable=None) as bar):
        for group in _groups(names, reader.sources):
            # Opened for each group anew, so that the pages mapped for the last one are released.
            opened = weights.open()
            for name in group:
                source = reader.sources[name]
                value = (opened.buffer(name) if name in buffers
                         else opened.whole(name, shapes[name]))
                for place in (source, *twins.get(source, ())):
                    patcher.write(place, value)
                bar.update()


def _groups(names: Sequence[str], sources: Mapping[str, ParameterSource]
            ) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        size += sources[name].numel() * sources[name].dtype.itemsize
        group.append(name)
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
