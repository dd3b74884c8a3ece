"""Are a model's weight files exactly those that its class loads: known from their headers.

transformers fills what a file lacks with random numbers, drops what it does not know, and under
ZeRO-3 does not even report it. So its own loader is run first on the meta device, where it makes
all its renamings and conversions and reads no weight, and its report decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from amid_ds.errors import InputError

# The most names of each kind, and characters of another library's error, in a message.
MAX_NAMES = 4
MAX_REASON = 200
# How the dtypes of weights begin, as torch and safetensors name them: 8 bits need a scale.
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64", "BF16", "F16", "F32", "F64")


def require_weights(meta: Any, model: str, revision: str | None = None, fetch: bool = True) -> None:
    """Raise InputError unless the weights of `model` are those of `meta`, its meta model.

    What the model's class itself declares may be missing or unexpected (tied heads, buffers of old
    versions). fetch: download the files of a model on the hub; False: one whose weights are not on
    this machine passes. `meta` is used up.
    """
    from transformers import logging as transformers_logging
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    # From here on: what it reports is in our message, and its advice on generation and padding
    # does not apply.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with readable_weights(model):
        files = _weight_files(meta, model, revision, fetch)
        if files is None:
            return
        config = LoadStateDictConfig(
            pretrained_model_name_or_path=model, ignore_mismatched_sizes=True,
            device_map={"": torch.device("meta")}, dtype=meta.dtype,
            weight_mapping=get_model_conversion_mapping(meta))
        headers = {name: header for file in files for name, header in _headers(file).items()}
        floats = {name for name, tensor in meta.named_parameters() if tensor.is_floating_point()}
        integers = [f"{name} {dtype}" for name, (_, dtype) in headers.items()
                    if name in floats and not dtype.startswith(FLOAT_DTYPES)]
        hollow = {name: torch.empty(shape, dtype=meta.dtype, device="meta")
                  for name, (shape, _) in headers.items()}
        report, _ = meta._load_pretrained_model(meta, hollow, None, config)
        report = meta._finalize_model_loading(meta, config, report)
    refuse_other_keys(model, {**vars(report), "integers": integers})


def _weight_files(meta: Any, model: str, revision: str | None, fetch: bool) -> list[str] | None:
    """The paths of the weight files; None where they are on the hub and not to be fetched."""
    from huggingface_hub.constants import is_offline_mode
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    named = getattr(meta.config, "transformers_weights", None)
    try:
        # is_remote_code: it does not ask the hub to convert pickles.
        files, _ = _get_resolved_checkpoint_files(
            model, variant=None, gguf_file=None, use_safetensors=None, user_agent=None,
            is_remote_code=True, transformers_explicit_filename=named,
            download_kwargs={"revision": revision, "local_files_only": not fetch})
    except OSError:
        if fetch or Path(model).is_dir() or is_offline_mode():
            raise
        return None
    return files


def _headers(file: str) -> dict[str, tuple[Sequence[int], str]]:
    """(shape, dtype) of the tensors in a weight file, by name, without their values."""
    from safetensors import safe_open
    from transformers.modeling_utils import load_state_dict

    if not file.endswith(".safetensors"):
        return {name: (tensor.shape, str(tensor.dtype).removeprefix("torch."))
                for name, tensor in load_state_dict(file, map_location="meta").items()}
    # As numpy's: for torch it would reserve memory for the whole file.
    with safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}   # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


@contextmanager
def readable_weights(model: str) -> Iterator[None]:
    """A context in which any error of reading the weights of `model` is an InputError.

    Files that are cut, damaged or absent make the readers raise nearly anything.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__)[:MAX_REASON]
        raise InputError(f"the weights of {model} cannot be read: {reason}",
                         "safetensors files as save_pretrained writes them, all that the index "
                         "names",
                         "copy or download the model again; weights on the hub need a network, or "
                         "to be in the cache") from None


def refuse_other_keys(model: str, report: Mapping[str, Any]) -> None:
    """Raise InputError if transformers' report of loading `model` names any key."""
    mismatched = [f"{name} {list(found)}, in the model {list(expected)}"
                  for name, found, expected in report["mismatched_keys"]]
    problems = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"],
                "of another shape": mismatched,
                "quantized, without a quantization_config": report.get("integers", ()),
                "not convertible": report.get("conversion_errors", ())}
    found = "; ".join(f"{len(names)} {kind}: {_first(names)}"
                      for kind, names in problems.items() if names)
    if found:
        raise InputError(f"the weights of {model} are not those of its config: {found}",
                         "a weight for every parameter of the model, of its shape, and no other",
                         "copy or download the model again, or save it anew with "
                         "save_pretrained; check that config.json belongs to these weights")


def _first(names: Collection[str]) -> str:
    shown = sorted(names)[:MAX_NAMES]
    return ", ".join([*shown, *(["…"] if len(names) > len(shown) else [])])
