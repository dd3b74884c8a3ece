"""A name is text wherever it is shown: on a terminal, in a table, on a page, in a figure.

A run's folder may come from somebody else, and with it names, errors and measurements.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import xxhash
from support.runs import write_recipe

from amid_ds.cli import main
from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.errors import InputError, printable, report_error
from amid_ds.experiments.plots import figure_text
from amid_ds.experiments.sweep import markdown_table
from amid_ds.run import attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import RunLog

NAMES = {
    "escape": "run\x1b[31m\x1b]0;title\x07",
    "rich markup": "[bold red]run[/nothing] :skull:",
    "mathtext": "$\\frac{a}$ a$b^{$",
    "html": "<script>alert(1)</script>&amp;\"'",
    "right to left": "run\u202etxt.exe",
    "no utf-8": "run\udcff",
    "hidden in a legend": "_run",
    "line": "run\n  state      done",
    "long": "run" * 70,
}
# No terminal, page or figure may be sent one of these.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")


@pytest.fixture
def named_run(shared_model, text_file, tmp_path):
    """make(name): the folder of a run of that name, which is in its files too."""
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama"), shared_model("gpt2", 1),
                          text_file, tmp_path / "run")

    def make(name: str) -> Path:
        folder = tmp_path / "runs" / name.replace("/", "\u2215")
        run = RunFolder(folder)
        checkpoint = run.checkpoints / "step_00000001"
        checkpoint.mkdir(parents=True)
        text = dump_recipe(load_recipe(recipe))
        run.recipe.write_text(text)
        line = {"step": 1, "loss": 1.0, "kd_loss": 1.0, "tokens": 9, "tokens_per_second": 9.0}
        run.metrics.write_text("".join(json.dumps({**line, "step": s}) + "\n" for s in (1, 2)))
        run.evaluations.write_text(json.dumps({"step": 1, "name": name, "loss": 1.0}) + "\n")
        run.measurements.write_text(json.dumps(
            {"step": 1, "hosts": [name], "device": "cpu", "recipe": text,
             "memory_per_rank": {name: 10**9, "total": 10**9}, "network_per_step": {name: 1}}))
        run.provenance.write_text(json.dumps({"versions": name}))
        attempts.append_event(folder, "begun", nodes=name, ranks=1, changed={})
        failure = {"rank": 0, "host": name, "step": 1, "error": name, "time": 0.0}
        attempts.append_event(folder, "ended", status=1, failure=failure)
        layout = {"ranks": name, "tensor_parallel": 1, "zero_stage": 3, "student_dtype": name}
        content = {"state": {"step": 1, "identity": {}, **layout}, "files": {}}
        checksum = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (checkpoint / "manifest.json").write_text(
            json.dumps({"content": content, "xxh3_128": str(checksum)}))
        return folder

    return make


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_terminal_shows_a_name_and_obeys_nothing_in_it(named_run, name, capsys, monkeypatch):
    run = named_run(name)
    for command in (["status", str(run)], ["checkpoints", str(run)]):
        assert main(command) == 0
        shown = capsys.readouterr()
        assert not CONTROL.search(shown.out + shown.err)
    # The message names the folder.
    RunFolder(run).metrics.write_text("")
    assert main(["report", str(run)]) == 2
    assert not CONTROL.search(capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["escape", "rich markup"])
def test_a_planned_run_is_compared_with_whatever_was_measured(named_run, kind, capsys):
    run = named_run(NAMES[kind])
    with RunFolder(run).metrics.open("a") as file:
        file.write('{"step": 3, "tokens": 9, "loss": 1.0, "tokens_per_second": 9.0, '
                   '"time/step": 1.0}\n')
    assert main(["plan", "--check", str(run)]) == 0
    shown = capsys.readouterr().out
    assert not CONTROL.search(shown)
    assert printable(NAMES[kind]) in shown.replace("\n", "")


def test_no_name_makes_a_line_of_its_own_in_status(named_run, capsys):
    assert main(["status", str(named_run(NAMES["line"]))]) == 0
    states = re.findall("^  state.*$", capsys.readouterr().out, re.M)
    assert len(states) == 1 and "failed" in states[0]


class Page(HTMLParser):
    """The tags of a page, and the pictures in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.pictures: list[bytes] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        source = dict(attributes).get("src") or ""
        if source.startswith("data:image/svg+xml;base64,"):
            self.pictures.append(base64.b64decode(source.partition(",")[2]))


def test_the_page_and_its_figures_show_a_name_as_it_is(named_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "report.html"
    runs = [str(named_run(name)) for name in NAMES.values()]
    assert main(["report", *runs, "-o", str(out)]) == 0
    assert not CONTROL.search(capsys.readouterr().out)
    text = out.read_text()
    assert not CONTROL.search(text)
    page = Page(text)
    assert "script" not in page.tags and len(page.pictures) >= 3
    for picture in page.pictures:
        # A browser draws no picture that is not well-formed; text in it is drawn as paths, whose
        # comment has the text.
        ElementTree.fromstring(picture)
        assert not CONTROL.search(picture.decode())
    labels = " ".join(re.findall("<!-- (.*?) -->", "".join(p.decode() for p in page.pictures)))
    for part in ("a$b^{$", " _run", "\\x1b[31m", "[bold red]run"):
        assert part in labels, part


def test_a_message_an_error_and_the_progress_bar_obey_no_name(tmp_path, capsys, caplog):
    name = NAMES["escape"]
    assert main(["train", f"{tmp_path}/{name}.yaml"]) == 2
    assert main(["train", f"{tmp_path}/r.yaml", f"train.{name}=1"]) == 2
    logging.getLogger("amid_ds.test").warning("of %s", name)
    report_error(InputError(name, name, name))
    shown = capsys.readouterr()
    assert "\\x1b[31m" in shown.err and not CONTROL.search(shown.err + shown.out)
    (tmp_path / name).mkdir()
    log = RunLog(RunFolder(tmp_path / name), 0, 2)
    assert not CONTROL.search(log.title) and "\\x1b" in log.title
    log.close()


def test_a_sweeps_table_keeps_its_columns_and_obeys_no_name():
    table = markdown_table(["key", "a|b"], [["x|y\n", NAMES["escape"]], [None, 0.5]])
    assert not CONTROL.search(table) and table.count("\n") == 4
    assert "a\\|b" in table and "x\\|y\\n" in table


def test_what_can_be_read_stays_as_it_is():
    text = "naïve 名前 🦙 α=−5 \u00a0\u3000[x] $y$\n\tz"
    assert printable(text) == text
    assert printable("a\nb\tc", keep="") == "a\\nb\\tc"
    assert figure_text("x" * 300).endswith("…") and len(figure_text("x" * 300)) == 40
