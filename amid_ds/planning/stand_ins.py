"""What stands in for attention, experts and scans while a body is counted on the meta device.

Each computes nothing. It notes the FLOPs that torch's counter does not see, in forward and in
backward, and keeps for backward the tensors that the fused kernel keeps.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from amid_ds.models.sizes import DELTA_CHUNK

# The name under which the counting attention is registered with transformers.
ATTENTION_NAME = "planned"
# transformers' own experts whose shapes depend on no numbers, by products that are grouped.
EXPERTS_NAME = "grouped_mm"
# FLOPs per token and element of a recurrent state, as Megatron-LM counts them for its MFU: of a
# state-space layer's scan, and of a gated delta rule (four products with the state).
SCAN_FLOPS = 7
DELTA_FLOPS = 8
# Positions between the states that Mamba's scan keeps.
SCAN_CHUNK = 2048
GROUPED_PRODUCTS = {getattr(owner, name) for owner, name in ((torch, "_grouped_mm"),
                                                             (F, "grouped_mm"))
                    if hasattr(owner, name)}


class Ledger:
    """FLOPs that torch's counter does not see, from the start of a run."""

    def __init__(self) -> None:
        self.flops = 0.0

    def note(self, flops: float) -> None:
        self.flops += flops


class Replaced(NamedTuple):
    """What stand-ins replace; of what they do not, transformers' own code runs, and what it does is
    not noted in the ledger."""

    attention: bool = True
    scans: bool = True


@contextlib.contextmanager
def stand_ins(meta: Any, ledger: Ledger, replaced: Replaced) -> Iterator[None]:
    """A context in which experts of `meta`, and what is to be replaced, are counted and not
    computed."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    attention = _Attention(ledger)
    AttentionInterface.register(ATTENTION_NAME, attention if replaced.attention else
                                functools.partial(_attend_eagerly, attention))
    AttentionMaskInterface.register(ATTENTION_NAME, _make_mask)
    config = meta.config
    before = config._attn_implementation, config._experts_implementation
    config._attn_implementation, config._experts_implementation = ATTENTION_NAME, EXPERTS_NAME
    try:
        with (_Products(ledger),
              _scans(meta, ledger) if replaced.scans else contextlib.nullcontext()):
            yield
    finally:
        config._attn_implementation, config._experts_implementation = before


def attends_eagerly(model: Any) -> bool:
    """True where no kernel does the model's attention: every score is kept for backward."""
    return bool(model.config._attn_implementation == "eager")


def has_scans(model: nn.Module) -> bool:
    """True where a part of the model is a scan or convolution that a kernel may do."""
    return bool(_scans_of(model))


