"""What of a body a tensor-parallel group splits: its plan in transformers, block by block.

A block is an attention, an MLP, or a layer's experts. One whose plan is wholly understood and
divides evenly is split, any other stays whole on every rank, which costs memory and time and
changes no number. Everything else follows this one description: which parameters a rank has a part
of, the part, the layers that work on it (tp_layers.py), and what `plan` counts.

transformers' styles are the words of a plan. Of a linear layer:

    colwise                 the rows of the weight, the bias; the output is this rank's part
    rowwise                 the columns of the weight; the outputs are summed, the bias added once
    colwise_gather_output   as colwise, and the outputs are joined
    rowwise_split_input     as rowwise, of a whole input
    packed_colwise          as colwise, of each half of the rows: gate and up in one weight
    mla_kv_a_proj           whole; the part of its output that goes to every head has a gradient
                            to sum
    replicated_with_grad_allreduce   whole, on split heads: its gradient is summed

A stacked weight of experts is cut by the same words in its last two dimensions, and the experts'
outputs are summed (moe_tp_experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from amid_ds.models.adapters import ADAPTER_NAME, adapted_layers, is_adapted
from amid_ds.models.shape import body_name, body_of, embedding_of, text_config

Role = Literal["column", "column joined", "row", "row of own", "latent", "experts", "identity"]
LINEAR_ROLES: dict[str, Role] = {
    "colwise": "column", "packed_colwise": "column", "colwise_gather_output": "column joined",
    "colwise_rep": "column joined", "rowwise": "row", "rowwise_split_input": "row of own",
    "rowwise_rep": "row of own"}
MODULE_ROLES: dict[str, Role] = {"mla_kv_a_proj": "latent", "moe_tp_experts": "experts",
                                 "moe_identity_expert": "identity"}
SUMMED, LOCAL = "replicated_with_grad_allreduce", "local_params"
# Of a stacked weight: the dimension from the end, and the pieces of it that are cut alike.
STACKED_CUTS = {"colwise": (-2, 1), "rowwise": (-1, 1), "packed_colwise": (-2, 2),
                "packed_rowwise": (-1, 2)}
# Experts add it to their output, of which every rank has a part.
OUTPUT_BIAS = "down_proj_bias"
# What a module has that works on heads.
OF_ATTENTION = ("head_dim", "num_key_value_groups", "num_heads", "qk_rope_head_dim")

ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
LATENT_ATTENTION = {"q_proj": "colwise", "q_b_proj": "colwise", "kv_b_proj": "colwise",
                    "kv_a_proj_with_mqa": "mla_kv_a_proj", "o_proj": "rowwise"}
GATED = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def _under(prefix: str, styles: Mapping[str, str]) -> dict[str, str]:
    return {f"layers.*.{prefix}.{name}": style for name, style in styles.items()}


_ATTENTION_AND_FEED_FORWARD = {**_under("self_attn", ATTENTION), **_under("feed_forward", GATED)}
_LATENT = _under("self_attn", LATENT_ATTENTION)
_FUSED_GATE = _under("mlp", {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"})
# What transformers' plans leave out, or join where there is no need, by the text model's type.
ADDED_PLANS: dict[str, dict[str, str]] = {
    "bamba": _ATTENTION_AND_FEED_FORWARD,
    "deepseek_v3": _LATENT,
    "falcon_h1": _ATTENTION_AND_FEED_FORWARD,
    "glm": _FUSED_GATE,
    "glm4": _FUSED_GATE,
    "glm4_moe": _under("self_attn", {"q_norm": SUMMED, "k_norm": SUMMED}),
    "gpt_oss": {**_under("self_attn", {**ATTENTION, "sinks": "colwise"}),
                "layers.*.mlp.experts": "moe_tp_experts",
                # Gate and up alternate in the last dimension.
                **_under("mlp.experts", {"gate_up_proj": "rowwise", "gate_up_proj_bias": "rowwise",
                                         "down_proj": "colwise"})},
    "granitemoehybrid": {**_under("self_attn", ATTENTION),
                         **_under("shared_mlp", {"input_linear": "packed_colwise",
                                                 "output_linear": "rowwise"})},
    "jamba": _ATTENTION_AND_FEED_FORWARD,
    "kimi_linear": _LATENT,
    "lfm2": {**_under("self_attn", {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise",
                                    "q_layernorm": SUMMED, "k_layernorm": SUMMED,
                                    "out_proj": "rowwise"}),
             **_under("feed_forward", {"w1": "colwise", "w3": "colwise", "w2": "rowwise"})},
    # Every layer is a mixer, of one kind or another.
    "nemotron_h": {**_under("mixer", {**ATTENTION, "up_proj": "colwise", "down_proj": "rowwise"}),
                   **_under("mixer.shared_experts", {"up_proj": "colwise",
                                                     "down_proj": "rowwise"})},
    "phi3": _FUSED_GATE,
    "qwen2_moe": _under("mlp.shared_expert", GATED),
}


@dataclass(frozen=True)
class PartCut:
    """A rank's part of a parameter: of each of `pieces` equal pieces of dimension `dim`, its own
    of as many equal shares as the group has ranks."""

    dim: int
    pieces: int = 1

    def ranges(self, size: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        """(start, stop) of its stretches of a dimension of `size`."""
        share = size // self.pieces // ranks
        return [(first, first + share) for first in
                (piece * (size // self.pieces) + rank * share for piece in range(self.pieces))]


@dataclass
class SplitBlock:
    """A part of a body that is split or not.

    name: of its module in the model. whole: the reason that it stays whole; None: it is split.
    cuts: of its parameters, by their names in the model. roles: of its modules. summed: parameters
    that are whole and work on a part: their gradients are summed over the group.
    """

    name: str
    whole: str | None = None
    cuts: dict[str, PartCut] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    summed: list[str] = field(default_factory=list)


class _WholeError(Exception):
    """The reason that a block stays whole."""


def own_shape(parameter: Any) -> tuple[int, ...]:
    """The shape that the parameter shows."""
    return tuple(parameter.shape)


def generic(name: str) -> str:
    """A name as plans have it: a star for each number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def body_plan(model: nn.Module) -> dict[str, str]:
    """The styles of a body's modules and parameters, by their generic names in it; {} for none."""
    config = text_config(model)
    return {**(getattr(config, "base_model_tp_plan", None) or {}),
            **ADDED_PLANS.get(config.model_type, {})}


