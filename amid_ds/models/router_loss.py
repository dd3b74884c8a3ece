"""The losses of a mixture's routers over the whole global batch, and the load of its experts.

The load-balancing loss is that of transformers (load_balancing_loss_func; Switch Transformers,
arXiv:2101.03961, equations 4 to 6): experts · Σ_e f_e · P_e, over the tokens of all layers
together, where f_e is how often a token has expert e among its k most probable ones and P_e the
expert's mean probability. f_e is a number for the gradient, and of the whole global batch, so it
must be known before the first backward pass. Where a rank has one micro-batch, one sum over the
ranks between its body and its head gives it. Otherwise the student runs over the step's
micro-batches once more, before, without gradient: exact, for a forward pass of the body. The z-loss
(ST-MoE, arXiv:2202.08906, equation 5) is the mean of log² Σ_e exp(logit_e).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amid_ds.data.batch import Batch
from amid_ds.distributed.transfer import to_device
from amid_ds.errors import InputError
from amid_ds.models.experts import ExpertLayer, records_router_logits
from amid_ds.models.heads import run_body
from amid_ds.models.shape import text_config

logger = logging.getLogger(__name__)

# What configs call the weight of the load-balancing loss in transformers; DBRX's is in a part.
BALANCE_NAMES = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
Z_NAMES = ("router_z_loss_coef", "z_loss_coef")
PROBABILITY_BYTES = 4
# How far the sum of recorded probabilities may be from 1.
NORMALIZED_TO = 1e-2


class RouterWeights(NamedTuple):
    """The weights of the load-balancing loss and of the z-loss in a student's objective."""

    balance: float
    z: float


def router_weights(model: nn.Module, layers: Sequence[ExpertLayer],
                   balance: float | Literal["auto"]) -> RouterWeights:
    """The weights for a student with these layers: `balance` or the config's, and the config's.

    Raises InputError for a mixture whose layers are not known.
    """
    own = _of_config(model, BALANCE_NAMES)
    weights = RouterWeights((own or 0.0) if balance == "auto" else balance,
                            _of_config(model, Z_NAMES) or 0.0)
    if not layers:
        if any(weights) and records_router_logits(model):
            raise InputError(f"student.router_aux_loss {balance} for {type(model).__name__}, whose "
                             "experts are no stack of matrices beside a router",
                             "a mixture whose layers of experts are known, or no such loss",
                             "set student.router_aux_loss=0")
        return RouterWeights(0.0, 0.0)
    return weights


def kept_bytes_per_token(layers: Sequence[ExpertLayer], weights: RouterWeights) -> int:
    """Bytes per token that the losses keep for backward: in fp32 the probabilities of every router,
    and for a z-loss its logits."""
    width = sum(layer.experts for layer in layers if layer.logits is not None)
    return PROBABILITY_BYTES * width * (any(weights) + bool(weights.z))


def log_router_weights(model: nn.Module, layers: Sequence[ExpertLayer], weights: RouterWeights,
                       balance: float | Literal["auto"]) -> None:
    """Log a line of the weights that `router_weights` has found, and where."""
    own = _of_config(model, BALANCE_NAMES)
    origin = ("the recipe's" if balance != "auto" else
              "its config's" if own is not None else "its config has none")
    logger.info("the student's %d layers of experts: load-balancing loss with weight %g (%s)%s",
                len(layers), weights.balance, origin,
                f", z-loss with weight {weights.z:g}" if weights.z else "")


def _of_config(model: nn.Module, names: Sequence[str]) -> float | None:
    config = text_config(model)
    for part in (config, getattr(config, "ffn_config", None)):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return float(value)
    return None


def real_tokens(batch: Batch) -> Tensor:
    """[B · L] fp32: 1 at each input that is a token, 0 at padding. Nothing waits for a device."""
    rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    if batch.padding == rows * length:
        return torch.zeros(rows * length, device=device)
    if batch.documents is None:
        return torch.ones(rows * length, device=device)
    ends = to_device(torch.tensor([starts[-1] for starts in batch.documents.starts]), device)
    return (torch.arange(length, device=device) < ends[:, None]).flatten().float()


