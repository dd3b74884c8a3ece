"""The names of what lies in a run's folder, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, `output_dir` in its recipe."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; running it again reproduces the run."""
        return self.path / "recipe.yaml"

    @property
    def exists(self) -> bool:
        """True once a run has begun here."""
        return self.recipe.is_file()

    @property
    def is_own(self) -> bool:
        """True for a folder that this package made a run's: its sign is its provenance.json."""
        try:
            facts = self.provenance.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        # A damaged one beside a recipe is ours all the same.
        return self.recipe.is_file() or "tokenizer_sha256" in facts

    @property
    def lease(self) -> Path:
        """There while a process works in the folder; says which."""
        return self.path / "lease.json"

    @property
    def metrics(self) -> Path:
        """JSON lines, one per logged optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """JSON lines, one per evaluation set and evaluation."""
        return self.path / "eval.jsonl"

    @property
    def samples(self) -> Path:
        """JSON lines, one per evaluation and prompt of `train.samples`."""
        return self.path / "samples.jsonl"

    @property
    def task_scores(self) -> Path:
        """JSON lines, one per task and checkpoint of `eval_tasks`: step, name, numbers."""
        return self.path / "eval_tasks.jsonl"

    @property
    def task_checkpoints(self) -> Path:
        """Checkpoints of `eval_tasks` that wait to be judged."""
        return self.path / "eval_tasks"

    @property
    def tracker_ids(self) -> Path:
        """What each tracker calls this run, over all its attempts."""
        return self.path / "trackers.json"

    @property
    def tensorboard(self) -> Path:
        """The same as curves."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of `step_00000100` and its siblings, and of the file `latest`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished student, an ordinary Hugging Face folder."""
        return self.path / "model"

    @property
    def best_model(self) -> Path:
        """The student of the best evaluation, where the recipe has `checkpoint.best`."""
        return self.path / "best"

    @property
    def start_model(self) -> Path:
        """The student as it began, where `student.model` names another run."""
        return self.path / "start"

    @property
    def student_files(self) -> Path:
        """The student's config, tokenizer and generation settings, for an export."""
        return self.path / "student_files"

    @property
    def provenance(self) -> Path:
        """Versions, git revision, hashes of models and tokenizer."""
        return self.path / "provenance.json"

    @property
    def measurements(self) -> Path:
        """Memory and network of one measured step."""
        return self.path / "measured.json"

    @property
    def attempts(self) -> Path:
        """JSON lines, one per event of an attempt: submitted, begun, stepping, ended."""
        return self.path / "attempts.jsonl"

    @property
    def old_attempts(self) -> Path:
        """The attempts of runs that began under version 0.1, by their name there; still read."""
        return self.path / "lives.jsonl"

    @property
    def failures(self) -> Path:
        """A JSON file for each rank that failed in the current attempt."""
        return self.path / "failures"

    @property
    def profile(self) -> Path:
        """Traces of torch's profiler, one per rank."""
        return self.path / "profile"

    @property
    def stop_file(self) -> Path:
        """Created by the user to stop the run in good order."""
        return self.path / "STOP"

    @property
    def logs(self) -> Path:
        """The output of Slurm jobs."""
        return self.path / "logs"

    @property
    def submissions(self) -> Path:
        """A folder per submission: the batch script and the recipe that were submitted."""
        return self.path / "submissions"
