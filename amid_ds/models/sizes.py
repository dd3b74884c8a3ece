"""The teacher's activation memory per token, and the tokens that one forward call may have.

Training and the plan both size the teacher's forward call; this module is the one owner of the
estimate. It is plain arithmetic on a model's config and its modules' settings, so the model may be
on any device and its weights anywhere; no tensors, no collectives. The estimate is generous, so
that a pass of that size is safe; planning/memory.py counts the bytes that a pass is expected to
hold at its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from amid_ds.models.experts import CHOSEN_NAMES
from amid_ds.models.kernel_packages import is_installed
from amid_ds.models.shape import body_of, text_config

# Of a rank's free memory, for one teacher pass, and as much again for the hidden states that wait
# for the loss. The rest is for the student's activations, gathered weights and the loss.
TEACHER_MEMORY_SHARE = 1 / 8
# Elements per token that one layer may hold at once without autograd: the residual stream, its
# norm and two projections' results, each of the hidden size; query, key, value and the attention's
# output, each of all heads' width if that is more; an MLP's gate, its activation, up and their
# product.
HIDDEN_TENSORS = 4
HEADS_TENSORS = 4
INTERMEDIATE_TENSORS = 4
# Of the hidden size for each expert that a token passes: its input, its output, that by its weight,
# and in the tokens' order.
EXPERT_HIDDEN_TENSORS = 4
# The width of an MLP over that of the residual stream, where a config does not name it (GPT-2).
DEFAULT_MLP_RATIO = 4
# Eager attention holds a token's scores with every other: before and after the mask, their softmax
# in fp32, and that in the model's dtype; so does torch's on a CPU where keys and values differ in
# width (latent attention), which the share leaves room for. A sparse indexer holds its own, in
# fp32, before and after it cuts them.
EAGER_SCORE_TENSORS = 6
INDEXER_SCORE_TENSORS = 3
# What configs call the width of an MLP, that of an expert (an MLP's where none is named), the
# experts of a layer, and the width of those that every token passes.
MLP_WIDTH_NAMES = ("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner")
EXPERT_WIDTH_NAMES = ("moe_intermediate_size",)
EXPERT_COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Of a head of latent attention: without positions, and with them.
LATENT_WIDTH_NAMES = ("qk_nope_head_dim", "qk_rope_head_dim")
SHARED_WIDTH_NAMES = ("shared_expert_intermediate_size", "shared_intermediate_size",
                      "moe_shared_expert_intermediate_size")
# transformers' own code of a scan is in fp32. Per token and head it holds so many rows of a chunk's
# matrices and vectors of a head's width; Mamba's holds three states.
SCAN_BYTES = 4
CHUNK_ROWS = 8
HEAD_VECTORS = 8
STATES = 4
CHANNEL_SHARE = 3 / CHUNK_ROWS
DELTA_CHUNK = 64


def intermediate_size(config: Any, hidden_size: int) -> int:
    """The width between an MLP's two products: the config's, else four times `hidden_size`.

    Of a model with dense layers and experts, that of the dense ones.
    """
    named = max((value for name in MLP_WIDTH_NAMES
                 if isinstance(value := getattr(config, name, None), int)), default=0)
    return named or DEFAULT_MLP_RATIO * hidden_size


def active_intermediate_size(model: nn.Module) -> int:
    """The width between the products that a token passes in the widest layer: of its MLP, or of all
    its experts, of which some models run more than it chooses."""
    config = text_config(model)
    dense = intermediate_size(config, config.hidden_size)
    experts = _experts_per_token(model)
    return max(dense, experts * _first(config, EXPERT_WIDTH_NAMES, dense)
               + _first(config, SHARED_WIDTH_NAMES, 0)) if experts else dense


def teacher_bytes_per_token(models: Sequence[nn.Module], element_size: int,
                            seq_length: int) -> int:
    """Bytes of one token's activations, of one layer, in a forward pass without gradients.

    `models`: of the teacher, which run one after another: the largest counts, and the hidden states
    of those before. `element_size`: bytes of an element; `seq_length`: tokens of a row, which eager
    attention compares with each other.
    """
    return (max(_layer_bytes(model, element_size, seq_length) for model in models)
            + sum(_hidden_size(model) for model in models[:-1]) * element_size)


def _layer_bytes(model: nn.Module, element_size: int, seq_length: int) -> int:
    config, width = text_config(model), _hidden_size(model)
    # A model without attention has no heads.
    heads = _first(config, ("num_attention_heads",), 0)
    head_width = max(_first(config, ("head_dim",), 0),
                     sum(_first(config, (name,), 0) for name in LATENT_WIDTH_NAMES))
    elements = (HIDDEN_TENSORS * width + HEADS_TENSORS * max(width, heads * head_width)
                + INTERMEDIATE_TENSORS * active_intermediate_size(model)
                + EXPERT_HIDDEN_TENSORS * _experts_per_token(model) * width
                + score_elements(model, seq_length))
    of_indexer = INDEXER_SCORE_TENSORS * _first(config, ("index_n_heads",), 0) * seq_length
    return elements * element_size + max(_scan_elements(model), of_indexer) * SCAN_BYTES


def score_elements(model: nn.Module, seq_length: int) -> int:
    """Elements per token of the scores that eager attention holds at once; 0 where a kernel does
    the attention."""
    config = text_config(model)
    if config._attn_implementation != "eager":
        return 0
    return EAGER_SCORE_TENSORS * _first(config, ("num_attention_heads",), 0) * seq_length


def _hidden_size(model: nn.Module) -> int:
    return int(text_config(model).hidden_size)


def _first(config: Any, names: Sequence[str], default: int) -> int:
    """The first of the names that the config has, the largest where its layers differ in it."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(next((value for name in names
                     if isinstance(value := getattr(layer, name, None), int)), default)
               for layer in layers)


