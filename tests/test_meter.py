"""A run's own measurements: time by phase, slow ranks, spikes of the loss, a profile of a step."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import statistics
import time
from pathlib import Path

import pytest
import torch
from support.patches import patch_train_step
from support.rank_stats import WatchedRanks
from support.ranks import Ranks, rank_main
from support.runs import read_metrics, write_recipe

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.distributed.world import Peak
from amid_ds.monitor import step_timer
from amid_ds.monitor.anomalies import AnomalyMonitor
from amid_ds.monitor.rank_stats import RECENT_STEPS
from amid_ds.monitor.step_timer import PHASES, StepTimer, phase
from amid_ds.planning.devices import find_device
from amid_ds.planning.plan import make_plan
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import RunLog

TOTAL = RECENT_STEPS + 4
SPIKE, LAZY, SLOW_S = RECENT_STEPS + 2, 0.15, 0.1
PROFILED = (3, 2)


def lazy_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank whose teacher and optimizer take at least LAZY seconds in step 2.

    Rank 1 is also slow in its loss, and its loss of step SPIKE counts thirtyfold.
    """
    import time

    from amid_ds.engine.engine import Engine
    from amid_ds.models import distiller
    from amid_ds.models.distiller import Distiller

    rank, at = int(variables["RANK"]), {"step": 0}
    loss = distiller.linear_amid_loss

    def around(*_):
        at["step"] += 1
        yield

    def slowly(function):
        def call(*arguments):
            if at["step"] == 2:
                time.sleep(LAZY)
            return function(*arguments)
        return call

    def lose(*arguments, token_weights, **options):
        if rank == 1:
            time.sleep(SLOW_S)
            token_weights = token_weights * (30 if at["step"] == SPIKE else 1)
        return loss(*arguments, token_weights=token_weights, **options)

    patch_train_step(around)
    Distiller.teacher_hidden_states = slowly(Distiller.teacher_hidden_states)
    Engine.optimizer_step = slowly(Engine.optimizer_step)
    distiller.linear_amid_loss = lose
    rank_main(argv, variables, log)


@pytest.fixture(scope="module")
def watched(shared_model, text_file, tmp_path_factory) -> tuple[Path, str]:
    """(run folder, output of rank 0)"""
    root = tmp_path_factory.mktemp("watched")
    pair = [shared_model(family) for family in ("llama", "gpt2")]
    recipe = write_recipe(root / "r.yaml", *pair, text_file, root / "run",
                          train__steps=TOTAL, train__global_batch_size=2, checkpoint__every=7,
                          train__profile=dict(zip(("start", "steps"), PROFILED, strict=True)))
    ranks = Ranks(2, "train", recipe, target=lazy_rank)
    assert ranks.wait() == [0, 0], ranks.output()
    return root / "run", ranks.output()


def test_every_second_belongs_to_one_phase(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(clock))
    with StepTimer(torch.device("cpu"), {"student": 60.0, "teacher": 2.0}, 2.0) as ours:  # at 0
        with phase("forward"):  # from 1
            with phase("loss"):  # 3 to 7
                pass
            with pytest.raises(RuntimeError), phase("loss"):  # 15 to 31
                raise RuntimeError
        # Ended at 63; read at 127.
        line = ours.line(steps=2, uses_teacher=False)
    spent = {"other": 1 + 64, "forward": 2 + 8 + 32, "loss": 4 + 16}
    assert {name: line[f"time/{name}"] for name in PHASES} == {
        name: spent.get(name, 0) / 2 for name in PHASES}
    assert line["time/step"] == 127 / 2 and line["perf/teacher_flops"] == 0
    assert line["perf/mfu"] == pytest.approx(60 / (127 / 2 * 2))


@pytest.mark.slow
def test_what_the_meter_costs_a_step_and_a_line(tmp_path, capfd):
    """Prints the README's numbers: CPU time of all threads, TensorBoard's too, around no work."""
    steps, costs = 300, {}
    values = {"loss": 1.0, "kd_loss": 1.0, "ce_loss": 1.0, "tokens_per_second": 1.0}
    for way in ("lines alone", "lines and phases", "metered lines"):
        (tmp_path / way).mkdir()
        log = RunLog(RunFolder(tmp_path / way), 0, steps)
        with StepTimer(torch.device("cpu"), {"student": 60.0}, 2.0) as ours:
            watch = AnomalyMonitor(lambda rank: f"rank {rank}", 2)
            began = time.process_time()
            for step in range(1, steps + 1):
                if way != "lines alone":
                    mark_a_step()
                    watch.step(step, ours.peers)
                more = ours.line(1, uses_teacher=True) if way == "metered lines" else {}
                log.step(step, {**values, **more})
            costs[way] = (time.process_time() - began) / steps * 1e3
        log.close()
    phases, line = (costs[way] - costs[before] for before, way in itertools.pairwise(costs))
    with capfd.disabled():
        print(f"\nthe meter: {phases:.2f} ms a step of 4 micro-batches, "
              f"{line:.2f} ms a logged line")
    assert all(size > 0 for size in costs.values())
    assert {"time/step", "perf/mfu"} <= read_metrics(tmp_path / "metered lines")[-1].keys()


