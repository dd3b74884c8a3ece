"""The plan's numbers are those of a real engine, of real autograd, and of the textbook formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.counting_rank import counting_rank
from support.patches import patch_train_step
from support.ranks import Ranks
from support.runs import write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM, LlamaConfig

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe, resolved
from amid_ds.distributed.world import World
from amid_ds.monitor.memory_probe import _Traffic
from amid_ds.planning import model_costs
from amid_ds.planning.body_costs import count_body
from amid_ds.planning.devices import EFFICIENCY, Device, find_device
from amid_ds.planning.plan import make_plan

H100 = Device("h100-80g", 80e9, 989e12, 50e9, 450e9)


def config_only(folder: Path, **sizes: int) -> Path:
    """A Llama without weights: a plan needs none."""
    config = LlamaConfig(**sizes, num_attention_heads=sizes["hidden_size"] // 128,
                         num_key_value_heads=8, vocab_size=128256, dtype="bfloat16",
                         architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(text_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("large")
    student = config_only(root / "1b", hidden_size=2048, num_hidden_layers=16,
                          intermediate_size=8192)
    teacher = config_only(root / "8b", hidden_size=4096, num_hidden_layers=32,
                          intermediate_size=14336)
    return write_recipe(root / "r.yaml", student, teacher, text_file, root / "run",
                        deepspeed="ds_configs/zero3.json", train__seq_length=4096,
                        train__micro_batch_size=4, train__global_batch_size=64)


def weighing_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes its engine's resident bytes to RANK.bytes in the run's folder."""
    def around(trainer, batch):
        yield
        optimizer = trainer.engine._deepspeed.optimizer
        rows = optimizer.fp32_partitioned_groups_flat
        moments = [value for state in optimizer.optimizer.state.values()
                   for key, value in state.items()
                   if key != "step"]
        named = dict(trainer.engine.distiller.named_parameters())
        held = {who: sum(p.ds_tensor.nbytes for name, p in named.items() if name.startswith(who))
                for who in ("student", "teacher")}
        gradients = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()
        (trainer.job.run.path / f"{variables['RANK']}.bytes").write_text(json.dumps({
            "student_weights": held["student"], "teacher_weights": held["teacher"],
            "optimizer": sum(tensor.nbytes for tensor in [*rows, *moments]),
            "gradients": sum(tensor.nbytes for tensor in gradients)}))

    patch_train_step(around)
    # Muon's functions take a minute to compile.
    torch._dynamo.config.disable = True
    counting_rank(argv, variables, log)


def test_what_ranks_exchange_in_fp32_takes_twice_bf16s_bytes_and_so_does_muons_moment(
        shared_model, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama", 0), None, text_file,
                          tmp_path / "run", train__optimizer="muon")
    plans = []
    for dtype in ("bf16", "fp32"):
        config = tmp_path / f"{dtype}.json"
        config.write_text(json.dumps({"bf16": {"enabled": True}, "communication_data_type": dtype,
                                      "zero_optimization": {"stage": 3}}))
        plans.append(make_plan(load_recipe(recipe, [f"deepspeed={config}"]), 1, 2, H100))
    bf16, fp32 = plans
    assert fp32.network_per_step["student_reductions"] == pytest.approx(
        2 * bf16.network_per_step["student_reductions"], abs=2)
    # The 14 matrices of the body, a half of each on a rank: 2 bytes more of each element.
    elements = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) // 2
    assert fp32.memory_per_rank["optimizer"] - bf16.memory_per_rank["optimizer"] == 2 * elements


@pytest.mark.parametrize("layout", [["train.micro_batch_size=2"], ["tensor_parallel=2"],
                                    ["deepspeed=BF16", "student.activation_checkpointing=true"],
                                    pytest.param(["student.lora={rank: 16}"],
                                                 marks=pytest.mark.slow),
                                    pytest.param(["student.freeze=[layers.0.*, lm_head]"],
                                                 marks=pytest.mark.slow),
                                    pytest.param(["student.lora={rank: 16}", "tensor_parallel=2"],
                                                 marks=pytest.mark.slow),
                                    pytest.param(["train.optimizer=muon"], marks=pytest.mark.slow),
                                    pytest.param(["train.optimizer=muon", "deepspeed=BF16"],
                                                 marks=pytest.mark.slow)],
                         ids=["dp 2", "tp 2", "bf16", "lora", "frozen", "lora, tp 2", "muon",
                              "muon, bf16"])
