"""Which modules of a causal LM are layers of experts, and which module routes their tokens.

No family is named here. transformers says which modules route, as it records their logits
(`_can_record_outputs`), and its routers say how many experts they choose; the experts of a layer
are stacked in parameters of three dimensions, the first of which counts them. Shared experts, which
every token passes, and dense layers are no expert layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from amid_ds.errors import InputError
from amid_ds.models.shape import text_config

Shape = Callable[[nn.Parameter], Sequence[int]]
# What configs call the routed experts that a token passes, where its router does not say it.
CHOSEN_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk",
                "moe_top_k", "moe_k")
ROUTER_LOGITS = "router_logits"


@dataclass(frozen=True)
class ExpertLayer:
    """A layer of routed experts.

    name: of the module in the model that holds their weights, "model.layers.0.mlp.experts".
    router: of the module that chooses. experts: of the layer, those with weights. chosen: by each
    token, of the routed ones. logits: which of its outputs transformers records as the router's
    logits; None where it records none, as of a router that looks experts up by the token's id.
    """

    name: str
    router: str
    experts: int
    chosen: int
    logits: int | None


def expert_layers(model: nn.Module, shape: Shape = lambda parameter: parameter.shape
                  ) -> list[ExpertLayer]:
    """The layers of experts of a causal LM on any device, in the order of its modules.

    [] of a dense model. To be asked before an engine splits the weights. shape: of a whole
    parameter, where an engine has partitioned them already. Raises InputError where nothing says
    how many experts a token passes.
    """
    recorded = dict(_recorded_routers(model))
    layers, modules = [], dict(model.named_modules())
    for name, module in modules.items():
        if not (name in recorded or _says_its_choice(module)) or _stack_size(module, shape):
            continue
        block_name = name.rpartition(".")[0]
        block = modules[block_name]
        holder = _holder(block, module, shape)
        if holder is None:
            continue
        relative, experts = holder
        layers.append(ExpertLayer(
            name=".".join(part for part in (block_name, relative) if part), router=name,
            experts=experts, chosen=_chosen(model, block, module), logits=recorded.get(name)))
    return layers


def records_router_logits(model: nn.Module) -> bool:
    """True where transformers records router logits of a module of the model."""
    return any(True for _ in _recorded_routers(model))


def _recorded_routers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the modules whose outputs transformers records as router logits, and which output.
    """
    for root, owner in model.named_modules():
        specs = (getattr(owner, "_can_record_outputs", None) or {}).get(ROUTER_LOGITS, ())
        for spec in specs if isinstance(specs, (list, tuple)) else [specs]:
            kind = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
            if kind is None:
                continue
            place = getattr(spec, "layer_name", None)
            for name, module in owner.named_modules(prefix=root):
                if isinstance(module, kind) and (place is None or f".{place}." in f".{name}."):
                    yield name, getattr(spec, "index", 1)


def _says_its_choice(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("top_k", "num_experts"))


def _stack_size(module: nn.Module, shape: Shape) -> int:
    """The experts stacked in a module's parameters, as their first dimensions have it; 0: none."""
    shapes = (shape(parameter) for each in module.modules() if not isinstance(each, _ConvNd)
              for parameter in each.parameters(recurse=False))
    return min((own[0] for own in shapes if len(own) == 3), default=0)


def _holder(block: nn.Module, router: nn.Module, shape: Shape) -> tuple[str, int] | None:
    """The module of `block` with the weights of the router's experts, by its name in the block, and
    the number of experts.

    It is the child with the largest stack (shared experts may be stacked, and are fewer), or the
    block itself ("") where several children have as large a one. DBRX's stack is flattened into a
    matrix: there the child counts.
    """
    sizes = {name: _stack_size(child, shape) for name, child in block.named_children()
             if child is not router}
    experts = max(sizes.values(), default=0)
    if experts:
        largest = [name for name, size in sizes.items() if size == experts]
        return largest[0] if len(largest) == 1 else "", experts
    for name, child in block.named_children():
        if child is not router and isinstance(counted := getattr(child, "num_experts", None), int):
            return name, counted
    return None


def _chosen(model: nn.Module, block: nn.Module, router: nn.Module) -> int:
    """Experts that a token passes, as its router, its block or the config says.

    Raises InputError where none does: transformers' DeepSeek-V2 has no default.
    """
    for owner in (router, block):
        if isinstance(own := getattr(owner, "top_k", None), int):
            return own
    own = config_value(model, CHOSEN_NAMES)
    if own is None:
        raise InputError(f"the model {text_config(model).name_or_path} is a mixture whose config "
                         "does not say how many experts a token passes",
                         f"a number, such as {CHOSEN_NAMES[0]}",
                         "add it to the model's config.json")
    return int(own)


def config_value(model: nn.Module, names: Sequence[str]) -> int | float | None:
    """The first number that the model's text config, or DBRX's part of it, has under one of
    `names`; None: none."""
    config = text_config(model)
    values = (getattr(part, name, None) for part in (config, getattr(config, "ffn_config", None))
              for name in names)
    return next((value for value in values if isinstance(value, (int, float))), None)
