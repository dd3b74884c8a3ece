"""`amid-ds status`: how a run goes, from what it has written itself and from what Slurm says of its job."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from amid_ds.checkpoint.manifest import checkpoint_step, list_checkpoints
from amid_ds.cluster import slurm
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.run import attempts
from amid_ds.run.log import read_metrics

RECENT_LINES = 20      # the logged steps whose speed counts


def print_status(run: str | None) -> None:
    """One run, or every run under ./runs."""
    if run is not None and not is_run(Path(run)):
        raise InputError(f"{run} is not the folder of a run", "a folder with recipe.yaml or submissions/",
                         "give the recipe's output_dir")
    folders = [Path(run)] if run is not None else sorted(path for path in Path("runs").glob("*") if is_run(path))
    if not folders:
        raise InputError("no run under ./runs", "runs/NAME with recipe.yaml", "amid-ds status RUN, with its output_dir")
    for folder in folders:
        print(folder)
        for name, value in facts_of(folder).items():
            print(f"  {name:<10} {value}")


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "submissions").is_dir()


def facts_of(run: Path) -> dict[str, str]:
    """What `status` prints, by name; what is not known yet is left out."""
    story = attempts.read_attempts(run)
    submitted = [event for event in attempts.read_events(run) if event["event"] == "submitted"]
    recipes = [run / "recipe.yaml", *(Path(event["folder"]) / "recipe.yaml" for event in submitted[::-1])]
    total = next((load_recipe(path).train.steps for path in recipes if path.is_file()), None)
    lines = read_metrics(run)
    job = _latest_job(story, submitted)
    facts_of_job = slurm.show_job(job) if job is not None and slurm.slurm_available() else {}
    facts = {"state": _state(run, story, total, facts_of_job), "step": f"{lines[-1]['step'] if lines else 0} of {total}"}
    if lines:
        facts |= _speed(lines, total)
    failures = [life for life in story if life.failure is not None]
    facts |= {"restarts": str(max(0, len(story) - 1))}
    if job is not None:
        facts["job"] = job
    if story:
        facts["nodes"] = story[-1].nodes
    if failures:
        facts["last error"] = f"{failures[-1].failure} (job {failures[-1].job}, restart {failures[-1].restart})"
    return facts


def _latest_job(story: list[attempts.AttemptRecord], submitted: list[attempts.AttemptEvent]) -> str | None:
    last = story[-1] if story else None
    if submitted and (last is None or submitted[-1]["time"] > last.began):
        return str(submitted[-1]["jobs"][0])
    return last.job if last is not None else None


def _state(run: Path, story: list[attempts.AttemptRecord], total: int | None, slurm: dict[str, str]) -> str:
    saved = list_checkpoints(run / "checkpoints")
    if saved and checkpoint_step(saved[-1]) == total:
        return "done"
    state = slurm.get("JobState", "")
    if state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
        reason = slurm.get("Reason", "None")
        return state.lower() + (f" ({reason})" if state == "PENDING" and reason != "None" else "")
    status = story[-1].status if story else None
    if status is not None:
        return {0: "done", 2: "its input was wrong", 75: "stopped in good order; start it again to go on"}.get(
            status, f"failed (status {status})")
    if state:
        return state.lower()
    return "running, or ended without a word" if story else "not begun"


def _speed(lines: list[dict[str, Any]], total: int | None) -> dict[str, str]:
    recent = lines[-RECENT_LINES:]
    speed = statistics.median(line["tokens_per_second"] for line in recent)
    facts = {"loss": f"{lines[-1]['loss']:.4f}", "tokens/s": f"{speed:,.0f}"}
    left = (total or 0) - lines[-1]["step"]
    if left > 0 and speed > 0:
        seconds = left * lines[-1]["tokens"] / lines[-1]["step"] / speed
        facts["time left"] = f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    return facts
