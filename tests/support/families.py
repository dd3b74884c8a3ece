"""Tiny models of every family that is tried, with random weights that all matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

Kind = Literal["dense", "mixture", "hybrid", "multimodal"]
VOCABULARY = 320
# What every config is told: rotary models of two layers, heads in two groups.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, eos_token_id=1, pad_token_id=2, bos_token_id=1, hidden_size=32,
    intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128)
WINDOW = dict(head_dim=8, sliding_window=8)
# Every other layer of those that have two kinds of attention has the window.
MIXED = dict(**WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
ROUTED = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
              n_shared_experts=1, n_group=1, topk_group=1)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
             linear_num_value_heads=4)
DELTA_LAYERS = dict(head_dim=16, **DELTA, layer_types=["linear_attention", "full_attention"])
LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
              qk_nope_head_dim=8, v_head_dim=8)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8,
              mamba_chunk_size=8)
# The vision tower of the multimodal ones, as small as their classes take it.
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=4,
                   out_hidden_size=32, num_position_embeddings=16)
QWEN_IDS = dict(image_token_id=310, video_token_id=311, vision_start_token_id=312,
                vision_end_token_id=313)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                  mrope_section=[1, 1, 2]))


@dataclass(frozen=True)
class Family:
    """A family by its transformers `model_type`.

    `values` are its config's beside COMMON, None for one of these that it does not have; of a
    multimodal one those of its text config, and `whole` the other parts' and the wrapper's own.
    """

    title: str
    kind: Kind
    values: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] | None = None
    notes: str = ""

    @property
    def name(self) -> str:
        """The key of FAMILIES, which is the model type."""
        return next(name for name, family in EVERY.items() if family is self)

    def tiny_config(self, **changes: Any) -> Any:
        """Return the config of the tiny model; `changes` are values of its text's config."""
        from transformers import AutoConfig

        text = {key: value for key, value in {**COMMON, **self.values, **changes}.items()
                if value is not None or key not in COMMON}
        if self.whole is None:
            return AutoConfig.for_model(self.name, **text)
        tied = {key: text[key] for key in ("tie_word_embeddings",) if key in text}
        return AutoConfig.for_model(self.name, text_config=text, **tied, **self.whole)


