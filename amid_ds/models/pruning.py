"""A smaller model cut out of a larger one of its family: sizes, config and the cut of a tensor.

What an axis of each parameter counts (channels of the hidden states, heads, neurons) is a table per
family, so a cut is an index for each axis. Nothing here runs a model, and tensors are read one by
one. Three numbers of a model follow its width, and are made up for so that channels that are 0
everywhere can go without a change of the logits: an RMSNorm's mean is over the width (its weight
and epsilon), and Gemma multiplies its embeddings by the width's square root.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amid_ds.errors import InputError
from amid_ds.models.weight_reader import ParameterSource, WeightReader

# Read at once of a tensor that is cut.
CUT_BYTES = 64 << 20


@dataclass(frozen=True)
class PrunedFamily:
    """Where the parts of a family's models lie.

    axes: by the end of a parameter's name, what each axis counts: `hidden` channels (`norm` in the
    weight of a norm over them), query `heads` and key-value `groups` with their widths, `fused`
    queries, keys and values, `neurons`; `whole` is never cut. layers: the list of layers;
    heads_out, neurons_out: the module of a layer that reads the heads' outputs, the neurons;
    final_norm: the norm before the head. epsilon: its key in the config. norm_offset: what a norm
    adds to its weight. centres: its norms subtract the mean. scales_embedding: embeddings are
    multiplied by the root of the width. has_head_width: the heads' width is a number of its own.
    """

    axes: Mapping[str, tuple[str, ...]]
    layers: str = "model.layers"
    heads_out: str = "self_attn.o_proj"
    neurons_out: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    epsilon: str = "rms_norm_eps"
    norm_offset: float = 0.0
    centres: bool = False
    scales_embedding: bool = False
    has_head_width: bool = True

    def axes_of(self, name: str) -> tuple[str, ...] | None:
        """The things that the axes of a parameter count; None: an unknown parameter."""
        return next((axes for end, axes in self.axes.items() if f".{name}".endswith(f".{end}")),
                    None)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter or module is in; None: it is in none."""
        rest = name.removeprefix(f"{self.layers}.")
        return None if rest == name else int(rest.partition(".")[0])


_ROTARY_AXES = {
    "embed_tokens.weight": ("whole", "hidden"), "lm_head.weight": ("whole", "hidden"),
    "q_proj.weight": ("heads", "hidden"), "q_proj.bias": ("heads",),
    "k_proj.weight": ("groups", "hidden"), "k_proj.bias": ("groups",),
    "v_proj.weight": ("groups", "hidden"), "v_proj.bias": ("groups",),
    "o_proj.weight": ("hidden", "heads"), "o_proj.bias": ("hidden",),
    "q_norm.weight": ("whole",), "k_norm.weight": ("whole",),
    "gate_proj.weight": ("neurons", "hidden"), "gate_proj.bias": ("neurons",),
    "up_proj.weight": ("neurons", "hidden"), "up_proj.bias": ("neurons",),
    "down_proj.weight": ("hidden", "neurons"), "down_proj.bias": ("hidden",),
    "input_layernorm.weight": ("norm",), "post_attention_layernorm.weight": ("norm",),
    "pre_feedforward_layernorm.weight": ("norm",), "post_feedforward_layernorm.weight": ("norm",),
    "norm.weight": ("norm",)}
# Its projections are [in, out].
_GPT2_AXES = {
    "wte.weight": ("whole", "hidden"), "wpe.weight": ("whole", "hidden"),
    "lm_head.weight": ("whole", "hidden"),
    "attn.c_attn.weight": ("hidden", "fused"), "attn.c_attn.bias": ("fused",),
    "attn.c_proj.weight": ("heads", "hidden"), "attn.c_proj.bias": ("hidden",),
    "mlp.c_fc.weight": ("hidden", "neurons"), "mlp.c_fc.bias": ("neurons",),
    "mlp.c_proj.weight": ("neurons", "hidden"), "mlp.c_proj.bias": ("hidden",),
    **{f"{norm}.{end}": axes for norm in ("ln_1", "ln_2", "ln_f")
       for end, axes in (("weight", ("norm",)), ("bias", ("hidden",)))}}
_ROTARY = PrunedFamily(_ROTARY_AXES)
_GEMMA = PrunedFamily(_ROTARY_AXES, norm_offset=1.0, scales_embedding=True)
# By the model_type of a config.
PRUNED_FAMILIES = {
    "llama": _ROTARY, "mistral": _ROTARY, "qwen2": _ROTARY, "qwen3": _ROTARY,
    "gemma": _GEMMA, "gemma2": _GEMMA, "gemma3_text": _GEMMA,
    "gpt2": PrunedFamily(_GPT2_AXES, "transformer.h", "attn.c_proj", "mlp.c_proj",
                         "transformer.ln_f", "layer_norm_epsilon", centres=True,
                         has_head_width=False)}


