"""On a GPU: the loss against float64, its memory and waits, models that are read to it, groups over
NCCL, and a training run killed and resumed.

All of it is skipped without one, and none of it has run on one yet. It is meant to take two minutes
without the slow ones, so that it is the first thing to run there.
"""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.data import write_jsonl, write_texts
from support.losses import LossProblem, relative_error
from support.models import make_tokenizer
from support.runs import BIN, launch_train, rank_environment, read_metrics, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds import AMiD, LMHead, PerToken, amid_loss, linear_amid_loss, preset
from amid_ds.config.recipe import Teacher
from amid_ds.data.batch import Batch
from amid_ds.distributed.devices import choose_device
from amid_ds.distributed.nodes import ShardGroups, neighbour_group
from amid_ds.distributed.world import World
from amid_ds.engine.sharding import open_causal_lm
from amid_ds.experiments.small_models import LlamaSize, save_new_llama
from amid_ds.losses.reference import naive_loss
from amid_ds.models.loading import DTYPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

# A power of two; neither even nor a multiple of the kernels' blocks; GPT-2's, odd.
VOCABULARIES = (4096, 5000, 50257)
OBJECTIVES = {"jsd": preset("gkd", beta=0.5), "amid": AMiD(-5.0, 0.1),
              "near-1": AMiD(1 - 1e-6, 0.3), "geometric": AMiD(1.0, 0.3, order="rq"),
              "all-orders": AMiD(3.0, 0.3, order={"pr": 0.4, "qr": 0.3, "rp": 0.2, "rq": 0.1}),
              "power": AMiD(1.0, 0.7, order="rq", power=1.4,
                            temperature={"student": 2.0, "teacher": 1.5}),
              "per-token": AMiD(PerToken("overlap", (-5.0, 1.0), (0.0, 0.3)),
                                PerToken("teacher_entropy", (0.0, 1.0), (4.0, 9.0)))}
STEPS, KILLED_AFTER = 60, 10


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest) -> LossProblem:
    """64 tokens over a vocabulary in bf16 on the GPU; every fourth is masked, labels are ignored.

    The two models' widths differ, and so do the widths of their heads.
    """
    exact = LossProblem(64, request.param, student=256, teacher=320, dtype=torch.float64)
    return exact.to(torch.bfloat16, "cuda")


@pytest.mark.parametrize("problem", VOCABULARIES, indirect=True)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_loss_is_no_further_from_float64_than_the_naive_one(problem, objective, backend):
    """In value and gradients, but for 2⁻⁹, a unit of bf16's last place; with cross entropy."""
    exact = problem.to(torch.float64, "cuda")
    truth, naive = exact.naive(objective), problem.naive(objective)
    ours = problem.fused(objective, backend=backend).loss
    assert (ours - truth).abs() <= (naive - truth).abs() + 2**-9 * truth.abs()
    for mine, usual, right in zip(problem.gradients(ours), problem.gradients(naive),
                                  exact.gradients(truth), strict=True):
        assert relative_error(mine, right) <= relative_error(usual, right) + 2**-9


