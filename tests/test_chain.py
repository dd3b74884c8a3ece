"""`amid-ds chain`: each student teaches the next; what is finished stays, what broke goes on."""

from __future__ import annotations

import csv
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from support.data import write_texts
from support.models import WORDS, make_model
from support.ranks import Ranks
from support.reference_loop import reference_loop
from support.runs import comparable_results, count_steps, read_metrics, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main
from amid_ds.cluster import slurm
from amid_ds.config.parse import load_recipe
from amid_ds.data import read_batches
from amid_ds.errors import InputError
from amid_ds.experiments import sweep
from amid_ds.experiments.chain import plan_chain
from amid_ds.run.folder import RunFolder


@pytest.fixture(scope="module")
def models(shared_model) -> dict[str, Path]:
    return {"teacher": shared_model("llama", 1, hidden_size=64, intermediate_size=96),
            "medium": shared_model("llama", 0), "small": shared_model("llama-tied", 3)}


def write_chain(folder: Path, models: dict[str, Path], data: Path, **changes) -> Path:
    """A chain of two links over one base; `changes` are the file's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    held = write_texts(folder / "held.jsonl", rows=6, seed=3)
    base = write_recipe(folder / "base.yaml", models["medium"], models["teacher"], data,
                        folder / "unused", data__eval=[{"path": str(held)}], checkpoint__every=2)
    file = {"base": str(base), "output_dir": str(folder / "out"), "chain": [
        {"name": "medium"},
        {"name": "small", "overrides": [f"student.model={models['small']}", "train.steps=5"]}]}
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({**file, **changes}))
    return path


class Started(list):
    """(folder, status) of the runs that were started; `kill` names one to be killed at a step."""

    kill: tuple[str, int] | None = None
    ranks = 1


@pytest.fixture(scope="module")
def started():
    """Runs in processes that share the fork server's imports."""
    runs = Started()

    def wait(arguments, log, run) -> int:
        ranks = Ranks(runs.ranks, *arguments[arguments.index("train"):])
        if runs.kill is not None and runs.kill[0] == run.name:
            ranks.wait_until(lambda: count_steps(run) >= runs.kill[1], 180)
            ranks.signal(signal.SIGKILL)
            runs.kill = None
        status = ranks.wait()[0]
        log.write(ranks.output().encode())
        runs.append((run.name, status))
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_wait", wait)
        yield runs


@pytest.fixture(scope="module")
def whole(models, text_file, tmp_path_factory, started) -> Path:
    """The folder of a chain that nothing has interrupted."""
    path = write_chain(tmp_path_factory.mktemp("whole"), models, text_file)
    started.clear()
    assert main(["chain", str(path)]) == 0
    assert started == [("medium", 0), ("small", 0)]
    return path.parent


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "out" / "chain.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_link_learns_from_the_model_that_the_one_before_has_left(models, whole):
    out = whole / "out"
    recipe = yaml.safe_load((out / "small" / "recipe.yaml").read_text())
    assert recipe["teacher"]["model"] == str(out / "medium" / "model")
    lines, _ = reference_loop(models["small"], out / "medium" / "model", recipe,
                              out / "small" / "data")
    for ours, expected in zip(read_metrics(out / "small"), lines, strict=True):
        assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def distance(first, model, run: Path) -> tuple[float, ...]:
    """Mean over the held-out tokens, in plain torch: of KL(first ‖ model), and the perplexity."""
    size = len(AutoTokenizer.from_pretrained(run / "model"))
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in read_batches(run / "data" / "eval" / "held", 1, 0, 1):
        keep = batch.labels != -100
        with torch.no_grad():
            q, p = (each(batch.input_ids, position_ids=batch.positions).logits[keep]
                    [:, :size].double().log_softmax(-1) for each in (model, first))
        nll = -q.gather(1, batch.labels[keep][:, None]).sum()
        sums += torch.stack([(p.exp() * (p - q)).sum(), nll, keep.sum()])
    kl, nll = sums[:2] / sums[2]
    return kl.item(), nll.exp().item()


def test_the_report_has_a_line_for_each_link_and_its_distance_to_both_teachers(models, whole):
    rows = table(whole)
    assert [(row["link"], row["steps"], row["set"]) for row in rows] == [
        ("medium", "6", "held"), ("small", "5", "held")]
    first = own = AutoModelForCausalLM.from_pretrained(models["teacher"])
    for row in rows:
        run = whole / "out" / row["link"]
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        to_first, perplexity = distance(first, model, run)
        assert float(row["KL to the first teacher"]) == pytest.approx(to_first, rel=1e-4)
        assert float(row["KL to its teacher"]) == pytest.approx(distance(own, model, run)[0],
                                                                rel=1e-4)
        assert float(row["perplexity"]) == pytest.approx(perplexity, rel=1e-4)
        own = model
    assert (whole / "out" / "chain.md").read_text().count("\n") == 4