EVERY: dict[str, Family] = {
    "llama": Family("Llama", "dense", dict(tie_word_embeddings=False)),
    "mistral": Family("Mistral", "dense", WINDOW, notes="sliding window"),
    "qwen2": Family("Qwen2", "dense", dict(tie_word_embeddings=True)),
    "qwen3": Family("Qwen3", "dense", dict(head_dim=16)),
    "gemma2": Family("Gemma 2", "dense", dict(
        **MIXED, query_pre_attn_scalar=8, final_logit_softcapping=5.0,
        attn_logit_softcapping=10.0)),
    "gemma3_text": Family("Gemma 3, text", "dense", dict(**MIXED, query_pre_attn_scalar=32)),
    "gemma4_text": Family("Gemma 4, text", "dense", dict(
        **WINDOW, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, final_logit_softcapping=5.0),
        notes="per-layer embeddings, the last layers share keys and values"),
    "phi3": Family("Phi-3", "dense", dict(sliding_window=8)),
    "olmo2": Family("OLMo 2", "dense"),
    "granite": Family("Granite", "dense", dict(
        embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5,
        attention_multiplier=0.3)),
    "cohere2": Family("Cohere 2", "dense", dict(**MIXED, logit_scale=0.5)),
    "smollm3": Family("SmolLM3", "dense", dict(no_rope_layers=[1, 0])),
    "glm4": Family("GLM-4", "dense", dict(head_dim=8)),
    "gpt2": Family("GPT-2", "dense", dict(
        intermediate_size=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "gpt_neox": Family("GPT-NeoX", "dense"),
    "opt": Family("OPT", "dense", dict(ffn_dim=64, dropout=0.0, word_embed_proj_dim=16),
                  notes="embeddings narrower than the body"),
    "bloom": Family("BLOOM", "dense", dict(intermediate_size=None), notes="ALiBi"),
    "mixtral": Family("Mixtral", "mixture", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": Family("Qwen3-MoE", "mixture", dict(
        **EXPERTS, head_dim=8, num_hidden_layers=3, mlp_only_layers=[0], norm_topk_prob=True)),
    "glm4_moe": Family("GLM-4.5", "mixture", dict(
        **ROUTED, head_dim=8, first_k_dense_replace=1, use_qk_norm=True,
        routed_scaling_factor=1.5)),
    "deepseek_v3": Family("DeepSeek-V3", "mixture", dict(
        {**ROUTED, **LATENT}, n_group=2, first_k_dense_replace=1), notes="latent attention"),
    "deepseek_v32": Family("DeepSeek-V3.2", "mixture", dict(
        {**ROUTED, **LATENT}, mlp_layer_types=["dense", "sparse"], index_topk=8,
        index_head_dim=16, index_n_heads=16), notes="latent attention, sparse indexer"),
    "gpt_oss": Family("gpt-oss", "mixture", dict(
        **MIXED, num_local_experts=4, num_experts_per_tok=2), notes="sinks, sliding window"),
    "llama4_text": Family("Llama 4, text", "mixture", dict(
        head_dim=8, intermediate_size=16, intermediate_size_mlp=48, num_local_experts=4,
        moe_layers=[1], attention_chunk_size=8, no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"]),
        notes="chunked attention, one expert chosen"),
    "qwen3_next": Family("Qwen3-Next", "hybrid", dict(
        **EXPERTS, **DELTA_LAYERS, shared_expert_intermediate_size=16)),
    "qwen3_5_text": Family("Qwen3.5, text", "hybrid", DELTA_LAYERS),
    "qwen3_5_moe_text": Family("Qwen3.5 mixture, text", "hybrid", dict(
        **EXPERTS, **DELTA_LAYERS, shared_expert_intermediate_size=16)),
    "olmo_hybrid": Family("OLMo-Hybrid", "hybrid", dict(
        **{**DELTA, "linear_num_key_heads": 4}, num_key_value_heads=4,
        layer_types=["linear_attention", "full_attention"])),
    "granitemoehybrid": Family("Granite 4 hybrid", "hybrid", dict(
        **MAMBA2, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16,
        embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5,
        attention_multiplier=0.3, layer_types=["linear_attention", "full_attention"])),
    "bamba": Family("Bamba", "hybrid", dict(**MAMBA2, attn_layer_indices=[1])),
    "nemotron_h": Family("Nemotron-H", "hybrid", dict(
        **ROUTED, head_dim=8, num_hidden_layers=None, ssm_state_size=8, mamba_num_heads=8,
        mamba_head_dim=8, n_groups=2, chunk_size=8, moe_shared_expert_intermediate_size=16,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"])),
    "falcon_h1": Family("Falcon-H1", "hybrid", dict(
        {**MAMBA2, "mamba_n_groups": 1}, mamba_d_ssm=64, key_multiplier=0.7,
        lm_head_multiplier=0.8, embedding_multiplier=2.0, attention_out_multiplier=0.9,
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 1.0], ssm_out_multiplier=0.8,
        mlp_multipliers=[0.9, 1.1])),
    "jamba": Family("Jamba", "hybrid", dict(
        num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False)),
    "zamba2": Family("Zamba2", "hybrid", dict(
        num_key_value_heads=4, num_hidden_layers=4, mamba_d_state=8, mamba_ngroups=2,
        n_mamba_heads=8, chunk_size=8, layers_block_type=[
            "linear_attention", "hybrid", "linear_attention", "hybrid"],
        attention_hidden_size=64, attention_head_dim=16, mamba_headdim=8, num_query_groups=4,
        kv_channels=8, hybrid_layer_ids=[1, 3], adapter_rank=4, use_mem_rope=True),
        notes="one attention block shared by layers"),
    "recurrent_gemma": Family("RecurrentGemma", "hybrid", dict(
        num_key_value_heads=1, num_hidden_layers=3, lru_width=32, attention_window_size=8)),
    "lfm2": Family("LFM2", "hybrid", dict(
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])),
    "lfm3": Family("LFM3", "hybrid", dict(
        head_dim=8, num_hidden_layers=3, conv_L_cache=3, sliding_window=8,
        layer_types=["conv", "sliding_attention", "full_attention"])),
    "kimi_linear": Family("Kimi Linear", "hybrid", dict(
        {**LATENT, "q_lora_rank": None}, moe_intermediate_size=16, num_experts=4,
        num_experts_per_token=2, num_shared_experts=1, linear_head_dim=8, linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"])),
    "mamba": Family("Mamba", "hybrid", dict(
        state_size=4, time_step_rank=4, num_attention_heads=None, num_key_value_heads=None)),
    "mamba2": Family("Mamba-2", "hybrid", dict(
        num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8,
        num_attention_heads=None, num_key_value_heads=None)),
    "gemma3": Family("Gemma 3", "multimodal", dict(**MIXED, query_pre_attn_scalar=32), dict(
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, image_size=16, patch_size=4),
        mm_tokens_per_image=4, image_token_index=310, boi_token_index=311, eoi_token_index=312)),
    "gemma4": Family("Gemma 4", "multimodal", dict(
        **MIXED, global_head_dim=16, hidden_size_per_layer_input=8, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16, enable_moe_block=True,
        vocab_size_per_layer_input=VOCABULARY), dict(
            vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                               patch_size=4, position_embedding_size=16),
            audio_config=None, image_token_id=310, video_token_id=311, audio_token_id=312,
            boi_token_id=313, eoi_token_id=314, boa_token_id=315, eoa_token_index=316),
        notes="a dense block and experts in each layer"),
    "qwen3_5": Family("Qwen3.5", "multimodal", DELTA_LAYERS, dict(
        vision_config=QWEN_VISION, **QWEN_IDS)),
    "qwen3_5_moe": Family("Qwen3.5 mixture", "multimodal", dict(
        **EXPERTS, **DELTA_LAYERS, shared_expert_intermediate_size=16), dict(
            vision_config=QWEN_VISION, **QWEN_IDS)),
    "llama4": Family("Llama 4", "multimodal", dict(
        head_dim=8, intermediate_size=16, intermediate_size_mlp=48, num_local_experts=4,
        moe_layers=[1], attention_chunk_size=8, no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"]), dict(
            vision_config=dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1,
                               num_attention_heads=2, image_size=16, patch_size=4,
                               vision_output_dim=16, projector_input_dim=16,
                               projector_output_dim=16),
            image_token_index=310, boi_token_index=311, eoi_token_index=312)),
    "mllama": Family("Llama 3.2 Vision", "multimodal", dict(
        num_hidden_layers=3, cross_attention_layers=[1]), dict(
            vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_global_layers=1, attention_heads=2, image_size=16,
                               patch_size=4, vision_output_dim=32,
                               intermediate_layers_indices=[0]),
            image_token_index=310), notes="cross attention to images, unused by text"),
    "mistral3": Family("Mistral Small 3", "multimodal", dict(
        model_type="mistral", head_dim=8, tie_word_embeddings=False), dict(
            vision_config=dict(model_type="pixtral", hidden_size=16, intermediate_size=16,
                               num_hidden_layers=1, num_attention_heads=2, head_dim=8,
                               image_size=16, patch_size=4), image_token_index=310)),
    "qwen2_5_vl": Family("Qwen2.5-VL", "multimodal", MROPE, dict(
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                           patch_size=4, out_hidden_size=32, window_size=16,
                           fullatt_block_indexes=[0]), **QWEN_IDS)),
    "qwen3_vl": Family("Qwen3-VL", "multimodal", dict(head_dim=8, **MROPE), dict(
        vision_config=dict(QWEN_VISION, deepstack_visual_indexes=[0]), **QWEN_IDS)),
    "glm4v": Family("GLM-4.1V", "multimodal", MROPE, dict(
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                           image_size=16, patch_size=4, out_hidden_size=32),
        image_token_id=310, video_token_id=311, image_start_token_id=312,
        image_end_token_id=313, video_start_token_id=314, video_end_token_id=315)),
}
# What this transformers knows of them.
FAMILIES = {name: family for name, family in EVERY.items() if name in CONFIG_MAPPING_NAMES}


