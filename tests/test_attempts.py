"""A run's attempts are read back as they were recorded, by whatever version recorded them."""

from __future__ import annotations

import shutil
from pathlib import Path

from amid_ds.run import attempts

OLD_RUN = Path(__file__).parent / "fixtures" / "old_runs" / "rollouts"


def test_the_attempts_of_an_old_run_come_before_those_of_this_version(tmp_path):
    old = shutil.copytree(OLD_RUN, tmp_path / "run")
    assert [attempt.status for attempt in attempts.read_attempts(old)] == [0]
    with attempts.Attempt(rank=0, size=3) as attempt:
        attempt.begin(old, {})
        attempt.stepping(5)
    first, second = attempts.read_attempts(old)
    assert (first.ranks, first.first_step, first.status) == (2, 1, 0)
    assert (second.ranks, second.first_step, second.status) == (3, 5, 0)
