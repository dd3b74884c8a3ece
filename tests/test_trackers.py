"""wandb, mlflow and trackio beside TensorBoard: the real packages, in their offline modes."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import socket
import struct
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_metrics, count_steps, write_recipe

import amid_ds.run.log
from amid_ds.config.parse import flattened, load_recipe, resolved
from amid_ds.errors import InputError, Stopped
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import TENSORBOARD_TAGS, RunLog, Sample, read_metrics
from amid_ds.run.trackers import complete_trackers, read_tracker_ids, require_trackers
from amid_ds.run.tracking import SECRETS

BESIDE = ["wandb", "mlflow", "trackio"]
USER_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID",
                  "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_API_KEY", "WANDB_RUN_ID",
                  "TRACKIO_PROJECT", "TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The three packages without a network; returns a run's folder with a space in its name."""
    for name in USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # The machine may be busy.
    monkeypatch.setattr(amid_ds.run.log, "END_WAIT_S", 200)
    folder = tmp_path / f"run {tmp_path.name}"
    folder.mkdir()
    return folder


def metrics(step: int, loss: float) -> dict[str, float | None]:
    return {"tokens": 5 * step, "loss": loss, "kd_loss": 0.5, "ce_loss": None,
            "tokens_per_second": 9.0, "time/step": 0.25}


