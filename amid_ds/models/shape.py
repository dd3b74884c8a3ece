"""The shape of a transformers causal LM: its text configuration, body, layers, head, embedding.

Nothing else asks a config or a model for them, because families differ: a configuration may have
several parts, and a body another name than its class says. Scale and cap of the logits are in
head_form.py. Every function takes a model on any device, sharded or not.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(described: Any) -> Any:
    """The configuration of the language model, of a model or a configuration."""
    config: Any = described.config if isinstance(described, nn.Module) else described
    return config.get_text_config()


def body_of(model: nn.Module) -> nn.Module:
    """The part of the model that ends in hidden states; the model itself if there is none."""
    name = body_name(model)
    return model.get_submodule(name) if name else model


def body_name(model: Any) -> str:
    """The body's name in the model, such as `model` or `transformer`; empty if there is none."""
    children = dict(model.named_children())
    # Llama 4's class gives the name that the body has in the multimodal model.
    if model.base_model_prefix in children:
        return str(model.base_model_prefix)
    words = embedding_of(model)
    return next((name for name, child in children.items()
                 if child is not words and any(each is words for each in child.modules())), "")


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The body's stack of layers; an empty list where it has none."""
    stacks = (module for module in body_of(model).modules() if isinstance(module, nn.ModuleList))
    return next(stacks, nn.ModuleList())


def head_module(model: nn.Module) -> Any:
    """The linear layer that ends in logits."""
    return model.get_output_embeddings()   # type: ignore[operator]


def embedding_of(model: nn.Module) -> Any:
    """The table of a hidden state for each id."""
    return model.get_input_embeddings()   # type: ignore[operator]


def is_tied(model: nn.Module) -> bool:
    """True where the head's weight is the embedding's."""
    return head_module(model).weight is embedding_of(model).weight


def vocabulary_rows(model: nn.Module) -> int:
    """The ids for which both the embedding and the head have a row.

    Of weights that are whole, or on the meta device.
    """
    return min(int(table(model).weight.shape[0]) for table in (head_module, embedding_of))