@pytest.mark.parametrize("problem", VOCABULARIES, indirect=True)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_cross_entropy_alone_and_a_head_with_scale_and_cap(problem, backend):
    exact = problem.to(torch.float64, "cuda")
    kept = exact.labels >= 0
    logits = (exact.student @ exact.weight.t() + exact.bias)[:, :problem.vocab_size] * 0.5
    logits = 20 * (logits / 20).tanh()
    truth = torch.nn.functional.cross_entropy(logits[kept], exact.labels[kept], reduction="none")
    out = linear_amid_loss(
        problem.student, LMHead(problem.weight, problem.bias, softcap=20.0, scale=0.5), None, None,
        None, token_weights=kept.float(), labels=problem.labels, kd_weight=0.0, ce_weight=1.0,
        vocab_size=problem.vocab_size, backend=backend)
    # The logits are rounded to bf16.
    torch.testing.assert_close(out.ce[kept].double(), truth.detach(), rtol=2**-7, atol=2**-7)
    right, mine = exact.gradients(truth.sum()), problem.gradients(out.loss)
    for a, b in zip(mine, right, strict=True):
        assert relative_error(a, b) < 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_longer_than_the_vocabulary_change_nothing(dtype):
    width = 5000
    for stride in (width, 5056, 5057):
        logits = [torch.randn(8, stride, device="cuda",
                              generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)
                  for seed in (1, 2)]
        student, teacher = (rows[:, :width] for rows in logits)
        student.requires_grad_()
        exact = student.detach().double().requires_grad_()
        ours = amid_loss(student, teacher, OBJECTIVES["amid"], backend="triton")
        truth = naive_loss(exact, teacher.double(), OBJECTIVES["amid"])
        torch.testing.assert_close(ours.double(), truth.detach(), rtol=2e-4, atol=1e-5)
        mine, = torch.autograd.grad(ours.sum(), student)
        right, = torch.autograd.grad(truth.sum(), exact)
        budget = {torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        assert relative_error(mine, right) < budget


def test_logits_are_never_whole():
    tokens, width, hidden, workspace = 8192, 50257, 64, 512 << 20
    student, teacher = (torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16,
                                    requires_grad=grad) for grad in (True, False))
    heads = [torch.randn(width, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
             for grad in (True, False)]
    weights = torch.ones(tokens, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_amid_loss(student, heads[0], teacher, heads[1], OBJECTIVES["jsd"], token_weights=weights,
                     workspace_bytes=workspace).loss.backward()
    gradients = 6 * (student.numel() + heads[0].numel())
    whole = 2 * 2 * tokens * width
    assert torch.cuda.max_memory_allocated() - before < workspace + gradients + (64 << 20) < whole


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["jsd", "amid"])
def test_a_loss_of_a_pretraining_step_is_finite_and_prints_where_its_time_goes(objective):
    """8192 tokens, 128256 ids, widths of 4096: what `bench loss --predict` is first asked for."""
    tokens, ids, width = 8192, 128256, 4096
    student, teacher, *heads = (
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for rows in
        (tokens, tokens, ids, ids))
    for head in heads:
        head.mul_(2 * width**-0.5)
    leaves = [student.requires_grad_(), heads[0].requires_grad_()]
    weights = torch.full((tokens,), 1 / tokens, device="cuda")

    def run() -> list[torch.Tensor]:
        out = linear_amid_loss(student, heads[0], teacher, heads[1], OBJECTIVES[objective],
                               token_weights=weights, checked=True, backend="triton")
        return [out.loss, *torch.autograd.grad(out.loss, leaves)]

    assert all(bool(each.isfinite().all()) for each in run())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    print(f"\n{torch.cuda.get_device_name()}, {objective}:\n" + trace.key_averages().table(
        sort_by="self_device_time_total", row_limit=16, max_name_column_width=60))


@pytest.fixture
def no_waits() -> Iterator[None]:
    """Torch raises where the host would wait for the GPU."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("problem", VOCABULARIES[:1], indirect=True)
def test_a_micro_batch_with_its_loss_is_queued_without_a_wait(problem, no_waits):
    rows = torch.arange(64).reshape(4, 16)
    batch = Batch(rows, torch.where(rows % 3 == 0, -100, rows), None, 0, [], [])
    hidden = torch.randn(4, 16, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(checked: bool) -> None:
        moved = batch.to("cuda")
        taken = hidden.flatten(0, 1).index_select(0, moved.valid)
        out = linear_amid_loss(
            taken, problem.weight, problem.teacher[:len(batch.valid)], problem.teacher_weight,
            OBJECTIVES["jsd"], token_weights=torch.ones(len(batch.valid), device="cuda"),
            labels=moved.targets, ce_weight=0.5, vocab_size=problem.vocab_size, checked=checked)
        out.loss.backward()

    # Kernels are compiled at their first use.
    step(checked=True)
    torch.cuda.set_sync_debug_mode("error")
    step(checked=True)
    with pytest.raises(RuntimeError, match="synchroniz"):
        step(checked=False)


@pytest.fixture
def bound_gpu(monkeypatch) -> Iterator[torch.device]:
    """The GPU of a default group of this process alone, bound to it as one of several ranks is."""
    device = choose_device(0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1,
                            device_id=device)
    yield device
    dist.destroy_process_group()


def test_groups_of_neighbours_are_split_off_a_group_that_is_bound_to_its_gpu(bound_gpu):
    groups = [neighbour_group([0]) for _ in range(2)]
    for group in groups:
        for device in (bound_gpu, torch.device("cpu")):
            total = torch.ones(2, device=device)
            dist.all_reduce(total, group=group)
            assert total.tolist() == [1, 1]


def test_sums_and_peaks_over_nccl_are_exact(bound_gpu):
    values = torch.tensor([0.1, -1e-3, 3e38, 0.0, math.inf, -math.inf, 1e-40, 8e10],
                          device=bound_gpu)
    sums, peaks = World(0, 1, bound_gpu).sum_with_peaks(values, torch.cat([values, -values[:2]]))
    assert sums == values.tolist()
    assert [peak.value for peak in peaks] == [*values.tolist(), *(-values[:2]).tolist()]
    assert all(peak.rank == 0 for peak in peaks)
    _, (peak,) = World(0, 1, bound_gpu).sum_with_peaks(values, -math.nan * values[:1])
    assert math.isnan(peak.value)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """A model in fp32 whose embedding is read in several chunks."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer(folder, [f"word{number}" for number in range(VOCABULARIES[-1])])
    save_new_llama(folder, LlamaSize.of_width(256, layers=2), tokenizer, 0)
    return folder


@pytest.mark.parametrize("offload", [{}, {"offload_param": {"device": "cpu", "pin_memory": True}}],
                         ids=["on the GPU", "pinned"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_partitions_that_are_read_to_a_gpu_are_the_models_weights(wide_model, bound_gpu, offload,
                                                                  dtype):
    """Over a group of neighbours; chunks of the files pass through the host's memory alone."""
    group = neighbour_group([0])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 1000, **offload}}
    world = World(0, 1, bound_gpu)
    opened = open_causal_lm(Teacher(model=str(wide_model)), dtype, config, world,
                            ShardGroups(group, group))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    named = dict(opened.read(world).named_parameters())
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before <= held + (1 << 20)
    whole = AutoModelForCausalLM.from_pretrained(wide_model, dtype=DTYPES[dtype])
    for name, expected in whole.named_parameters():
        own: torch.Tensor = named[name].ds_tensor
        on_host = bool(offload) and not named[name].ds_persist
        assert (own.device.type, own.is_pinned()) == ("cpu" if on_host else "cuda", on_host), name
        assert torch.equal(own.cpu(), expected.detach().flatten()), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(opened.module.get_buffer(name), buffer.to(bound_gpu)), name


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def kill_and_resume(recipe: Path, run: Path, step: int, timeout: float, *overrides: str) -> int:
    """Train, SIGKILL once `step` is saved, and train on; return the second attempt's status."""
    log = run.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(BIN / "amid-ds"), "train", str(recipe), *overrides], env=rank_environment(),
            stdout=file, stderr=file, start_new_session=True)
    name = f"step_{step:08}"
    while not any(path.name >= name for path in (run / "checkpoints").glob("step_*")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = launch_train(0, recipe, *overrides, timeout=timeout)
    assert done.returncode in (0, 75), done.stderr
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step
    return done.returncode


def test_a_killed_and_resumed_run_is_the_uninterrupted_run_within_rounding(llama_pair, tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl")

    def recipe(name: str) -> Path:
        return write_recipe(
            tmp_path / f"{name}.yaml", *llama_pair, texts, tmp_path / name, train__steps=STEPS,
            deepspeed="ds_configs/zero3.json", checkpoint__every=5,
            data__prepared=str(tmp_path / "data"))

    done = launch_train(0, recipe("whole"))
    assert done.returncode == 0, done.stderr
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert kill_and_resume(recipe("killed"), killed, KILLED_AFTER, 240) == 0
    assert [line["tokens"] for line in read_metrics(killed)] == [
        line["tokens"] for line in read_metrics(whole)]
    assert losses_of(killed) == pytest.approx(losses_of(whole), rel=2e-2)
    first, *_, last = read_metrics(whole)
    assert last["loss"] < first["loss"] and last["memory/peak"] > 0 and last["time/loss"] > 0


@pytest.mark.slow
def test_hundreds_of_millions_of_parameters_learn_for_minutes_over_a_kill(tmp_path):
    """A student of 0.25 B parameters, its teacher of 0.91 B, both random; prints what it took."""
    words = [f"word{number}" for number in range(VOCABULARIES[-1])]
    draw = random.Random(0)
    data = write_jsonl(tmp_path / "texts.jsonl",
                       ({"text": " ".join(draw.choices(words[:1000], k=1200))} for _ in range(500)))
    models = [tmp_path / name for name in ("student", "teacher")]
    for seed, (folder, width) in enumerate(zip(models, (1024, 2048), strict=True)):
        tokenizer = make_tokenizer(folder, words)
        save_new_llama(folder, LlamaSize.of_width(width, layers=12), tokenizer, seed)
    recipe = write_recipe(
        tmp_path / "r.yaml", *models, data, tmp_path / "run", deepspeed="ds_configs/zero3.json",
        train={"steps": 100_000, "seq_length": 1024, "micro_batch_size": 4, "global_batch_size": 16,
               "learning_rate": 3e-4, "warmup_steps": 10, "max_hours": 90 / 3600},
        checkpoint={"every": 20, "keep": 2})
    assert kill_and_resume(recipe, tmp_path / "run", 20, 600) == 75
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
    timed = lines[len(lines) // 2:]
    names = ["tokens_per_second", "perf/mfu", "memory/peak",
             *(name for name in timed[-1] if name.startswith("time/"))]
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(lines)} steps:")
    for name in names:
        values = [line[name] for line in timed if line[name] is not None]
        print(f"  {name}: {statistics.median(values):.4g}" if values else f"  {name}: unknown")
