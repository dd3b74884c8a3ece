"""Weights & Biases, MLflow and trackio, each as a run that takes points, notes and a page.

What the user has set in a package's own environment variables holds; this process's environment
gets values for those that are not set.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from amid_ds.files.atomic import replace_text
from amid_ds.run.folder import RunFolder

TRACKER_PROJECT = "amid_ds"
# Of MLflow: what names may not have, and what one request may.
MLFLOW_FORBIDDEN = re.compile(r"[^\w\-. /]")
MOST_METRICS, MOST_PARAMETERS, MOST_CHARACTERS = 1000, 100, 6000


class Point(NamedTuple):
    """The values of some curves, and texts in Markdown, at a step, by their tags."""

    step: int
    values: Mapping[str, float]
    texts: Mapping[str, str]


class TrackerClient(Protocol):
    """A run as a tracker has it. `id`: what the tracker calls it; `place`: where to look.

    Opening it again with its id goes on with the same run. Any call may raise anything.
    """

    id: str
    place: str

    def __init__(self, run: RunFolder, known: str | None) -> None: ...

    def add_config(self, config: dict[str, Any]) -> None:
        """Show the recipe and the provenance as the run's settings."""

    def add_points(self, points: Sequence[Point]) -> None:
        """Add points to the curves, and texts."""

    def add_note(self, tag: str, text: str) -> None:
        """Add a text."""

    def add_report(self, page: Path) -> None:
        """Attach a page."""

    def close(self, outcome: str) -> None:
        """End the run: `finished`, `stopped` in good order, or `failed`."""


class WandbRun:
    """A run of Weights & Biases; offline where its server cannot be reached."""

    def __init__(self, run: RunFolder, known: str | None) -> None:
        _set_defaults(WANDB_PROJECT=TRACKER_PROJECT, WANDB_NAME=run.path.name,
                      WANDB_DIR=str(run.path), WANDB_SILENT="true", WANDB_CONSOLE="off",
                      # What `wandb sync` sends later stands beside the rest, not in the home.
                      WANDB_DATA_DIR=str(run.path / "wandb"),
                      # The process whose memory and CPU it shows is rank 0's.
                      WANDB_INIT_TIMEOUT="30", WANDB_X_STATS_PID=str(os.getppid()))
        import wandb

        options: dict[str, Any] = {"id": known or uuid.uuid4().hex[:12], "resume": "allow"}
        try:
            self.run = wandb.init(**options)
        except wandb.errors.Error:
            # No key, or no network: `wandb sync` sends the folder later. Its service holds the id.
            wandb.teardown(exit_code=1)
            self.run = wandb.init(**options, mode="offline")
        self.id = self.run.id
        self.place = self.run.url or f"offline in {Path(self.run.dir).parent}"
        # Its own steps never go back, and ours do: a resumed run repeats some.
        self.run.define_metric("*", step_metric="step")

    def add_config(self, config: dict[str, Any]) -> None:
        self.run.config.update(config, allow_val_change=True)

    def add_points(self, points: Sequence[Point]) -> None:
        from wandb import Html

        for point in points:
            texts = {tag: Html(f"<pre>{escape(text)}</pre>") for tag, text in point.texts.items()}
            self.run.log({**point.values, **texts, "step": point.step})

    def add_note(self, tag: str, text: str) -> None:
        self.run.alert(tag, text, level="WARN")

    def add_report(self, page: Path) -> None:
        self.run.log_artifact(str(page), name=f"report-{self.id}", type="report")

    def close(self, outcome: str) -> None:
        if outcome == "stopped":
            self.run.mark_preempting()
        self.run.finish(exit_code=int(outcome != "finished"))


