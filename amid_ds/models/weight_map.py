"""Which bytes of the files make each parameter: transformers' own loader, run on hollow tensors.

The loader renames keys, merges experts, splits, transposes and ties. It is run here on tensors of
the meta device that have no values but know which boxes of the files theirs are, and follow it
through every operation. So nothing of its rules is repeated. What such a tensor cannot follow, it
names, and the model is then loaded in transformers' own way.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from amid_ds.models.language_part import HELD, places_in_whole
from amid_ds.models.weight_files import DTYPES_ON_DISK, WeightTable
from amid_ds.models.weight_reader import FileBox, ParameterSource, row_major

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightMap:
    """What transformers' loader makes of a table of weights.

    report: its own, with missing, unexpected and mismatched keys. sources: by every name of a
    parameter, and of a persistent buffer that is in the files. twins: by the second name of a tied
    parameter, where the files hold it a second time. reason: why the weights cannot be read by
    range; None if they can.
    """

    report: dict[str, Any]
    sources: Mapping[str, ParameterSource]
    twins: Mapping[str, ParameterSource]
    reason: str | None


def map_weights(meta: Any, table: WeightTable, whole: Any = None) -> WeightMap:
    """The map of the weights in `table` onto `meta`, a meta model, which stays as it is.

    whole: the multimodal model that they are the weights of, where `meta` is its language part; of
    its report what concerns other parts is left out. Kept, so a start that checks its models and
    then loads them runs the loader once.
    """
    key = (type(meta), meta.config.to_json_string(), meta.dtype, table)
    if key not in _MAPS:
        # Two models, one after the other, are the most that a command works with.
        while len(_MAPS) > 1:
            _MAPS.pop(next(iter(_MAPS)))
        _MAPS[key] = (_map(meta, *_run_loader(meta, table)) if whole is None
                      else _map_part(meta, whole, table))
    return _MAPS[key]


_MAPS: dict[tuple[type, str, torch.dtype, WeightTable], WeightMap] = {}


def _run_loader(meta: Any, table: WeightTable
                ) -> tuple[dict[str, Any], dict[str, ParameterSource | str]]:
    """(transformers' report, by every name of a parameter or read buffer its source)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    model = copy.deepcopy(meta)
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=table.model, ignore_mismatched_sizes=True,
        device_map={"": torch.device("meta")}, dtype=model.dtype,
        weight_mapping=get_model_conversion_mapping(model))
    sources, shapes = stored_sources(table), table.tensors
    hollow = {name: HollowTensor(shapes[name].shape, model.dtype, source)
              for name, source in sources.items()}
    report, _ = model._load_pretrained_model(model, hollow, None, config)
    report = model._finalize_model_loading(model, config, report)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False)
                if isinstance(buffer, HollowTensor)}
    found = {name: tensor.source if isinstance(tensor, HollowTensor) else f"no file holds {name}"
             for name, tensor in tensors.items()}
    return vars(report), found


def _map(meta: Any, report: dict[str, Any], found: Mapping[str, ParameterSource | str]
         ) -> WeightMap:
    mapped = {name: source for name, source in found.items()
              if isinstance(source, ParameterSource)}
    reasons = [source for source in found.values() if isinstance(source, str)]
    twins = {} if reasons else _take_out_twins(meta, mapped)
    return WeightMap(report, mapped, twins, reasons[0] if reasons else None)


def _map_part(meta: Any, whole: Any, table: WeightTable) -> WeightMap:
    """The map onto the language part of `whole`, in its own names."""
    report, found = _run_loader(whole, table)
    places = places_in_whole(meta, whole)

    def own(names: Iterable[str]) -> dict[str, str]:
        return {f"{name}{theirs.removeprefix(place)}": theirs for theirs in names
                for name, place in places.items() if theirs.startswith(f"{place}.")}

    shapes = {name: rest for name, *rest in report["mismatched_keys"]}
    report = {**report, "missing_keys": set(own(report["missing_keys"])),
              "unexpected_keys": set(own(report["unexpected_keys"]).values()),
              "mismatched_keys": {(name, *shapes[theirs])
                                  for name, theirs in own(shapes).items()},
              "conversion_errors": {theirs: report["conversion_errors"][theirs]
                                    for theirs in own(report["conversion_errors"]).values()}}
    mapped = _map(meta, report, {name: found[theirs] for name, theirs in own(found).items()})
    _say_what_is_read(meta, whole, table, mapped)
    return mapped