def mark_a_step() -> None:
    """Call the meter as training does in a step of 4 micro-batches."""
    for name in ("data", "teacher", *["forward", "backward"] * 4, "optimizer"):
        with phase(name), phase("loss") if name == "forward" else contextlib.nullcontext():
            pass
    summands, candidates = step_timer.local_stats()
    step_timer.set_peer_stats(2.0, [2 * number for number in summands],
                              [Peak(number, 0) for number in (1.0, *candidates)])


def test_time_is_counted_in_the_phase_that_took_it(watched):
    run, _ = watched
    lines = read_metrics(run)
    for line in lines:
        assert sum(line[f"time/{name}"] for name in PHASES) == pytest.approx(
            line["time/step"] + line["time/checkpoint"] + line["time/evaluation"])
    for name in ("teacher", "optimizer"):
        median = statistics.median(line[f"time/{name}"] for line in lines)
        assert lines[1][f"time/{name}"] >= LAZY > median
    # Rank 1 sleeps in its loss; rank 0 waits for it in its backward, or where the two meet next.
    assert all(line["time/step"] >= SLOW_S for line in lines)
    assert statistics.median(line["time/loss"] for line in lines) < SLOW_S
    saves = [line["step"] for line in lines if line["time/checkpoint"] > 0]
    # Counted in the line after the save.
    assert {8, 15, 22} <= set(saves) and saves[0] == 8
    assert all(line["memory/peak"] >= line["memory/reserved"] > 2**20 for line in lines)


def test_flops_are_the_plans_and_mfu_is_theirs(watched):
    run, _ = watched
    cpu = find_device("cpu", 2)
    planned = make_plan(load_recipe(run / "recipe.yaml"), 1, 2, cpu).flops_per_step
    for line in read_metrics(run):
        assert {name: line[f"perf/{name}_flops"] for name in ("student", "teacher")} == planned
        assert line["perf/mfu"] == pytest.approx(
            sum(planned.values()) / line["time/step"] / cpu.flops)


