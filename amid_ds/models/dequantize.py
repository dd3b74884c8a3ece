"""`amid-ds dequantize`: a quantized checkpoint as an ordinary folder, weight by weight.

Files of at most FILE_BYTES are written one after another into a folder beside the output, which a
command that was killed leaves and the next one goes on in. What a weight is made of is in
quantized.py. A weight that is stored in full is copied as it is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amid_ds.config.recipe import HubKwargs
from amid_ds.errors import InputError
from amid_ds.files.atomic import fsync, replace_folder, replace_text, require_disk_space
from amid_ds.files.lease import Lease
from amid_ds.files.ownership import STAGING_SIGN, require_new_folder
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.loading import DTYPES, stored_config
from amid_ds.models.quantized import Quantization, QuantizedWeight, quantization_config
from amid_ds.models.weight_files import (
    DTYPES_ON_DISK,
    StoredTensor,
    WeightFile,
    WeightTable,
    read_weight_table,
)
from amid_ds.models.weight_map import map_weights
from amid_ds.models.weight_writer import save_tensors, split_into_files, write_index
from amid_ds.models.weights import (
    named_weights,
    readable_weights,
    reason_of,
    refuse_other_keys,
    silence_transformers,
)

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

logger = logging.getLogger(__name__)

# Of the folder in which a killed command has left finished files: what they are of.
PLAN_FILE = "amid-ds-plan.json"
# Files of the quantized folder that the new one has anew, or not at all.
LEFT_OUT = re.compile(r"config\.json|\..*|.*\.(safetensors|bin|pt|pth|gguf)(\.index\.json)?")
# Keys of config.json that are of the quantized weights, or an old name of `dtype`.
OF_QUANTIZED = ("quantization_config", "transformers_weights", "torch_dtype")
# The values of integers that say how another part is laid out, such as the shape of packed codes.
MAX_LAYOUT_NUMBERS = 16
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES_ON_DISK.items()}


@dataclass(frozen=True)
class DequantizeArgs:
    """The arguments of `amid-ds dequantize`."""

    model: str
    out: str
    dtype: str = "bf16"
    trust_remote_code: bool = False

    @property
    def hub_kwargs(self) -> HubKwargs:
        """Keyword arguments for transformers, to go with the model's name."""
        return {"revision": None, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class DequantizePlan:
    """What is written: the weights by name, the names in each file, and the bytes of all.

    table: of the stored weights. places: by stored name its file's number in the table.
    """

    quantization: Quantization
    table: WeightTable
    places: Mapping[str, int]
    weights: Mapping[str, QuantizedWeight]
    split: StateDictSplit
    size: int


def dequantize(args: DequantizeArgs) -> None:
    """Write the folder, complete or not at all. Raises InputError."""
    out = require_new_folder(args.out, "the output")
    silence_transformers()
    config = stored_config(args.model, **args.hub_kwargs)
    quantization = Quantization(args.model, config, DTYPES[args.dtype])
    source = _local_folder(args.model)
    meta = _meta_model(args, config)
    with readable_weights(args.model):
        table = read_weight_table(str(source), named=named_weights(meta))
        assert table is not None
        plan = _plan(args, quantization, meta, table)
    existing = next(path for path in out.parents if path.is_dir())
    staging = out.with_name(f".{out.name}{STAGING_SIGN}dequantize")
    finished = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
    require_disk_space(existing, plan.size - finished, f"the model {args.model} in {args.dtype}",
                       "choose a folder elsewhere")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (Lease.held(out.with_name(f".{out.name}.lease.json"), f"the output {out}"),
              freed_memory_given_back()):
            # Somebody may have finished it meanwhile.
            require_new_folder(out, "the output")
            _begin(staging, args, config, table)
            _write_missing(plan, staging, args.model)
            _write_rest(source, staging, args, plan)
            replace_folder(staging, out)
    except OSError as error:
        raise InputError(f"{out} could not be written: {error}", "a folder that can be written, "
                         "with room", "make room there, and run this again: it goes on with the "
                         "files that are finished") from None
    logger.info("%s: %s, in %s", args.out, args.model, args.dtype)


def _local_folder(model: str) -> Path:
    """The model's folder; of one on the hub its snapshot, downloaded where it is not there."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    with readable_weights(model):
        # Mistral's `consolidated` files are the same weights once more.
        return Path(snapshot_download(model, ignore_patterns=[
            "*/*", "*.bin", "*.pth", "*.gguf", "consolidated*.safetensors"]))


def _plan(args: DequantizeArgs, quantization: Quantization, meta: Any, table: WeightTable
          ) -> DequantizePlan:
    """What is to be written, known from headers alone. Raises InputError."""
    stored = table.tensors
    if any(tensor.offset is None for tensor in stored.values()):
        raise InputError(f"the weights of {args.model} are pickled files", "safetensors files",
                         "save them anew as safetensors")
    places = {tensor.name: number for number, file in enumerate(table.files)
              for tensor in file.tensors}
    weights = quantization.weights({name: each.dtype for name, each in stored.items()}, meta)
    paths = table.paths()
    hollow: dict[str, Tensor] = {}
    for weight in weights:
        if not weight.parts:
            found = stored[weight.name]
            hollow[weight.name] = torch.empty(found.shape, dtype=DTYPES_ON_DISK[found.dtype],
                                              device="meta")
            continue
        parts = {part: _hollow(stored[name], paths[places[name]])
                 for part, name in weight.parts.items()}
        hollow[weight.name] = _made_hollow(args.model, quantization, weight, parts)
    _require_whole(args.model, meta, hollow)
    return DequantizePlan(quantization, table, places, {weight.name: weight for weight in weights},
                          split_into_files(hollow),
                          sum(tensor.nbytes for tensor in hollow.values()))


def _meta_model(args: DequantizeArgs, config: Any) -> Any:
    """The model without weights, of the class that its config names. Raises InputError where it
    cannot be built."""
    import transformers

    found = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            if found is not None and isinstance(config, found.config_class):
                return found(config)
            return transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=args.trust_remote_code)
    # Values that its class does not take, packages that are not there, code of its own.
    except Exception as error:
        raise InputError(f"the model {args.model} cannot be built, so its weights' names and "
                         f"shapes are not known: {reason_of(error)}",
                         "a config.json and a class that belong together",
                         "check config.json and its `architectures`, and the packages that the "
                         "class needs") from None


def _made_hollow(model: str, quantization: Quantization, weight: QuantizedWeight,
                 parts: Mapping[str, Tensor]) -> Tensor:
    """A weight without values, made of such parts. Raises InputError where it cannot be."""
    try:
        return quantization.make(weight, parts)
    # What the arithmetic raises for parts that are absent, or of shapes that do not fit.
    except Exception as error:
        stored = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise InputError(f"{weight.name} of {model} cannot be made of its stored {stored}: "
                         f"{reason_of(error)}",
                         "values and scales as its quantization_config describes them",
                         "copy or download the model again; check that config.json belongs to "
                         "these weights") from None


def _hollow(tensor: StoredTensor, path: str) -> Tensor:
    """A stored tensor without values, but for those that say how others are laid out."""
    from safetensors import safe_open

    dtype = DTYPES_ON_DISK[tensor.dtype]
    if dtype in (torch.int32, torch.int64) and math.prod(tensor.shape) <= MAX_LAYOUT_NUMBERS:
        with safe_open(path, "pt") as file:
            return file.get_tensor(tensor.name)
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _require_whole(model: str, meta: Any, made: Mapping[str, Tensor]) -> None:
    """Raise InputError unless weights of these names and shapes are those of the meta model."""
    tensors = tuple(StoredTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0)
                    for name, tensor in made.items())
    table = WeightTable(model, None, "", (WeightFile("", 0, 0, "", tensors),))
    refuse_other_keys(model, map_weights(meta, table).report)


def _begin(staging: Path, args: DequantizeArgs, config: Any, table: WeightTable) -> None:
    """Make the folder in which the output is made, unless a killed command has left it, of the same
    weights."""
    from transformers import __version__

    content = json.dumps({
        "dtype": args.dtype, "transformers": __version__,
        "quantization": repr(quantization_config(config)),
        "files": {file.name: [file.size, file.changed_ns, file.digest] for file in table.files}})
    plan = staging / PLAN_FILE
    if staging.is_dir() and not (plan.is_file() and plan.read_text() == content):
        shutil.rmtree(staging)
    if not staging.is_dir():
        staging.mkdir()
        replace_text(plan, content)


def _write_missing(plan: DequantizePlan, staging: Path, model: str) -> None:
    """Write the files that are not there yet."""
    from tqdm import tqdm

    with tqdm(total=len(plan.weights), desc="dequantize", unit="tensor", disable=None) as bar:
        for file, names in plan.split.filename_to_tensors.items():
            if (staging / file).exists():
                bar.update(len(names))
                continue
            tensors = {}
            with readable_weights(model):
                for name in names:
                    tensors[name] = _read(plan, plan.weights[name])
                    bar.update()
            unfinished = staging / f".{file}"
            save_tensors(tensors, unfinished)
            fsync(unfinished)
            os.replace(unfinished, staging / file)


def _read(plan: DequantizePlan, weight: QuantizedWeight) -> Tensor:
    """A weight in full: made of its parts, or as it is stored."""
    from safetensors import safe_open

    paths, parts = plan.table.paths(), {}
    for part, name in (weight.parts or {"": weight.name}).items():
        # Opened each time, so that the pages mapped for the last one are released.
        with safe_open(paths[plan.places[name]], "pt") as file:
            parts[part] = file.get_tensor(name)
    if not weight.parts:
        return parts[""]
    counts = {len(tensor) if tensor.dim() > 2 else 0 for tensor in parts.values()}
    if len(counts) > 1 or counts == {0}:
        return plan.quantization.make(weight, parts)
    # Of stacked experts one at a time: what is needed beside the result is the size of one.
    whole = None
    for number in range(counts.pop()):
        made = plan.quantization.make(weight, {part: tensor[number:number + 1]
                                               for part, tensor in parts.items()})[0]
        if whole is None:
            whole = made.new_empty(len(next(iter(parts.values()))), *made.shape)
        whole[number] = made
    assert whole is not None
    return whole


def _write_rest(source: Path, staging: Path, args: DequantizeArgs, plan: DequantizePlan) -> None:
    """Write the index, config.json without the quantization, and copies of all other files."""
    if plan.split.is_sharded:
        write_index(plan.split.metadata, plan.split.tensor_to_filename, staging)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = _unquantized({"dtype": "", **config},
                          str(DTYPES[args.dtype]).removeprefix("torch."))
    replace_text(staging / "config.json", json.dumps(config, indent=2) + "\n")
    for entry in source.iterdir():
        if entry.is_file() and not LEFT_OUT.fullmatch(entry.name):
            shutil.copyfile(entry, staging / entry.name)
    (staging / PLAN_FILE).unlink(missing_ok=True)


def _unquantized(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a config.json without what is of the quantized weights; so its parts'."""
    kept = {key: _unquantized(value, dtype) if isinstance(value, dict) else value
            for key, value in config.items() if key not in OF_QUANTIZED}
    return {**kept, "dtype": dtype} if config.keys() & {"dtype", "torch_dtype"} else kept
