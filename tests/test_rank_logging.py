"""Messages: once per job on stdout, every rank's errors on stderr, wherever the streams point."""

from __future__ import annotations

import contextlib
import io
import logging

import pytest

from amid_ds.distributed.rank_logging import leave_stdout_to_results, set_up_logging

logger = logging.getLogger("amid_ds.example")


@pytest.fixture(autouse=True)
def stdout_has_messages() -> None:
    """As before a command with --json, which another test may have run in this process."""
    leave_stdout_to_results(False)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_come_from_every_rank_and_the_rest_from_rank_0(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    # Set up twice: a message is still written once.
    set_up_logging()
    set_up_logging()
    logger.info("step 1")
    logger.warning("slow")
    logger.error("failed")
    written = capsys.readouterr()
    assert written.out == ("step 1\n" if rank == "0" else "")
    assert written.err == ("WARNING: slow\n" if rank == "0" else "") + "amid-ds: failed\n"


def test_messages_follow_a_replaced_stream_and_are_written_once(capsys, monkeypatch):
    monkeypatch.setattr(set_up_logging.__globals__["PACKAGE_LOGGER"], "handlers", [])
    set_up_logging()
    # Some libraries put a handler of their own on the root logger.
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])
    logger.info("before")
    with contextlib.redirect_stdout(io.StringIO()) as replaced:
        logger.info("meanwhile")
    written = capsys.readouterr()
    assert (written.out, written.err) == ("before\n", "")
    assert replaced.getvalue() == "meanwhile\n"


def test_a_stream_that_is_closed_ends_nothing(monkeypatch):
    class Closed:
        def write(self, text: str) -> int:
            raise OSError("closed")

        flush = write

    set_up_logging()
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr("sys.stdout", Closed())
    logger.info("nobody reads this")