@pytest.mark.slow
def test_a_link_may_leave_a_mean_and_the_last_one_adapters(models, text_file, tmp_path, started):
    path = write_chain(tmp_path, models, text_file, **links_of(
        {"name": "mean", "overrides": ["train.ema=0.5"]},
        {"name": "lora", "overrides": ["student.lora={rank: 2}"]}))
    assert main(["chain", str(path), "train.steps=2"]) == 0
    first = AutoModelForCausalLM.from_pretrained(models["teacher"])
    for row, base in zip(table(tmp_path), (None, models["medium"]), strict=True):
        run = tmp_path / "out" / row["link"]
        model = AutoModelForCausalLM.from_pretrained(base or run / "model")
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        if base is not None:
            model = PeftModel.from_pretrained(model, run / "model")
        to_first, _ = distance(first, model, run)
        assert float(row["KL to the first teacher"]) == pytest.approx(to_first, rel=1e-4)


@pytest.mark.slow
def test_the_distance_to_a_first_teacher_that_is_a_shift_is_not_told(models, text_file, tmp_path,
                                                                     started):
    path = write_chain(tmp_path, models, text_file, **links_of(
        {"name": "a", "overrides": ["teacher.delta={base: {model: MEDIUM}}"]}, {"name": "b"}))
    path.write_text(path.read_text().replace("MEDIUM", str(models["medium"])))
    assert main(["chain", str(path), "train.steps=2"]) == 0
    first, second = table(tmp_path)
    assert first["KL to the first teacher"] == first["KL to its teacher"] != ""
    assert second["KL to the first teacher"] == "" != second["KL to its teacher"]


def test_a_chain_that_was_killed_in_its_second_link_goes_on_to_the_same_digits(
        models, text_file, whole, tmp_path, started):
    path = write_chain(tmp_path, models, text_file)
    started.clear()
    started.kill = ("small", 3)
    assert main(["chain", str(path)]) == 1
    assert [name for name, _ in started] == ["medium", "small"] and started[1][1] != 0
    assert main(["chain", str(path)]) == 0
    assert started[2:] == [("small", 0)]
    for name in ("medium", "small"):
        ours, expected = tmp_path / "out" / name, whole / "out" / name
        assert comparable_results(ours) == comparable_results(expected)
        weights = "model/model.safetensors"
        assert (ours / weights).read_bytes() == (expected / weights).read_bytes()
    assert table(tmp_path) == table(whole)


