"""Bodies split over two ranks compute what they compute whole, and a wrong split is found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.families import FAMILIES, tiny_model
from support.ranks import RankPool
from torch import Tensor, nn

from amid_ds.distributed.tensor_group import Peers
from amid_ds.models import tp_layers, tp_plan
from amid_ds.models.adapters import first_values, inject
from amid_ds.models.shape import body_of, text_config
from amid_ds.models.split_check import split_problem
from amid_ds.models.tp_layers import split_blocks, sum_gradients
from amid_ds.models.tp_plan import blocks_of, part_of

# Experts, latent attention, sinks and biases, what is joined, layers that share keys, a hybrid.
QUICK = ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "falcon_h1", "gemma4_text"]
SLOW = [name for name, family in FAMILIES.items() if family.whole is None and name not in QUICK]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.close()


def ids_for(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, text_config(model).vocab_size, (2, 12), generator=generator)


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a few ids, and the gradients of a number made of them."""
    model.zero_grad()
    hidden = body_of(model)(input_ids=ids_for(model), use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: parameter.grad for name, parameter in model.named_parameters()
                             if parameter.grad is not None}


def split_model(model: nn.Module, rank: int, group: Any, size: int) -> dict[str, tp_plan.PartCut]:
    """Split a model in place; return the cuts of its parameters."""
    blocks = blocks_of(model, size)
    split_blocks(model, blocks, Peers(rank, size, group))
    sum_gradients(model)
    return {name: cut for block in blocks for name, cut in block.cuts.items()}


def problem_of(model: nn.Module) -> str | None:
    return split_problem(model, ids_for(model), lambda _: contextlib.nullcontext())


def split_and_whole(rank: int, group: Any, name: str, size: int, adapters: bool) -> list[str]:
    """Run by every rank: what differs between a split model and the whole one, to 1e-5."""
    model = tiny_model(name)
    if adapters:
        from amid_ds.config.recipe import Lora

        inject(model, Lora(rank=4, targets="all-linear"))
        draw = torch.Generator().manual_seed(3)
        for key in first_values(model, 3):
            # B begins with zeros, below which A has no gradient.
            value = model.get_parameter(key)
            value.data.copy_(0.1 * torch.randn(value.shape, generator=draw))
    hidden, gradients = outcome(model)
    cuts = split_model(model, rank, group, size)
    assert cuts
    split_hidden, split_gradients = outcome(model)
    assert split_gradients.keys() == gradients.keys()
    largest = max(float(each.abs().max()) for each in gradients.values())
    wrong = []
    for key, expected in {"hidden states": hidden, **gradients}.items():
        found = split_hidden if key == "hidden states" else split_gradients[key]
        if key in cuts:
            cut = cuts[key]
            expected = part_of(expected, cut.dim,
                               cut.ranges(expected.shape[cut.dim], rank, size))
        scale = float(expected.abs().max()) + 1e-2 * largest * (key != "hidden states")
        difference = float((found - expected).abs().max()) / scale
        if not difference < 1e-5:
            wrong.append(f"{name}: {key} differs by {difference:.2g}")
    found_by_check = problem_of(model)
    return wrong + ([f"{name}: {found_by_check}"] if found_by_check else [])


def test_a_split_body_and_its_gradients_are_those_of_the_whole_one(pool):
    for name in (name for name in QUICK if name in FAMILIES):
        assert pool.run(2, split_and_whole, name, 2, False) == [[], []]
    assert pool.run(2, split_and_whole, "deepseek_v3", 2, True) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_so_it_is_of_every_family_that_has_a_plan(name, pool):
    if blocks_of(tiny_model(name), 2):
        assert pool.run(2, split_and_whole, name, 2, False) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "olmo2", "phi3"])
def test_over_four_ranks_attentions_of_two_heads_of_keys_stay_whole(name, pool):
    assert pool.run(4, split_and_whole, name, 4, False) == [[]] * 4
    assert pool.run(2, split_and_whole, name, 2, True) == [[], []]


# A family, and what is wrong in its plan: the style of a module or weight. None of these is seen in
# the shapes; the last two are wrong in a gradient alone.
WRONG_PLANS = [
    ("mixtral", {"layers.*.mlp.experts.gate_up_proj": "colwise"}, "the output"),
    ("llama", {"layers.*.mlp.gate_proj": "packed_colwise"}, "the output"),
    ("gpt_oss", {}, "the output"),
    ("qwen3", {"layers.*.self_attn.q_norm": "replicate"},
     "the gradient of model.layers.0.self_attn.q_norm.weight"),
    ("deepseek_v3", {"layers.*.self_attn.kv_a_proj_with_mqa": "replicate"},
     "the gradient of input 0"),
]


def planted(rank: int, group: Any, family: str, styles: dict[str, str]) -> str | None:
    """Run by every rank: what the check finds of a model with a wrong plan; of gpt-oss without the
    rule for biases that every rank adds."""
    model = tiny_model(family)
    before = tp_plan.ADDED_PLANS, tp_plan._Planned._require_all_known, tp_layers.OUTPUT_BIAS
    plan = {**tp_plan.body_plan(model), **styles}
    tp_plan.ADDED_PLANS = {model.config.model_type: plan}
    tp_plan._Planned._require_all_known = lambda *_: None
    tp_layers.OUTPUT_BIAS = "nothing" if not styles else before[2]
    try:
        split_model(model, rank, group, 2)
        return problem_of(model)
    finally:
        (tp_plan.ADDED_PLANS, tp_plan._Planned._require_all_known,
         tp_layers.OUTPUT_BIAS) = before


def test_a_wrong_plan_is_found_by_the_check_of_the_start(pool):
    for family, styles, place in WRONG_PLANS:
        found = [each or "" for each in pool.run(2, planted, family, styles)]
        assert any(f"): {place} differs by up to" in each for each in found), (family, found)
