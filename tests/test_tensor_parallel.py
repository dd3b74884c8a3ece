"""A tensor-parallel group splits the bodies whose own plan divides evenly; without weights."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as t

from amid_ds.config.recipe import Lora
from amid_ds.models.adapters import inject
from amid_ds.models.tensor_parallel import (
    layer_specs,
    shrink_to_tp_rank,
    split_parameters,
    tp_unsupported_reason,
    vocab_shard,
)

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=40, head_dim=8, pad_token_id=0, bos_token_id=1,
             eos_token_id=1)


def shell(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(t, f"{family}ForCausalLM")(getattr(t, f"{family}Config")(**SMALL))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral"])
def test_every_linear_layer_of_a_planned_body_is_split_and_nothing_else(family):
    model = shell(family)
    assert tp_unsupported_reason(model, 2) is None
    kinds = {}
    for spec in layer_specs(model, "student"):
        for name, _ in torch.nn.ModuleDict({"student": model}).named_parameters():
            if any(re.match(pattern, name) for pattern in spec["patterns"]):
                kinds[name] = spec["partition_type"]
    for name, module in model.named_modules():
        kind = kinds.pop(f"student.{name}.weight", None)
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert kind == ("row" if name.endswith(("o_proj", "down_proj")) else "column"), name
        else:
            assert kind == ("skip" if name.endswith(("q_norm", "k_norm")) else None), name
    assert kinds == {}
    model.requires_grad_(False)
    assert all(not spec["grad_allreduce"] for spec in layer_specs(model, "teacher"))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_an_adapters_factor_is_split_with_its_layer(family):
    model = shell(family)
    inject(model, Lora(rank=2, targets=["q_proj", "down_proj"]))
    assert tp_unsupported_reason(model, 2) is None
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    split = split_parameters(model, 2)
    assert all(any(re.match(pattern, f"student.{name}") for spec in layer_specs(model, "student")
                   for pattern in spec["patterns"])
               for name in split if not name.startswith("lm_head"))
    shrink_to_tp_rank(model, 2)
    halves = {name: [dim for dim in range(len(shape)) if 2 * parameter.shape[dim] == shape[dim]]
              for (name, parameter), shape in zip(model.named_parameters(), whole.values(),
                                                  strict=True)}
    assert {name for name, dims in halves.items() if dims} | {"lm_head.weight"} == split
    layer = "model.layers.0."
    for target, dims in (("self_attn.q_proj", ([0], [], [0])), ("mlp.down_proj", ([1], [1], []))):
        parts = ("base_layer", "lora_A.default", "lora_B.default")
        assert tuple(halves[f"{layer}{target}.{part}.weight"] for part in parts) == dims


def test_a_tied_embedding_in_the_plan_stays_whole_and_its_body_is_split():
    tied = shell("Gemma2")
    # As transformers 5.17 adds it, and 5.24 does not.
    tied.config.base_model_tp_plan = {**tied.config.base_model_tp_plan,
                                      "embed_tokens": "embedding_rowwise"}
    assert tp_unsupported_reason(tied, 2) is None
    assert not any("embed" in name for name in split_parameters(tied, 2))
    assert not any("embed" in pattern for spec in layer_specs(tied, "student")
                   for pattern in spec["patterns"])


def test_a_body_that_its_plan_does_not_split_evenly_stays_whole_and_says_why():
    assert "num_key_value_heads 2" in tp_unsupported_reason(shell("Llama"), 4)
    assert "moe_tp_experts" in tp_unsupported_reason(shell("Mixtral"), 2)
    assert "no tensor-parallel plan" in tp_unsupported_reason(shell("StableLm"), 2)
    # As if transformers had forgotten the norm on split heads.
    forgetful = shell("Qwen3")
    plan = forgetful.config.base_model_tp_plan
    forgetful.config.base_model_tp_plan = {pattern: plan[pattern] for pattern in plan
                                           if not pattern.endswith("q_norm")}
    assert tp_unsupported_reason(forgetful, 2) == "layers.0.self_attn.q_norm is not in its plan"


@pytest.mark.parametrize("vocabulary", [31, 127, 128, 129, 320, 50257, 151669])
def test_the_rows_of_the_common_vocabulary_cover_it_without_a_gap_and_no_shard_is_empty(vocabulary):
    for size in (2, 3, 4, 7, 8):
        shards = [vocab_shard(vocabulary, rank, size, None) for rank in range(size)]
        ends = [0, *(shard.stop for shard in shards)]
        assert [shard.start for shard in shards] == ends[:-1] and ends[-1] == vocabulary
        widths = [shard.width for shard in shards]
        assert min(widths) > 0
        if vocabulary >= 64 * size:
            # Rows of logits are then aligned on every rank but the last.
            assert all(end % 64 == 0 for end in ends[:-1])
            assert max(widths) - min(widths) < 128
        else:
            assert max(widths) - min(widths) <= 1
    assert vocab_shard(vocabulary, 0, 1, None) is None
