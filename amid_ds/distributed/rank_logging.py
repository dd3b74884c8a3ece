"""Progress messages of the package, once per job and not once per rank.

Modules log to `logging.getLogger(__name__)`. INFO (on stdout; on stderr where stdout is a command's
JSON alone) and WARNING (on stderr) come from rank 0 alone, ERROR (on stderr) from every rank, all
of them above a progress bar. The results of a command (a table, a path, JSON) are printed and not
logged.
"""

from __future__ import annotations

import contextlib
import logging
import sys

from tqdm import tqdm

from amid_ds.distributed.launch import launched_rank
from amid_ds.errors import TrainingError, printable

PACKAGE_LOGGER = logging.getLogger("amid_ds")
_STDOUT_IS_RESULTS = False


class _RankHandler(logging.Handler):
    """Writes through tqdm, so that a message and a progress bar do not share a line.

    The streams are looked up for each message: they may be replaced while the process runs.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            prefix, stream = "amid-ds: ", sys.stderr
        elif launched_rank() == 0:
            is_warning = record.levelno >= logging.WARNING
            prefix = "WARNING: " if is_warning else ""
            stream = sys.stderr if is_warning or _STDOUT_IS_RESULTS else sys.stdout
        else:
            return
        # A message that cannot be written (a closed terminal, a full disk) does not end a run.
        with contextlib.suppress(OSError, ValueError, TrainingError):
            tqdm.write(f"{prefix}{printable(self.format(record))}", file=stream)
            stream.flush()


def leave_stdout_to_results(alone: bool) -> None:
    """Say whether a command's stdout is its results' alone, so that INFO goes to stderr."""
    global _STDOUT_IS_RESULTS
    _STDOUT_IS_RESULTS = alone


def set_up_logging() -> None:
    """Send the package's log messages to this process's streams. Called by the command line and on
    joining a process group; later calls change nothing."""
    if not any(isinstance(handler, _RankHandler) for handler in PACKAGE_LOGGER.handlers):
        PACKAGE_LOGGER.addHandler(_RankHandler())
        PACKAGE_LOGGER.setLevel(logging.INFO)
        # Some libraries (absl, by way of rouge-score) put a handler of their own on the root
        # logger, which would print every message a second time.
        PACKAGE_LOGGER.propagate = False