def _say_what_is_read(meta: Any, whole: Any, table: WeightTable, mapped: WeightMap) -> None:
    # A tied one is there under each of its names.
    read = sum(source.numel() * source.dtype.itemsize for source in set(mapped.sources.values()))
    of = sum(file.size for file in table.files)
    logger.info("%s is multimodal (%s): its language part is read, as %s, %.1f of %.1f MB",
                table.model, type(whole).__name__, type(meta).__name__, read / 1e6, of / 1e6)
    if whole.config.model_type not in HELD:
        logger.warning("%s: the language part of a %s was not held against all of it by the tests "
                       "of this package; compare logits of a text", table.model,
                       whole.config.model_type)


def stored_sources(table: WeightTable) -> dict[str, ParameterSource | str]:
    """Where each tensor of the files lies, by its name; a string says why it cannot be read so."""
    found: dict[str, ParameterSource | str] = {}
    for number, file in enumerate(table.files):
        for tensor in file.tensors:
            dtype = DTYPES_ON_DISK.get(tensor.dtype)
            if tensor.offset is None:
                found[tensor.name] = f"{file.name} is a pickled file"
            elif dtype is None:
                found[tensor.name] = f"{tensor.name} has the dtype {tensor.dtype}"
            else:
                box = FileBox(number, dtype, tensor.offset, row_major(tensor.shape),
                              (0,) * len(tensor.shape), tensor.shape)
                found[tensor.name] = ParameterSource(tensor.shape, (box,))
    return found


def _take_out_twins(meta: Any, sources: dict[str, ParameterSource]) -> dict[str, ParameterSource]:
    """Give parameters that are one in the model, and two in the files, the source of the first.

    Returns the sources of the others, by their names.
    """
    names: dict[int, str] = {}
    twins = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if sources[first] != sources[name]:
            twins[name], sources[name] = sources[name], sources[first]
    return twins


class HollowTensor(Tensor):
    """A meta tensor that knows its `source`, or in a few words why it has none."""

    source: ParameterSource | str

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, source: ParameterSource | str
                ) -> HollowTensor:
        """One of that shape and dtype; without values, so without a place in memory."""
        made: HollowTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype,
                                                           device=torch.device("meta"))
        made.source = source
        return made

    @classmethod
    def __torch_dispatch__(   # type: ignore[override]
            cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (),
            kwargs: Any = None) -> Any:
        """The operation on the meta device, its results with their sources."""
        kwargs = kwargs or {}
        results = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        sources = _follow(func, tree_map(_source, args))
        if isinstance(results, Tensor):
            return cls(results.shape, results.dtype, sources[0])
        if isinstance(results, (list, tuple)):
            if len(sources) == 1:
                sources *= len(results)
            return type(results)(
                cls(result.shape, result.dtype, source)
                for result, source in zip(results, sources, strict=True))
        return results


