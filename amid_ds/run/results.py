"""A run's results as pandas frames, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations, read_metrics, read_samples, read_task_scores

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """The run in the folder `path`, under way or finished; each call reads its files anew.

    A frame has the names of its file as columns, `step` too, and the steps as index.
    Raises InputError for a folder that is no run's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder = RunFolder(self.path)
        if not self._folder.exists:
            raise InputError(f"{path} holds no {self._folder.recipe.name}",
                             "the folder of a run that has begun, `output_dir` in its recipe",
                             "check the path")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe; running it again reproduces the run."""
        return load_recipe(self._folder.recipe)

    @property
    def model(self) -> Path:
        """Where the finished student is, an ordinary Hugging Face folder."""
        return self._folder.model

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl: a row for each logged step."""
        return _frame(read_metrics(self.path))

    def evaluations(self) -> pd.DataFrame:
        """eval.jsonl: a row for each evaluation and set, whose name is `name`."""
        return _frame(read_evaluations(self.path))

    def task_scores(self) -> pd.DataFrame:
        """eval_tasks.jsonl: a row for each checkpoint and benchmark, whose name is `name`."""
        return _frame(read_task_scores(self.path))

    def samples(self) -> pd.DataFrame:
        """samples.jsonl: a row for each evaluation and prompt, and what was answered."""
        return _frame(read_samples(self.path))


def _frame(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The lines as a frame whose columns are their keys and whose index is their step.

    What is not there is NaN.
    """
    import pandas as pd

    frame = pd.DataFrame(lines, columns=None if lines else ["step"], dtype=None if lines else int)
    # A column of None alone has no number to be typed by.
    missing = [name for name in frame if len(frame) and frame[name].isna().all()]
    frame = frame.astype(dict.fromkeys(missing, float))
    # Without a name: pandas takes `step` for neither where the index and a column have it.
    return frame.set_axis(frame["step"].rename(None), axis=0)
