"""Each rank reads its own part of a model, bit for bit what transformers and DeepSpeed give it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.models import WORDS, make_model
from support.ranks import Ranks, rank_main, run_ranks, world_main
from support.runs import comparable_metrics, write_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Teacher
from amid_ds.distributed.progress import launched_collectives
from amid_ds.distributed.world import World
from amid_ds.engine import build, sharding
from amid_ds.engine.ds_config import read_deepspeed_config
from amid_ds.engine.zero_plus_plus import secondary_groups_of_neighbours
from amid_ds.errors import InputError
from amid_ds.models.loading import load_causal_lm

FAMILIES = ["llama", "llama-tied", "qwen3", "mistral", "gemma3", "gemma2", "qwen2-tied", "gpt2"]
# Of the tokenizer of every such model.
VOCAB_SIZE = 3 + len(WORDS)
# Some of the tiny models' parameters persist, and some do not.
ZERO_3 = {"train_micro_batch_size_per_gpu": 1,
          "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}


def read_model(folder: str, dtype: str, config: dict, world: World) -> Any:
    """The model, shaped and then read; between the two agreements ranks exchange nothing."""
    partition, fill, launched = sharding.partition_parameters, sharding.OpenModel._fill, []

    def watched(work: Any) -> Any:
        def call(*arguments: Any) -> Any:
            before = launched_collectives(world)
            result = work(*arguments)
            launched.append(launched_collectives(world) == before)
            return result
        return call

    sharding.partition_parameters = watched(partition)
    sharding.OpenModel._fill = watched(fill)
    model = sharding.open_causal_lm(Teacher(model=folder, dtype=dtype), dtype, config, world)
    ours = model.read(world)
    sharding.partition_parameters, sharding.OpenModel._fill = partition, fill
    # For secondary partitions DeepSpeed makes groups.
    assert launched == ["zero_hpz_partition_size" not in config["zero_optimization"], True]
    return ours


def own_elements(parameter: Any) -> Tensor:
    """This rank's partition of a parameter, without what pads the last one."""
    start = len(parameter.ds_tensor) * dist.get_rank(parameter.ds_process_group)
    return parameter.ds_tensor[:max(0, parameter.ds_numel - start)]


def facts(parameter: Any) -> tuple[object, ...]:
    """What DeepSpeed knows of a parameter, beside its values."""
    return (parameter.ds_shape, parameter.ds_numel, parameter.ds_numel_aligned, parameter.ds_status,
            parameter.ds_persist, parameter.ds_tensor.shape, parameter.ds_tensor.dtype,
            parameter.ds_tensor.device, parameter.ds_tensor.ds_numel, parameter.ds_tensor.status,
            parameter.ds_tensor.requires_grad, parameter.requires_grad, parameter.dtype,
            parameter.shape, parameter.device, dist.get_process_group_ranks(
                parameter.ds_process_group), type(parameter))


def same_as_transformers(world: World, config: str, *models: str) -> None:
    """Run by every rank: hold each of `models` (a folder:dtype) against from_pretrained's."""
    for model in models:
        folder, dtype = model.rsplit(":", 1)
        with secondary_groups_of_neighbours(world.rank):
            ours = read_model(folder, dtype, json.loads(config), world)
            theirs: Any = load_causal_lm(folder, dtype, json.loads(config))
        named, expected = (dict(each.named_parameters(remove_duplicate=False))
                           for each in (ours, theirs))
        assert list(named) == list(expected)
        assert len({*map(id, named.values())}) == len({*map(id, expected.values())}), "ties"
        for name, parameter in named.items():
            assert facts(parameter) == facts(expected[name]), (model, name)
            assert torch.equal(own_elements(parameter), own_elements(expected[name])), (model, name)
            # DeepSpeed makes it at the first gather.
            assert parameter.ds_secondary_tensor is None
        # Without ZeRO: with it some versions of transformers round the rotary frequencies to bf16.
        buffers = dict(load_causal_lm(folder, dtype).named_buffers())
        for name, buffer in ours.named_buffers():
            assert buffer.dtype == buffers[name].dtype, (model, name)
            assert torch.equal(buffer, buffers.pop(name)), (model, name)
        assert not buffers
        for each in ("config", "generation_config"):
            assert getattr(ours, each).to_dict() == getattr(theirs, each).to_dict()
        assert ours.config._attn_implementation == theirs.config._attn_implementation
        assert not ours.training


