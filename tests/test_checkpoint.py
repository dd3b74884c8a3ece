"""What a checkpoint guarantees, tested by killed runs, corrupted files and full disks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import fp32_state
from support.data import write_instructions
from support.disks import SmallDisk
from support.models import make_model
from support.patches import rank_without_compiler
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_metrics, count_steps, read_metrics, write_recipe

from amid_ds.checkpoint.manifest import Manifest, list_checkpoints, verify

STEPS = 30
LAST = f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def pair(shared_model) -> tuple[Path, Path]:
    """A student with dropout, so that a resume has to restore the random state too; a teacher."""
    dropout = dict(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
    return shared_model("gpt2", 0, **dropout), shared_model("llama", 1)


@pytest.fixture(scope="module")
def recipe_for(pair, instructions_file, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, **changes): a recipe with a checkpoint at every step."""
    prepared = tmp_path_factory.mktemp("prepared") / "data"

    def write(run: Path, **changes) -> Path:
        settings = {"train__steps": STEPS, "checkpoint__every": 1, "checkpoint__keep": 3,
                    "data__prepared": str(prepared), **changes}
        return write_recipe(run.with_suffix(".yaml"), *pair, instructions_file, run, **settings)
    return write


@pytest.fixture(scope="module")
def uninterrupted(recipe_for, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(2, "train", recipe_for(run))
    return run


def newest_name(run: Path) -> str:
    return max((path.name for path in list_checkpoints(run / "checkpoints")), default="")


def wait_while_alive(ranks: Ranks, condition: Callable[[], object], interval: float) -> None:
    """Return when `condition()` is true, when rank 0 has ended, or after 90 s."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and ranks.processes[0].is_alive() and not condition():
        time.sleep(interval)


def kill_and_resume(recipe: Path, run: Path, kills: int, seed: int, last: str = LAST) -> int:
    """Start, kill -9 one rank or all at a random moment, restart; return the kills inside a save.

    Every other kill waits for a save to begin: its hidden folder exists for some milliseconds.
    """
    draw = random.Random(seed)
    inside = 0
    for number in range(kills):
        before = len(list_checkpoints(run / "checkpoints"))
        newest = newest_name(run)
        ranks = Ranks(2, "train", recipe)
        # At least one step further in every attempt.
        wait_while_alive(ranks, lambda newest=newest: newest_name(run) != newest, 0.002)
        if number % 2:
            wait_while_alive(ranks, lambda: list((run / "checkpoints").glob(".step_*.tmp")), 0.0005)
        else:
            time.sleep(draw.random() * 0.3)
        hidden = bool(list((run / "checkpoints").glob(".step_*.tmp")))
        ranks.signal(signal.SIGKILL, *([0, 1] if draw.random() < 0.5 else [draw.randrange(2)]))
        inside += hidden
        # As the launcher does: when one rank dies, it kills the others.
        for rank in range(2):
            ranks.processes[rank].kill()
        ranks.wait(30)
        assert len(list_checkpoints(run / "checkpoints")) >= min(2, before), (
            "a kill has cost a committed checkpoint")
        if newest_name(run) == last:
            break
    return inside


def test_killed_at_random_moments_a_run_is_still_the_uninterrupted_run(recipe_for, uninterrupted,
                                                                       tmp_path):
    kills = inside = 0
    # Four runs, because one has at most as many attempts as steps.
    for attempt in range(4):
        run = tmp_path / f"run{attempt}"
        recipe = recipe_for(run)
        inside += kill_and_resume(recipe, run, 5, seed=attempt)
        kills += 5
        if attempt == 0:
            run_ranks(2, "train", recipe)
            assert comparable_metrics(run) == comparable_metrics(uninterrupted)
            last = [fp32_state(path / "checkpoints" / LAST) for path in (run, uninterrupted)]
            for ours, theirs in zip(*last, strict=True):
                assert torch.equal(ours, theirs)
            assert not list((run / "checkpoints").glob(".step_*")), (
                "what was half-written is not swept away")
        else:
            steps = [line["step"] for line in read_metrics(run)]
            assert steps == list(range(1, len(steps) + 1))
    assert kills == 20 and inside >= 5


LAYOUTS = {
    "bf16": (2, {"deepspeed": "zero3.json"}),
    "offload": (2, {"deepspeed": "zero3_offload.json"}),
    "tp 2 x dp 2": (4, {"tensor_parallel": 2}),
}


@pytest.mark.parametrize(("layout", "target"), [
    *((layout, rank_without_compiler) for layout in LAYOUTS),
    pytest.param("offload", rank_main, marks=pytest.mark.slow, id="offload, CPU Adam")])
def test_a_resume_is_exact_in_other_precisions_and_layouts(layout, target, recipe_for, tmp_path):
    ranks, changes = LAYOUTS[layout]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ranks(ranks, "train", recipe_for(whole, train__steps=6, checkpoint__every=3, **changes),
              target=target)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000006")
    text = run_ranks(ranks, "train",
                     recipe_for(cut, train__steps=6, checkpoint__every=3, **changes),
                     target=target).output()
    assert "resumed after step 3" in text
    assert comparable_metrics(cut) == comparable_metrics(whole)
    last = [fp32_state(run / "checkpoints" / "step_00000006") for run in (cut, whole)]
    for ours, theirs in zip(*last, strict=True):
        assert torch.equal(ours, theirs)


def test_tensorboard_carries_on_with_no_step_missing_and_none_twice(uninterrupted, recipe_for,
                                                                    tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    run_ranks(2, "train", continued(uninterrupted, recipe_for, run))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/total")] == list(range(1, STEPS + 1))
    assert [event.value for event in board.Scalars("loss/total")] == pytest.approx(
        [line["loss"] for line in read_metrics(run)])


def test_a_second_ctrl_c_ends_the_run_at_once(recipe_for, tmp_path):
    run = tmp_path / "run"
    ranks = Ranks(1, "train", recipe_for(run, train__steps=3000, checkpoint__every=1000))
    ranks.wait_until(lambda: count_steps(run) > 2)
    # The second comes in the step that the first waits for, or just after its save.
    for _ in range(2):
        ranks.signal(signal.SIGINT)
    assert ranks.wait(30)[0] in (1, 75)


def break_it(checkpoint: Path, how: str) -> None:
    shards = sorted(checkpoint.glob("*optim_states.pt"))
    if how == "a file missing":
        shards[0].unlink()
    elif how == "truncated":
        os.truncate(shards[1], shards[1].stat().st_size // 2)
    elif how == "one bit flipped":
        data = bytearray(shards[1].read_bytes())
        data[len(data) // 2] ^= 1
        shards[1].write_bytes(data)
    elif how == "a rank's file swapped with another's":
        first, second = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(second)
        shards[1].write_bytes(first)
    elif how == "manifest gone":
        (checkpoint / "manifest.json").unlink()
    elif how == "manifest changed":
        text = (checkpoint / "manifest.json").read_text()
        (checkpoint / "manifest.json").write_text(text.replace('"tokens": ', '"tokens": 1'))


DAMAGES = ["a file missing", "truncated", "one bit flipped", "a rank's file swapped with another's",
           "manifest gone", "manifest changed"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_found(how, uninterrupted, tmp_path):
    checkpoint = tmp_path / "step_00000030"
    shutil.copytree(uninterrupted / "checkpoints" / checkpoint.name, checkpoint)
    assert verify(checkpoint) is None
    break_it(checkpoint, how)
    assert verify(checkpoint) is not None
    # Ranks share the files: at least one of them sees the damage.
    if "manifest" not in how:
        assert [verify(checkpoint, rank, 3) is not None for rank in range(3)].count(True) >= 1


@pytest.mark.slow
def test_soak_of_a_hundred_kills(recipe_for, tmp_path):
    run, kills, inside = tmp_path / "run", 0, 0
    whole = tmp_path / "whole"
    run_ranks(2, "train", recipe_for(whole, train__steps=600, checkpoint__every=2), timeout=1200)
    recipe = recipe_for(run, train__steps=600, checkpoint__every=2)
    while kills < 100:
        inside += kill_and_resume(recipe, run, 10, seed=kills, last="step_00000600")
        kills += 10
        assert newest_name(run) < "step_00000600", (
            "the run ended before its last kill: give it more steps")
    run_ranks(2, "train", recipe, timeout=1200)
    assert comparable_metrics(run) == comparable_metrics(whole)
    print(f"{kills} kills, {inside} of them inside a save")


def continued(uninterrupted: Path, recipe_for: Callable[..., Path], run: Path, **changes) -> Path:
    """Copy the uninterrupted run without its last checkpoint; return the recipe that resumes it."""
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "checkpoints" / LAST)
    return recipe_for(run, **changes)


def test_a_damaged_newest_is_named_loudly_and_the_one_before_is_used(uninterrupted, recipe_for,
                                                                     tmp_path):
    run = tmp_path / "run"
    recipe = continued(uninterrupted, recipe_for, run)
    break_it(run / "checkpoints" / "step_00000029", "one bit flipped")
    text = run_ranks(2, "train", recipe).output()
    assert "WARNING" in text and "step_00000029 is damaged" in text
    assert "resumed after step 28" in text
    assert comparable_metrics(run) == comparable_metrics(uninterrupted)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [
        "step_00000028", "step_00000029", "step_00000030"]
    assert [verify(path) for path in list_checkpoints(run / "checkpoints")] == [None, None, None]


def test_with_no_good_checkpoint_the_run_stops_with_1_and_does_not_start_over(uninterrupted,
                                                                              recipe_for, tmp_path):
    run = tmp_path / "run"
    recipe = continued(uninterrupted, recipe_for, run)
    for path in list_checkpoints(run / "checkpoints"):
        break_it(path, "manifest gone")
    ranks = Ranks(2, "train", recipe)
    assert ranks.wait() == [1, 1]
    assert "does not start over" in ranks.output() and "Traceback" not in ranks.output()
    assert comparable_metrics(run) == comparable_metrics(uninterrupted), (
        "the metrics of the damaged run were touched")
    listing = run_ranks(1, "checkpoints", run).output()
    assert listing.count("manifest") == 2


def test_the_listing_tells_good_from_damaged(uninterrupted, recipe_for, tmp_path):
    run = tmp_path / "run"
    continued(uninterrupted, recipe_for, run)
    break_it(run / "checkpoints" / "step_00000028", "truncated")
    lines = run_ranks(1, "checkpoints", run).output()
    assert "good" in lines and "bytes" in lines and "2 rank(s)" in lines and "29" in lines


@pytest.mark.parametrize("changed, named", [("teacher", "teacher.sha256"), ("data", "data.sha256")])
def test_a_resume_with_another_teacher_or_other_data_is_refused_unless_allowed(
        changed, named, uninterrupted, recipe_for, pair, instructions_file, tmp_path):
    run = tmp_path / "run"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(pair[1], other / "teacher")
    shutil.copy(instructions_file, other / "rows.jsonl")
    write_instructions(other / "rows.jsonl", rows=50, seed=7) if changed == "data" else \
        make_model(other / "teacher", "llama", 9)
    recipe = write_recipe(tmp_path / "r.yaml", pair[0], other / "teacher", other / "rows.jsonl",
                          run, train__steps=STEPS, checkpoint__every=1)
    continued(uninterrupted, recipe_for, run)
    moved = ["data.train.0.path", "teacher.model"]
    ranks = Ranks(2, "train", recipe, f"checkpoint.allow_change=[{', '.join(moved)}]")
    assert ranks.wait() == [2, 2]
    assert named in ranks.output() and "before" in ranks.output()
    run_ranks(2, "train", recipe, f"checkpoint.allow_change=[{', '.join([*moved, named])}]")


def test_the_teacher_is_in_no_checkpoint(uninterrupted, pair, instructions_file, tmp_path):
    alone = write_recipe(tmp_path / "r.yaml", pair[0], None, instructions_file, tmp_path / "run",
                         train__steps=1)
    run_ranks(2, "train", alone)

    def size(checkpoint: Path) -> int:
        return sum(path.stat().st_size for path in checkpoint.glob("*.pt"))

    assert size(list_checkpoints(uninterrupted / "checkpoints")[0]) <= 1.02 * size(
        tmp_path / "run/checkpoints/step_00000001")


def test_keep_every_keeps_milestones_and_keep_the_newest(recipe_for, tmp_path):
    recipe = recipe_for(tmp_path / "run", train__steps=9, checkpoint__keep=2,
                        checkpoint__keep_every=3)
    run_ranks(1, "train", recipe)
    assert [path.name[-1]
            for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["3", "6", "8", "9"]


@pytest.mark.parametrize("how", ["STOP file", "max_hours"])
def test_a_stop_file_and_the_time_limit_stop_in_order(how, recipe_for, uninterrupted, tmp_path):
    run = tmp_path / "run"
    limit = 0.5 / 3600 if how == "max_hours" else None
    recipe = recipe_for(run, train__steps=STEPS, checkpoint__every=1000)
    changes = [f"train.max_hours={limit}"] if limit else []
    if how == "STOP file":
        run.mkdir()
        (run / "STOP").touch()
    ranks = Ranks(2, "train", recipe, *changes)
    assert ranks.wait() == [75, 75], ranks.output()
    assert ("STOP" if how == "STOP file" else "max_hours") in ranks.output()
    assert not (run / "STOP").exists()
    run_ranks(2, "train", recipe)
    assert comparable_metrics(run) == comparable_metrics(uninterrupted)


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "run" / "checkpoints", 8)
    yield disk
    disk.vanish()


@pytest.mark.parametrize("how", [
    "fill", pytest.param("make_read_only", marks=pytest.mark.slow)])
def test_the_training_goes_on_when_a_save_fails_and_the_next_interval_tries_again(
        how, disk, recipe_for, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for(run, train__steps=60, checkpoint__every=15)
    ranks = Ranks(2, "train", recipe)
    ranks.wait_until(lambda: len(list_checkpoints(run / "checkpoints")) == 1, interval=0.002)
    getattr(disk, how)()
    ranks.wait_until(lambda: "SAVE FAILED" in ranks.output(), interval=0.002)
    good = list_checkpoints(run / "checkpoints")
    assert good and [verify(path) for path in good] == [None] * len(good)
    disk.repair()
    assert ranks.wait() == [0, 0], ranks.output()
    assert Manifest.read(list_checkpoints(run / "checkpoints")[-1]).state.step == 60
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 61))


@pytest.mark.parametrize("how", ["fill", "vanish"])
def test_after_three_failures_in_a_row_the_run_stops_with_1(how, disk, recipe_for, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for(run, train__steps=2000, checkpoint__every=5)
    ranks = Ranks(2, "train", recipe)
    ranks.wait_until((run / "checkpoints" / "latest").exists, interval=0.002)
    getattr(disk, how)()
    assert ranks.wait() == [1, 1], ranks.output()
    assert "(3 in a row)" in ranks.output() and "Traceback" not in ranks.output()
    if how == "vanish":
        assert not list((run / "checkpoints").iterdir()), (
            "something was written where the mount had been")
    else:
        disk.repair()
        assert [verify(path) for path in list_checkpoints(run / "checkpoints")].count(None) >= 1
