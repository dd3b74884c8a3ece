"""Experts that neighbouring ranks hold together train as if every rank had them all."""

from __future__ import annotations

import copy
import filecmp
import functools
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from support.checkpoints import saving_rank, tensors_of
from support.counting_rank import counting_rank
from support.data import write_instructions
from support.families import save_tiny, tiny_model
from support.ranks import Ranks, run_ranks, world_main
from support.reference_loop import reference_loop
from support.runs import comparable_results, read_metrics, write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.checkpoint.export import export
from amid_ds.checkpoint.manifest import Manifest, list_checkpoints
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.nodes import expert_groups
from amid_ds.engine.expert_parallel import distribute_experts
from amid_ds.engine.sharding import OpenModel
from amid_ds.errors import InputError
from amid_ds.models.expert_exchange import exchange_tokens
from amid_ds.models.experts import expert_layers
from amid_ds.planning.devices import find_device
from amid_ds.planning.plan import make_plan
from amid_ds.training.job import check_recipe

KEYS = ("loss", "kd_loss", "ce_loss", "grad_norm")
# The experts that each rank's tokens choose, of four of which rank 0 holds the first two.
CHOICES = {
    "uneven": ([[0, 2], [3, 1], [2, 3], [0, 1], [1, 3]], [[3, 0], [1, 2]]),
    "disjoint": ([[0, 1], [1, 0], [0, 1]], [[2, 3], [3, 2]]),
    "all strangers": ([[2, 3], [3, 2]], [[0, 1], [1, 0], [0, 1]]),
    "nobody asks rank 1": ([[0, 1], [1, 0]], [[1, 0]]),
    "rank 1 has no token": ([[0, 3], [2, 1]], []),
}
# Gates and none, biases, transposed weights; the ways in which transformers computes them.
LAYERS = [("mixtral", "eager"), ("mixtral", "grouped_mm"), ("gpt_oss", "eager"),
          ("gpt_oss", "batched_mm"), ("nemotron_h", "eager")]


def outputs_and_gradients(experts, tokens: torch.Tensor, chosen: list) -> list[torch.Tensor]:
    """The layer's output, and the gradients of an uneven sum of it: of tokens, weights, experts."""
    hidden = tokens[:len(chosen)].clone().requires_grad_()
    index = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    weights = torch.linspace(0.1, 0.9, 2 * len(chosen)).view(-1, 2).requires_grad_()
    output = experts(hidden, index, weights)
    if output.requires_grad:
        # The whole layer's does not, without a token.
        (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(torch.zeros_like(each) if each.grad is None else each.grad
                               for each in (hidden, weights, *experts.parameters()))]


def compare_layers(world) -> None:
    """Compare every layer over two ranks with the whole one on each."""
    for family, implementation in LAYERS:
        model = tiny_model(family)
        layer = expert_layers(model)[-1]
        for name, chosen in CHOICES.items():
            whole = copy.deepcopy(model.get_submodule(layer.name))
            whole.config = copy.deepcopy(whole.config)
            whole.config._experts_implementation = implementation
            own = copy.deepcopy(whole)
            for key, parameter in list(own.named_parameters()):
                setattr(own, key, torch.nn.Parameter(parameter.chunk(2)[world.rank].clone()))
            exchange_tokens(own, dist.group.WORLD)
            tokens = torch.randn(8, model.config.hidden_size,
                                 generator=torch.Generator().manual_seed(world.rank))
            ours = outputs_and_gradients(own, tokens, chosen[world.rank])
            theirs = outputs_and_gradients(whole, tokens, chosen[world.rank])
            for gradient in theirs[3:]:
                # The sum of the ranks' losses is what trains.
                dist.all_reduce(gradient)
            theirs[3:] = [gradient.chunk(2)[world.rank] for gradient in theirs[3:]]
            title = f"{family} {implementation} {name}"
            for mine, truth in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5,
                                           msg=lambda m, title=title: f"{title}: {m}")