def test_a_finished_chain_is_reported_again_and_nothing_is_trained(whole, started, capsys):
    before, report = len(started), whole / "out" / "chain.md"
    text = report.read_text()
    report.unlink()
    (whole / "out" / "chain.csv").unlink()
    assert main(["chain", str(whole / "chain.yaml")]) == 0
    assert len(started) == before and report.read_text() == text
    assert text in capsys.readouterr().out
    # Nor is a set that the recipe has got since.
    held = whole / "held.jsonl"
    more = f"data.eval=[{{path: {held}}}, {{path: {held}, name: again}}]"
    assert main(["chain", str(whole / "chain.yaml"), more]) == 0
    assert len(started) == before and report.read_text() == text
    assert text in capsys.readouterr().out
    assert main(["chain", str(whole / "chain.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == ""


def test_a_finished_link_whose_teacher_was_trained_otherwise_is_refused(whole, tmp_path, started,
                                                                        capsys):
    shutil.copytree(whole, tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    for path in (tmp_path / "copy").rglob("*.yaml"):
        path.write_text(path.read_text().replace(str(whole), str(tmp_path / "copy")))
    chain = tmp_path / "copy" / "chain.yaml"
    changed = yaml.safe_load(chain.read_text())
    changed["chain"][0]["overrides"] = ["train.seed=1"]
    chain.write_text(yaml.safe_dump(changed))
    shutil.rmtree(out / "medium")
    started.clear()
    assert main(["chain", str(chain)]) == 2
    assert started == [("medium", 0)]
    assert "small has learnt from another model" in capsys.readouterr().err


def links_of(*links: dict) -> dict:
    return {"chain": list(links)}


@pytest.mark.parametrize("changes, found", [
    (links_of({"name": "medium"}), "at least 2"),
    (links_of({"name": "medium"}, {"name": "medium"}), "two links are called medium"),
    (links_of({"name": "a/b"}, {"name": "c"}), "the name of a folder"),
    (links_of({"name": "a"}, {"name": "b", "overides": []}),
     r"`chain\.1\.overides` is unknown; did you mean `overrides`"),
    (links_of({"name": "a"}, {"name": "b", "overrides": ["output_dir=/tmp/x"]}),
     "the chain gives each link its folder"),
    (links_of({"name": "a"}, {"name": "b", "overrides": ["teacher.model=elsewhere"]}),
     "link b: its teacher.model is elsewhere, and its teacher"),
    (links_of({"name": "a"}, {"name": "b", "overrides": ["teacher.ema=0.9"]}),
     "link b: its teacher.ema is 0.9, and its teacher"),
    (links_of({"name": "a", "overrides": ["student.model=nowhere"]},
              {"name": "b", "overrides": ["student.model=nothing"]}),
     r"(?s)link a: .*nowhere.*link b: .*nothing"),
    (links_of({"name": "a", "overrides": ["train.stepz=1"]},
              {"name": "b", "overrides": ["student.model=nothing"]}),
     r"(?s)link a: .*stepz.*link b: .*nothing"),
    (links_of({"name": "a", "overrides": ["teacher=null"]}, {"name": "b"}),
     "link a: it names no teacher"),
    (links_of({"name": "a", "overrides": ["teacher.delta={base: {model: MEDIUM}}"]},
              {"name": "b", "overrides": ["teacher.delta={base: {model: MEDIUM}}"]}),
     "link b: it has a teacher.delta"),
    (links_of({"name": "a", "overrides": ["student.lora={rank: 2}"]}, {"name": "b"}),
     r"link a: its student\.lora leaves adapters"),
    ({"base": None}, "no `base`"), ({"output_dir": 3}, "output_dir")])
def test_what_is_wrong_is_refused_for_all_links_before_anything_loads(
        models, text_file, tmp_path, changes, found):
    path = write_chain(tmp_path, models, text_file, **changes)
    path.write_text(path.read_text().replace("MEDIUM", str(models["medium"])))
    with pytest.raises(InputError, match=found):
        plan_chain(str(path), [], 1)
    assert not (tmp_path / "out").exists()


def test_a_chain_whose_vocabularies_differ_is_refused(models, text_file, tmp_path):
    other = make_model(tmp_path / "other", "llama", words=WORDS[:-1])
    path = write_chain(tmp_path, {**models, "small": other}, text_file)
    with pytest.raises(InputError, match=r"(?s)link small: .*tokenizer .*differ"):
        plan_chain(str(path), [], 1)


def test_a_recipe_of_its_own_may_name_the_link_before_and_no_other(models, text_file, tmp_path):
    out = tmp_path / "out"
    own = write_recipe(tmp_path / "own.yaml", models["small"], out / "medium" / "model", text_file,
                       tmp_path / "unused")
    path = write_chain(tmp_path, models, text_file, **links_of(
        {"name": "medium"}, {"name": "small", "recipe": str(own)}))
    chain = plan_chain(str(path), [], 1)
    assert load_recipe(own, chain.links[1].overrides) == chain.links[1].recipe
    assert chain.links[1].run == RunFolder(out / "small")
    write_recipe(own, models["small"], models["teacher"], text_file, tmp_path / "unused")
    with pytest.raises(InputError, match=r"link small: its teacher\.model is"):
        plan_chain(str(path), [], 1)


def test_under_slurm_each_job_waits_for_the_success_of_the_one_before(models, text_file, tmp_path,
                                                                      monkeypatch, capsys):
    path = write_chain(tmp_path, models, text_file)
    calls: list[tuple[str, ...]] = []

    def call(*command: str, **_: object) -> str:
        calls.append(command)
        return f"{len(calls)}\n"

    monkeypatch.setattr(slurm, "_call", call)
    words = ["chain", str(path), "--slurm", "--ranks-per-node", "1", "--cpus-per-rank", "1"]
    assert main(words) == 0
    jobs = [command for command in calls if "--parsable" in command]
    assert len(jobs) == 2 and not any("--dependency" in word for word in jobs[0])
    first = str(calls.index(jobs[0]) + 1)
    assert f"--dependency=afterok:{first}" in jobs[1] and "--kill-on-invalid-dep=yes" in jobs[1]
    kept = load_recipe(tmp_path / "out" / "small" / "submissions" / "0001" / "recipe.yaml")
    assert kept.teacher.model == str(tmp_path / "out" / "medium" / "model")
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(calls.index(jobs[1]) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_chain_that_is_asked_to_stop_ends_with_75_and_goes_on(models, text_file, tmp_path, ranks):
    path = write_chain(tmp_path, models, text_file)
    words = ["chain", path, "--ranks-per-node", ranks, "train.steps=60", "checkpoint.every=1000"]
    stopped = Ranks(1, *words)
    small = tmp_path / "out" / "small"
    stopped.wait_until(lambda: count_steps(small) >= 3, 300)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == [75], stopped.output()
    assert count_steps(small) < 60
    again = Ranks(1, *words)
    assert again.wait(300) == [0], again.output()
    assert [line["step"] for line in read_metrics(small)] == list(range(1, 61))
    assert len(table(tmp_path)) == 2