def blocks_of(model: nn.Module, ranks: int,
              shape_of: Callable[[nn.Parameter], tuple[int, ...]] = own_shape) -> list[SplitBlock]:
    """The blocks that the plan of a transformers causal LM names, split or not, in the model's
    order; [] with one rank, or no plan.

    model: whole, on any device. shape_of: of a parameter, where it does not show its own.
    """
    plan = body_plan(model) if ranks > 1 else {}
    body, prefix = body_of(model), body_name(model)
    words = embedding_of(model)
    targets = dict(body.named_modules()) | dict(body.named_parameters())
    entries: dict[str, dict[str, str]] = {}
    for name, target in targets.items():
        style = plan.get(generic(name))
        if style is None or style == "replicate" or target is words:
            continue
        is_block = style in ("moe_tp_experts", LOCAL, "all_reduce")
        entries.setdefault(name if is_block else name.rpartition(".")[0], {})[name] = style
    made = []
    for name, styles in entries.items():
        try:
            block = _Planned(body, text_config(model), name, styles, ranks, shape_of,
                             tuple(f"{other}." for other in entries if other != name)).block()
        except _WholeError as reason:
            block = SplitBlock(name, whole=str(reason))
        made.append(_renamed(block, f"{prefix}." if prefix else ""))
    return made


def _renamed(block: SplitBlock, prefix: str) -> SplitBlock:
    """A block of the body as one of the model."""
    return SplitBlock(prefix + block.name, block.whole,
                 {prefix + name: cut for name, cut in block.cuts.items()},
                 {prefix + name: role for name, role in block.roles.items()},
                 [prefix + name for name in block.summed])


