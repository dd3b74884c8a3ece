"""Are a model's weight files exactly those that its class loads: known from their headers.

transformers fills what a file lacks with random numbers, drops what it does not know, and under
ZeRO-3 does not even report it. So its own loader is run first on the meta device, where it makes
all its renamings and conversions and reads no weight, and its report decides (`weight_map.py`).
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.models.weight_files import WeightTable, read_weight_table, weight_paths
from amid_ds.models.weight_map import WeightMap, map_weights

# A constant that old versions of transformers saved with GPT-2, and new ones do not know.
OLD_BUFFERS = (".attn.masked_bias",)
# The most names of each kind, and characters of another library's error, in a message.
MAX_NAMES = 4
MAX_REASON = 200
# How the dtypes of weights begin, as torch and safetensors name them: 8 bits need a scale.
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64", "BF16", "F16", "F32", "F64")


def require_weights(meta: Any, model: str, revision: str | None = None, fetch: bool = True,
                    table: WeightTable | None = None, whole: Any = None
                    ) -> tuple[WeightTable, WeightMap] | None:
    """The table and map of the weights of `model`, which are those of `meta`, its meta model.

    Raises InputError if they are others. What the model's class itself declares may be missing or
    unexpected (tied heads, buffers of old versions). table: as another rank read it. fetch:
    download the files of a model on the hub; False: None where they are not on this machine.
    whole: the multimodal meta model that `meta` is the language part of; its other parts' tensors
    are not judged.
    """
    silence_transformers()
    with readable_weights(model):
        named = named_weights(meta if whole is None else whole)
        table = table or read_weight_table(model, revision, fetch, named)
        if table is None:
            return None
        mapped = map_weights(meta, table, whole)
    floats = {name for name, tensor in meta.named_parameters() if tensor.is_floating_point()}
    integers = [f"{name} {tensor.dtype}" for name, tensor in table.tensors.items()
                if name in floats and not tensor.dtype.startswith(FLOAT_DTYPES)]
    refuse_other_keys(model, {**mapped.report, "integers": integers})
    return table, mapped


def share_weight_table(world: World, model: str, revision: str | None = None,
                       named: str | None = None) -> WeightTable:
    """Rank 0's table of the weights of `model`, on every rank. Collective.

    The lowest rank of each host downloads what its cache lacks, for as long as it takes; `revision`
    is then the commit. named: as in `read_weight_table`. Raises on all ranks what one of them does.
    """
    def download() -> None:
        with readable_weights(model):
            weight_paths(model, revision, True, named)

    def read() -> bytes:
        with readable_weights(model):
            # A mixture's tens of thousands of names are all alike.
            return zlib.compress(pickle.dumps(read_weight_table(model, revision, named=named)))

    world.run_on_hosts(download)
    table: WeightTable = pickle.loads(zlib.decompress(world.run_on_main(read)))
    return table


def named_weights(meta: Any) -> str | None:
    """The weight file that the config of a meta model names; None if it leaves it open."""
    return getattr(meta.config, "transformers_weights", None)


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
        raise InputError(f"the weights of {model} cannot be read: {reason_of(error)}",
                         "safetensors files as save_pretrained writes them, all that the index "
                         "names",
                         "copy or download the model again; weights on the hub need a network, or "
                         "to be in the cache") from None


def silence_transformers() -> None:
    """Keep transformers quiet from here on: what it reports is in our messages, and its advice on
    generation and padding does not apply."""
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def reason_of(error: Exception) -> str:
    """The first line of another library's error, for a message; its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:MAX_REASON]


def refuse_other_keys(model: str, report: Mapping[str, Any]) -> None:
    """Raise InputError if transformers' report of loading `model`, or ours, names any key."""
    mismatched = [f"{name} {list(found)}, in the model {list(expected)}"
                  for name, found, expected in report.get("mismatched_keys", ())]
    problems = {"missing": report.get("missing_keys", ()),
                "unexpected": [name for name in report.get("unexpected_keys", ())
                               if not name.endswith(OLD_BUFFERS)],
                "tied by its config, with values of their own in the files":
                    report.get("untied", ()),
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