def test_tensorboard_has_the_names_and_numbers_of_the_metrics(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = watched
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    lines = read_metrics(run)
    for name in (name for name in lines[0] if "/" in name):
        assert [event.value for event in board.Scalars(name)] == pytest.approx(
            [line[name] for line in lines]), name
    assert {name.partition("/")[0] for name in board.Tags()["scalars"]} == {
        "loss", "optim", "objective", "perf", "time", "memory", "data"}


def test_a_slow_rank_and_a_spike_are_reported_once_with_step_and_rank(watched):
    run, output = watched
    slow = [line for line in output.splitlines() if "is slow" in line]
    assert len(slow) == 1 and "WARNING: rank 1 on " in slow[0], output
    assert f"up to {RECENT_STEPS + 1} " in slow[0], output
    spikes = [line for line in output.splitlines() if "spikes" in line]
    assert len(spikes) == 1 and f"in step {SPIKE}," in spikes[0], output
    assert "rank 1 on" in spikes[0], output
    assert all(line["perf/slowest_rank"] == 1 for line in read_metrics(run))
    last = next(line for line in output.splitlines() if f"step {TOTAL}/{TOTAL}" in line)
    assert f"slowest rank 1 on {socket.gethostname()}" in last


def test_normal_noise_is_not_reported(caplog):
    watch = WatchedRanks(3)
    noise = torch.Generator().manual_seed(0)
    for step in range(300):
        loss = 3 / (1 + step / 30) + 0.1 * float(torch.randn((), generator=noise))
        own = 0.1 + 0.02 * torch.rand(3, generator=noise)
        watch.step(step, [(loss / 3, float(seconds)) for seconds in own])
    assert caplog.messages == []


def test_a_spike_that_returns_is_reported_again(caplog):
    watch = WatchedRanks(2)
    for step in range(1, 6 * RECENT_STEPS + 1):
        # STEPS good steps, then STEPS bad ones, and so on.
        bad = (step - 1) // RECENT_STEPS % 2 == 1
        watch.step(step, [(1.0, 0.1), (8.0 if bad else 1.0, 0.5 if bad else 0.1)])
    assert ["spikes" in line for line in caplog.messages].count(True) == 3
    assert ["slow" in line for line in caplog.messages].count(True) == 3
    assert ("in step 21," in caplog.messages[0]
            and "most of it comes from rank 1" in caplog.messages[0])


def test_a_loss_that_stays_up_hides_no_later_spike(caplog):
    watch = WatchedRanks(1)
    for step in range(1, 101):
        watch.step(step, [(60.0 if step == 90 else 3.0 if step > 30 else 1.0, 0.1)])
    assert len(caplog.messages) == 2 and "in step 31," in caplog.messages[0], caplog.messages
    assert "60 in step 90, the median of the 20 steps before is 3;" in caplog.messages[1], (
        caplog.messages)


def test_a_tensor_parallel_group_has_one_part_of_the_loss(caplog):
    watch = WatchedRanks(4, tp_size=2)
    for step in range(1, RECENT_STEPS + 2):
        bad = 9.0 if step > RECENT_STEPS else 1.0
        watch.step(step, [(part, 0.1) for part in (1.0, 1.0, bad, bad)])
    assert len(caplog.messages) == 1 and "spikes: 10 in step" in caplog.messages[0], caplog.messages
    assert "comes from rank 2, 90% of it" in caplog.messages[0], caplog.messages


def test_a_rank_that_compiles_longer_in_an_attempts_first_step_is_not_slow(caplog):
    watch = WatchedRanks(2)
    for step in range(1, 3 * RECENT_STEPS):
        watch.step(step, [(1.0, 0.1), (1.0, 90.0 if step == 1 else 0.1)],
                   91.0 if step == 1 else 1.0)
    assert caplog.messages == []


def test_of_many_slow_ranks_each_is_reported_once_the_slowest_first(caplog):
    watch = WatchedRanks(9)
    for step in range(1, 3 * RECENT_STEPS):
        watch.step(step, [(1.0, 0.1)] * 5 + [(1.0, 0.1 + 0.1 * rank) for rank in range(1, 5)])
    assert [message.partition(" is slow")[0] for message in caplog.messages] == [
        "rank 8", "rank 7", "rank 6", "rank 5"]
    # One after another, from the first step with enough before it.
    assert [re.search(r"up to (\d+) it took ([\d.]+) s", message).groups()
            for message in caplog.messages] == [("21", "10"), ("22", "8"), ("23", "6"), ("24", "4")]
    # Rank 8 catches up and falls behind once more.
    for step in range(3 * RECENT_STEPS, 6 * RECENT_STEPS):
        watch.step(step, [(1.0, 0.1)] * 8 + [(1.0, 0.1 if step < 4 * RECENT_STEPS else 0.5)])
    assert [message.partition(" is slow")[0] for message in caplog.messages[4:]] == ["rank 8"]


@pytest.mark.parametrize("tp_size", [1, 3])
def test_the_median_of_the_ranks_work_is_known_to_within_5_percent(tp_size):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-4, 1e-2, 1.0, 1e3):
        watch = WatchedRanks(99, tp_size)
        own = (scale * torch.rand(99 // tp_size, generator=generator)).repeat_interleave(tp_size)
        seconds = watch.step(1, [(1.0, float(each)) for each in own])
        assert seconds.median_s == pytest.approx(max(own.median().item(), 1e-4), rel=0.0501)
        assert seconds.slowest.value == own.max().item()
        assert seconds.slowest.rank == int(own.argmax())


def test_a_profile_holds_our_phases_of_the_steps_asked_for_on_every_rank(watched):
    run, output = watched
    start, steps = PROFILED
    assert output.count("ui.perfetto.dev") == 1
    for rank in (0, 1):
        trace = json.loads((run / "profile" / f"step_{start:08d}_rank_{rank}.json").read_text())
        spans = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
        counts = {name: sum(event["name"] == name for event in spans) for name in PHASES}
        assert counts == {**dict.fromkeys(PHASES, steps), "rollout": 0, "checkpoint": 0,
                          "evaluation": 0, "other": 0,
                          "data": counts["data"]}
        assert all(event["ph"] == "X" and event["dur"] >= 0 for event in spans)
        names = {event["name"] for event in trace["traceEvents"]}
        assert "aten::mm" in names or "aten::addmm" in names, "operators are there too"


def test_steps_to_profile_that_are_none_exit_with_2(watched, capsys):
    run, _ = watched
    assert main(["train", str(run / "recipe.yaml"), "train.profile={start: 0}"]) == 2
    assert "train.profile.start" in capsys.readouterr().err
