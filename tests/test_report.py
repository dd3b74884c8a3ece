"""A report is one page that a browser opens from a file, with every plot of every run in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.data import write_texts
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import read_metrics, write_recipe

from amid_ds.cli import main
from amid_ds.run import attempts

STOPPED, STEPS = 4, 9


def stopping_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that finds a STOP file after step STOPPED."""
    def around(trainer, batch):
        yield
        if trainer.state.step == STOPPED:
            (trainer.job.run.path / "STOP").touch()

    patch_train_step(around)
    rank_main(argv, variables, log)


@pytest.fixture(scope="module")
def runs(shared_model, text_file, tmp_path_factory) -> list[Path]:
    """An evaluated run of two attempts, and one of a single attempt with half the loss."""
    root = tmp_path_factory.mktemp("runs")
    pair = [shared_model(family) for family in ("llama", "gpt2")]
    recipe = write_recipe(root / "r.yaml", *pair, text_file, root / "first", train__steps=STEPS,
                          train__eval_every=3, train__samples=2)
    held = f"data.eval=[{{path: {write_texts(root / 'held.jsonl', 8, seed=5)}}}]"
    assert Ranks(1, "train", recipe, held, target=stopping_rank).wait() == [75]
    run_ranks(1, "train", recipe, held)
    shutil.copytree(root / "first", root / "second")
    lines = read_metrics(root / "second")
    (root / "second" / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, "loss": line["loss"] / 2}) + "\n" for line in lines))
    kept_events = [event for event in attempts.read_events(root / "second")
                   if event["event"] != "stepping" or event["step"] == 1]
    (root / "second" / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n"
                                                         for event in kept_events))
    return [root / "first", root / "second"]


@pytest.fixture(scope="module")
def page(runs) -> Path:
    out = runs[0].parent / "report.html"
    assert main(["report", *map(str, runs), "-o", str(out)]) == 0
    return out


def browser() -> str:
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        assert not os.environ.get("CI"), "no Chromium: .ci/run installs one"
        pytest.skip("no Chromium on this machine: apt-get install chromium-headless-shell")
    return program


# Runs in a copy of the page: how much of each picture is neither white nor transparent.
COUNT = """<script>onload = () => {
 document.title = JSON.stringify([...document.images].map(image => {
  const canvas = document.createElement("canvas"); canvas.width = 400; canvas.height = 200
  const pen = canvas.getContext("2d"); pen.drawImage(image, 0, 0, 400, 200)
  const pixels = pen.getImageData(0, 0, 400, 200).data; let ink = 0
  for (let i = 0; i < pixels.length; i += 4)
    ink += pixels[i + 3] > 0 && pixels[i] + pixels[i + 1] + pixels[i + 2] < 720
  return [image.alt, image.naturalWidth, ink] }).concat(
   [...document.querySelectorAll("details[open] td.text")].map(
    cell => ["sample", cell.offsetWidth, 1000 * cell.innerText.length]))) }</script>"""


