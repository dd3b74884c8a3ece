"""The learning rate of each step, and the number of steps, are what the recipe says."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.data import write_texts
from support.ranks import Ranks, run_ranks
from support.reference_loop import reference_factor, reference_loop
from support.runs import comparable_metrics, read_metrics, write_recipe

from amid_ds.cli import main
from amid_ds.cluster.status import run_status
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Train
from amid_ds.config.schedule import learning_rate
from amid_ds.data.epochs import epoch_steps
from amid_ds.data.order import rows_for_samples
from amid_ds.experiments.sweep import is_finished
from amid_ds.run.attempts import append_event

# Every schedule, and every shape of the way down of wsd.
SCHEDULES = {
    "cosine": {"schedule": "cosine", "min_lr_ratio": 0.1},
    "linear": {"schedule": "linear", "min_lr_ratio": 0.25},
    "constant": {"schedule": "constant"},
    "wsd-linear": {"schedule": "wsd", "decay_steps": 6, "min_lr_ratio": 0.1},
    "wsd-cosine": {"schedule": "wsd", "decay_steps": 7, "decay_shape": "cosine"},
    "wsd-sqrt": {"schedule": "wsd", "decay_steps": 8, "decay_shape": "sqrt", "min_lr_ratio": 0.05},
}


@st.composite
def trains(draw) -> Train:
    warmup_steps = draw(st.integers(0, 40))
    decay_steps, stable_steps = draw(st.integers(1, 60)), draw(st.integers(0, 60))
    keys = dict(draw(st.sampled_from([{"schedule": "cosine"}, {"schedule": "linear"},
                                      {"schedule": "constant"},
                                      *({"schedule": "wsd", "decay_shape": shape}
                                        for shape in ("linear", "cosine", "sqrt"))])))
    if keys["schedule"] == "wsd":
        keys["decay_steps"] = decay_steps
    if keys["schedule"] != "constant":
        keys["min_lr_ratio"] = draw(st.floats(0, 1))
    return Train(steps=warmup_steps + stable_steps + decay_steps, global_batch_size=1,
                 warmup_steps=warmup_steps, learning_rate=draw(st.floats(1e-8, 10)), **keys)


@given(trains())
@settings(deadline=None, max_examples=300)
def test_the_rate_rises_to_its_peak_once_and_goes_down_to_its_end_without_a_jump(train):
    peak, warm, low = train.learning_rate, train.warmup_steps, train.min_lr_ratio
    # The last is the step after the run.
    rates = [learning_rate(train, step) for step in range(train.steps + 1)]
    before, after = rates[:warm], rates[warm:]
    # Up, by equal steps, to the peak itself; then never up again, and nothing is above it.
    assert before == [peak * (step + 1) / warm for step in range(warm)]
    assert max(after) == peak == after[0] and (not warm or before[-1] == pytest.approx(peak))
    assert all(one >= other for one, other in itertools.pairwise(after))
    # The end, exactly.
    assert rates[-1] == peak * (1 if train.schedule == "constant" else low)
    # The steepest step of each shape: of the sine's, half a pi over the way.
    way = train.decay_steps if train.schedule == "wsd" else train.steps - warm
    shape = train.decay_shape if train.schedule == "wsd" else train.schedule
    steepest = {"constant": 0, "linear": 1 / way, "cosine": 1.571 / way, "sqrt": way**-0.5}[shape]
    assert all(one - other <= peak * (1 - low) * steepest * (1 + 1e-9) + 1e-15 * peak
               for one, other in itertools.pairwise(after))


@given(trains())
@settings(deadline=None)
def test_wsd_is_its_peak_up_to_its_last_steps_whatever_comes_then(train):
    assume(train.schedule == "wsd")
    stable = range(train.warmup_steps, train.steps - train.decay_steps + 1)
    assert {learning_rate(train, step) for step in stable} == {train.learning_rate}
    # A longer run and a constant one have the same rates until there: it can be branched off.
    longer = train.model_copy(update={"steps": train.steps + 1000})
    constant = train.model_copy(update={"schedule": "constant", "min_lr_ratio": 0.0})
    for step in range(train.steps - train.decay_steps + 1):
        assert (learning_rate(train, step) == learning_rate(longer, step)
                == learning_rate(constant, step))


@given(trains(), st.randoms())
@settings(deadline=None)
def test_a_rate_depends_on_its_step_alone_so_a_resumed_run_has_it_too(train, random):
    steps = list(range(train.steps))
    whole = [learning_rate(train, step) for step in steps]
    random.shuffle(steps)
    assert {step: learning_rate(train, step) for step in steps} == dict(enumerate(whole))


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedules_rates_are_the_reference_loops(name):
    keys = {"steps": 20, "warmup_steps": 3, "learning_rate": 3e-3, **SCHEDULES[name]}
    train = Train(global_batch_size=1, **keys)
    assert [learning_rate(train, step) for step in range(20)] == pytest.approx(
        [3e-3 * reference_factor(keys, step) for step in range(20)], rel=1e-12)


@pytest.mark.parametrize(("name", "ranks"), [
    *((name, 1) for name in ("cosine", "linear", "constant", "wsd-sqrt")),
    *(pytest.param(name, ranks, marks=pytest.mark.slow)
      for name, ranks in itertools.product(SCHEDULES, (1, 2))
      if ranks == 2 or name in ("wsd-linear", "wsd-cosine"))])
def test_a_run_of_each_schedule_trains_as_a_plain_loop_does(llama_pair, instructions_file, tmp_path,
                                                            name, ranks):
    path = write_recipe(
        tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
        data__prepared=str(tmp_path / "data"), data__isolate_documents=False,
        train__global_batch_size=2,
        **{f"train__{key}": value
           for key, value in {"steps": 20, "warmup_steps": 3, **SCHEDULES[name]}.items()})
    run_ranks(ranks, "train", path)
    truth, _ = reference_loop(*llama_pair, yaml.safe_load(path.read_text()), tmp_path / "data")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line, expected in zip(lines, truth, strict=True):
        assert line["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-12)
        for key in ("loss", "kd_loss", "ce_loss"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (line["step"], key)


# --- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize(("train", "problems"), [
    # All at once, also where a key is wrong by itself.
    ({"epochs": 20, "steps": 10, "min_lr_ratio": 1.5, "schedule": "wsd", "decay_steps": 11},
     ["`train.epochs`: found 20; beside `steps` 10", "`train.min_lr_ratio`: found 1.5",
      "`train.decay_steps`: found 11; there is no room", "are streamed"]),
    ({"epochs": 20, "min_lr_ratio": -0.1, "decay_steps": 5, "decay_shape": "sqrt"},
     ["`train.min_lr_ratio`: found -0.1", "`train.decay_steps`: found 5; `schedule: cosine` has",
      "`train.decay_shape`: found 'sqrt'; `schedule: cosine` has", "are streamed"]),
    ({"schedule": "wsd"}, ["neither is named", "`schedule: wsd` needs the number"]),
    ({"steps": 10, "schedule": "constant", "min_lr_ratio": 0.1},
     ["`schedule: constant` has no way down"]),
    ({"steps": 10, "warmup_steps": 6, "schedule": "wsd", "decay_steps": 5},
     ["the warm-up's 6 steps and the run's end at 10"]),
    ({"epochs": 0, "schedule": "wsd", "decay_steps": 0, "decay_shape": "cube"},
     ["`train.epochs`: found 0", "`train.decay_steps`: found 0", "`train.decay_shape`"]),
])
def test_lengths_and_schedules_that_cannot_be_are_refused_at_once(tmp_path, capsys, train,
                                                                  problems):
    streamed = any("streamed" in problem for problem in problems)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({
        "student": {"model": "s"}, "data": {"train": [{"path": "x.jsonl", "stream": streamed}]},
        "output_dir": "out", "train": {"global_batch_size": 1, **train}}))
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    message = capsys.readouterr().err
    assert f"{len(problems)} problem(s)" in message
    assert [problem for problem in problems if problem not in message] == []


def test_steps_that_leave_no_phase_out_are_taken():
    whole = Train(steps=10, warmup_steps=6, schedule="wsd", decay_steps=4, global_batch_size=1)
    assert [learning_rate(whole, step) for step in (5, 6, 8, 10)] == pytest.approx(
        [1e-4, 1e-4, 0.5e-4, 0])


# --- branching off -----------------------------------------------------------------------------

def test_a_run_branched_off_in_its_stable_phase_is_the_shorter_run(llama_pair, instructions_file,
                                                                   tmp_path):
    keys = {"train__warmup_steps": 2, "train__global_batch_size": 2, "checkpoint__every": 6,
            "data__prepared": str(tmp_path / "data")}
    stable = write_recipe(tmp_path / "stable.yaml", *llama_pair, instructions_file,
                          tmp_path / "stable", train__steps=12, train__schedule="constant", **keys)
    short = write_recipe(tmp_path / "short.yaml", *llama_pair, instructions_file,
                         tmp_path / "short", train__steps=10, train__schedule="wsd",
                         train__decay_steps=4, train__min_lr_ratio=0.1, **keys)
    run_ranks(1, "train", stable)
    run_ranks(1, "train", short)
    # As the documents say: in a copy, without the checkpoints from which it is not to go on.
    branch = shutil.copytree(tmp_path / "stable", tmp_path / "branch")
    changes = ["train.steps", "train.schedule", "train.decay_steps", "train.min_lr_ratio"]
    words = ["train", short, f"output_dir={branch}", f"checkpoint.allow_change={changes}"]
    refused = Ranks(1, *words)
    assert refused.wait() == [2]
    assert "step_00000012" in refused.output() and "train.steps 10" in refused.output()
    shutil.rmtree(branch / "checkpoints" / "step_00000012")
    unnamed = Ranks(1, *words[:-1])
    assert unnamed.wait() == [2]
    assert all(f"- {key}: " in unnamed.output() for key in changes)
    said = run_ranks(1, *words).output()
    assert "resumed after step 6" in said and "without a jump" not in said
    assert comparable_metrics(branch) == comparable_metrics(tmp_path / "short")
    assert read_metrics(branch)[5]["learning_rate"] > read_metrics(branch)[9]["learning_rate"]
    # Where it is too late for that, the start says so.
    late = shutil.copytree(tmp_path / "stable", tmp_path / "late")
    said = run_ranks(1, "train", short, f"output_dir={late}", "train.steps=13",
                     f"checkpoint.allow_change={changes}").output()
    assert "step 12 was made at a learning rate of 0.003, this recipe has 0.00165 there" in said


# --- epochs ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rows", "batch", "steps"), [
    ([11_435], 32, 357), ([11_435], 8, 1429), ([64], 32, 2), ([63], 32, 1), ([3, 5], 4, 2),
    ([10**12 + 3], 2**20, (10**12 + 3) // 2**20), ([7], 8, 0)])
def test_an_epoch_is_the_whole_batches_in_all_rows(rows, batch, steps):
    assert epoch_steps(rows, batch) == steps


def test_no_row_is_left_out_at_the_end_of_an_epoch_and_none_is_read_more_often_than_epochs():
    for rows, batch, epochs in ((43, 4, 2), (11, 4, 7), (64, 8, 3)):
        samples = epochs * epoch_steps([rows], batch) * batch
        read = rows_for_samples(range(samples), [rows], [1.0], seed=3).tolist()
        times = [read.count(row) for row in range(rows)]
        assert max(times) <= epochs and max(times) - min(times) <= 1


def test_a_run_of_epochs_counts_its_steps_says_them_and_is_the_run_of_so_many_steps(
        llama_pair, tmp_path):
    small, large = (write_texts(tmp_path / f"{name}.jsonl", rows)
                    for name, rows in (("small", 10), ("large", 50)))
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", *llama_pair, small, run, train__global_batch_size=8)
    raw = yaml.safe_load(path.read_text())
    raw["train"] = {**raw["train"], "steps": None, "epochs": 2}
    raw["data"]["train"] = [{"path": str(small)}, {"path": str(large), "weight": 4.0}]
    path.write_text(yaml.safe_dump(raw))
    said = run_ranks(1, "train", path).output()
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    rows = sum(source["rows"] for source in manifest["sources"])
    steps = 2 * (rows // 8)
    assert f"2 epoch(s) are {steps} steps of 8 rows" in said
    lines = comparable_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    # What it leaves is the recipe of a run of so many steps.
    assert load_recipe(run / "recipe.yaml").train.steps == steps
    run_ranks(1, "train", run / "recipe.yaml", f"output_dir={tmp_path / 'again'}")
    assert comparable_metrics(tmp_path / "again") == lines
    # The same command finds it finished, on other ranks too; one epoch more is a change.
    assert "nothing to do" in run_ranks(2, "train", path).output()
    assert is_finished(run, load_recipe(path)) and not is_finished(
        run, load_recipe(path, ["train.epochs=3"]))
    more = Ranks(1, "train", path, "train.epochs=3")
    assert more.wait() == [2]
    assert f"- train.steps: {steps} before, {steps // 2 * 3} now" in more.output()


def test_before_the_data_are_prepared_a_plan_says_so_and_afterwards_it_has_the_steps(
        llama_pair, instructions_file, tmp_path, capsys):
    path = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                        train__steps=None, train__epochs=3)
    (tmp_path / "run").mkdir()

    def planned(command: str, *words: str) -> str:
        capsys.readouterr()
        assert main([command, str(path), *words]) == 0
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    before = json.loads(planned("plan", "--json"))
    assert (before["steps"], before["hours"], before["epochs"]) == (None, None, None)
    assert before["fits"] and before["recipe"]["train"]["epochs"] == 3
    assert "steps not known before the data are prepared, by amid-ds prepare" in planned("plan")
    assert "hours not known" in planned("submit", "--dry-run", "--ranks-per-node", "1")
    assert not is_finished(tmp_path / "run", load_recipe(path))
    append_event(tmp_path / "run", "submitted", jobs=["7"], folder=str(tmp_path))
    shutil.copy(path, tmp_path / "recipe.yaml")
    assert run_status(tmp_path / "run")["step"] == "0 of a number not known yet"
    assert main(["prepare", str(path)]) == 0
    rows = json.loads((tmp_path / "run/data/manifest.json").read_text())["sources"][0]["rows"]
    after = json.loads(planned("plan", "--json"))
    assert after["steps"] == 3 * (rows // 4) and after["hours"] > 0
    assert after["epochs"] == [pytest.approx(after["steps"] * 4 / rows)]
    assert f"{after['steps']} steps (3 epochs)" in planned("plan")
    # Rows of another length are not those that were counted.
    assert json.loads(planned("plan", "--json", "train.seq_length=48"))["steps"] is None


@pytest.mark.parametrize(("changes", "problem"), [
    (["train.global_batch_size=64"], "less than one global batch of 64"),
    (["train.schedule=wsd", "train.decay_steps=20"], "the run's end at 10")])
def test_epochs_of_no_step_or_with_no_room_for_a_decay_are_refused_before_a_model_is_loaded(
        llama_pair, instructions_file, tmp_path, changes, problem):
    path = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                        train__steps=None, train__epochs=1)
    ranks = Ranks(2, "train", path, *changes)
    assert ranks.wait() == [2, 2]
    assert problem in ranks.output() and not (tmp_path / "run" / "recipe.yaml").exists()
    assert main(["plan", str(path), *changes]) == 2