def run_world(ranks: int, work: Any, *arguments: object) -> None:
    started = Ranks(ranks, *arguments, target=functools.partial(world_main, work))
    statuses = started.wait(400)
    assert statuses == [0] * ranks, "\n".join(started.output(rank) for rank in range(ranks))


def copy_with_second_head(tied: Path, folder: Path, more: float = 0.0) -> Path:
    """Copy a model with its tied head as a tensor of its own, `more` added to the last number."""
    shutil.copytree(tied, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += more
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_partitions_are_those_that_from_pretrained_under_zero_3_gives(shared_model, tmp_path):
    models = [f"{shared_model(family)}:{dtype}" for family, dtype in (
        ("llama", "bf16"), ("llama-tied", "fp32"), ("gpt2", "bf16"))]
    models.append(f"{copy_with_second_head(shared_model('llama-tied'), tmp_path / 'twice')}:bf16")
    run_world(3, same_as_transformers, json.dumps(ZERO_3), *models)


def refuse_on_all(world: World, config: str, untied: str) -> None:
    """Run by every rank: a tied pair that differs in the files; a folder that rank 1 lacks."""
    with pytest.raises(InputError, match="tied by its config, with values of their own"):
        read_model(untied, "fp32", json.loads(config), world)
    for dtype in ("fp32", "auto"):
        with pytest.raises(InputError, match="no model can be read from"):
            read_model(untied if world.rank == 0 else f"{untied}/absent", dtype,
                       json.loads(config), world)


def test_what_one_rank_finds_wrong_is_an_error_of_all(shared_model, tmp_path):
    # One number, which one of the ranks compares.
    untied = copy_with_second_head(shared_model("llama-tied"), tmp_path / "untied", more=1.0)
    run_world(2, refuse_on_all, json.dumps(ZERO_3), untied)


def make_mixture(folder: Path) -> Path:
    """Save a model of fused experts, whose router has a buffer that is saved, and stays fp32."""
    model = Glm4MoeForCausalLM(Glm4MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([5.001, 5.002, 5.003, 5.004]))
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_so_they_are_for_every_family_dtype_and_number_of_ranks(ranks, shared_model, tmp_path):
    folders = [*map(shared_model, FAMILIES), make_mixture(tmp_path / "mixture")]
    models = [f"{folder}:{dtype}" for folder in folders for dtype in ("fp32", "bf16")]
    run_world(ranks, same_as_transformers, json.dumps(ZERO_3), *models)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"zero_hpz_partition_size": 2},
                                  {"offload_param": {"device": "cpu", "pin_memory": False}}])
def test_so_they_are_with_secondary_partitions_and_offloaded(zero, shared_model):
    config = {**ZERO_3, "zero_optimization": {**ZERO_3["zero_optimization"], **zero}}
    models = [f"{shared_model(family)}:bf16" for family in ("llama", "qwen2-tied")]
    run_world(4, same_as_transformers, json.dumps(config), *models)


def own_rows(whole: Tensor, parameter: Any, start_of_head: int | None, world: World) -> Tensor:
    """What this tensor-parallel rank has of a whole weight: even parts but of a head."""
    for dim, (own, every) in enumerate(zip(parameter.ds_shape, whole.shape, strict=True)):
        if own != every:
            start = own * world.tp_rank if start_of_head is None else start_of_head
            return whole.narrow(dim, start, own)
    return whole


def same_as_cut_weights(world: World, path: str, *shards: str) -> None:
    """Run by every rank: hold both bodies and heads, split over two, against their whole weights.

    shards: numbers of data-parallel ranks that the teacher lies over; "0": all.
    """
    recipe = load_recipe(path, [])
    assert recipe.teacher is not None
    for over in map(int, shards):
        own_world = world.split(2, over or None)
        distiller, _ = build._build_distiller(
            recipe, read_deepspeed_config(recipe, own_world.dp_size), VOCAB_SIZE, own_world, False)
        for role, source in (("student", recipe.student), ("teacher", recipe.teacher)):
            whole = AutoModelForCausalLM.from_pretrained(source.model).state_dict()
            block = 2 * over if over and role == "teacher" else world.size
            first = world.rank // block * block
            cut = 0
            for name, each in getattr(distiller, role).named_parameters():
                parameter: Any = each
                is_head = name.startswith("lm_head")
                expected = own_rows(whole[name], parameter, distiller.head.shard.start
                                    if is_head else None, own_world)
                is_cut = expected.shape != whole[name].shape
                cut += is_cut
                ranks = range(first + is_cut * own_world.tp_rank, first + block, 1 + is_cut)
                group = parameter.ds_process_group
                assert dist.get_process_group_ranks(group) == list(ranks), (role, name)
                start = len(parameter.ds_tensor) * dist.get_rank(group)
                assert torch.equal(own_elements(parameter), expected.flatten()[
                    start:start + len(parameter.ds_tensor)]), (role, name)
                assert parameter.requires_grad == (role == "student")
            # Of two layers seven matrices each, with biases those of the column-wise ones.
            assert cut == (14 + 6 if role == "student" else 14 + 10 + 1), cut