def tiny_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a model of the family in fp32; a multimodal one whole, with its vision tower.

    Every weight, bias, norm, gate, sink and router is drawn, so that none can be left out
    unseen. `changes` are values of its (text's) config.
    """
    torch.manual_seed(seed)
    return drawn(_built(name, torch.float32, changes), seed)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in eval mode, random in every weight and persistent buffer."""
    draw = torch.Generator().manual_seed(seed)
    persistent = model.state_dict().keys()
    tensors = [*model.named_parameters(),
               *((key, buffer) for key, buffer in model.named_buffers() if key in persistent)]
    with torch.no_grad():
        for key, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=draw)
            if tensor.dim() < 2 or key.endswith("A_log"):
                # Around what the class begins with: 1 or 0, or rates of decay.
                if tensor.is_floating_point():
                    tensor.add_(0.2 * noise)
            else:
                tensor.copy_((0.4 if "conv" in key else 0.25) * noise)
    return model.eval()


def tiny_meta(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """`tiny_model` on the meta device."""
    with torch.device("meta"):
        return _built(name, dtype, changes)


def _built(name: str, dtype: torch.dtype, changes: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    family = FAMILIES[name]
    loader = AutoModelForCausalLM if family.whole is None else AutoModelForImageTextToText
    return loader.from_config(family.tiny_config(**changes), dtype=dtype)


def plain_model(folder: Path) -> nn.Module:
    """Transformers' own model of a folder, by whichever class opens it, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    return (AutoModelForCausalLM if known else AutoModelForImageTextToText).from_pretrained(folder)


def save_tiny(name: str, folder: Path, tokenizer: Any = None, seed: int = 0,
              **changes: Any) -> Path:
    """Save tiny_model(...) and a tokenizer as from_pretrained opens them; return the folder.

    Without one the tokenizer is support.models.make_tokenizer's, of fewer ids than the model has.
    """
    from support.models import make_tokenizer

    tiny_model(name, seed, **changes).save_pretrained(folder)
    if tokenizer is None:
        make_tokenizer(folder)
    else:
        tokenizer.save_pretrained(folder)
    return folder
