"""Every multimodal family that is said to be held against its language part: the same logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.families import COMMON, FAMILIES, MROPE, drawn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from amid_ds.models.language_part import (
    HELD,
    language_config,
    multimodal_model,
    places_in_whole,
    why_not_apart,
)
from amid_ds.models.shape import body_of, head_module, text_config

IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2)
# By the text's model_type, what support.families has no family for.
TEXTS: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": MROPE, "qwen2_5_vl_text": MROPE, "glm4v_text": MROPE,
    "qwen3_vl_text": dict(head_dim=8, **MROPE),
    "qwen3_vl_moe_text": dict(head_dim=8, num_experts=4, **EXPERTS, **MROPE),
    "glm4v_moe_text": dict(
        head_dim=16, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, **EXPERTS, rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5,
            mrope_section=[1, 1, 2]))}


def config_of(family: str) -> Any:
    """A config of the family with a tiny text; its towers are its class's own size."""
    config = AutoConfig.for_model(family)
    text = text_config(config)
    values = FAMILIES[text.model_type].values if text.model_type in FAMILIES else {}
    small = type(text)(**{**COMMON, **values, **TEXTS.get(text.model_type, {})})
    name = next(name for name in ("text_config", "decoder", "generator")
                if getattr(config, name, None) is text)
    setattr(config, name, small)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(HELD & CONFIG_MAPPING_NAMES.keys()))
def test_a_whole_model_gives_text_the_logits_of_its_language_part(family):
    config = config_of(family)
    own = language_config(copy.deepcopy(config))
    assert why_not_apart(config, own) is None
    part = drawn(AutoModelForCausalLM.from_config(own))
    whole = multimodal_model(config).eval()
    body, head = places_in_whole(part, whole).values()
    # The towers stay on the meta device: text does not reach them.
    real = type(whole.get_submodule(body))._from_config(text_config(whole)).eval()
    real.load_state_dict(body_of(part).state_dict())
    whole.set_submodule(body, real)
    whole.set_submodule(head, copy.deepcopy(head_module(part)))
    # Llama 4's wrapper asks for pictures' outputs that a text has none of (transformers 5.24).
    inner = whole.language_model if family == "llama4" else whole
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, use_cache=False).logits for model in (inner, part))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