def wandb_records(path: Path) -> Iterator:
    """The records of a .wandb file, by the format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7:position + 7 + length]
        position += 7 + length
        # 1: a whole record, 4: the last part of one.
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


class Seen:
    """What a tracker has of a run: `ids` of all its runs, points by tag, settings, texts, files."""

    def __init__(self, name: str, run: Path) -> None:
        self.ids: set[str] = set()
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.config: dict[str, object] = {}
        self.notes: list[str] = []
        self.texts: dict[str, str] = {}
        self.files: list[str] = []
        self.ends: list[object] = []
        getattr(self, name)(run)

    def add(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.points.setdefault(tag, []).append((step, value))

    def wandb(self, run: Path) -> None:
        for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
            for record in wandb_records(path):
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    assert (record.run.display_name, record.run.project) == (run.name, "amid_ds")
                    self.ids.add(record.run.run_id)
                elif kind == "history":
                    row = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json)
                           for item in record.history.item}
                    step = row["step",]
                    self.add(step, {tag: value for (tag, *under), value in row.items()
                                    if "/" in tag and not under})
                    self.texts |= {
                        f"{key[0]}, {step}": unescape((path.parent / "files" / value).read_text())
                        for key, value in row.items() if key[1:] == ("path",)}
                elif kind == "config":
                    self.config |= flattened({item.key: json.loads(item.value_json)
                                              for item in record.config.update if item.key})
                elif kind == "alert":
                    self.notes.append(record.alert.text)
                elif kind == "artifact":
                    self.files += [entry.path for entry in record.artifact.manifest.contents]
                elif kind == "exit":
                    self.ends.append(record.exit.exit_code)

    def mlflow(self, run: Path) -> None:
        from mlflow import MlflowClient

        client = MlflowClient((run / "mlflow").as_uri())
        experiment = client.get_experiment_by_name("amid_ds")
        for found in client.search_runs([experiment.experiment_id]):
            self.ids.add(found.info.run_id)
            assert found.info.run_name == run.name
            self.config |= found.data.params
            self.notes.append(found.data.tags.get("alarm"))
            self.ends.append(found.info.status)
            for tag in found.data.metrics:
                for point in client.get_metric_history(found.info.run_id, tag):
                    self.add(point.step, {tag: point.value})
            self.files += [item.path for item in client.list_artifacts(found.info.run_id)]
            place = Path(unquote(urlsplit(found.info.artifact_uri).path))
            for path in place.glob("samples/*/*"):
                tag = f"samples/{path.parent.name}, {int(path.stem.removeprefix('step_'))}"
                self.texts[tag] = path.read_text()

    def trackio(self, run: Path) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        for found in trackio.Api().runs("amid_ds"):
            if not found.name.startswith(f"{run.name}-"):
                continue
            self.ids.add(found.name)
            self.config |= flattened(found.config)
            self.notes += [alert["text"] for alert in found.alerts()]
            for row in SQLiteStorage.get_logs("amid_ds", found.name):
                for tag, value in row.items():
                    if isinstance(value, dict):
                        self.texts[f"{tag}, {row['step']}"] = value["_value"]
                    elif "/" in tag:
                        self.add(row["step"], {tag: value})
            self.files += [item["name"] for item
                           in SQLiteStorage.get_run_artifacts("amid_ds", found.name,
                                                              found.id)["output"]]


def test_two_attempts_are_one_run_with_all_curves_settings_notes_and_a_page(offline):
    """The second attempt goes on after step 3 of 5, as after a kill, and is stopped in order."""
    run, page = RunFolder(offline), offline.parent / "report.html"
    page.write_text("<html>")
    text = offline.parent / "text.jsonl"
    text.write_text('{"text": "a"}')
    write_recipe(run.recipe, Path("student"), None, text, offline)
    run.provenance.write_text(json.dumps({"versions": {"torch": "2.13"}}))
    run.task_scores.write_text('\0junk\n[]\n{"step": 2, "name": "arc", "acc": 0.5, "x": "y"}\n'
                               '{"step": 6, "na')
    log = RunLog(run, 0, 9, BESIDE)
    for step in range(1, 6):
        log.step(step, metrics(step, 1 / step))
    log.evaluation(5, {"held out: [é]": {"loss": 0.1, "tokens": 7}})
    log.samples(5, [Sample(3, "<b>why", "a\nb", None)])
    logging.getLogger("amid_ds.test").warning("the loss spikes")
    log.close("failed")
    ids = read_tracker_ids(run)
    with pytest.raises(Stopped), RunLog(run, 3, 9, ["tensorboard", *BESIDE]) as log:
        log.step(4, metrics(4, 1 / 4))
        log.step(6, metrics(6, 1 / 6))
        for tracker in log.trackers:
            tracker.add_report(page)
        raise Stopped

    assert sorted(ids) == sorted(BESIDE) and read_tracker_ids(run) == ids
    expected = flattened({**resolved(load_recipe(run.recipe)),
                          "provenance": {"versions": {"torch": "2.13"}}})
    for name in BESIDE:
        seen = Seen(name, offline)
        assert seen.ids == {ids[name]}
        # TensorBoard's tags; what a resumed run makes again is there twice.
        assert sorted(seen.points[TENSORBOARD_TAGS["loss"]]) == [
            (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (4, 0.25), (5, 0.2), (6, 1 / 6)], name
        assert set(seen.points) >= {"time/step", "loss/kd", "data/tokens"}
        assert "loss/ce" not in seen.points
        tag = "eval/held out_ _é_/loss" if name == "mlflow" else "eval/held out: [é]/loss"
        assert seen.points[tag] == [(5, 0.1)] and set(seen.points["tasks/arc/acc"]) == {(2, 0.5)}
        assert "the loss spikes" in seen.notes
        assert "<b>why\n\nstudent:\n\n    a\n    b" in seen.texts["samples/3, 5"], name
        for key in ("train.learning_rate", "data.train.0.path", "provenance.versions.torch"):
            assert str(seen.config[key]) == str(expected[key]), (name, key)
        assert any("report" in file for file in seen.files), name
    assert Seen("wandb", offline).ends == [1, 1]
    assert Seen("mlflow", offline).ends == ["KILLED"]


def test_a_finished_runs_tracker_gets_its_page_and_all_that_it_does_not_have(offline):
    run, page = RunFolder(offline), offline.parent / "report.html"
    page.write_text("<html>")
    run.metrics.write_text(json.dumps({"step": 1, **metrics(1, 0.5)}) + "\n")
    complete_trackers(["tensorboard", "trackio"], run, page)
    complete_trackers(["tensorboard", "trackio"], run, None)
    seen = Seen("trackio", offline)
    assert seen.points["loss/total"] == [(1, 0.5)] and len(seen.files) == 1
    assert seen.ids == set(read_tracker_ids(run).values()) and not run.tensorboard.exists()


def test_a_run_without_trackers_writes_its_own_files_alone(tmp_path):
    with RunLog(RunFolder(tmp_path), 0, 1, []) as log:
        log.step(1, metrics(1, 1.0))
        log.evaluation(1, {"held-out": {"loss": 1.0}})
        logging.getLogger("amid_ds.test").warning("goes nowhere else")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eval.jsonl", "metrics.jsonl", "samples.jsonl"]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_tracker_that_fails_is_said_once_an_attempt_and_has_everything_once_it_works(
        offline, monkeypatch, caplog):
    """MLflow's store lies under a file, until the end of the second attempt."""
    place = offline.parent / "place"
    place.touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (place / "store").as_uri())
    for attempt in (1, 2):
        caplog.clear()
        with RunLog(RunFolder(offline), attempt - 1, 3, ["mlflow"]) as log:
            log.step(attempt, metrics(attempt, 1 / attempt))
            while not warnings_of(caplog):
                time.sleep(0.05)
            if attempt == 2:
                place.unlink()
        said = warnings_of(caplog)
        assert len(said) == 1 and "the run goes on, and this is said once" in said[0]
    (place / "store").rename(offline / "mlflow")
    assert Seen("mlflow", offline).points["loss/total"] == [(1, 1.0), (2, 0.5)]


def test_what_trackio_cannot_write_is_said(offline, monkeypatch, caplog):
    """Its threads warn and go on."""
    monkeypatch.setenv("TRACKIO_DIR", "/dev/null/trackio")
    with RunLog(RunFolder(offline), 0, 1, ["trackio"]) as log:
        log.step(1, metrics(1, 1.0))
    said, = warnings_of(caplog)
    assert "trackio failed to flush metric logs" in said and "Not a directory" in said