def test_a_layer_over_two_ranks_is_the_whole_layer_whatever_its_tokens_choose():
    ranks = Ranks(2, target=functools.partial(world_main, compare_layers))
    assert ranks.wait(60) == [0, 0], ranks.output() + ranks.output(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """student: with a dense layer and 4 experts of 16; teacher: 4 experts of 64, which weigh most.
    """
    root = tmp_path_factory.mktemp("models")
    return {"student": save_tiny("qwen3_moe", root / "student", seed=0),
            "teacher": save_tiny("mixtral", root / "teacher", seed=1)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=60)


def recipe_of(run: Path, models: dict[str, Path], rows: Path, **changes) -> Path:
    run.parent.mkdir(exist_ok=True)
    settings = {"train__steps": 3, "train__global_batch_size": 8, "train__learning_rate": 1e-3,
                "student__router_aux_loss": 0.0, "data__prepared": str(run.parent / "prepared"),
                "teacher__placement": "zero3",
                "deepspeed": str(write_gathering_config(run.parent, stage3_max_reuse_distance=0,
                                                        stage3_prefetch_bucket_size=1)), **changes}
    return write_recipe(run.with_suffix(".yaml"), models["student"], models["teacher"], rows, run,
                        **settings)


def counted(run: Path) -> dict[str, int]:
    """Rank 0's counts of its last step."""
    return json.loads((run / "0.jsonl").read_text().splitlines()[-1])


def test_student_and_teacher_with_halved_experts_train_as_a_plain_loop_does_and_export_it(
        models, rows, tmp_path):
    recipe = recipe_of(tmp_path / "run", models, rows, expert_parallel=2)
    run_ranks(2, "train", recipe, target=counting_rank)
    lines, weights = reference_loop(models["student"], models["teacher"],
                                    yaml.safe_load(recipe.read_text()), tmp_path / "prepared")
    for expected, line in zip(lines, read_metrics(tmp_path / "run"), strict=True):
        for key in KEYS:
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for key, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[key], rtol=1e-3, atol=2e-5,
                                   msg=lambda m, k=key: f"{k}: {m}")
    # No expert is gathered: each of the two ranks has one half of them.
    whole = AutoModelForCausalLM.from_pretrained(models["teacher"])
    others = sum(p.numel() for name, p in whole.named_parameters() if ".experts." not in name)
    assert others < whole.num_parameters() / 2
    assert 0 < counted(tmp_path / "run")["teacher_bytes"] <= 4 * others


# What is asked for, and the reason that it is refused for, of two ranks' halves on four ranks.
REFUSED = {
    "expert_parallel=3": "expert_parallel 3: it must divide the number of ranks, 4, as 1, 2, 4 do",
    "tensor_parallel=2": "tensor_parallel 2 would split the same layers",
    "train.optimizer=muon": "train.optimizer muon needs whole gradients",
    "deepspeed=stage 2": "ZeRO stage 2 shards no weights; it needs stage 3",
    "deepspeed=hpz": "zero_hpz_partition_size 2 would keep second copies",
    "deepspeed=8 bits": "ZeRO.. sends in 8 bits",
    "student.model=llama4_text": "the student .*Llama4TextExperts.* takes hidden_states, not ",
    "student.model=three": "the student .*experts has 3 experts: it must divide them, as 1, 3 do",
    "student.model=dense": "no layer of experts in the student .*/dense, the teacher .*/dense",
}


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> dict[str, Path]:
    """What the keys of REFUSED name."""
    root = tmp_path_factory.mktemp("named")
    configs = {"stage 2": {"stage": 2}, "hpz": {"zero_hpz_partition_size": 2},
               "8 bits": {"zero_quantized_weights": True}}
    return {**{key: write_gathering_config(root, **values).rename(root / f"{key}.json")
               for key, values in configs.items()},
            "llama4_text": save_tiny("llama4_text", root / "llama4"),
            "three": save_tiny("mixtral", root / "three", num_local_experts=3),
            "dense": save_tiny("llama", root / "dense")}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_had_is_refused_with_the_reason(change, models, rows, named, tmp_path):
    key, _, value = change.partition("=")
    overrides = [f"{key}={named.get(value, value)}"]
    if value == "dense":
        overrides.append(f"teacher.model={named[value]}")
    recipe = load_recipe(recipe_of(tmp_path / "run", models, rows, expert_parallel=2), overrides)
    for check in (check_recipe, plan_on):
        with pytest.raises(InputError, match=REFUSED[change]):
            check(recipe, 4)


def plan_on(recipe: Recipe, ranks: int) -> None:
    make_plan(recipe, 1, ranks, find_device("cpu", ranks))


def test_a_group_that_is_in_two_copies_of_the_teacher_is_refused_and_auto_takes_none(
        models, rows, tmp_path):
    refused = pytest.raises(InputError, match=r"expert_parallel 4, .* lies over 2 rank\(s\)")
    with refused:
        expert_groups(0, 8, 4, shard_over=2)
    recipe, device = recipe_of(tmp_path / "run", models, rows), find_device("cpu", 2)
    four = load_recipe(recipe, ["expert_parallel=4", "teacher.placement=auto"])
    assert {each.placement for each in make_plan(four, 2, 2, device).placements} == {
        "zero3", "replicated"}
    with refused:
        make_plan(load_recipe(recipe, ["expert_parallel=4", "teacher.placement=node"]), 2, 2,
                  device)


def test_weights_that_transformers_has_read_are_refused_and_left_whole():
    model = tiny_model("mixtral")
    groups = Namespace(exchange=Namespace(rank=lambda: 0, size=lambda: 2))
    with pytest.raises(InputError, match=r"the weights of the teacher .* loaded by transformers"):
        distribute_experts(OpenModel(model, {}), "teacher", groups)
    assert len(model.model.layers[0].mlp.experts.down_proj) == 4


def series(run: Path) -> torch.Tensor:
    """KEYS by step, in float64."""
    return torch.tensor([[line[key] for key in KEYS] for line in read_metrics(run)],
                        dtype=torch.float64)