def test_a_browser_opens_it_without_an_error_and_draws_every_figure(page, tmp_path):
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", COUNT + "</body>"))
    done = subprocess.run([browser(), "--no-sandbox", "--disable-gpu", "--dump-dom",
                           "--enable-logging=stderr",
                           f"--user-data-dir={tmp_path / 'profile'}", copy.as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:500]
    pictures = json.loads(title[1].replace("&amp;", "&"))
    assert {"Loss", "Divergence from the teacher", "Where the time went", "Memory by part",
            "held: perplexity", "sample"} <= {alt for alt, *_ in pictures}
    for alt, width, ink in pictures:
        assert width > 0 and ink > 300, f"{alt} is not drawn: {ink} pixels of ink"


def test_it_needs_nothing_but_itself(page):
    text = page.read_text()
    assert "http" not in re.sub("(?s)<pre>.*?</pre>", "", text) and "<script" not in text
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', text))


def test_curves_are_the_metrics_and_restarts_are_at_their_steps(runs, monkeypatch):
    from amid_ds.experiments import report, reported_run

    drawn = {}

    def record(self, title, axis, values, *_):
        drawn[title] = values
        return {}

    monkeypatch.setattr(report._Draw, "lines", record)
    monkeypatch.setattr(report._Draw, "bars", record)
    both = [reported_run.read_reported_run(run, run.name) for run in runs]
    assert [run.restarts for run in both] == [[STOPPED + 1], []]
    report._sections(both, report._Draw(None, both))
    lines = read_metrics(runs[0])
    losses = [line["loss"] for line in lines]
    assert drawn["Loss"]["first"] == (list(range(1, STEPS + 1)), losses, 1)
    assert drawn["Loss"]["second"][1] == [line["loss"] / 2 for line in lines]
    assert drawn["held: loss"]["first"][0] == [3, 6, 9]
    assert {part: size * 1e9
            for part, size in drawn["Memory by part"]["first, measured"].items()} == pytest.approx(
                json.loads((runs[0] / "measured.json").read_text())["memory_per_rank"])
    for phase, seconds in drawn["Where the time went"]["first"].items():
        assert seconds == pytest.approx(sum(line[f"time/{phase}"] for line in lines) / STEPS), phase
    monkeypatch.setattr(reported_run, "POINTS", 4)
    assert both[0].curve("loss") == (
        [3, 6, 9], [pytest.approx(sum(line["loss"] for line in lines[i:i + 3]) / 3)
                    for i in (0, 3, 6)], 3)


def test_tables_and_provenance_are_in_it(runs, page):
    text = page.read_text()
    for run in runs:
        evaluated = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()][-1]
        assert f"<td>{evaluated['perplexity']:,.5g}</td>" in text
        assert json.loads((run / "provenance.json").read_text())["tokenizer_sha256"] in text
    assert f"started again at step {STOPPED + 1}" in text
    assert text.count("<h3>first</h3>") == 2 == text.count("<h3>second</h3>")


def without_figures(monkeypatch) -> None:
    """The page's figures are not drawn: they take most of its time."""
    from amid_ds.experiments import report

    monkeypatch.setattr(report._Draw, "picture",
                        lambda self, title, *_: {"title": title, "caption": "", "svg": ""})