def _experts_per_token(model: nn.Module) -> int:
    """The experts of a layer that run for a token; 0 of a dense model."""
    config: Any = text_config(model)
    config = getattr(config, "ffn_config", config)
    chosen = _first(config, CHOSEN_NAMES, 0)
    # A class without transformers' interface of experts runs a token through all (Llama 4).
    groups_by_expert = getattr(type(model), "_can_set_experts_implementation", lambda: True)()
    return chosen if groups_by_expert or not chosen else _first(config, EXPERT_COUNT_NAMES, chosen)


def _scan_elements(model: nn.Module) -> int:
    """fp32 elements per token of the largest scan that no kernel does; 0 where one does."""
    return max((_elements_of_scan(module) for module in body_of(model).modules()
                if hasattr(module, "A_log")), default=0)


def _elements_of_scan(mixer: Any) -> int:
    """Of a mixer of transformers, by the settings that its families have in common."""
    if hasattr(mixer, "head_k_dim") or not hasattr(mixer, "ssm_state_size"):
        if is_installed("fla"):
            return 0
        heads = getattr(mixer, "num_v_heads", None) or mixer.num_heads
        width = max(getattr(mixer, name, 0) for name in ("head_k_dim", "head_v_dim", "head_dim"))
        # One that decays by channel has a chunk's matrix for each.
        by_channel = 1 if hasattr(mixer, "head_k_dim") else max(1, CHANNEL_SHARE * width)
        return int(heads * (CHUNK_ROWS * DELTA_CHUNK * by_channel + HEAD_VECTORS * width))
    if is_installed("mamba_ssm"):
        return 0
    if not hasattr(mixer, "chunk_size"):
        return int(STATES * mixer.intermediate_size * mixer.ssm_state_size)
    width = max(mixer.ssm_state_size, mixer.head_dim)
    return int(mixer.num_heads * (CHUNK_ROWS * mixer.chunk_size + HEAD_VECTORS * width))


def teacher_memory_budget(free_bytes: float) -> int:
    """Bytes of `free_bytes` for the teacher's activations; its hidden states get as many."""
    return max(0, int(free_bytes * TEACHER_MEMORY_SHARE))


def default_teacher_tokens(free_bytes: float, bytes_per_token: int) -> int:
    """Tokens that share a forward call of the teacher: the largest power of two that fits, or 1.

    A power of two, so that small differences of free memory seldom change it: the number of rows
    in a product changes its last digits.
    """
    fitting = teacher_memory_budget(free_bytes) // bytes_per_token
    return 1 << max(0, fitting.bit_length() - 1)


def hidden_states_fit(models: Sequence[nn.Module], element_size: int, tokens: int,
                      free_bytes: float) -> bool:
    """True if the hidden states of `tokens` tokens, waiting for the loss, fit their budget.

    models: of the teacher.
    """
    width = sum(_hidden_size(model) for model in models)
    return tokens * width * element_size <= teacher_memory_budget(free_bytes)