def test_a_plan_holds_what_the_engine_of_that_layout_holds(layout, shared_model, text_file,
                                                           tmp_path, capfd):
    # Wide enough that ZeRO-3 partitions more than it pads.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 2}
    pair = [shared_model(family, 0, **sizes) for family in ("llama", "qwen3")]
    recipe = write_recipe(tmp_path / "r.yaml", *pair, text_file, tmp_path / "run",
                          train__steps=5, deepspeed=str(write_gathering_config(tmp_path)))
    layout = [key.replace("BF16", str(write_gathering_config(tmp_path, "zero3.json")))
              for key in layout]
    processes = Ranks(2, "train", recipe, *layout, target=weighing_rank)
    assert processes.wait() == [0, 0], processes.output()
    plan = make_plan(load_recipe(recipe, layout), 1, 2, find_device("cpu", 2))
    held = json.loads((tmp_path / "run" / "0.bytes").read_text())
    for part, size in held.items():
        assert plan.memory_per_rank[part] == pytest.approx(size, rel=0.05), part
    assert f"epochs by the last step: {text_file} {plan.epochs[0]:.3g}" in processes.output()
    last = json.loads((tmp_path / "run" / "0.jsonl").read_text().splitlines()[-1])
    # Tensor-parallel ranks gather only what both hold whole.
    if "tensor_parallel=2" not in layout:
        # A gather's bytes less the rank's own part.
        for who in ("student", "teacher"):
            assert plan.network_per_step[f"{who}_gathers"] == pytest.approx(
                last[f"{who}_bytes"] / 2, rel=0.05), who
    left = json.loads((tmp_path / "run" / "measured.json").read_text())
    assert {part: left["memory_per_rank"][part] for part in held} == held
    for part, size in left["memory_per_rank"].items():
        assert plan.memory_per_rank[part] == pytest.approx(size, rel=0.15), part
    assert main(["plan", "--check", str(tmp_path / "run"), "--json"]) == 0
    checked = json.loads(capfd.readouterr().out.splitlines()[-1])
    for what in ("memory_per_rank", "network_per_step"):
        for part, pair in checked[what].items():
            assert pair == {"planned": getattr(plan, what).get(part),
                            "measured": left[what].get(part)}, part
    assert checked["seconds"]["step"]["measured"] > 0
    assert sum(plan.network_per_step.values()) == pytest.approx(
        sum(left["network_per_step"].values()), rel=0.05)


def test_a_step_that_is_measured_may_compile():
    compiled = torch.compile(lambda x: x * 2, fullgraph=True, backend="eager")
    with _Traffic(World(0, 1, torch.device("cpu"))):
        assert compiled(torch.ones(1)) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_what_is_kept_for_backward_is_what_autograd_keeps(family, shared_model):
    sizes = {} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 256}
    model = AutoModelForCausalLM.from_pretrained(shared_model(family, 0, **sizes)).train()
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.base_model(input_ids=torch.zeros(3, 96, dtype=torch.long), use_cache=False)
    planned = count_body(model.to("meta"), 3, 96, fused=False).saved_bytes
    assert planned == pytest.approx(sum(kept.values()), rel=0.15)


def test_flops_are_those_of_six_and_two_per_weight_and_token(large):
    plan = make_plan(load_recipe(large), 1, 8, H100)
    tokens = plan.tokens_per_step / plan.ranks

    def per_token(width: int, layers: int, inner: int) -> float:
        """2 FLOPs a weight; attention's two products over half of 4096 positions; the head."""
        weights = layers * (2 * width * width + 2 * width * 8 * 128 + 3 * width * inner)
        return 2 * weights + layers * 2 * 4096 * width + 2 * 128256 * width

    assert plan.flops_per_step["student"] == pytest.approx(
        3 * tokens * per_token(2048, 16, 8192), rel=0.01)
    assert plan.flops_per_step["teacher"] == pytest.approx(
        tokens * per_token(4096, 32, 14336), rel=0.01)


def test_logits_that_are_made_twice_take_time_and_are_no_more_flops_of_the_model(large):
    plans = [make_plan(load_recipe(large, [f"loss.token_weight={weight}"]), 1, 8, H100)
             for weight in ("null", "{by: overlap}", "{by: overlap, top: 0.5}",
                            "{by: overlap, over: sequence}")]
    assert len({tuple(plan.flops_per_step.values()) for plan in plans}) == 1
    plain, in_blocks, top, over = (
        [plan.seconds_by_model[model]["flops"] for model in ("student", "teacher")]
        for plan in plans)
    assert plain == in_blocks and top == over
    tokens = plans[0].tokens_per_step / 8
    for width, once, twice in zip((2048, 4096), plain, top, strict=True):
        assert twice - once == pytest.approx(
            2 * tokens * 128256 * width / (H100.flops * EFFICIENCY), rel=0.01)


