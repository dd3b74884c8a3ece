"""The teacher's activation memory per token, and the tokens that one forward call may have.

Training and the plan both size the teacher's forward call; this module is the one owner of the
estimate. It is plain arithmetic on a model's config: no tensors, no device, no collectives. The
estimate is generous, so that a pass of that size is safe; planning/memory.py counts the bytes
that a pass is expected to hold at its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

# Of a rank's free memory, for one teacher pass, and as much again for the hidden states that wait
# for the loss. The rest is for the student's activations, gathered weights and the loss.
TEACHER_MEMORY_SHARE = 1 / 8
# Elements per token that one layer may hold at once without autograd: the residual stream, its
# norm, query, key, value, the attention's output and two projections' results, each of the hidden
# size; an MLP's gate, its activation, up and their product.
HIDDEN_TENSORS = 8
INTERMEDIATE_TENSORS = 4
# The width of an MLP over that of the residual stream, where a config does not name it (GPT-2).
DEFAULT_MLP_RATIO = 4
# Eager attention holds a token's scores with every other, and their softmax.
EAGER_SCORE_TENSORS = 2


class TransformerConfig(Protocol):
    """The attributes read here of a transformers config; `intermediate_size` is optional."""

    hidden_size: int
    num_attention_heads: int
    _attn_implementation: str


def intermediate_size(config: object, hidden_size: int) -> int:
    """The width between an MLP's two products: the config's, else four times `hidden_size`."""
    named = cast("int | None", getattr(config, "intermediate_size", None))
    return named or DEFAULT_MLP_RATIO * hidden_size


def teacher_bytes_per_token(configs: Sequence[TransformerConfig], element_size: int,
                            seq_length: int) -> int:
    """Bytes of one token's activations, of one layer, in a forward pass without gradients.

    `configs`: of the models of the teacher, which run one after another: the largest counts, and
    the hidden states of those before. `element_size`: bytes of an element; `seq_length`: tokens of
    a row, which eager attention compares with each other.
    """
    return (max(_layer_bytes(config, element_size, seq_length) for config in configs)
            + sum(config.hidden_size for config in configs[:-1]) * element_size)


def _layer_bytes(config: TransformerConfig, element_size: int, seq_length: int) -> int:
    width = config.hidden_size
    elements = HIDDEN_TENSORS * width + INTERMEDIATE_TENSORS * intermediate_size(config, width)
    if config._attn_implementation == "eager":
        elements += EAGER_SCORE_TENSORS * config.num_attention_heads * seq_length
    return elements * element_size


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


def hidden_states_fit(configs: Sequence[TransformerConfig], element_size: int, tokens: int,
                      free_bytes: float) -> bool:
    """True if the hidden states of `tokens` tokens, waiting for the loss, fit their budget.

    configs: of the models of the teacher.
    """
    width = sum(config.hidden_size for config in configs)
    return tokens * width * element_size <= teacher_memory_budget(free_bytes)
