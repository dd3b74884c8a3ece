"""Trackers beside TensorBoard, each fed by a process of its own beside rank 0.

A tracker's package may hang, raise, print, take signals or wait for a server at exit; in that
process (run/tracking.py) none of it reaches the run. The process follows the run's files: what a
slow tracker has not taken yet waits in metrics.jsonl, and the run never waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amid_ds.errors import InputError
from amid_ds.files.atomic import replace_text
from amid_ds.run.folder import RunFolder

logger = logging.getLogger(__name__)

# Seconds that a run waits at its end for what its trackers have not taken yet; and a finished run,
# which nobody waits for, for its report.
END_WAIT_S = 15
REPORT_WAIT_S = 90
NO_STEP_AFTER = 2**63
# What fits into a pipe at once or not at all is 4,096 bytes; a character may take 6 of them.
MOST_NOTE_CHARACTERS = 500
TRACKER_PROGRAM = ("import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
                   "from amid_ds.run.tracking import follow_run; follow_run()")
_IDS_LOCK = threading.Lock()


def with_processes(trackers: Sequence[str]) -> list[str]:
    """Those of `train.trackers` that are fed by a process; TensorBoard's files are written here."""
    return [name for name in trackers if name != "tensorboard"]


def require_trackers(trackers: Sequence[str]) -> None:
    """Raise InputError where the package of one of `train.trackers` is not installed."""
    missing = [name for name in with_processes(trackers) if not _is_installed(name)]
    if missing:
        raise InputError(f"train.trackers: {', '.join(missing)} not installed",
                         "the package of each tracker",
                         f"pip install 'amid-ds[{','.join(missing)}]', or leave it out")


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name where the command is run, such as one of wandb's files, has no origin.
    return spec is not None and spec.origin is not None


def read_tracker_ids(run: RunFolder) -> dict[str, str]:
    """What each tracker calls the run, by the tracker's name; {} before the first has opened."""
    try:
        ids = json.loads(run.tracker_ids.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(ids, dict):
        return {}
    return {name: value for name, value in ids.items() if isinstance(value, str)}


def _keep_id(run: RunFolder, name: str, value: str) -> None:
    with _IDS_LOCK:
        ids = read_tracker_ids(run)
        if ids.get(name) != value:
            replace_text(run.tracker_ids, json.dumps({**ids, name: value}, indent=2) + "\n")


class TrackerProcess:
    """One tracker of a run, fed with what the run's files get after `start` steps.

    A tracker that does not know the run yet gets all that they hold. config: what it shows as the
    run's settings.
    """

    def __init__(self, name: str, run: RunFolder, start: int, config: dict[str, Any]) -> None:
        self.name, self.run = name, run
        known = read_tracker_ids(run).get(name)
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRACKER_PROGRAM, json.dumps(sys.path)], stdin=subprocess.PIPE,
            # Signals to the run's process group are the run's; this process sees the run end.
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        order = {"tracker": name, "run": str(run.path.resolve()), "parent": os.getpid(),
                 "id": known, "start": start if known is not None else 0, "config": config}
        # A process that could not start has closed its end, which the listener reports.
        with contextlib.suppress(OSError):
            self.pipe.write(json.dumps(order).encode() + b"\n")
            self.pipe.flush()
        os.set_blocking(self.pipe.fileno(), False)
        self.left = False
        self.listener = threading.Thread(target=self._listen, name=name, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        """Log what the process says, and keep the run's id as soon as it has one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "failed" in message:
                logger.warning("%s: %s\n  the run goes on, and this is said once; what %s lacks "
                               "is in %s", self.name, message["failed"], self.name,
                               self.run.metrics)
                continue
            logger.info("%s: %s", self.name, message["place"])
            try:
                _keep_id(self.run, self.name, message["id"])
            except OSError as error:
                logger.warning("%s: its id %s could not be written: %s", self.name, message["id"],
                               error)
        status = self.process.wait()
        if status and not self.left:
            logger.warning("%s: the process that feeds it has ended with status %d; the run goes "
                           "on without", self.name, status)

    def add_note(self, tag: str, text: str) -> None:
        """Add a text."""
        self.tell("note", tag, text[:MOST_NOTE_CHARACTERS])

    def add_report(self, page: Path) -> None:
        """Attach a page to the run."""
        self.tell("report", str(page.resolve()))

    def tell(self, *message: str) -> None:
        """Send a message, if the process has room for it; nothing waits."""
        with contextlib.suppress(OSError, ValueError):
            os.write(self.pipe.fileno(), json.dumps(message).encode() + b"\n")

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended, after it was told to, or leave it to itself.

        It ends by itself, see REST_S.
        """
        with contextlib.suppress(OSError):
            self.pipe.close()
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.left = True
            logger.warning("%s has not taken everything yet: its process goes on beside the run's "
                           "end, for at most two minutes", self.name)
            return
        self.listener.join(timeout=5)


def start_trackers(trackers: Sequence[str], run: RunFolder, start: int) -> list[TrackerProcess]:
    """The processes of a run's trackers, fed with what comes after `start` steps."""
    names = with_processes(trackers)
    config = _read_config(run) if names else {}
    try:
        return [TrackerProcess(name, run, start, config) for name in names]
    except OSError as error:
        logger.warning("no process could be started for %s, the run goes on without: %s",
                       ", ".join(names), error)
        return []


def _read_config(run: RunFolder) -> dict[str, Any]:
    """The run's resolved recipe, and its provenance under that name."""
    from amid_ds.config.parse import load_recipe, resolved
    from amid_ds.run.provenance import read_provenance

    config: dict[str, Any] = {}
    if run.recipe.exists():
        config = resolved(load_recipe(run.recipe))
    if facts := read_provenance(run):
        config["provenance"] = facts
    return config


def end_trackers(trackers: Sequence[TrackerProcess], outcome: str, wait_s: float) -> None:
    """Have every tracker take what it has not taken yet, in `wait_s` seconds together.

    outcome: what became of the attempt: `finished`, `stopped` or `failed`.
    """
    for tracker in trackers:
        tracker.tell("end", outcome)
    deadline = time.monotonic() + wait_s
    for tracker in trackers:
        tracker.wait(deadline)


def complete_trackers(trackers: Sequence[str], run: RunFolder, page: Path | None) -> None:
    """Give a finished run's trackers its page, the scores of its tasks, and whatever they lack."""
    known = read_tracker_ids(run)
    lacking = [name for name in with_processes(trackers)
               if page is not None or run.task_scores.exists() or name not in known]
    processes = start_trackers(lacking, run, start=NO_STEP_AFTER)
    if page is not None:
        for tracker in processes:
            tracker.add_report(page)
    end_trackers(processes, "finished", REPORT_WAIT_S)
