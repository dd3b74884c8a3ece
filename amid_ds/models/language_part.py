"""The language part of a multimodal checkpoint, as the ordinary causal LM of its text.

A multimodal model is a body of text with a head, beside towers for pictures. The model here is the
causal LM of the text's own config, such as Gemma3ForCausalLM of a Gemma3ForConditionalGeneration,
or one of another family that computes the same. Which tensors of the files are its own is not
written down: transformers' loader for the whole model is followed (weight_map.py), and what it
gives to the body and the head is taken. The towers are built on the meta device at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from amid_ds.models.shape import body_name, body_of, head_module, text_config

# Families without a causal LM of their own, by the model_type of their text, and the one whose
# layers are the same where all of a token's positions are equal, as in text alone.
TWINS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3",
         "qwen3_vl_moe_text": "qwen3_moe", "glm4v_text": "glm4", "glm4v_moe_text": "glm4_moe"}
# Of rotary positions with several axes: what a family with one does not know.
AXES = ("mrope_section", "mrope_interleaved")


def is_multimodal(config: Any) -> bool:
    """True for the config of a multimodal model: text is one of several parts."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    return (text_config(config) is not config and not config.is_encoder_decoder
            and any(type(config) in mapping for mapping in (
                MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)))


def language_config(config: Any) -> Any:
    """The config of the causal LM that is the language part of a multimodal one.

    Any other config is returned as it is, and the text's where no causal LM is known for it.
    """
    if not is_multimodal(config):
        return config
    text = text_config(config)
    if text.model_type in TWINS:
        text = _as_twin(text, TWINS[text.model_type])
    # The whole model's count for its head and its files; a part's own may be its class's default.
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    text.dtype = text.dtype or config.dtype
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    text.name_or_path = config.name_or_path
    return text


def _as_twin(text: Any, model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    twin = CONFIG_MAPPING[model_type]
    known = twin().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    values = {key: value for key, value in text.to_dict().items() if key in known}
    rope = values.get("rope_parameters")
    if rope is not None:
        kept = {key: value for key, value in rope.items() if key not in AXES}
        kept["rope_type"] = "default" if rope["rope_type"] == "mrope" else rope["rope_type"]
        values["rope_parameters"] = kept
    return twin(**values)


def multimodal_model(config: Any) -> nn.Module:
    """The whole model of a multimodal config, on the meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        whole: nn.Module = AutoModelForImageTextToText.from_config(config)
    return whole


def places_in_whole(part: nn.Module, whole: nn.Module) -> dict[str, str]:
    """By the names of body and head in the causal LM `part`, those in the multimodal `whole`.

    Raises LookupError where the whole has no such body and head.
    """
    from transformers import PreTrainedModel

    shapes = _shapes(body_of(part))
    bodies = [name for name, module in whole.named_modules()
              if isinstance(module, PreTrainedModel) and _shapes(module) == shapes]
    heads = [name for name, module in whole.named_modules() if module is head_module(whole)]
    if len(bodies) != 1 or not heads or (_shapes(head_module(whole))
                                         != _shapes(head_module(part))):
        raise LookupError(f"{type(whole).__name__} is not a {type(part).__name__} with towers")
    head = next(name for name, module in part.named_modules() if module is head_module(part))
    return {body_name(part): bodies[0], head: heads[0]}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict(keep_vars=True).items()}