@pytest.mark.slow
def test_mlflows_files_follow_a_folder_that_was_moved(offline):
    page, moved = offline.parent / "report.html", RunFolder(offline.with_name("moved's"))
    page.write_text("<html>")
    complete_trackers(["mlflow"], RunFolder(offline), page)
    offline.rename(moved.path)
    page.write_text("<html>2")
    complete_trackers(["mlflow"], moved, page)
    assert not offline.exists()
    written, = moved.mlflow.glob("*/*/artifacts/report.html")
    assert written.read_text() == "<html>2"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_hangs_delays_no_step_and_the_end_by_a_bounded_time(
        offline, silent_server, monkeypatch, caplog, request):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setattr(amid_ds.run.log, "END_WAIT_S", 0.5)
    with RunLog(RunFolder(offline), 0, 2000, ["mlflow"]) as log:
        process = log.trackers[0].process
        # One that is stopped never ends by itself.
        request.addfinalizer(process.kill)
        for step in range(1, 2001):
            log.step(step, metrics(step, 1.0))
            logging.getLogger("amid_ds.test").warning("a note that nobody takes " + "." * 500)
            if step == 1000:
                # Its pipe fills too.
                process.send_signal(signal.SIGSTOP)
    said = [text for text in warnings_of(caplog) if "mlflow" in text]
    assert len(said) == 1 and "has not taken everything yet" in said[0]
    assert process.poll() is None
    assert len(read_metrics(offline)) == 2000
    assert "secret" not in caplog.text


def test_a_trackers_process_that_dies_is_said_once(offline, caplog):
    with RunLog(RunFolder(offline), 0, 3, ["trackio"]) as log:
        log.trackers[0].process.kill()
        for step in range(1, 4):
            log.step(step, metrics(step, 1.0))
    assert [text for text in warnings_of(caplog) if "trackio" in text] == [
        "trackio: the process that feeds it has ended with status -9; the run goes on without"]


def test_an_address_is_told_without_its_secrets():
    text = "no route to https://me:pw@host:1/x and https://host/?write_token=abc&b=1"
    assert SECRETS.sub("", text) == (
        "no route to https://host:1/x and https://host/?write_token=&b=1")


def hide(package: str) -> None:
    """Make a package one that is not installed."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: (None if name == package
                                                    else find(name, *rest))


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", importlib.util.find_spec)
    require_trackers(["tensorboard", *BESIDE])
    hide("wandb")
    with pytest.raises(InputError) as refused:
        require_trackers(["wandb", "mlflow"])
    assert refused.value.remedy == "pip install 'amid-ds[wandb]', or leave it out"
    require_trackers(["tensorboard", "mlflow"])


def rank_without_wandb(argv: list[str], variables: dict[str, str], log: str) -> None:
    hide("wandb")
    rank_main(argv, variables, log)


@pytest.mark.slow
def test_a_missing_tracker_is_refused_once_on_all_ranks(llama_pair, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, text_file, tmp_path / "run",
                          train__trackers=["tensorboard", "wandb"])
    ranks = Ranks(2, "train", recipe, target=rank_without_wandb)
    assert ranks.wait() == [2, 2]
    output = ranks.output(0) + ranks.output(1)
    assert output.count("train.trackers: wandb not installed") == 1
    assert "pip install 'amid-ds[wandb]'" in output and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_killed_and_resumed_is_one_run_and_trains_as_without_trackers(
        offline, silent_server, llama_pair, text_file, tmp_path, monkeypatch):
    """MLflow's server hangs in the run; wandb's server does not exist, so wandb goes offline."""
    def recipe(out: Path, **changes) -> Path:
        return write_recipe(tmp_path / f"{out.name}.yaml", *llama_pair, text_file, out,
                            data__eval=[{"path": str(text_file), "name": "held-out"}],
                            train__eval_every=4, train__steps=40, checkpoint__every=4, **changes)

    run_ranks(2, "train", recipe(tmp_path / "plain"))
    monkeypatch.delenv("WANDB_MODE")
    variables = {"MLFLOW_TRACKING_URI": silent_server,
                 "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40,
                 "WANDB_INIT_TIMEOUT": "2"}
    tracked = recipe(offline, train__trackers=BESIDE)
    ranks = Ranks(2, "train", tracked, variables=variables)
    ranks.wait_until(lambda: count_steps(offline) >= 10
                     and set(read_tracker_ids(RunFolder(offline))) == {"wandb", "trackio"})
    ids = read_tracker_ids(RunFolder(offline))
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    ranks = Ranks(2, "train", tracked, variables=variables)
    assert ranks.wait(240) == [0, 0], ranks.output()
    assert read_tracker_ids(RunFolder(offline)) == ids
    assert comparable_metrics(offline) == comparable_metrics(tmp_path / "plain")
    for name, value in ids.items():
        seen = Seen(name, offline)
        assert seen.ids == {value}
        assert {step for step, _ in seen.points["loss/total"]} == set(range(1, 41))
        assert {step for step, _ in seen.points["eval/held-out/loss"]} == set(range(4, 41, 4))
        assert any("report" in file for file in seen.files)
    assert "svg" in (offline / "report.html").read_text()
    assert "WARNING: mlflow" in ranks.output()