class MlflowRun:
    """A run of MLflow, through its client."""

    def __init__(self, run: RunFolder, known: str | None) -> None:
        _set_defaults(MLFLOW_TRACKING_URI=run.mlflow.resolve().as_uri(),
                      MLFLOW_EXPERIMENT_NAME=TRACKER_PROJECT,
                      # Recent ones do not write files without it.
                      MLFLOW_ALLOW_FILE_STORE="true",
                      # Who follows the run tries again: a server that hangs is said in a minute.
                      MLFLOW_HTTP_REQUEST_TIMEOUT="20", MLFLOW_HTTP_REQUEST_MAX_RETRIES="2")
        from mlflow import MlflowClient

        self.folder, self.client = run, MlflowClient()
        if known is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment(
                os.environ["MLFLOW_EXPERIMENT_NAME"])
            known = self.client.create_run(experiment, run_name=run.path.name).info.run_id
        else:
            _follow_move(run.mlflow)
            self.client.set_terminated(known, "RUNNING")
        self.id = known
        address = urlsplit(os.environ["MLFLOW_TRACKING_URI"])
        where = address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl()
        self.place = f"run {known} at {where}"

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self.client.create_experiment(name)

    def add_config(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        from amid_ds.config.parse import flattened

        # A parameter is written once; the files show what a later attempt has changed.
        there = self.client.get_run(self.id).data.params
        values = {MLFLOW_FORBIDDEN.sub("_", key): str(value)[:MOST_CHARACTERS]
                  for key, value in flattened(config).items()}
        new = [Param(key, value) for key, value in values.items() if key not in there]
        for first in range(0, len(new), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=new[first:first + MOST_PARAMETERS])
        for path in (self.folder.recipe, self.folder.provenance):
            if path.exists():
                self.client.log_artifact(self.id, str(path))

    def add_points(self, points: Sequence[Point]) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(MLFLOW_FORBIDDEN.sub("_", tag), value, now, point.step)
                   for point in points for tag, value in point.values.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[first:first + MOST_METRICS])
        for point in points:
            for tag, text in point.texts.items():
                self.client.log_text(self.id, text, f"{tag}/step_{point.step:08d}.md")

    def add_note(self, tag: str, text: str) -> None:
        self.client.set_tag(self.id, tag, text)

    def add_report(self, page: Path) -> None:
        self.client.log_artifact(self.id, str(page))

    def close(self, outcome: str) -> None:
        statuses = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, statuses[outcome])


class TrackioRun:
    """A run of trackio: on this machine, on a server or in a Space, as its variables say.

    Its runs are resumed by their names, so each has one that no other run has.
    """

    def __init__(self, run: RunFolder, known: str | None) -> None:
        import trackio

        # Its threads drop what they cannot write, with a warning.
        self.warned: list[str] = []
        warnings.showwarning = self._take_warning
        project = os.environ.get("TRACKIO_PROJECT", TRACKER_PROJECT)
        self.id = known or f"{run.path.name}-{uuid.uuid4().hex[:6]}"
        self.run = trackio.init(project, name=self.id, resume="allow", embed=False)
        self.place = f"run {self.id} of the project {project}, `trackio show --project {project}`"

    def add_config(self, config: dict[str, Any]) -> None:
        # It goes with the first points.
        self.run.config.update(config)

    def add_points(self, points: Sequence[Point]) -> None:
        from trackio import Markdown

        self._raise_warning()
        for point in points:
            texts = {tag: Markdown(text) for tag, text in point.texts.items()}
            self.run.log({**point.values, **texts}, step=point.step)

    def add_note(self, tag: str, text: str) -> None:
        self.run.alert(tag, text)

    def add_report(self, page: Path) -> None:
        self.run.log_artifact(str(page), type="report")

    def close(self, outcome: str) -> None:
        self.run.finish()
        self._raise_warning()

    def _take_warning(self, message: Warning | str, category: type[Warning], filename: str,
                      lineno: int, file: object = None, line: str | None = None) -> None:
        if "trackio" in Path(filename).parts:
            self.warned.append(str(message))

    def _raise_warning(self) -> None:
        if self.warned:
            text, *_ = self.warned
            self.warned.clear()
            raise RuntimeError(text)


CLIENTS: dict[str, type[TrackerClient]] = {"wandb": WandbRun, "mlflow": MlflowRun,
                                           "trackio": TrackioRun}


def _follow_move(store: Path) -> None:
    """Have an MLflow store that was moved keep its artifacts where it is: it has whole paths."""
    for path in (*store.glob("*/meta.yaml"), *store.glob("*/*/meta.yaml")):
        text = path.read_text(encoding="utf-8")
        place = path.parent.relative_to(store).as_posix()
        moved = re.sub(rf"(?m)^(artifact_(?:uri|location): )file://.*/(?={place}(?:/artifacts)?$)",
                       lambda found: f"{found[1]}{store.resolve().as_uri()}/", text)
        if moved != text:
            replace_text(path, moved)


def _set_defaults(**variables: str) -> None:
    for name, value in variables.items():
        if not os.environ.get(name):
            os.environ[name] = value