@dataclass
class _Planned:
    """A block of a body in the making. `styles`: by the names of its modules and parameters in the
    body. others: names that other blocks' begin with."""

    body: nn.Module
    config: Any
    name: str
    styles: Mapping[str, str]
    ranks: int
    shape_of: Callable[[nn.Parameter], tuple[int, ...]]
    others: tuple[str, ...]

    def block(self) -> SplitBlock:
        """The block, split. Raises _WholeError where it is not."""
        made = SplitBlock(self.name)
        modules = dict(self.body.named_modules())
        for name, style in self.styles.items():
            if name not in modules:
                made.cuts[name] = self._stacked_cut(name, style)
            elif style in LINEAR_ROLES:
                self._add_linear(made, name, modules[name], style)
            elif style == SUMMED:
                made.summed += [f"{name}.{each}" for each, _ in modules[name].named_parameters()]
            elif style in MODULE_ROLES:
                made.roles[name] = MODULE_ROLES[style]
            elif style != LOCAL:
                raise _WholeError(f"its plan has {style}, which is not known here")
        if not made.cuts:
            raise _WholeError("its plan splits nothing of it")
        self._require_all_known(made)
        self._require_heads(made, modules[self.name])
        return made

    def _stacked_cut(self, name: str, style: str) -> PartCut:
        """The cut of a parameter that is no linear layer's."""
        shape = self.shape_of(self.body.get_parameter(name))
        if len(shape) == 1 and style == "colwise":
            cut = PartCut(0)
        elif len(shape) > 1 and style in STACKED_CUTS:
            if "moe_tp_experts" not in self.styles.values():
                raise _WholeError(f"its plan splits the weight {name} and sums nothing")
            dim, pieces = STACKED_CUTS[style]
            cut = PartCut(len(shape) + dim, pieces)
        else:
            raise _WholeError(f"its plan has {style} of {name}")
        self._require_divides(name, shape[cut.dim], cut)
        return cut

    def _add_linear(self, made: SplitBlock, name: str, module: Any, style: str) -> None:
        layer = module.base_layer if is_adapted(module) else module
        # A subclass may do anything else with its weight.
        if type(layer).forward is not nn.Linear.forward:
            raise _WholeError(f"{name} of its plan is not a linear layer")
        role = LINEAR_ROLES[style]
        by_rows = role in ("column", "column joined")
        cut = PartCut(0 if by_rows else 1, 2 if style == "packed_colwise" else 1)
        self._require_divides(name, layer.out_features if by_rows else layer.in_features, cut)
        # Of an adapter the factor that is split as the layer is: B by rows, or A by columns.
        factor = f".{'lora_B' if by_rows else 'lora_A'}.{ADAPTER_NAME}"
        for part in ("",) if not is_adapted(module) else (".base_layer", factor):
            made.roles[name + part] = role
            made.cuts[f"{name}{part}.weight"] = cut
        if by_rows and layer.bias is not None:
            made.cuts[f"{name}{'.base_layer' if is_adapted(module) else ''}.bias"] = cut

    def _require_divides(self, name: str, size: int, cut: PartCut) -> None:
        if size % (cut.pieces * self.ranks):
            raise _WholeError(f"tensor_parallel {self.ranks} does not divide the {size} of {name}")

    def _require_all_known(self, made: SplitBlock) -> None:
        """Raise _WholeError for a weight that works on a part of the block though the plan does
        not name it.

        What all outputs are joined for, and what stands before a latent attention's heads, works
        on what is whole.
        """
        roles = set(made.roles.values())
        if "latent" in roles or roles <= {"column joined", "row of own"}:
            return
        module = self.body.get_submodule(self.name)
        adapted = tuple(f"{self.name}.{name}." for name, _ in adapted_layers(module))
        known = {*made.cuts, *made.summed}
        for name, _ in module.named_parameters(prefix=self.name):
            of_row = made.roles.get(name.rpartition(".")[0]) in ("row", "row of own")
            is_output_bias = "experts" in roles and name == f"{self.name}.{OUTPUT_BIAS}"
            if not (name in known or of_row or is_output_bias
                    or name.startswith((*adapted, *self._nested()))):
                raise _WholeError(f"{generic(name)} is not in its plan")

    def _nested(self) -> tuple[str, ...]:
        return tuple(each for each in self.others if each.startswith(f"{self.name}."))

    def _require_heads(self, made: SplitBlock, module: Any) -> None:
        """Raise _WholeError where a rank's part of an attention is not a whole number of heads."""
        is_attention = ("att" in self.name.rpartition(".")[2]
                        or any(hasattr(module, name) for name in OF_ATTENTION))
        if not is_attention or "column" not in made.roles.values():
            return
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(self.config, key, None)
            if isinstance(heads, int) and heads % self.ranks:
                raise _WholeError(
                    f"tensor_parallel {self.ranks} does not divide its {key} {heads}")
        size, shared_by = (getattr(module, name, None) for name in ("head_dim",
                                                                    "num_key_value_groups"))
        layer: Any = getattr(module, "q_proj", None)
        layer = getattr(layer, "base_layer", layer)
        # Layers may differ in them, and one may take its keys from another.
        if isinstance(size, int) and isinstance(shared_by, int) and isinstance(layer, nn.Linear):
            heads = layer.out_features // size // shared_by
            if heads % self.ranks:
                raise _WholeError(f"tensor_parallel {self.ranks} does not divide the {heads} "
                                  f"heads of its keys")


def part_of(whole: Tensor, dim: int, ranges: Iterable[tuple[int, int]]) -> Tensor:
    """The stretches of one dimension of a tensor, joined; a view where there is but one."""
    views = [whole.narrow(dim, start, stop - start) for start, stop in ranges]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def whole_of(parts: list[Tensor], cut: PartCut) -> Tensor:
    """A parameter from the parts of all ranks, in order."""
    pieces = [part.chunk(cut.pieces, cut.dim) for part in parts]
    return torch.cat([own[piece] for piece in range(cut.pieces) for own in pieces], cut.dim)
