"""Attention that ends with each document of a row, or with a window, without a mask.

transformers keeps documents that share a row apart by a mask [B, 1, L, L], as it does with windows
shorter than the row, and torch has no flash kernel for a mask. Here the rows are laid end to end,
and a kernel for sequences of many lengths takes the documents' boundaries instead: nothing grows
with L². That kernel runs on a GPU, on 16-bit numbers, and computes causal attention with grouped
heads and a window. A model whose layers ask for more keeps the mask. No config is read for that:
the model's own forward runs on the meta device, its attention replaced by one that records what it
is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amid_ds.data.batch import Documents
from amid_ds.distributed.transfer import to_device
from amid_ds.models.recurrence import recurrent_layers, run_documents_alone
from amid_ds.models.shape import body_of, layers_of

logger = logging.getLogger(__name__)

# The names under which transformers knows the attention of this module, and the recording one.
VARLEN_NAME = "amid_varlen"
RECORDER_NAME = "amid_recorder"
# The widths of a head that the kernel has on every GPU: others from 193 to 224 lack a backward pass
# on some (torch's sdp_utils.cpp).
HEAD_WIDTHS = (*range(8, 193, 8), *range(232, 257, 8))
# What layers hand to their attention that the kernel obeys, or that changes no attention.
UNDERSTOOD = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache",
              "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def choose_attention(model: nn.Module, title: str, device: torch.device, trains: bool) -> None:
    """Let `model` attend by boundaries, if it and the device can; log which way it attends.

    trains: it will run in training mode, with its dropout.
    """
    recurrent = recurrent_layers(model)
    if not any(_takes_mask(layer, recurrent) for layer in layers_of(model)):
        logger.info("no layer of %s attends", title)
        return
    reason = _device_refusal(device, model.dtype) or _model_refusal(model, trains)   # type: ignore[arg-type]
    if reason is None:
        _register(VARLEN_NAME, _attend)
        model.set_attn_implementation(VARLEN_NAME)   # type: ignore[operator]
        # They would be handed the boundaries too, of rows that no kernel takes side by side.
        run_documents_alone(model)
    logger.info("where rows hold several documents, or reach a window, %s attends %s",
                title, "by boundaries, in flash attention" if reason is None
                else f"under a dense mask, because {reason}")


def attends_by_boundaries(model: nn.Module) -> bool:
    """True where `choose_attention` has let `model` do so."""
    return bool(model.config._attn_implementation == VARLEN_NAME)   # type: ignore[union-attr]


def exceeds_window(model: nn.Module, length: int) -> bool:
    """True where transformers would make a mask for a row of `length` tokens that is one document.
    """
    window = getattr(model.config, "sliding_window", None)
    return window is not None and length >= window


def boundary_arguments(documents: Documents, input_ids: Tensor) -> dict[str, Any]:
    """The keyword arguments with which a body attends to each document of input_ids [B, L] alone.

    cu_seq_lens_*: int32 [documents + 1], max_length_*: the longest, both as transformers calls
    them. They are made on the host, and nothing waits for the device.
    """
    rows, length = input_ids.shape
    starts = documents.boundaries(length)
    longest = max(stop - start for start, stop in itertools.pairwise(starts))
    device = input_ids.device
    boundaries = to_device(torch.tensor(starts, dtype=torch.int32), device)
    # transformers hands a mask of four dimensions on as it is, and makes none.
    no_mask = torch.empty(rows, 1, length, 0, device=device)
    return {"attention_mask": no_mask, "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries,
            "max_length_q": longest, "max_length_k": longest}


@contextlib.contextmanager
def masks_by_positions(model: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """In this context the masks that the body makes end where `positions` [B, L] start again.

    Most families hand the positions to transformers' functions that make masks. OPT, BLOOM, gpt-oss
    and Granite 4 (transformers 5.24) do not, so here those functions are given them. BLOOM's biases
    by the distance along the row are right in a document too: softmax knows differences alone.
    BioGPT hands on a mask of ones, beside which no positions count: the body was given no padding.
    """
    module = sys.modules[type(body_of(model)).__module__]
    own = {name: make for name, make in vars(module).items()
           if name.startswith("create_") and name.endswith("_mask")}

    def told(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_mask(*args: Any, **options: Any) -> Any:
            mask = options.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                options["attention_mask"] = None
            return make(*args, **{**options, "position_ids": positions})
        return make_mask

    try:
        if positions is not None:
            vars(module).update({name: told(make) for name, make in own.items()})
        yield
    finally:
        vars(module).update(own)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
            attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
            sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
            max_length_q: int = 0, **options: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, L, D], key and value [B, H', L, D] ->
    [B, L, H, D]. Without boundaries it is transformers' own: plain rows, and keys from a cache."""
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                      scaling=scaling, **options)
    rows, _, length, _ = query.shape
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    # The kernel's window is of the tokens before this one, transformers' has this one in it.
    window = -1 if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1
    out: Tensor = varlen_kernel()(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q,
                                  max_length_q, scale=scaling, window_size=(window, 0))
    return out.unflatten(0, (rows, length)), None