def test_a_tensor_parallel_rank_reads_what_the_cuts_of_body_and_head_leave_it(
        shared_model, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shared_model("qwen2-tied"), shared_model(
        "llama", attention_bias=True, mlp_bias=True, extra_rows=2), text_file, tmp_path / "run",
        tensor_parallel=2)
    run_world(4, same_as_cut_weights, recipe, "0", "1")


def reading_rank(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that notes in `folder` the models that it reads weights of."""
    from amid_ds.models.weight_reader import WeightReader

    notes = Path(folder) / f"rank{variables['RANK']}"
    fill, load = WeightReader.fill, build.load_causal_lm

    def noted_fill(reader: Any, reads: Any) -> None:
        fill(reader, reads)
        with open(notes, "a") as file:
            file.write(f"{reader.table.model}\n")

    def noted_load(model: str, *arguments: Any, **options: Any) -> Any:
        with open(notes, "a") as file:
            file.write(f"{model}\n")
        return load(model, *arguments, **options)

    WeightReader.fill, build.load_causal_lm = noted_fill, noted_load
    rank_main(argv, variables, log)


def damage_values(file: Path) -> None:
    """Turn every number in a safetensors file into NaN."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    file.write_bytes(content)


@pytest.mark.parametrize("stage, tensor_parallel, resumed_on", [
    (3, 1, 1), pytest.param(1, 1, 2, marks=pytest.mark.slow),
    pytest.param(1, 2, 2, marks=pytest.mark.slow),
    pytest.param(3, 2, 2, marks=pytest.mark.slow)])
def test_a_run_that_resumes_does_not_read_its_students_weights(
        stage, tensor_parallel, resumed_on, shared_model, text_file, tmp_path):
    student = make_model(tmp_path / "student", "llama-tied")
    teacher = shared_model("llama", 1, hidden_size=64, intermediate_size=96)
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    recipe = write_recipe(tmp_path / "recipe.yaml", student, teacher, text_file, tmp_path / "run",
                          deepspeed=str(config), checkpoint__every=3,
                          tensor_parallel=tensor_parallel)
    run_ranks(2, "train", recipe)
    uninterrupted = comparable_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    shutil.rmtree(tmp_path / "run" / "model")
    damage_values(student / "model.safetensors")
    notes = tmp_path / "notes"
    notes.mkdir()
    resumed = run_ranks(resumed_on, "train", recipe,
                        target=functools.partial(reading_rank, str(notes)))
    assert "resumed after step 3" in resumed.output()
    for rank in range(resumed_on):
        assert (notes / f"rank{rank}").read_text().splitlines() == [str(teacher)]
    again = comparable_metrics(tmp_path / "run")
    assert [line["loss"] for line in again] == pytest.approx(
        [line["loss"] for line in uninterrupted], rel=0 if resumed_on == 2 else 1e-4)


def test_pickled_weights_are_loaded_by_transformers_and_the_log_says_why(shared_model, text_file,
                                                                         tmp_path):
    student = make_model(tmp_path / "student", "llama-tied")
    model = AutoModelForCausalLM.from_pretrained(student)
    (student / "model.safetensors").unlink()
    torch.save(model.state_dict(), student / "pytorch_model.bin")
    recipes = [write_recipe(tmp_path / f"{name}.yaml", source, shared_model("llama"), text_file,
                            tmp_path / name, train__steps=2)
               for name, source in (("bin", student), ("safe", shared_model("llama-tied")))]
    outputs = [run_ranks(2, "train", recipe).output() for recipe in recipes]
    assert f"transformers loads {student}, on rank 0 for all: " in outputs[0]
    assert "transformers loads" not in outputs[1]
    losses = [[line["loss"] for line in comparable_metrics(tmp_path / name)]
              for name in ("bin", "safe")]
    assert losses[0] == losses[1]