def test_what_is_damaged_is_named_on_the_page(runs, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(runs[1], tmp_path / "copy"))
    (copy / "provenance.json").write_text("{")
    (copy / "measured.json").write_text("[1, 2]")
    without_figures(monkeypatch)
    assert main(["report", str(copy), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "provenance.json cannot be read" in text and "measured.json is damaged" in text


def test_the_plan_next_to_a_measurement_is_for_the_runs_own_device_and_ranks(runs):
    from amid_ds.config.parse import load_recipe
    from amid_ds.experiments import report, reported_run
    from amid_ds.planning.devices import DEVICES
    from amid_ds.planning.plan import make_plan

    run = reported_run.read_reported_run(runs[1], "second")
    elsewhere = replace(run.measured, device="NVIDIA H200", hosts=["a", "a", "b", "b"])
    # The run's ranks shared a node, so that its teacher lay over all of them.
    recipe = load_recipe(runs[1] / "recipe.yaml", ["teacher.placement=zero3"])
    expected = make_plan(recipe, 2, 2, DEVICES["h200"]).memory_per_rank
    assert report._planned(replace(run, measured=elsewhere)) == (expected, "")


def write_samples(run: Path, answers: dict[int, str], prompt: str = "<b>the</b>",
                  teacher: str | None = None) -> Path:
    """Write what was answered to `prompt` by step in place of the run's samples."""
    (run / "samples.jsonl").write_text("".join(json.dumps(
        {"step": step, "number": 0, "prompt": prompt, "student": answer, "teacher": teacher}) + "\n"
        for step, answer in answers.items()))
    return run


def test_answers_stand_run_beside_run_as_text_at_a_few_steps(runs, tmp_path, monkeypatch):
    without_figures(monkeypatch)
    both = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    write_samples(both[0], {step: f"answer {step} <script>\x1b[31m\u202e" for step in range(1, 21)},
                  teacher="<i>\n\ttaught")
    write_samples(both[1], {1: "one", 20: "twenty"})
    assert main(["report", *map(str, both), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert '<summary class="text">&lt;b&gt;the&lt;/b&gt;</summary>' in page
    assert "&lt;i&gt;\n\ttaught</td>" in page and "<script" not in page
    assert page.count("\\x1b[31m\\u202e</td>") == 2 and "answer 2 " not in page
    rows = re.findall(r"<tr><td>([^<]*)</td>\s*<td class=.text.>(.*?)</td>\s*"
                      r"<td class=.text.>(.*?)</td>", page, re.S)
    assert [row[0] for row in rows] == ["teacher", "step 1", "step 20"]
    assert [row[2] for row in rows] == ["–", "one", "twenty"]


def test_at_most_a_few_steps_are_shown_from_the_first_to_each_runs_last():
    from amid_ds.experiments.report_samples import _shown_steps

    assert _shown_steps([[5]]) == [5]
    assert _shown_steps([list(range(1, 101))]) == [1, 21, 41, 60, 80, 100]
    assert _shown_steps([[2, 4, 6, 8], [4, 8, 12]]) == [4, 8, 12]
    assert _shown_steps([[1], [2]]) == [1, 2]


def test_the_picture_has_the_evaluations_and_the_last_answers(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from PIL import Image

    without_figures(monkeypatch)
    drawn, save = [], Figure.savefig

    def keep(figure, path, **options):
        drawn.append(figure)
        save(figure, path, **options)

    both = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    write_samples(both[0], {3: "early", 9: "\ndef f($x$):\n\treturn 漢" + "\n|" * 9},
                  teacher="taught")
    write_samples(both[1], {9: "late"})
    picture = tmp_path / "a picture.png"
    monkeypatch.setattr(Figure, "savefig", keep)
    command = ["report", *map(str, both), "-o", str(tmp_path / "r.html"),
               "--picture", str(picture)]
    assert main(command) == 0
    figure = drawn[0]
    left, right = [axes for part in figure.subfigs for axes in part.axes]
    values = [line["kl_to_teacher"] for line in map(
        json.loads, (both[0] / "eval.jsonl").read_text().splitlines())]
    assert [list(line.get_ydata()) for line in left.lines] == [values, values]
    assert [bar.get_height() for bar in right.patches] == [values[-1]] * 2
    texts = [text.get_text() for part in figure.subfigs for text in part.texts]
    assert texts == ["prompt", "<b>the</b>", "teacher", "taught", "first",
                     "def f($x$):\n    return 漢" + "\n|" * 4 + "\n…", "second", "late"]
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width == 900
    # It is known as ours, and somebody else's is not written over.
    assert main(command) == 0
    Image.new("RGB", (4, 4)).save(picture)
    before = picture.read_bytes()
    assert main(command) == 2 and picture.read_bytes() == before


@pytest.mark.parametrize("wrong, message", [
    ("never evaluated", "none of the runs was evaluated"), ("no png", "ending in .png")])
def test_a_picture_that_cannot_be_made_exits_with_2_and_writes_nothing(runs, tmp_path, wrong,
                                                                       message, capsys):
    run = Path(shutil.copytree(runs[1], tmp_path / "run"))
    if wrong == "never evaluated":
        (run / "eval.jsonl").unlink()
    picture, page = tmp_path / ("p.jpg" if wrong == "no png" else "p.png"), tmp_path / "r.html"
    assert main(["report", str(run), "-o", str(page), "--picture", str(picture)]) == 2
    assert message in capsys.readouterr().err
    assert not page.exists() and not picture.exists()


@pytest.mark.parametrize("wrong, message", [
    ("nothing here", "not the folder of a run"), ("no metrics", "has no metrics yet"),
    ("no place", "cannot be written"), ("no matplotlib", "pip install")])
def test_a_report_that_cannot_be_made_exits_with_2(runs, tmp_path, wrong, message, capsys,
                                                   monkeypatch):
    run, out = runs[0], tmp_path / "r.html"
    if wrong == "nothing here":
        run = tmp_path
    elif wrong == "no metrics":
        run = tmp_path / "run"
        run.mkdir()
        shutil.copy(runs[0] / "recipe.yaml", run)
    elif wrong == "no place":
        out = tmp_path / "nowhere" / "r.html"
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(run), "-o", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()