class _Routing(NamedTuple):
    """What the routers of n layers have said of T tokens in a forward pass.

    logits: of those that have some [T, E_i], in the model's dtype, with gradient. choices: of each
    layer the experts chosen [T, k].
    """

    logits: list[Tensor]
    choices: list[Tensor]


class Routers:
    """The routers of a student that is a mixture, and what an optimizer step has to add up of them.

    add_up: the sum over the data-parallel ranks of a float64 tensor on the device, in one
    collective. load: float64, this rank's tokens of each expert in the step so far, the layers end
    to end; None where it is not measured. All ranks make the same calls.
    """

    def __init__(self, layers: Sequence[ExpertLayer], weights: RouterWeights,
                 add_up: Callable[[Tensor], Tensor]) -> None:
        self.layers, self.weights, self.add_up = layers, weights, add_up
        # Of the step's global batch, where they are known in advance.
        self._choices: Tensor | None = None
        self._measures_load = False
        # Whether what is recorded as logits are probabilities, as Gemma 4's; None: not looked yet.
        self._normalized: bool | None = None
        self.load: Tensor | None = None

    @property
    def has_loss(self) -> bool:
        """True where the objective has one of the losses."""
        return any(self.weights)

    def start_step(self, measures_load: bool) -> None:
        """Begin an optimizer step. measures_load: `load` is asked at its end."""
        self._choices = self.load = None
        self._measures_load = measures_load

    @torch.no_grad()
    def count_ahead(self, student: nn.Module, batches: Sequence[Batch]) -> None:
        """Count the choices of the step's micro-batches on all ranks, in forward passes of their
        own with the random numbers that the coming ones have. One collective."""
        device = batches[0].input_ids.device
        total: Tensor | float = 0.0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in batches:
                with self._listening(student, False) as routing:
                    run_body(student, batch.input_ids, batch.positions, batch.documents)
                total = total + self._count(routing.logits, real_tokens(batch))
        assert isinstance(total, Tensor)
        self._choices = self.add_up(total)

    @contextlib.contextmanager
    def watched(self, student: nn.Module, real: Tensor) -> Iterator[list[Tensor]]:
        """A context in which the student's body runs over a micro-batch.

        Then the list has two: the micro-batch's part of the weighted losses, a scalar fp32 with
        gradient, and of the load-balancing and the z-loss without their weights, [2] float64. It is
        empty without a loss. real: `real_tokens` of it. One collective, unless `count_ahead` was
        called.
        """
        losses: list[Tensor] = []
        with self._listening(student, self._measures_load) as routing:
            yield losses
        if self._measures_load:
            self._add_load(routing.choices, real)
        if self.has_loss:
            choices = self._choices
            if choices is None:
                with torch.no_grad():
                    choices = self.add_up(self._count(routing.logits, real))
            parts = self._parts(routing.logits, real, choices)
            weighted = self.weights.balance * parts[0] + self.weights.z * parts[1]
            losses += [weighted.float(), parts.detach()]

    def load_metrics(self, load: Sequence[float]) -> dict[str, float]:
        """Of each layer the largest expert's load over the mean one.

        load: `self.load`, summed over the ranks; []: none. Of layers with the same number (JetMoE's
        attention has experts too) the larger one.
        """
        if not load:
            return {}
        metrics: dict[str, float] = {}
        start = 0
        for layer in self.layers:
            own = load[start:start + layer.experts]
            start += layer.experts
            number = next((part for part in layer.name.split(".") if part.isdigit()), layer.name)
            key = f"expert_load/{number}"
            metrics[key] = max(metrics.get(key, 0.0), max(own) * len(own) / max(sum(own), 1.0))
        return metrics

    @contextlib.contextmanager
    def _listening(self, student: nn.Module, with_choices: bool) -> Iterator[_Routing]:
        """A context in which the routers are listened to, whatever they are called by.

        The hooks are the last of their modules, behind ZeRO-3's, and gone in the backward pass:
        what activation checkpointing computes anew is not heard twice.
        """
        routing = _Routing([], [])
        handles = [student.get_submodule(layer.router).register_forward_hook(
            partial(_listen, routing, layer, with_choices)) for layer in self.layers]
        try:
            yield routing
        finally:
            for handle in handles:
                handle.remove()
        recorded = sum(layer.logits is not None for layer in self.layers)
        assert len(routing.logits) == recorded, (len(routing.logits), recorded)

    def _count(self, logits: Sequence[Tensor], real: Tensor) -> Tensor:
        """[E + 1] float64: how often each expert is one of a token's k most probable ones, over all
        routers; tokens times routers."""
        recorded = [layer for layer in self.layers if layer.logits is not None]
        counts = torch.zeros(logits[0].shape[-1], dtype=torch.float64, device=real.device)
        for layer, own in zip(recorded, logits, strict=True):
            chosen = self._probabilities(own.detach()).topk(layer.chosen, -1).indices
            counts += _tally(chosen, real, len(counts))
        return torch.cat([counts, real.double().sum()[None] * len(logits)])

    def _parts(self, logits: Sequence[Tensor], real: Tensor, choices: Tensor) -> Tensor:
        """[2] float64: the micro-batch's part of the load-balancing loss and of the z-loss."""
        probabilities = torch.zeros_like(choices[:-1])
        squares = torch.zeros_like(choices[-1])
        for own in logits:
            share = self._probabilities(own) * real[:, None]
            probabilities = probabilities + share.sum(0).double()
            if self.weights.z:
                squares = squares + (own.float().logsumexp(-1).square() * real).sum().double()
        tokens = choices[-1].clamp(min=1.0)
        balance = len(probabilities) * (choices[:-1] / tokens * probabilities / tokens).sum()
        return torch.stack([balance, squares / tokens])

    def _probabilities(self, logits: Tensor) -> Tensor:
        """[T, E] fp32 of logits [T, E]. At the first call the host waits for the device."""
        own = logits.float()
        if self._normalized is None:
            looked_at = own.detach()
            self._normalized = bool((looked_at >= 0).all()
                                    and ((looked_at.sum(-1) - 1).abs() < NORMALIZED_TO).all())
        return own if self._normalized else own.softmax(-1)

    @torch.no_grad()
    def _add_load(self, choices: Sequence[Tensor], real: Tensor) -> None:
        own = torch.cat([_tally(chosen, real, layer.experts)
                         for layer, chosen in zip(self.layers, choices, strict=True)])
        self.load = own if self.load is None else self.load + own


def _listen(routing: _Routing, layer: ExpertLayer, with_choices: bool, router: nn.Module,
            args: object, output: Any) -> None:
    """Note what a router returns: a tensor, or several."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    logits = None if layer.logits is None else outputs[layer.logits].flatten(0, -2)
    if logits is not None:
        routing.logits.append(logits)
    if with_choices:
        named = [own for own in outputs if not own.is_floating_point() and own.ndim > 1
                 and own.shape[-1] == layer.chosen]
        if named:
            routing.choices.append(named[0].flatten(0, -2))
        else:
            assert logits is not None, layer
            routing.choices.append(logits.detach().topk(layer.chosen, -1).indices)


def _tally(chosen: Tensor, real: Tensor, experts: int) -> Tensor:
    """[experts] float64: how many real tokens have chosen each. chosen: [T, k]; an index beyond is
    no expert with weights (LongCat's identities)."""
    counted = real.double()[:, None] * (chosen < experts)
    counts = torch.zeros(experts, dtype=torch.float64, device=real.device)
    return counts.index_add_(0, chosen.clamp(max=experts - 1).flatten(), counted.flatten())