@pytest.fixture(scope="module")
def quartered(models, rows, tmp_path_factory) -> Path:
    """A run of four ranks, of which two hold the experts together, with evaluations of one row and
    of many, a checkpoint at each second of 4 steps, and each layer's activations made twice."""
    root = tmp_path_factory.mktemp("quartered")
    few = root / "few.jsonl"
    few.write_text(rows.read_text().splitlines()[0] + "\n")
    sets = [{"name": path.stem, "path": str(path), "prompt": "prompt", "response": "response"}
            for path in (few, rows)]
    recipe = recipe_of(root / "run", models, rows, expert_parallel=2, train__steps=4,
                       train__eval_every=2, data__eval=sets, checkpoint={"every": 2},
                       student__activation_checkpointing=True, student__router_aux_loss=0.02)
    run_ranks(4, "train", recipe, target=counting_rank)
    return root / "run"


# Ranks, and what else is said: every rank has all experts, one of them each; a teacher once for
# each two ranks, or whole on each; whole layers of weights that stay gathered.
OTHERS = {
    "2 ranks, whole": (2, ["expert_parallel=1", "student.activation_checkpointing=false"]),
    "4 ranks, one each": (4, ["expert_parallel=4"]),
    "a teacher over two": (4, ["teacher.placement=node", "teacher.shard_over=2"]),
    "a replicated teacher": (4, ["teacher.placement=replicated"]),
    "small weights stay": (2, ["deepspeed=ds_configs/zero3_fp32.json"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_of_experts_trains_and_evaluates_alike(name, quartered, tmp_path):
    ranks, overrides = OTHERS[name]
    run_ranks(ranks, "train", quartered.with_suffix(".yaml"), f"output_dir={tmp_path / 'run'}",
              *overrides, target=counting_rank)
    torch.testing.assert_close(series(tmp_path / "run"), series(quartered), rtol=1e-5, atol=0)
    for ours, theirs in zip(*(read_evaluations(run) for run in (tmp_path / "run", quartered)),
                            strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if name == "2 ranks, whole":
        for key in ("teacher_bytes", "student_bytes"):
            assert counted(quartered)[key] < counted(tmp_path / "run")[key], key


def read_evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "name"} for line in lines]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_digit(quartered, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(quartered, run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    output = run_ranks(4, "train", quartered.with_suffix(".yaml"), f"output_dir={run}").output()
    assert "converting" not in output
    assert comparable_results(run) == comparable_results(quartered)
    assert filecmp.cmp(run / "model" / "model.safetensors",
                       quartered / "model" / "model.safetensors", shallow=False)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "neighbours"), [(2, 1), (4, 4), (2, 2)])
def test_weights_and_moments_move_bit_for_bit_and_train_on(ranks, neighbours, quartered, models,
                                                           tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(quartered, run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    saved, = list_checkpoints(run / "checkpoints")
    before = tensors_of(saved, models["student"])
    assert any(".experts." in name and tensor.count_nonzero() for (name, _), tensor
               in before.items())
    arguments = ("train", quartered.with_suffix(".yaml"), f"output_dir={run}",
                 f"expert_parallel={neighbours}")
    moved = Ranks(ranks, *arguments, target=functools.partial(saving_rank, str(other)))
    assert moved.wait(200) == [0] * ranks, moved.output()
    assert "converting it once" in moved.output()
    after = tensors_of(other / saved.name, models["student"])
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert Manifest.read(other / saved.name).layout.expert_parallel == neighbours
    run_ranks(ranks, *arguments)
    torch.testing.assert_close(series(run), series(quartered), rtol=1e-5, atol=0)
    exported = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "exported"))
    for name, parameter in AutoModelForCausalLM.from_pretrained(
            quartered / "model").named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


# A mean of the student that teaches, adapters beside frozen experts, the student's own words, state
# on the host.
KINDS = {
    "running means": ["train.ema=0.9", "teacher={ema: 0.9}"],
    "adapters": ["student.lora={rank: 2, targets: [q_proj, v_proj]}"],
    "own words": ["rollout={share: 1.0, max_new_tokens: 6}"],
    "offload": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_run_is_the_same_with_halved_experts(name, models, rows, tmp_path):
    config = write_gathering_config(tmp_path, offload_optimizer={"device": "cpu"})
    offload = [f"deepspeed={config}"] if name == "offload" else []
    for neighbours in (1, 2):
        recipe = recipe_of(tmp_path / str(neighbours), models, rows, expert_parallel=neighbours)
        run_ranks(2, "train", recipe, *KINDS[name], *offload, target=counting_rank_without_compiler)
    # A mean's divergence is 0 in the first step.
    torch.testing.assert_close(series(tmp_path / "1"), series(tmp_path / "2"), rtol=1e-5, atol=1e-8)
    assert counted(tmp_path / "2")["student_bytes"] < counted(tmp_path / "1")["student_bytes"]


def counting_rank_without_compiler(argv: list[str], variables: dict[str, str], log: str) -> None:
    from amid_ds.engine import cpu_adam

    cpu_adam._load = lambda: "this test has no compiler"
    counting_rank(argv, variables, log)