class _Fused(torch.autograd.Function):
    """An output of `shape` for inputs of which backward needs all, and `kept` beside them.

    keeps_output: backward needs it too. backward: called with whether each input needs a gradient,
    once backward has come so far.
    """

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, kept: Sequence[Tensor], keeps_output: bool,
                backward: Callable[[Sequence[bool]], None], *inputs: Tensor) -> Tensor:
        out = inputs[0].new_empty(shape)
        ctx.save_for_backward(*inputs, *kept, *([out] if keeps_output else []))
        ctx.count_backward, ctx.inputs = backward, len(inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        needed = ctx.needs_input_grad[4:]
        ctx.count_backward(needed)
        return None, None, None, None, *(
            torch.empty_like(each) if needs else None
            for each, needs in zip(ctx.saved_tensors[:ctx.inputs], needed, strict=True))


def _fused(ledger: Ledger, flops: float, shape: Sequence[int], inputs: Sequence[Tensor | None],
           kept: Sequence[Tensor] = (), keeps_output: bool = True) -> Tensor:
    """What a kernel makes of `inputs` with so many FLOPs, and twice as many in backward."""
    ledger.note(flops)
    result: Tensor = _Fused.apply(torch.Size(shape), kept, keeps_output,
                                  lambda _: ledger.note(2 * flops),
                                  *(each for each in inputs if each is not None))
    return result


class _Attention:
    """An attention for transformers: two products over the positions that a token attends to."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, _: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                 attention_mask: Tensor | None = None, sliding_window: int | None = None,
                 indices: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        # query, key: [rows, heads, length, width]; value's width may differ.
        rows, heads, length, width = query.shape
        pairs: float | None = getattr(attention_mask, "pairs", None)
        if indices is not None:
            # Of a sparse indexer: the positions that it chooses for each token.
            pairs = window_pairs(length, indices.shape[-1])
        if pairs is None:
            pairs = window_pairs(length, sliding_window)
        flops = 2 * rows * heads * pairs * (width + value.shape[-1])
        return _fused(self.ledger, flops, (rows, length, heads, value.shape[-1]),
                      [query, key, value]), None


def _attend_eagerly(stand_in: _Attention, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the module's own file, where there is one."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", stand_in)
    return own(module, *args, **kwargs)


def window_pairs(length: int, window: int | None) -> float:
    """Pairs of positions of a causal row, of which a token sees the last `window` (None: all)."""
    if window is None or window >= length:
        return length * length / 2
    return length * window - window * window / 2


def chunk_pairs(length: int, chunk: int) -> float:
    """The same, of a row in chunks that do not see each other."""
    whole, rest = divmod(length, chunk)
    return (whole * chunk * chunk + rest * rest) / 2


def _make_mask(*_: Any, kv_length: int = 0, batch_size: int = 1, local_size: int | None = None,
               config: Any = None, **__: Any) -> Tensor:
    """A mask without numbers that knows the pairs that it leaves, as `pairs`.

    local_size: of the window, or of the chunks, where the config has such.
    """
    mask: Any = torch.empty(batch_size, 1, kv_length, kv_length, dtype=torch.bool, device="meta")
    in_chunks = (local_size is not None and local_size < kv_length
                 and getattr(config, "attention_chunk_size", None) == local_size
                 and getattr(config, "sliding_window", None) is None)
    mask.pairs = (chunk_pairs(kv_length, local_size or 0) if in_chunks else
                  window_pairs(kv_length, local_size))
    return mask


class _Products(TorchFunctionMode):
    """Products of tokens grouped by expert, in any dtype; and questions that only numbers answer.

    A row is one document without padding: whether something holds of its positions or mask is
    answered yes, whether an id is in it no.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in GROUPED_PRODUCTS:
            return self.grouped(*args, **(kwargs or {}))
        if func in (Tensor.__bool__, Tensor.__contains__) and args[0].is_meta:
            return func is Tensor.__bool__
        return func(*args, **(kwargs or {}))

    def grouped(self, rows: Tensor, weight: Tensor, **_: Any) -> Tensor:
        """[S, N] of rows [S, K] in groups, each times its own of weight [E, K, N]."""
        flops = 2 * rows.numel() * weight.shape[-1]
        self.ledger.note(flops)
        result: Tensor = _Fused.apply(torch.Size((len(rows), weight.shape[-1])), (), False,
                                      lambda needed: self.ledger.note(sum(needed) * flops),
                                      rows, weight)
        return result


def _scans_of(model: nn.Module) -> list[tuple[Any, str]]:
    """(module of Python, name) of the functions there that a stand-in replaces."""
    sources = {sys.modules.get(type(module).__module__) for module in model.modules()}
    return [(source, name) for source in sources for name in STAND_INS if hasattr(source, name)]


@contextlib.contextmanager
def _scans(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """A context in which the functions that fused kernels do for this model are stand-ins."""
    replaced = [(source, name, getattr(source, name)) for source, name in _scans_of(model)]
    for source, name, _ in replaced:
        setattr(source, name, _with_ledger(STAND_INS[name], ledger))
    try:
        yield
    finally:
        for source, name, function in replaced:
            setattr(source, name, function)


def _with_ledger(stand_in: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    return lambda *args, **kwargs: stand_in(ledger, *args, **kwargs)


def _delta_rule(ledger: Ledger, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
                *_: Any, **__: Any) -> tuple[Tensor, None]:
    """flash-linear-attention's chunk_gated_delta_rule and chunk_kda: query and key [B, T, H, K],
    value [B, T, H', V]; it keeps both normalised, and a matrix of each chunk."""
    rows, length, heads, width = value.shape
    flops = DELTA_FLOPS * rows * length * heads * key.shape[-1] * width
    kept = [torch.empty_like(query), torch.empty_like(key),
            key.new_empty(rows, length, heads, DELTA_CHUNK), torch.empty_like(g)]
    return _fused(ledger, flops, value.shape, [query, key, value, g, beta], kept,
                  keeps_output=False), None


def _state_space_duality(ledger: Ledger, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor,
                         C: Tensor, *_: Any, **__: Any) -> Tensor:
    """mamba_ssm's mamba_chunk_scan_combined: hidden_states [B, T, H, P], B and C [B, T, G, N]; it
    keeps its output and the sums of decays, not the states."""
    flops = SCAN_FLOPS * hidden_states.numel() * B.shape[-1]
    return _fused(ledger, flops, hidden_states.shape, [hidden_states, dt, A, B, C],
                  [torch.empty_like(dt, dtype=torch.float32)])


def _selective_scan(ledger: Ledger, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor,
                    C: Tensor, D: Tensor | None = None, z: Tensor | None = None, *_: Any,
                    **__: Any) -> Tensor:
    """mamba_ssm's selective_scan_fn: hidden_states [B, D, T], A [D, N]; it keeps its output before
    the gate and a state and its decay every 2,048 positions."""
    flops = SCAN_FLOPS * hidden_states.numel() * A.shape[-1]
    kept = [torch.empty_like(hidden_states), _scan_states(hidden_states, A.shape[-1])]
    return _fused(ledger, flops, hidden_states.shape, [hidden_states, dt, A, B, C, z], kept,
                  keeps_output=False)


def _scan_states(hidden_states: Tensor, states: int) -> Tensor:
    rows, width, length = hidden_states.shape
    return hidden_states.new_empty(rows, width, -(-length // SCAN_CHUNK), 2 * states,
                                   dtype=torch.float32)


def _convolution(ledger: Ledger, hidden_states: Tensor, weight: Tensor,
                 bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """causal_conv1d's causal_conv1d_fn: hidden_states [B, C, T], weight [C, K]; it keeps its
    input."""
    flops = 2 * hidden_states.numel() * weight.shape[-1]
    return _fused(ledger, flops, hidden_states.shape, [hidden_states, weight, bias],
                  keeps_output=False)


def _whole_mamba2(ledger: Ledger, projected: Tensor, conv_weight: Tensor,
                  conv_bias: Tensor | None, dt_bias: Tensor, A: Tensor, *_: Any, headdim: int,
                  ngroups: int = 1, outproj_weight: Tensor | None = None,
                  outproj_bias: Tensor | None = None, **__: Any) -> Tensor:
    """mamba_ssm's mamba_split_conv1d_scan_combined, convolution to the last product: it keeps its
    input and the scan's output."""
    rows, length = projected.shape[:2]
    width = A.shape[0] * headdim
    states = (conv_weight.shape[0] - width) // (2 * ngroups)
    flops = rows * length * (SCAN_FLOPS * width * states + 2 * conv_weight.numel())
    scanned = _fused(ledger, flops, (rows, length, width),
                     [projected, conv_weight, conv_bias, dt_bias, A])
    return scanned if outproj_weight is None else F.linear(scanned, outproj_weight, outproj_bias)


def _whole_mamba(ledger: Ledger, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor | None,
                 x_weight: Tensor, dt_weight: Tensor, out_weight: Tensor,
                 out_bias: Tensor | None, A: Tensor, *_: Any, **__: Any) -> Tensor:
    """mamba_ssm's mamba_inner_fn, convolution to the last product: projected [B, 2D, T]; it keeps
    its input, steps and matrices of the scan, and its output."""
    rows, length = projected.shape[0], projected.shape[2]
    width, states = A.shape
    flops = rows * length * (SCAN_FLOPS * width * states + 2 * conv_weight.numel()
                             + 2 * x_weight.numel() + 2 * dt_weight.numel())
    kept = [projected.new_empty(rows, length, x_weight.shape[0]),
            _scan_states(projected[:, :width], states)]
    scanned = _fused(ledger, flops, (rows, width, length),
                     [projected, conv_weight, conv_bias, x_weight, dt_weight, A], kept)
    return F.linear(scanned.transpose(1, 2), out_weight, out_bias)


# By the names that transformers' modelling files give the functions which kernels replace.
STAND_INS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space_duality,
    "mamba_selective_scan": _selective_scan,
    "causal_conv1d_fn": _convolution,
    "mamba2_split_conv1d_scan_combined": _whole_mamba2,
    "mamba_inner_fn": _whole_mamba}