def pruned_family(model: str, config: Any) -> PrunedFamily:
    """The family of a model by its config. Raises InputError for one that is not in the table."""
    family = PRUNED_FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(f"the model {model} (model_type {config.model_type}) cannot be pruned",
                         f"one of {', '.join(PRUNED_FAMILIES)}",
                         "choose such a teacher, or cut this one with a tool of its own")
    return family


class ModelSizes(NamedTuple):
    """Layers, channels of the hidden states, neurons of an MLP and query heads of a model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """Those of a config of one of the families."""
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return cls(config.num_hidden_layers, config.hidden_size, inner or 4 * config.hidden_size,
                   config.num_attention_heads)

    @property
    def width(self) -> tuple[int, int, int]:
        """All but the layers."""
        return self.hidden, self.intermediate, self.heads


def group_count(config: Any) -> int:
    """The number of a layer's key-value groups."""
    return getattr(config, "num_key_value_heads", None) or int(config.num_attention_heads)


def head_width(config: Any) -> int:
    """The width of a head."""
    return (getattr(config, "head_dim", None)
            or int(config.hidden_size) // int(config.num_attention_heads))


def pruned_sizes(config: Any, **asked: int | None) -> ModelSizes:
    """The teacher's sizes with those of `asked` in their place. Raises InputError for a bad one."""
    own = ModelSizes.of(config)
    for name, value in asked.items():
        most = getattr(own, name)
        if value is not None and not 0 < value <= most:
            raise InputError(f"--{name} {value}", f"from 1 to {most}, what the teacher has",
                             f"give --{name} such a number, or leave it out")
    sizes = own._replace(**{name: value for name, value in asked.items() if value is not None})
    per_group = own.heads // group_count(config)
    if sizes.heads % per_group:
        raise InputError(f"--heads {sizes.heads}, and the teacher's {own.heads} query heads share "
                         f"keys and values in groups of {per_group}",
                         "whole groups: heads that share keys and values stay together",
                         f"give --heads a multiple of {per_group}")
    width = head_width(config)
    if (not PRUNED_FAMILIES[config.model_type].has_head_width
            and sizes.hidden != sizes.heads * width):
        raise InputError(f"--hidden {sizes.hidden} with {sizes.heads} heads of width {width}, "
                         f"and the heads of a {config.model_type} are as wide together as its "
                         "hidden states",
                         f"{width} channels for each head",
                         f"give --hidden {sizes.heads * width} --heads {sizes.heads}, or other "
                         "numbers of this ratio")
    if sizes.layers < own.layers and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError("--layers, and the teacher's attention is scaled by its layer's number "
                         "(scale_attn_by_inverse_layer_idx)",
                         "layers that do not know their number", "leave --layers out")
    return sizes


def pruned_config(config: Any, sizes: ModelSizes, layers: Sequence[int]) -> Any:
    """The config of the model of these sizes, of which `layers` are kept. Raises InputError."""
    own = ModelSizes.of(config)
    new = copy.deepcopy(config)
    if sizes == own:
        return new
    per_group = own.heads // group_count(config)
    family = PRUNED_FAMILIES[config.model_type]
    values: dict[str, object] = {
        "num_hidden_layers": sizes.layers, "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        family.epsilon: getattr(config, family.epsilon) * (own.hidden / sizes.hidden)}
    if family.has_head_width:
        values |= {"num_key_value_heads": sizes.heads // per_group,
                   "head_dim": head_width(config), "intermediate_size": sizes.intermediate}
    else:
        values["n_inner"] = sizes.intermediate
    if getattr(config, "layer_types", None):
        values["layer_types"] = [config.layer_types[layer] for layer in layers]
    if getattr(config, "max_window_layers", None) is not None:
        values["max_window_layers"] = sum(layer < config.max_window_layers for layer in layers)
    try:
        for name, value in values.items():
            setattr(new, name, value)
        type(new).from_dict(new.to_dict())
    # transformers has checks of its own, and classes of errors for them.
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{type(config).__name__} does not allow {sizes}: {reason}",
                         "sizes that the family's own config takes",
                         "choose others, such as a hidden size that the heads divide") from None
    return new


def even_layers(count: int, kept: int) -> list[int]:
    """`kept` of `count` layers at even distances, the first and the last among them."""
    return [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]


class TensorCut(NamedTuple):
    """How a tensor comes out of the teacher's tensor `source`.

    indices: what is kept along each axis; None: all. Of a tensor that loses something the values
    are then (value + offset) · scale - offset.
    """

    source: str
    indices: tuple[Tensor | None, ...]
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Cut:
    """Which parts of a model are kept, each in the teacher's order.

    config: the teacher's. layers: numbers. channels: [H'], None: all. neurons, groups: by a kept
    layer's number in the teacher; {}: all. embedding_scale: the factor of the embeddings, which a
    tied head shares.
    """

    config: Any
    layers: list[int]
    channels: Tensor | None = None
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    groups: Mapping[int, Tensor] = field(default_factory=dict)
    embedding_scale: float = 1.0

    def of(self, name: str) -> TensorCut:
        """The way in which the pruned model's parameter `name` comes out of the teacher's."""
        family = PRUNED_FAMILIES[self.config.model_type]
        layer = family.layer_of(name)
        if layer is not None:
            prefix, source = f"{family.layers}.{layer}.", self.layers[layer]
            name, layer = f"{family.layers}.{source}.{name.removeprefix(prefix)}", source
        axes = family.axes_of(name)
        assert axes is not None
        indices = tuple(self._kept(axis, layer) for axis in axes)
        tied = self.config.tie_word_embeddings
        if axes == ("norm",):
            is_last = name == f"{family.final_norm}.weight"
            scale = self._norm_scale / (self.embedding_scale if is_last and tied else 1.0)
            return TensorCut(name, indices, scale, family.norm_offset)
        is_embedding = axes == ("whole", "hidden") and (
            tied or not name.startswith("lm_head"))
        return TensorCut(name, indices, self.embedding_scale if is_embedding else 1.0)

    @property
    def _norm_scale(self) -> float:
        """The factor of the norms' weights, with which their outputs are those of the teacher, up
        to what the dropped channels were of its mean square."""
        width = self.config.hidden_size
        return math.sqrt(width / (width if self.channels is None else len(self.channels)))

    def _kept(self, axis: str, layer: int | None) -> Tensor | None:
        if axis in ("hidden", "norm"):
            return self.channels
        if axis == "whole" or layer is None:
            return None
        if axis == "neurons":
            return self.neurons.get(layer)
        groups = self.groups.get(layer)
        if groups is None:
            return None
        width, count = head_width(self.config), group_count(self.config)
        if axis == "groups":
            return _spread(groups, width)
        heads = _spread(groups, self.config.num_attention_heads // count * width)
        if axis == "heads":
            return heads
        all_heads = self.config.num_attention_heads * width
        return torch.cat([heads, heads + all_heads, heads + 2 * all_heads])


def _spread(numbers: Tensor, width: int) -> Tensor:
    """The positions of the elements of blocks of `width`, of the blocks of these numbers."""
    return (numbers[:, None] * width + torch.arange(width)).flatten()


def scaled_embedding_ratio(config: Any, hidden: int, dtype: torch.dtype) -> float:
    """The factor of the embeddings in which Gemma's own factor stays, at the width `hidden`."""
    if not PRUNED_FAMILIES[config.model_type].scales_embedding:
        return 1.0
    # As the model rounds them.
    before, after = (torch.tensor(math.sqrt(width)).to(dtype).item()
                     for width in (config.hidden_size, hidden))
    return before / after


def require_known_parameters(model: str, meta: Any, family: PrunedFamily) -> None:
    """Raise InputError if the model has a parameter that its family's table does not know."""
    unknown = [name for name in meta.state_dict() if family.axes_of(name) is None]
    if unknown:
        raise InputError(f"the model {model} has {unknown[0]}, which is not known of a "
                         f"{type(meta).__name__}", "the parameters of its family alone",
                         "choose a teacher without such parts")


def read_cut(reader: WeightReader, cut: TensorCut) -> Tensor:
    """The cut of a tensor of the files, in their dtype, read in blocks of CUT_BYTES."""
    source = reader.sources[cut.source]
    if all(index is None for index in cut.indices):
        return read_rows(reader, source, 0, source.shape[0])
    rows = cut.indices[0]
    if rows is None:
        rows = torch.arange(source.shape[0])
    shape = [len(rows), *(size if index is None else len(index)
                          for size, index in zip(source.shape[1:], cut.indices[1:], strict=True))]
    out = torch.empty(shape, dtype=source.dtype)
    for start, stop in row_blocks(source):
        first, last = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
        if first == last:
            continue
        block = read_rows(reader, source, start, stop)[rows[first:last] - start]
        for dim, index in enumerate(cut.indices[1:], 1):
            block = block if index is None else block.index_select(dim, index)
        if cut.scale != 1.0:
            block = (block.double() + cut.offset) * cut.scale - cut.offset
        out[first:last] = block
    return out


def row_blocks(source: ParameterSource) -> list[tuple[int, int]]:
    """The ranges of a tensor's first axis that fill CUT_BYTES, in order."""
    rows = source.shape[0]
    step = max(1, CUT_BYTES * rows // (source.numel() * source.dtype.itemsize))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_rows(reader: WeightReader, source: ParameterSource, start: int, stop: int) -> Tensor:
    """The part from `start` up to `stop` of a tensor's first axis, in the files' dtype."""
    row = source.numel() // source.shape[0]
    out = torch.empty((stop - start) * row, dtype=source.dtype)
    reader.fill([(source, start * row, out)])
    return out.view(stop - start, *source.shape[1:])
