"""Do a model's vocabulary and positions hold the ids and rows that it is to be given?

Judged by the model's structure, so one on the meta device answers: before a weight is read.
"""

from __future__ import annotations

import torch
from torch import nn

from amid_ds.errors import InputError
from amid_ds.models.shape import body_of, embedding_of, text_config, vocabulary_rows

# Rows that some tables of positions have before the first one: OPT and BART have 2.
MOST_OFFSET = 2


def require_rows(model: nn.Module, name: str, vocab_size: int) -> None:
    """Raise InputError unless `model` has a row for every id below `vocab_size`.

    name: for the message, such as "the student runs/student".
    """
    rows = vocabulary_rows(model)
    if rows < vocab_size:
        raise InputError(
            f"{name} has {rows} rows in its vocabulary, and its tokenizer's ids end at "
            f"{vocab_size - 1}",
            "a model with a row for every id of the tokenizer",
            "resize the model's embeddings, or use the tokenizer that it was made with")


def require_positions(model: nn.Module, name: str, length: int) -> None:
    """Raise InputError if `model` has a table of positions that rows of `length` tokens exceed."""
    limit = table_of_positions(model)
    if limit is not None and length > limit:
        raise InputError(f"rows of {length} tokens, and {name} has {limit} positions",
                         f"rows of at most {limit} tokens",
                         f"set train.seq_length={limit}, or in `eval` --seq-length {limit}; or "
                         "choose a model whose positions are computed")


def table_of_positions(model: nn.Module) -> int | None:
    """The positions that a model has a table for, learned or not; None: it computes them.

    A rotary model's max_position_embeddings says how long its training rows were, and is no limit.
    """
    config = text_config(model)
    if getattr(getattr(config, "attn_config", None), "alibi", False):
        # MPT makes its biases once, for so many.
        return int(config.max_seq_len)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    words = embedding_of(model)
    for module in body_of(model).modules():
        if isinstance(module, nn.Embedding):
            found = (module is not words
                     and limit <= module.num_embeddings <= limit + MOST_OFFSET)
        else:
            # GPT-J and CTRL keep a table of sines.
            tensors = {**vars(module), **dict(module.named_buffers(recurse=False))}
            found = any(isinstance(tensor, torch.Tensor) and "pos" in name and tensor.dim() == 2
                        and len(tensor) == limit for name, tensor in tensors.items())
        if found:
            return int(limit)
    return None
