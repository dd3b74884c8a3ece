"""Work of any length beside the heartbeats of the ranks that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from amid_ds.errors import TrainingError

_T = TypeVar("_T")
# Seconds between the signs of life of a rank that works while the others wait.
HEARTBEAT_S = 20.0


class BackgroundWork(Generic[_T]):
    """`work`, which makes no collective, in a thread of its own: its rank can answer others.

    A collective waits no longer than its timeout, so ranks exchange whether it `goes_on`.
    """

    def __init__(self, rank: int, work: Callable[[], _T]) -> None:
        self._rank, self._work = rank, work
        self._result: _T | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="background work", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:
            self._error = error
        except BaseException as error:
            # A SystemExit would end this thread in silence.
            self._error = TrainingError(
                f"rank {self._rank} failed: {type(error).__name__}: {error}")

    def goes_on(self) -> bool:
        """True if it has not ended within HEARTBEAT_S from now."""
        self._thread.join(HEARTBEAT_S)
        return self._thread.is_alive()

    def result(self) -> _T:
        """What the work returned, once it has ended. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result   # type: ignore[return-value]