def _plain(value: Any) -> Any:
    if isinstance(value, HollowTensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def _source(value: Any) -> Any:
    return value.source if isinstance(value, HollowTensor) else value


def _follow(func: Any, args: Sequence[Any]) -> list[ParameterSource | str]:
    """The sources of an operation's results; a single string, why not, stands for all of them."""
    inputs = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    lost = [source for source in inputs if not isinstance(source, ParameterSource)]
    if lost:
        return [lost[0] if isinstance(lost[0], str) else "values that are in no file"]
    name = func.overloadpacket.__name__
    follow = _FOLLOWED.get(name)
    made = follow(*args) if follow is not None else None
    return [f"one of them is made by {name}"] if made is None else list(made)


def _dim(source: ParameterSource, dim: int, new: int = 0) -> int:
    return dim % (len(source.shape) + new)


def _cat(sources: Sequence[ParameterSource], dim: int = 0) -> list[ParameterSource]:
    dim, end, boxes = _dim(sources[0], dim), 0, []
    for source in sources:
        boxes += [box.moved(dim, end) for box in source.boxes]
        end += source.shape[dim]
    shape = list(sources[0].shape)
    shape[dim] = end
    return [ParameterSource(tuple(shape), tuple(boxes))]


def _unsqueeze(source: ParameterSource, dim: int) -> list[ParameterSource]:
    dim = _dim(source, dim, new=1)

    def places(values: tuple[int, ...]) -> list[int]:
        return [*values[:dim], values[-1], *values[dim:-1]]

    return [ParameterSource(tuple(places((*source.shape, 1))),
                            tuple(box.on_dims(places) for box in source.boxes))]


def _stack(sources: Sequence[ParameterSource], dim: int = 0) -> list[ParameterSource]:
    return _cat([_unsqueeze(source, dim)[0] for source in sources],
                _dim(sources[0], dim, new=1))


def _squeeze(source: ParameterSource, dim: int) -> list[ParameterSource]:
    dim = _dim(source, dim)
    return _select(source, dim, 0) if source.shape[dim] == 1 else [source]


def _select(source: ParameterSource, dim: int, index: int) -> list[ParameterSource]:
    dim = _dim(source, dim)
    index %= source.shape[dim]
    row = source.part(dim, index, index + 1)

    def places(values: tuple[int, ...]) -> list[int]:
        return [*values[:dim], *values[dim + 1:-1]]

    return [ParameterSource(tuple(places((*row.shape, 1))),
                            tuple(box.on_dims(places) for box in row.boxes))]


def _split(source: ParameterSource, sizes: int | Sequence[int], dim: int = 0
           ) -> list[ParameterSource]:
    dim = _dim(source, dim)
    whole = source.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)] or [0]
    ends = [sum(sizes[:count + 1]) for count in range(len(sizes))]
    return [source.part(dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _slice(source: ParameterSource, dim: int = 0, start: int | None = None,
           stop: int | None = None, step: int = 1) -> list[ParameterSource] | None:
    if step != 1:
        return None
    dim = _dim(source, dim)
    first, last, _ = slice(start, stop).indices(source.shape[dim])
    return [source.part(dim, first, max(first, last))]


def _transpose(source: ParameterSource, first: int = 0, second: int = 1) -> list[ParameterSource]:
    order = list(range(len(source.shape)))
    first, second = _dim(source, first), _dim(source, second)
    order[first], order[second] = second, first
    return _permute(source, order)


def _permute(source: ParameterSource, order: Sequence[int]) -> list[ParameterSource]:
    def places(values: tuple[int, ...]) -> list[int]:
        return [values[_dim(source, dim)] for dim in order]

    return [ParameterSource(tuple(places(source.shape)),
                            tuple(box.on_dims(places) for box in source.boxes))]


def _view(source: ParameterSource, shape: Sequence[int]) -> list[ParameterSource] | None:
    return [source] if tuple(shape) == source.shape else None


def _pad(source: ParameterSource, widths: Sequence[int], value: float = 0
         ) -> list[ParameterSource] | None:
    return None if any(widths) else [source]


def _same(source: ParameterSource, *_: object) -> list[ParameterSource]:
    return [source]


# By the name of the ATen operation.
_FOLLOWED: dict[str, Callable[..., Sequence[ParameterSource] | None]] = {
    "alias": _same, "detach": _same, "clone": _same, "_to_copy": _same, "cat": _cat,
    "stack": _stack, "unsqueeze": _unsqueeze, "squeeze": _squeeze, "select": _select,
    "split": _split, "split_with_sizes": _split, "slice": _slice, "transpose": _transpose,
    "permute": _permute, "view": _view, "constant_pad_nd": _pad,
    "unbind": lambda source, dim=0: [_select(source, dim, index)[0]
                                     for index in range(source.shape[_dim(source, dim)])]}
