"""The language part of a multimodal checkpoint, as the ordinary causal LM of its text.

A multimodal model is a body of text with a head, beside towers for pictures. The model here is the
causal LM of the text's own config, such as Gemma3ForCausalLM of a Gemma3ForConditionalGeneration,
or one of another family that computes the same. Which tensors of the files are its own is not
written down: transformers' loader for the whole model is followed (weight_map.py), and what it
gives to the body and the head is taken. The towers are built on the meta device at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from amid_ds.models.shape import body_name, body_of, head_module, text_config

# Families without a causal LM of their own, by the model_type of their text: the one whose layers
# are the same where all of a token's positions are equal, as in text alone, and what it needs told.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}), "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4v_text": ("glm4", {"attention_bias": True}), "glm4v_moe_text": ("glm4_moe", {})}
# The multimodal families, by model_type, whose logits of text were held against those of their
# language part (tests/test_language_part_families.py).
HELD = frozenset(
    "apertus1p5 aria cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 fuyu gemma3 gemma4 "
    "gemma4_unified glm46v glm4v glm4v_moe glmga got_ocr2 hyperclovax_vision_v2 idefics2 inkling2 "
    "inkling2_loop inkling_mm_model internvl janus kimi_k25 lfm2_vl lfm3_vl lighton_ocr llama4 "
    "llava llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7 "
    "minimax_m3_vl mistral3 ovis2 paligemma pp_chart2table qianfan_ocr qwen2_5_vl qwen2_vl qwen3_5 "
    "qwen3_5_moe qwen3_vl qwen3_vl_moe qwen4_exp shieldgemma2 smolvlm video_llama_3 video_llava "
    "vipllava".split())
# By the model_type of the whole, why its logits of text are not those of its text's causal LM.
UNSCALED = "its class leaves out the scale that its text's model gives its logits"
NOT_THE_SAME = {
    "cohere2_vision": UNSCALED, "aya_vision": UNSCALED,
    "mllama": "its text's model has layers of cross-attention that text alone skips, and "
              "AutoModelForCausalLM does not open its text's config"}
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
        text = _as_twin(text, *TWINS[text.model_type])
    # The whole model's count for its head and its files; a part's own may be its class's default.
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    text.dtype = text.dtype or config.dtype
    text.name_or_path = config.name_or_path
    return text


def why_not_apart(config: Any, part: Any) -> str | None:
    """Why the language part of a multimodal config, whose own is `part`, is no model by itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.model_type in NOT_THE_SAME:
        return NOT_THE_SAME[config.model_type]
    if type(part) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return (f"its language part ({part.model_type}) has no causal LM in transformers, nor a "
                "family known here whose layers are the same")
    return None


def _as_twin(text: Any, model_type: str, told: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    twin = CONFIG_MAPPING[model_type]
    # Layers read head_dim where there is one, known to the class or not.
    known = {*twin().to_dict(), "head_dim"} - {"model_type", "architectures",
                                               "transformers_version"}
    values = {"head_dim": text.hidden_size // text.num_attention_heads, **text.to_dict(), **told}
    values = {key: value for key, value in values.items() if key in known}
    rope = values.get("rope_parameters")
    if rope is not None:
        # Half of a head, where GLM-4's config is told nothing.
        kept = {"partial_rotary_factor": 1.0,
                **{key: value for key, value in rope.items() if key not in AXES}}
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