def test_plan_refuses_what_no_objective_has(large, capsys):
    assert main(["plan", str(large), "loss.order=pq"]) == 2
    assert "order='pq'" in capsys.readouterr().err


def test_what_does_not_fit_exits_with_1_and_names_changes_that_do(large, capsys):
    assert main(["plan", str(large), "--ranks-per-node", "8", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["fits"] and whole["ranks"] == 8 and whole["tokens_per_step"] == 64 * 4096
    assert sum(size for part, size in whole["memory_per_rank"].items() if part != "total") \
        == whole["memory_per_rank"]["total"]
    assert whole["epochs"] is None and whole["recipe"] == resolved(load_recipe(large))
    assert main(["plan", str(large), "--ranks-per-node", "8", "--json",
                 "student.activation_checkpointing=true"]) == 0
    saving = json.loads(capsys.readouterr().out)
    assert whole["activations"] == saving["activations"] == {
        "without_checkpointing": whole["memory_per_rank"]["activations"],
        "with_checkpointing": sum(saving["memory_per_rank"][part]
                                  for part in ("activations", "recomputed_layer"))}
    less = json.dumps({"memory": 0.6 * whole["memory_per_rank"]["total"], "flops": 1e15,
                       "bandwidth": 5e10})
    assert main(["plan", str(large), "--ranks-per-node", "8", "--device", less, "--json"]) == 1
    remedies = json.loads(capsys.readouterr().out)["remedies"]
    assert remedies
    for remedy in remedies:
        change = remedy.partition(":")[0].split()
        assert main(["plan", str(large), "--ranks-per-node", "8", "--device", less,
                     *change]) == 0, remedy
    printed = capsys.readouterr().out
    assert "fits" in printed
    assert "epochs by the last step: not known before the data are prepared" in printed
    assert "seq_length: 4096" in printed and "GB without checkpointing" in printed


@pytest.mark.parametrize("wrong, message",
                         [([], "with nothing"), (["--check", "nowhere"], "no measured.json"),
                          (["--check", "."], "no measured.json")])
def test_a_check_of_no_run_exits_with_2(wrong, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *wrong]) == 2
    assert message in capsys.readouterr().err


MEASURED = {"step": 4, "hosts": ["here"], "device": "cpu", "recipe": "students: {model: x}",
            "memory_per_rank": {},
            "network_per_step": {}}


@pytest.mark.parametrize("left, message",
                         [("[1, 2]", "is damaged"), ("{}", "is damaged"), ("{", "is damaged"),
                          (json.dumps({**MEASURED, "hosts": []}), "is damaged"),
                          (json.dumps(MEASURED), "students")])
def test_a_check_of_what_is_damaged_or_of_another_version_exits_with_2(left, message, capsys,
                                                                       tmp_path):
    (tmp_path / "measured.json").write_text(left)
    assert main(["plan", "--check", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


BAD_DEVICES = ["memory: 1e9, flops: 0, bandwidth: 1e9",
               "memory: .nan, flops: 1e12, bandwidth: 1e9",
               "memory: 1e9, flops: -1e12, bandwidth: 1e9",
               "memory: 1e9, flops: 1e12, bandwidth: .inf",
               "memory: 1e9, flops: 1e12",
               "memory: 1e9, flops: 1e12, bandwidth: 1e9, colour: 3"]


@pytest.mark.parametrize("wrong, message", [
    (["--device", "abacus"], "h100-80g"),
    (["--nodes", "0"], "at least one"),
    (["--device", "cpu", "--ranks-per-node", "0"], "at least one"),
    (["student.model=nowhere"], "nowhere"),
    *[(["--device", f"{{{device}}}"], "each finite and above 0") for device in BAD_DEVICES]])
def test_a_plan_for_nothing_that_is_exits_with_2(large, wrong, message, capsys):
    assert main(["plan", str(large), *wrong]) == 2
    assert message in capsys.readouterr().err


def test_a_model_whose_shapes_depend_on_numbers_exits_with_2(large, monkeypatch, capsys):
    def asks_for_numbers(*_, **__):
        raise NotImplementedError("aten::nonzero\nand more")

    monkeypatch.setattr(model_costs, "count_body", asks_for_numbers)
    monkeypatch.setattr(model_costs, "_COUNTED", {})
    assert main(["plan", str(large)]) == 2
    printed = capsys.readouterr().err
    assert "does not run on torch's meta device, so there is no plan: aten::nonzero\n" in printed
    assert "and more" not in printed
