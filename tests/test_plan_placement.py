"""The plan's placements: rings by hand, bytes from other nodes, the choice of `auto`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.ranks import Ranks
from support.runs import write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.models import loading
from amid_ds.planning import paper_scale
from amid_ds.planning.body_costs import count_body
from amid_ds.planning.devices import Device, find_device
from amid_ds.planning.memory import memory_per_rank
from amid_ds.planning.network import network_per_step
from amid_ds.planning.placement import choose_placement
from amid_ds.planning.plan import make_plan
from amid_ds.planning.rings import Ring
from amid_ds.planning.setting import make_setting

ROOMY = Device("roomy", 1e12, 1e15, 50e9, 450e9)


@pytest.fixture(scope="module")
def recipe(shared_model, text_file, tmp_path_factory) -> Path:
    """Wide enough that ZeRO-3 partitions more than it pads; every weight is gathered."""
    folder = tmp_path_factory.mktemp("placements")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 2}
    return write_recipe(folder / "r.yaml", shared_model("llama", 0, **sizes),
                        shared_model("qwen3", 0, **sizes), text_file, folder / "run",
                        deepspeed=str(write_gathering_config(folder)), train__seq_length=64,
                        train__global_batch_size=16)


def elements_of(model: str) -> int:
    return sum(parameter.numel() for parameter in loading.meta_model(model).parameters())


@pytest.mark.parametrize("ranks, per_node", [(2, 2), (2, 1), (4, 2), (6, 2), (8, 4), (64, 8)])
def test_a_ring_by_hand_takes_in_what_the_plan_says(ranks, per_node):
    # Each rank sends each part but the last on to the next rank, part by part.
    size, into_node, into_rank = 960, Counter(), Counter()
    for _ in range(ranks - 1):
        for rank in range(ranks):
            receiver = (rank + 1) % ranks
            into_rank[receiver] += size / ranks
            if receiver // per_node != rank // per_node:
                into_node[receiver // per_node] += size / ranks
    traffic = Ring(ranks, per_node).gather(size, calls=0)
    assert traffic.received == pytest.approx(into_rank[0])
    for node in range(ranks // per_node):
        assert per_node * traffic.between == pytest.approx(into_node[node])


def test_a_ring_waits_for_its_start_and_for_each_hop_of_a_part_on_its_way_round():
    # 24 ranks on 3 nodes: a part takes 23 hops, and 2 of them leave a node.
    over_nodes, in_node = Ring(24, 8).gather(1.0, calls=5), Ring(8, 8).gather(1.0, calls=5)
    assert over_nodes.between_waits == pytest.approx(5 * (14e-6 + 21 * 1.9e-6 + 2 * 4.0e-6))
    assert in_node.inside_waits == pytest.approx(5 * (14e-6 + 7 * 1.9e-6))
    assert over_nodes.inside_waits == in_node.between_waits == 0


@pytest.mark.parametrize("placement, share", [("zero3", 3 / 4), ("node", 0), ("replicated", 0)])
def test_a_node_takes_in_its_part_of_the_teacher_once_and_not_once_a_rank(placement, share, recipe):
    loaded = load_recipe(recipe, [f"teacher.placement={placement}"])
    plan = make_plan(loaded, 2, 2, find_device("cpu", 2))
    assert loaded.teacher is not None
    size = 4 * elements_of(loaded.teacher.model)
    network = plan.network_per_step
    # Its weights; it is tied, so the embedding is gathered for the head too.
    assert 2 * network["teacher_between_nodes"] == pytest.approx(share * size, rel=0.05)
    assert network["teacher_gathers"] == pytest.approx(
        {"zero3": 3 / 4, "node": 1 / 2, "replicated": 0}[placement] * size, rel=0.05)
    # gloo makes a sum for all ranks of a scatter, in each of 4 micro-batches.
    student = 4 * elements_of(loaded.student.model)
    assert 2 * network["student_between_nodes"] == pytest.approx(
        3 / 4 * student * (1 + 4 * 2), rel=0.05)


def test_a_rank_holds_of_the_teacher_what_its_placement_and_layout_leave_it(recipe):
    def weights(placement: str, *changes: str) -> int:
        loaded = load_recipe(recipe, [f"teacher.placement={placement}", *changes])
        return make_plan(loaded, 2, 4, ROOMY).memory_per_rank["teacher_weights"]

    loaded = load_recipe(recipe)
    assert loaded.teacher is not None
    size = 4 * elements_of(loaded.teacher.model)
    assert weights("zero3") == pytest.approx(size / 8, rel=0.02)
    assert weights("node") == pytest.approx(size / 4, rel=0.02)
    assert weights("node", "teacher.shard_over=2") == pytest.approx(size / 2, rel=0.02)
    assert weights("replicated") == size
    # Two data-parallel ranks of a node share what tensor parallelism leaves, halved or whole.
    assert weights("node", "tensor_parallel=2") == pytest.approx(size / 4, rel=0.02)
    assert weights("replicated", "tensor_parallel=2") == size


def chosen(recipe: Path, device: Device, *changes: str, nodes: int = 2,
           ranks: int = 8) -> tuple[str, int | None]:
    taken = choose_placement(make_setting(load_recipe(recipe, list(changes)), ranks, device, nodes))
    plan = make_plan(load_recipe(recipe, list(changes)), nodes, ranks // nodes, device)
    assert plan.placement == taken
    return taken.placement, taken.shard_over


def test_auto_takes_the_fastest_placement_that_fits_and_of_equals_the_one_with_the_least_between(
        recipe):
    plan = make_plan(load_recipe(recipe), 2, 4, ROOMY)
    by_name = {each.placement: each for each in plan.placements}
    assert list(by_name) == ["zero3", "node", "replicated"]
    assert by_name["zero3"].memory < by_name["node"].memory < by_name["replicated"].memory
    assert by_name["zero3"].from_other_nodes > 0 == by_name["node"].from_other_nodes
    # Arithmetic binds: all take the same time.
    slow = replace(ROOMY, flops=1e12)
    assert chosen(recipe, slow) == ("node", 4)
    assert make_plan(load_recipe(recipe), 2, 4, slow).binds == "flops"
    # Links between nodes bind: whatever needs none of them is faster.
    far = replace(ROOMY, bandwidth=1e6, flops=1e18)
    assert chosen(recipe, far) == ("node", 4)
    assert make_plan(load_recipe(recipe, ["teacher.placement=zero3"]), 2, 4,
                     far).binds == "links_between"
    # Links within a node bind: without gathers it is fastest.
    near = replace(ROOMY, neighbours=1e6, bandwidth=1e9, flops=1e18)
    assert chosen(recipe, near) == ("replicated", None)
    assert make_plan(load_recipe(recipe), 2, 4, near).binds == "links_inside"
    # What does not fit is not taken; without room for the fastest, `near`, zero3 has fewer bytes
    # from neighbours than node.
    for device, smaller, larger in ((near, "node", "replicated"), (far, "zero3", "node")):
        room = (by_name[smaller].memory + by_name[larger].memory) / 2 / 0.92
        assert chosen(recipe, replace(device, memory=room)) == ("zero3", None)
    assert chosen(recipe, slow, "teacher.shard_over=2") == ("node", 2)
    assert chosen(recipe, far, "teacher.placement=zero3") == ("zero3", None)
    # As training has it below stage 3, whatever the recipe says.
    for asked, taken in (("auto", "zero3"), ("node", "zero3"), ("replicated", "replicated")):
        below = "deepspeed=zero2.json", f"teacher.placement={asked}"
        assert chosen(recipe, far, *below) == (taken, None)
        plan = make_plan(load_recipe(recipe, list(below)), 2, 4, far)
        assert [each.placement for each in plan.placements] == ["zero3", "replicated"]
    assert chosen(recipe, far, nodes=1) == ("zero3", None)
    # A rank a node: a node's shard would be all of it.
    assert chosen(recipe, far, nodes=8) == ("replicated", None)


def test_where_nothing_fits_auto_is_zero3_and_the_plan_says_so(recipe, capsys):
    device = json.dumps({"memory": 1e6, "flops": 1e15, "bandwidth": 1e9})
    arguments = ["plan", str(recipe), "--nodes", "2", "--ranks-per-node", "2", "--device", device]
    assert main([*arguments, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["placement"]["placement"] == "zero3" and not plan["fits"]
    assert not any(each["fits"] for each in plan["placements"])
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "teacher.placement: zero3" in printed and "placements of the teacher" in printed
    # Nothing is cut off in 80 columns.
    assert "node (2)" in printed and "…" not in printed


def test_the_files_are_read_once_by_all_ranks_together_or_once_a_node(recipe):
    loaded = load_recipe(recipe)
    assert loaded.teacher is not None
    stored = 0
    for file in Path(loaded.teacher.model).glob("*.safetensors"):
        stored += sum(tensor.nbytes for tensor in load_file(file).values())
    for placement, copies in (("zero3", 1), ("node", 2), ("replicated", 2)):
        plan = make_plan(load_recipe(recipe, [f"teacher.placement={placement}"]), 2, 4, ROOMY, 1e6)
        read = plan.read_at_start
        assert 8 * read.teacher == pytest.approx(copies * stored, rel=0.02), placement
        # Each of two nodes reads half of all that is read.
        assert read.seconds_resumed == pytest.approx(copies * stored / 2 / 1e6, rel=0.02)
        assert read.seconds > read.seconds_resumed


def test_a_shard_that_does_not_divide_the_ranks_exits_with_2(recipe, capsys):
    layout = ["--nodes", "2", "--ranks-per-node", "2"]
    assert main(["plan", str(recipe), *layout, "teacher.shard_over=3"]) == 2
    assert "shard_over" in capsys.readouterr().err


@pytest.mark.parametrize("storage", ["0", "-1", "nan", "inf"])
def test_a_storage_that_reads_nothing_exits_with_2(storage, recipe, capsys):
    assert main(["plan", str(recipe), "--storage", storage]) == 2
    assert "--storage" in capsys.readouterr().err


def test_two_ranks_make_the_same_flops_in_every_layout(recipe):
    by_data, by_tensor = (
        make_plan(load_recipe(recipe, [f"tensor_parallel={size}"]), 1, 2, ROOMY).flops_per_step
        for size in (1, 2))
    assert by_tensor == pytest.approx(by_data)


def test_hidden_states_that_exceed_their_budget_wait_in_host_memory(recipe):
    loaded = load_recipe(recipe)
    memory = make_plan(loaded, 1, 2, ROOMY).memory_per_rank
    states = sum(memory[part] for part in ("student_weights", "gradients", "optimizer",
                                           "teacher_weights"))
    # 8 micro-batches of 64 tokens, 256 wide; an eighth of the free memory is theirs.
    whole = 8 * 64 * 256 * 4
    for name, free, on_device in (("gpu", 9 * whole, whole), ("gpu", 7 * whole, whole // 8),
                                  ("cpu", 7 * whole, whole)):
        device = replace(ROOMY, name=name, memory=states + free)
        assert make_plan(loaded, 1, 2, device).memory_per_rank["teacher_hidden"] == on_device


def test_the_teacher_is_gathered_for_each_of_its_passes_which_have_whole_micro_batches(
        recipe, tmp_path):
    config = write_gathering_config(tmp_path, stage3_max_reuse_distance=0)
    teacher = load_recipe(recipe).teacher
    assert teacher is not None
    size = 4 * elements_of(teacher.model) / 2
    # 8 micro-batches of 64 tokens a rank.
    for most, passes in ((64, 8), (127, 8), (128, 4), (1, 8), (4096, 1)):
        plan = make_plan(load_recipe(recipe, [f"teacher.max_tokens_per_pass={most}",
                                              f"deepspeed={config}"]), 1, 2, ROOMY)
        assert plan.network_per_step["teacher_gathers"] == pytest.approx(passes * size, rel=0.06)


def test_a_second_copy_of_the_student_takes_memory_and_keeps_its_gathers_within_a_node(recipe,
                                                                                       tmp_path):
    config = write_gathering_config(tmp_path, stage3_max_reuse_distance=0)
    loaded = load_recipe(recipe, [f"deepspeed={config}"])
    plain = make_setting(loaded, 4, ROOMY, nodes=2)
    second = replace(plain, zero=replace(plain.zero, secondary_ranks=2))
    size = 4 * elements_of(loaded.student.model)
    assert memory_per_rank(second)["student_secondary"] == pytest.approx(size / 2, rel=0.02)
    # 4 micro-batches of 2 gathers, all but the first from the copy; and 4 reductions.
    assert 2 * network_per_step(plain)["student_between_nodes"] == pytest.approx(
        3 / 4 * size * (8 + 4), rel=0.02)
    assert 2 * network_per_step(second)["student_between_nodes"] == pytest.approx(
        3 / 4 * size * (1 + 4), rel=0.02)
    assert network_per_step(second)["student_gathers"] == pytest.approx(
        size * (3 / 4 + 7 / 2), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "llama-tied"])
def test_layers_that_are_alike_cost_what_they_cost_one_by_one(family, shared_model):
    sizes = {} if family == "gpt2" else {"num_hidden_layers": 5}
    meta = AutoModelForCausalLM.from_pretrained(shared_model(family, 0, **sizes)).to("meta")
    assert count_body(meta, 2, 32) == count_body(meta, 2, 32, every_layer=True)


def test_the_table_of_paper_scale_has_every_placement_and_names_the_one_that_is_taken(
        capsys, monkeypatch):
    monkeypatch.setattr(paper_scale, "DEVICE_COUNTS", (1024,))
    monkeypatch.setattr(paper_scale, "PAIRS", (("8B", "70B"),))
    assert main(["plan", "--paper-scale", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["costs"]["placement"] for row in rows] == 2 * ["zero3", "node", "replicated"]
    for start in (0, 3):
        assert [row["taken"] for row in rows[start:start + 3]].count(True) == 1
    # 2 FLOPs a weight and token forward, 6 with backward and 2 recomputed: 70.6 and 8.03 billion
    # weights; attention beside them is less than a sixth.
    zero3 = rows[0]["costs"]
    least = 8192 * (2 * 70.6e9 + 8 * 8.03e9) / (0.45 * 989e12)
    assert least * 0.95 < zero3["parts"]["flops"] < least * 1.2
    assert rows[0]["tokens_per_day"] == pytest.approx(
        1024 * 8192 * 86400 / zero3["seconds"])
    assert main(["plan", "--paper-scale"]) == 0
    assert "8B ← 70B | 1,024 | 8.4" in capsys.readouterr().out
    assert main(["plan", "r.yaml", "--paper-scale"]) == 2


def test_layers_that_differ_are_counted_one_by_one():
    meta = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                                        num_attention_heads=4, vocab_size=99)).to("meta")
    layers = meta.model.layers
    layers[3].mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=512)).to("meta")
    assert count_body(meta, 2, 32) == count_body(meta, 2, 32, every_layer=True)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0, 10**9])
def test_what_several_passes_of_the_teacher_gather_is_what_was_planned(distance, recipe, tmp_path):
    config = write_gathering_config(tmp_path, stage3_max_reuse_distance=distance,
                                    stage3_prefetch_bucket_size=0)
    changes = ["teacher.max_tokens_per_pass=64", f"deepspeed={config}", "train.steps=5",
               "train.global_batch_size=8", f"output_dir={tmp_path / 'run'}"]
    processes = Ranks(2, "train", recipe, *changes)
    assert processes.wait() == [0, 0], processes.output()
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())["network_per_step"]
    plan = make_plan(load_recipe(recipe, changes), 1, 2, find_device("cpu", 2))
    for part, size in measured.items():
        assert plan.network_per_step[part] == pytest.approx(size, rel=0.001), part
