"""Any layout resumes any other: bit for bit what was saved, and the same training from there on."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import saving_rank, tensors_of
from support.data import write_instructions
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import read_metrics, write_recipe

from amid_ds.checkpoint import reshard
from amid_ds.checkpoint.manifest import Manifest, list_checkpoints, verify
from amid_ds.checkpoint.state import Layout
from amid_ds.cli import main
from amid_ds.config.recipe import Student
from amid_ds.data import PreparedDataset
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.files.atomic import require_disk_space

STEPS = 26
# (ranks, tensor_parallel, ZeRO stage, last step) of each attempt.
CHAIN = [(2, 1, 3, 3), (4, 2, 3, 6), (2, 2, 2, STEPS)]
EVERY = [(2, 1, 3, 3), (4, 2, 3, 6), (1, 1, 2, 9), (4, 1, 2, 12), (2, 2, 2, 15), (1, 1, 3, 18),
         (2, 2, 3, 21),
         (4, 1, 3, STEPS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A DeepSpeed config for each dtype and ZeRO stage, such as fp32_3.json."""
    root = tmp_path_factory.mktemp("reshard")
    for dtype in ("fp32", "bf16"):
        for stage in range(4):
            config = {"bf16": {"enabled": dtype == "bf16"}, "zero_optimization": {"stage": stage}}
            (root / f"{dtype}_{stage}.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def students(shared_model) -> dict[str, Path]:
    """One with a padded vocabulary, a head of its own and 2 KV heads; and one with a tied head."""
    return {"untied": shared_model("qwen3", 0, extra_rows=2), "tied": shared_model("llama-tied", 3)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder that the module's runs prepare their data in, the first of them for all."""
    return tmp_path_factory.mktemp("prepared") / "data"


@pytest.fixture(scope="module")
def recipe_for(students, shared_model, prepared, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, student, **changes): a recipe of STEPS steps, the teacher in bf16."""
    rows = write_instructions(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=120)

    def write(run: Path, student: str = "untied", **changes) -> Path:
        settings = {"train__steps": STEPS, "train__learning_rate": 1e-3,
                    "data__prepared": str(prepared),
                    "teacher__dtype": "bf16", **changes}
        return write_recipe(run.with_suffix(".yaml"), students[student], shared_model("llama", 1),
                            rows, run, **settings)
    return write


def row_recording_rank(stop_after: int, notes: str, argv: list[str], variables: dict[str, str],
                       log: str) -> None:
    """Run as a rank that records each step's rows and asks to stop after step `stop_after`."""
    def around(trainer, batch):
        yield
        world, step = trainer.world, trainer.state.step
        if world.tp_rank == 0:
            rows = [row for each in batch.window for row in each.rows]
            with open(f"{notes}.{world.rank}", "a") as file:
                file.write(json.dumps([step, rows]) + "\n")
        if world.is_main and step == stop_after:
            (trainer.job.run.path / "STOP").touch()

    patch_train_step(around)
    rank_main(argv, variables, log)


def rows_by_step(notes: Path) -> dict[int, list[int]]:
    """The rows that all ranks of all attempts have read, sorted, by step."""
    rows: dict[int, list[int]] = {}
    for path in notes.parent.glob(f"{notes.name}.*"):
        for line in path.read_text().splitlines():
            step, read = json.loads(line)
            rows.setdefault(step, []).extend(read)
    return {step: sorted(read) for step, read in rows.items()}


def run_attempt(recipe: Path, notes: Path, ranks: int, tp: int, config: Path,
                stop_after: int = 0) -> Ranks:
    started = Ranks(ranks, "train", recipe, f"tensor_parallel={tp}", f"deepspeed={config}",
                    target=functools.partial(row_recording_rank, stop_after, str(notes)))
    statuses = started.wait(200)
    assert statuses == [75 if stop_after else 0] * ranks, started.output()
    return started


@pytest.mark.parametrize("chain", [CHAIN, pytest.param(EVERY, marks=pytest.mark.slow)], ids=len)
def test_a_run_moved_through_layouts_is_the_uninterrupted_run(chain, folder, prepared, recipe_for,
                                                              tmp_path):
    whole, moved = (recipe_for(tmp_path / name) for name in ("whole", "moved"))
    run_attempt(whole, tmp_path / "whole.rows", 1, 1, folder / "fp32_3.json")
    for ranks, tp, stage, last in chain:
        text = run_attempt(moved, tmp_path / "moved.rows", ranks, tp, folder / f"fp32_{stage}.json",
                           last if last < STEPS else 0).output()
        assert ("converting it once" in text) == (last != chain[0][-1])
    expected, actual = (read_metrics(tmp_path / name) for name in ("whole", "moved"))
    assert [line["step"] for line in actual] == list(range(1, STEPS + 1))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3), ours["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["tokens"] == theirs["tokens"]
    rows = rows_by_step(tmp_path / "moved.rows")
    assert rows == rows_by_step(tmp_path / "whole.rows")
    read = [row for step in rows.values() for row in step]
    times = [read.count(row) for row in range(len(PreparedDataset(prepared)))]
    assert sum(times) == 4 * STEPS, "a row again before every row was read once"
    assert max(times) - min(times) <= 1, "a row again before every row was read once"


def test_a_tensor_parallel_checkpoint_that_does_not_say_how_its_heads_were_cut_is_another_layout():
    """Its heads were cut as evenly as possible (test_layouts.py resumes such a run)."""
    now = Layout.of(Namespace(size=4, tp_size=2, experts=None), 3, "bf16", "all",
                    ("model.layers.*.mlp.experts.gate_up_proj/2",))
    assert Layout.from_json(now.to_json()) == now
    earlier = Layout.from_json({"ranks": 4, "tensor_parallel": 2, "zero_stage": 3,
                                "student_dtype": "bf16", "step": 4})
    assert earlier != now and "multiples of 1 rows" in str(earlier)
    # Without a group nothing is cut, and all versions read each other's manifests.
    alone = Layout.of(Namespace(size=4, tp_size=1, experts=None), 3, "bf16", "all", ())
    assert alone == Layout(4, 1, 3, "bf16")
    assert alone.to_json().keys() == {"ranks", "tensor_parallel", "zero_stage", "student_dtype"}


def adam_steps(value: object) -> set[float]:
    """Every step count in an optimizer's state; it corrects the bias of the moments."""
    if not isinstance(value, (dict, list)):
        return set()
    own = {float(value["step"])} if isinstance(value, dict) and "exp_avg" in value else set()
    children = value.values() if isinstance(value, dict) else value
    return own.union(*map(adam_steps, children))


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# Student, from (ranks, tensor_parallel, config), to several of them.
BITWISE = {
    "fp32": ("untied", (4, 2, "fp32_3"), [(2, 1, "fp32_2"), (2, 2, "bf16_3")]),
    "bf16": ("tied", (4, 2, "bf16_2"), [(2, 1, "bf16_3"), (1, 1, "fp32_2")]),
    "fp32, all stages": ("untied", (2, 2, "fp32_1"), [(2, 2, "fp32_0"), (2, 1, "fp32_1")]),
    "bf16, all stages": ("tied", (4, 2, "bf16_1"),
                         [(2, 1, "bf16_0"), (2, 2, "bf16_1"), (1, 1, "offload")]),
    "fp32, nothing partitioned": ("untied", (2, 2, "fp32_0"), [(2, 1, "fp32_3")]),
    "bf16, nothing partitioned": ("tied", (2, 1, "bf16_0"), [(4, 2, "bf16_3")]),
}
IN_CI = ("fp32", "bf16")


@pytest.mark.parametrize("name",
                         [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow)
                          for name in BITWISE])
def test_weights_and_moments_arrive_bit_for_bit_in_any_layout(name, folder, students, recipe_for,
                                                              tmp_path):
    student, (ranks, tp, config), others = BITWISE[name]
    shutil.copy(Path(__file__).parent.parent / "ds_configs" / "zero3_offload.json",
                folder / "offload.json")
    recipe = recipe_for(tmp_path / "run", student, train__steps=4,
                        checkpoint__allow_change=["student.dtype"])
    run_attempt(recipe, tmp_path / "rows", ranks, tp, folder / f"{config}.json", stop_after=2)
    first, = list_checkpoints(tmp_path / "run" / "checkpoints")
    before = tensors_of(first, students[student])
    assert not equal(before, {key: torch.zeros_like(tensor) for key, tensor in before.items()})
    for ranks, tp, config in others:
        other = tmp_path / f"{ranks}{tp}{config}"
        started = Ranks(ranks, "train", recipe, f"tensor_parallel={tp}",
                        f"deepspeed={folder / config}.json",
                        target=functools.partial(saving_rank, str(other)))
        assert started.wait(100) == [0] * ranks, started.output()
        assert equal(tensors_of(other / first.name, students[student]), before), other.name
        files = [torch.load(path, weights_only=False)
                 for path in (other / first.name).glob("*states.pt")]
        assert adam_steps(files) == {2.0}
        state, moved = (Manifest.read(path).state for path in (first, other / first.name))
        assert state.tokens == moved.tokens and state.step == moved.step == 2


@pytest.fixture(scope="module")
def stopped(folder, recipe_for, tmp_path_factory) -> Path:
    """A run of two ranks that was stopped after its second step."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    recipe = recipe_for(run, train__steps=4)
    run_attempt(recipe, run.with_suffix(".rows"), 2, 1, folder / "fp32_3.json", stop_after=2)
    return run


@pytest.mark.parametrize("config", ["fp32_3", pytest.param("bf16_2", marks=pytest.mark.slow)])
def test_the_whole_tensors_are_those_of_deepspeeds_own_conversion(config, folder, stopped, students,
                                                                  recipe_for, tmp_path):
    from deepspeed.checkpoint import ds_to_universal

    run = stopped
    if config != "fp32_3":
        run = tmp_path / "run"
        run_ranks(2, "train", recipe_for(run, train__steps=2), f"deepspeed={folder / config}.json")
    saved, = list_checkpoints(run / "checkpoints")
    universal = tmp_path / "universal"
    ds_to_universal.main(Namespace(input_folder=str(saved), output_folder=str(universal),
                                   num_extract_workers=1, num_merge_workers=1,
                                   keep_temp_folder=False, strict=True, inject_missing_state=True))
    for (name, kind), tensor in tensors_of(saved, students["untied"]).items():
        theirs = torch.load(universal / "zero" / f"student.{name}" / f"{kind}.pt",
                            weights_only=False)
        theirs = theirs["param"] if isinstance(theirs, dict) else theirs
        assert torch.equal(tensor, theirs.view(tensor.shape)), (name, kind)


def converting_process(kept: str, model: str, argv: list[str], variables: dict[str, str],
                       log: str) -> None:
    reshard.consolidate(Path(kept), Student(model=model))


def test_after_a_kill_during_a_conversion_the_next_start_converts_anew_and_the_one_after_not_again(
        folder, stopped, students, recipe_for, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    recipe = recipe_for(run, train__steps=4, deepspeed=str(folder / "fp32_3.json"))
    kept = run / "checkpoints" / "step_00000002"
    ranks = Ranks(1,
                  target=functools.partial(converting_process, str(kept), str(students["untied"])))
    ranks.wait_until((kept / ".whole.tmp").exists, 60, interval=0.0005)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert verify(kept) is None and not (kept / "whole").exists()
    assert "converting it once" in run_ranks(1, "train", recipe).output()
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert verify(kept / "whole") is None and not (kept / ".whole.tmp").exists()
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    assert "converting it once" not in run_ranks(1, "train", recipe).output()


def test_without_room_on_the_disk_nothing_is_written_and_the_message_says_how_much(
        stopped, students, tmp_path, monkeypatch):
    kept = tmp_path / "step_00000002"
    shutil.copytree(stopped / "checkpoints" / kept.name, kept)
    before = sorted(path.name for path in kept.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    with pytest.raises(InputError, match=r"needs 0\.\d+ MB, .* has 0\.0 MB free"):
        reshard.consolidate(kept, Student(model=str(students["untied"])))
    assert sorted(path.name for path in kept.iterdir()) == before


def test_where_the_batch_cannot_be_divided_the_numbers_of_ranks_that_can_are_named(
        stopped, recipe_for, tmp_path):
    recipe = recipe_for(tmp_path / "run", train__steps=4, train__global_batch_size=12)
    ranks = Ranks(4, "train", recipe, "train.micro_batch_size=2")
    assert ranks.wait() == [2] * 4
    assert "on one of these numbers of ranks: 1, 2, 3, 6;" in ranks.output()
    ranks = Ranks(4, "train", recipe, "tensor_parallel=2", "train.micro_batch_size=4")
    assert ranks.wait() == [2] * 4
    assert "on one of these numbers of ranks: 2, 6;" in ranks.output()


def test_another_precision_than_before_is_a_change_to_be_allowed(folder, stopped, recipe_for,
                                                                 tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    recipe = recipe_for(run, train__steps=4, deepspeed=str(folder / "bf16_3.json"))
    ranks = Ranks(1, "train", recipe)
    assert ranks.wait() == [2]
    assert "student.dtype: 'fp32' before, 'bf16' now" in ranks.output()
    assert main(["checkpoints", str(run)]) == 0


class CountingWorld(World):
    """A world whose collectives only count."""

    def broadcast(self, value, source=0):
        received.append(value)
        return value


received: list[object] = []


def test_ranks_that_wait_for_a_long_conversion_get_its_heartbeat_and_its_failure(monkeypatch):
    monkeypatch.setattr("amid_ds.distributed.background.HEARTBEAT_S", 0.02)
    world = CountingWorld(rank=0, size=2, device=torch.device("cpu"))
    world.run_on_main(lambda: time.sleep(0.5))
    assert received.count(True) >= 3
    with pytest.raises(InputError, match="no room"):
        world.run_on_main(lambda: require_disk_space(Path("."), 10**18, "no room:", "go elsewhere"))
    with pytest.raises(TrainingError, match="rank 0 failed: SystemExit: 3"):
        world.run_on_main(lambda: sys.exit(3))


def test_the_other_ranks_get_what_rank_0_made_and_make_nothing(monkeypatch):
    # Rank 0 is busy, rank 0 is done, its result and no error.
    replies = iter([True, False, ("of rank 0", None)])
    made: list[int] = []
    monkeypatch.setattr(World, "broadcast", lambda self, value: next(replies))
    world = World(rank=1, size=2, device=torch.device("cpu"))
    assert world.run_on_main(lambda: made.append(1)) == "of rank 0"
    assert made == [] and next(replies, None) is None
