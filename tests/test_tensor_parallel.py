"""A tensor-parallel group splits a body block by block, by its plan; without weights."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from support.families import FAMILIES, tiny_meta

from amid_ds.config.recipe import Lora
from amid_ds.models.adapters import inject
from amid_ds.models.shape import head_module
from amid_ds.models.tensor_parallel import (
    shrink_to_tp_rank,
    split_kinds,
    split_parameters,
    vocab_shard,
    whole_parts,
)
from amid_ds.models.tp_plan import PartCut, blocks_of, part_of, whole_of
from amid_ds.planning.body_costs import count_body

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=40, head_dim=8, pad_token_id=0, bos_token_id=1,
             eos_token_id=1)
QUICK = {"llama", "gemma4_text", "deepseek_v3", "gpt_oss", "qwen3_next"}
# Families of text alone.
TEXT = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, family in FAMILIES.items() if family.whole is None]


def shell(family: str, **changes) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(t, f"{family}ForCausalLM")(
            getattr(t, f"{family}Config")(**{**SMALL, **changes}))


def reasons(model: torch.nn.Module, ranks: int) -> dict[str, str]:
    return {block.name: block.whole for block in blocks_of(model, ranks) if block.whole}


def dims_halved(model: torch.nn.Module) -> dict[str, list[int]]:
    """The dimensions that `shrink_to_tp_rank` halves of each parameter that it changes."""
    before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shrink_to_tp_rank(model, 2)
    after = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(b in (a, a // 2) for name in before
               for a, b in zip(before[name], after[name], strict=True))
    return {name: [dim for dim, (a, b) in enumerate(zip(before[name], after[name], strict=True))
                   if a != b] for name in before if before[name] != after[name]}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral"])
def test_every_linear_layer_of_a_planned_body_is_split_and_nothing_else(family):
    model = shell(family)
    assert reasons(model, 2) == {} and whole_parts(model, blocks_of(model, 2)) == []
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            is_row = name.endswith(("o_proj", "down_proj"))
            expected[f"{name}.weight"] = [1 if is_row else 0]
            if module.bias is not None and not is_row:
                expected[f"{name}.bias"] = [0]
    summed = {name for block in blocks_of(model, 2) for name in block.summed}
    assert summed == {name for name, _ in model.named_parameters()
                      if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert dims_halved(model) == expected


@pytest.mark.parametrize("name", TEXT)
def test_what_is_split_counted_and_shrunk_is_one_and_the_same_and_runs_by_its_shapes(name):
    model = tiny_meta(name)
    blocks = blocks_of(model, 2)
    head = {each for each, parameter in model.named_parameters()
            if any(parameter is own for own in head_module(model).parameters())}
    split = {each for block in blocks for each in block.cuts}
    assert split_parameters(model, 2) - head == split
    assert {each.rpartition("/")[0] or each for each in split_kinds(blocks)} == {
        ".".join("*" if part.isdigit() else part for part in each.split(".")) for each in split}
    whole = sum(part.count for part in whole_parts(model, blocks))
    of_layers = sum(parameter.numel() for each, parameter in model.named_parameters()
                    if ".layers." in each and parameter.dim() > 1)
    cut = sum(parameter.numel() for each, parameter in model.named_parameters()
              if each in split and parameter.dim() > 1)
    assert whole + cut == of_layers or not blocks
    assert dims_halved(model).keys() == split
    if blocks and not whole_parts(model, blocks):
        # Of every product half is left, in forward and backward.
        assert count_body(model, 1, 8).flops < 0.6 * count_body(tiny_meta(name), 1, 8).flops
    else:
        count_body(model, 1, 8)


def test_of_a_mixture_attention_experts_and_shared_experts_are_split():
    for name, unsplit in (("mixtral", ["gate"]), ("qwen3_moe", ["gate"]),
                          ("deepseek_v3", ["kv_a_proj_with_mqa", "q_a_proj", "gate"]),
                          ("gpt_oss", ["router", "experts"]), ("llama4_text", ["router"])):
        model = tiny_meta(name)
        parts = whole_parts(model, blocks_of(model, 2))
        # Of gpt-oss's experts the bias of the output.
        assert [part.name.rpartition(".")[2] for part in parts] == unsplit, name
        assert sum(part.count for part in parts) < 0.07 * sum(
            parameter.numel() for parameter in model.parameters()), name
    packed = split_kinds(blocks_of(tiny_meta("mixtral"), 2))
    assert "model.layers.*.mlp.experts.gate_up_proj/2" in packed
    assert "model.layers.*.mlp.experts.down_proj" in packed


def test_of_a_hybrid_the_mixer_without_a_plan_alone_stays_whole():
    for name in ("falcon_h1", "bamba", "nemotron_h"):
        model = tiny_meta(name)
        names = {part.name.rpartition(".")[2] for part in whole_parts(model, blocks_of(model, 2))}
        assert names <= {"in_proj", "out_proj", "conv1d", "gate"}, name
    # The heads of one layer in two: the plan's words fit both, and only one of them.
    assert list(reasons(tiny_meta("kimi_linear"), 2)) == ["model.layers.0.self_attn"]


def test_both_halves_of_a_packed_weight_are_cut():
    whole = torch.arange(8).view(8, 1)
    cut = PartCut(0, 2)
    parts = [part_of(whole, 0, cut.ranges(8, rank, 2)) for rank in (0, 1)]
    assert parts[0].flatten().tolist() == [0, 1, 4, 5]
    assert torch.equal(whole_of(parts, cut), whole)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_an_adapters_factor_is_split_with_its_layer(family):
    model = shell(family)
    inject(model, Lora(rank=2, targets=["q_proj", "down_proj"]))
    assert reasons(model, 2) == {}
    split = split_parameters(model, 2)
    halves = dims_halved(model)
    assert halves.keys() | {"lm_head.weight"} == split
    layer = "model.layers.0."
    for target, dims in (("self_attn.q_proj", ([0], [], [0])), ("mlp.down_proj", ([1], [1], []))):
        parts = ("base_layer", "lora_A.default", "lora_B.default")
        assert tuple(halves.get(f"{layer}{target}.{part}.weight", []) for part in parts) == dims


def test_a_tied_embedding_in_the_plan_stays_whole_and_its_body_is_split():
    tied = shell("Gemma2")
    # As transformers 5.17 adds it, and 5.24 does not.
    tied.config.base_model_tp_plan = {**tied.config.base_model_tp_plan,
                                      "embed_tokens": "embedding_rowwise"}
    assert reasons(tied, 2) == {}
    assert not any("embed" in name for name in split_parameters(tied, 2))


def test_a_block_that_its_plan_does_not_split_evenly_stays_whole_and_says_why():
    few = shell("Llama")
    assert set(reasons(few, 4).values()) == {"tensor_parallel 4 does not divide its "
                                             "num_key_value_heads 2"}
    assert split_kinds(blocks_of(few, 4)) == tuple(
        f"model.layers.*.mlp.{name}.weight" for name in ("down_proj", "gate_proj", "up_proj"))
    odd = reasons(shell("Llama", intermediate_size=63), 2)
    assert odd["model.layers.0.mlp"] == ("tensor_parallel 2 does not divide the 63 of "
                                         "layers.0.mlp.gate_proj")
    [part] = whole_parts(shell("StableLm"), blocks_of(shell("StableLm"), 2))
    assert part.reason == "StableLmForCausalLM has no tensor-parallel plan in transformers"


def test_a_plan_that_is_not_understood_leaves_its_block_whole_and_no_other():
    def with_plan(**changes: str | None) -> torch.nn.Module:
        model = shell("Qwen3")
        plan = {**model.config.base_model_tp_plan,
                **{key.replace("__", "."): style for key, style in changes.items()}}
        model.config.base_model_tp_plan = {f"{key}" if key.startswith("layers") else
                                           f"layers.*.{key}": style
                                           for key, style in plan.items() if style}
        return model

    attention = {f"model.layers.{layer}.self_attn" for layer in (0, 1)}
    # As if transformers had forgotten the norm on split heads.
    plan = dict(shell("Qwen3").config.base_model_tp_plan)
    forgetful = shell("Qwen3")
    del plan["layers.*.self_attn.q_norm"]
    forgetful.config.base_model_tp_plan = plan
    assert reasons(forgetful, 2) == dict.fromkeys(
        attention, "layers.*.self_attn.q_norm.weight is not in its plan")
    unknown = reasons(with_plan(self_attn__o_proj="a_style_of_tomorrow"), 2)
    assert unknown == dict.fromkeys(
        attention, "its plan has a_style_of_tomorrow, which is not known here")
    mixture = tiny_meta("mixtral")
    plan = dict(mixture.config.base_model_tp_plan)
    del plan["layers.*.mlp.experts"]
    mixture.config.base_model_tp_plan = plan
    assert set(reasons(mixture, 2)) == {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}


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