@functools.cache
def varlen_kernel() -> Callable[..., Any]:
    """torch's `varlen_attn`, with grouped heads. Imported late: it imports torch's compiler."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 groups heads unasked; later versions want to be asked.
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


def _device_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no kernel on `device` for weights of `dtype`; None: there is."""
    if device.type != "cuda":
        return "it runs on a CPU"
    if dtype != torch.bfloat16:
        return f"its weights are {str(dtype).removeprefix('torch.')}, and the kernel's 16-bit"
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return "this torch has no such kernel"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than the kernel's oldest, of compute capability 8.0"
    return None


class _Call(NamedTuple):
    """What a layer asked of its attention."""

    module: nn.Module
    states: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None
    options: dict[str, Any]


def _model_refusal(model: Any, trains: bool) -> str | None:
    """What keeps the layers of `model` from the kernel; None: nothing does. No weight is read."""
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}"
    try:
        with torch.device("meta"):
            meta = type(model)(copy.deepcopy(model.config)).to(torch.bfloat16).train(trains)
            ids = torch.zeros(2, 16, dtype=torch.long)
            given = boundary_arguments(Documents(((0, 8, 16),) * 2), ids)
            # They run on each document alone, whatever the attention; the kernels of some would
            # fail here. And transformers looks into a mask that is for them.
            recurrent = recurrent_layers(meta)
            for layer in recurrent:
                layer.forward = lambda hidden_states, **_: hidden_states
            mask = torch.ones(2, 16, dtype=torch.long, device="cpu" if recurrent else None)
            masked = _record(meta, input_ids=ids, attention_mask=mask)
            packed = _record(meta, input_ids=ids, position_ids=torch.zeros_like(ids), **given)
    # A model's forward fails on what it does not know in as many ways.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"its forward fails on the meta device without one ({reason})"
    layers = layers_of(meta)
    told = [layer for layer in layers if _attends(layer, packed)]
    if not told or len(masked) != len(packed) or any(
            _takes_mask(layer, recurrent) for layer in layers if layer not in told):
        return f"{len(told)} of its {len(layers)} layers attend"
    reasons = (_call_refusal(call, given) or _window_refusal(plain)
               for plain, call in zip(masked, packed, strict=True))
    return next(filter(None, reasons), None)


def _attends(layer: nn.Module, calls: list[_Call]) -> bool:
    """True where one of the calls came from a module of `layer`."""
    return any(call.module is module for call in calls for module in layer.modules())


def _takes_mask(layer: nn.Module, recurrent: list[nn.Module]) -> bool:
    """True where a module in `layer` may attend, but those with a state along the row."""
    return any("attention_mask" in inspect.signature(type(module).forward).parameters
               for module in layer.modules() if module is not layer and module not in recurrent)


def _call_refusal(call: _Call, given: dict[str, Any]) -> str | None:
    """What keeps a call that was given `boundary_arguments` from the kernel; None: nothing does."""
    options, widths = call.options, {states.shape[-1] for states in call.states}
    asked = [name for name, option in options.items()
             if name not in UNDERSTOOD and option is not None and option is not False]
    if asked:
        return f"its layers ask for {', '.join(sorted(asked))}"
    if (call.mask is not given["attention_mask"]
            or options.get("cu_seq_lens_q") is not given["cu_seq_lens_q"]
            or options.get("max_length_q") != given["max_length_q"]):
        return "its layers are not told the boundaries"
    if options.get("dropout"):
        return f"it drops {options['dropout']} of the attention in training"
    if not options.get("is_causal", getattr(call.module, "is_causal", True)):
        return "it attends to what follows"
    if any(states.dtype != torch.bfloat16 for states in call.states):
        return "it attends in fp32"
    if len(widths) > 1 or not widths <= {*HEAD_WIDTHS}:
        return f"its heads are {' and '.join(map(str, sorted(widths)))} wide"
    return None


def _window_refusal(call: _Call) -> str | None:
    """None where the mask that transformers would make has the window that the layer hands on."""
    window = call.options.get("sliding_window") or 0
    if call.mask is None or call.mask.shape[-1] != window:
        return "its mask is of another kind than causal or a window"
    return None


def _record(meta: Any, **inputs: Any) -> list[_Call]:
    """The calls of its attention that a body on the meta device makes for `inputs`."""
    calls: list[_Call] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
        calls.append(_Call(module, (query, key, value), attention_mask, options))
        return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1]), None

    _register(RECORDER_NAME, attend, _window_as_mask)
    meta.set_attn_implementation(RECORDER_NAME)
    with torch.no_grad():
        body_of(meta)(use_cache=False, **inputs)
    return calls


def _window_as_mask(*_: Any, local_size: int | None = None, allow_is_causal_skip: bool = True,
                    **__: Any) -> Tensor:
    """In place of a mask a tensor whose last dimension is the window; 0 for none."""
    if not allow_is_causal_skip:
        raise ValueError("its mask is more than causal")
    return torch.empty(1, 1, 1, local_size or 0, device="meta")


def _register(name: str, attend: Any, make_mask: Any = None) -> None:
    """Make an attention known to transformers, with its mask; None: that of torch's attention."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask or sdpa_mask)
