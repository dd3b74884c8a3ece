"""The log while a model's weights are read."""

from __future__ import annotations

import logging

import pytest

from amid_ds.run import reading
from amid_ds.run.reading import ReadingProgress, size_text


@pytest.fixture
def clock(monkeypatch):
    """The progress's clock, in seconds, moved by hand; no terminal; the log is caught."""
    now = [100.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(reading.sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(logging.getLogger("amid_ds"), "propagate", True)
    return now


def test_without_a_terminal_a_line_comes_now_and_then_and_one_at_the_end(clock, caplog):
    with caplog.at_level(logging.INFO, logger="amid_ds"), ReadingProgress(
            "the-teacher", 12_000_000_000, 64 * 12_000_000_000) as progress:
        for _ in range(12):
            clock[0] += 2
            progress.add(1_000_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "reading the-teacher: 5 GB of 12 GB, 500 MB/s",
        "reading the-teacher: 10 GB of 12 GB, 500 MB/s",
        "read 12 GB of the-teacher in 24.0 s, 500 MB/s: the share of rank 0, 1/64 of it"]


def test_what_fails_while_it_is_read_is_not_said_to_be_read(clock, caplog):
    with (caplog.at_level(logging.INFO, logger="amid_ds"), pytest.raises(OSError),
          ReadingProgress("m", 10, 20)):
        raise OSError
    assert caplog.records == []


def test_on_a_terminal_rank_0_alone_has_a_bar_with_its_rate(monkeypatch, capsys):
    monkeypatch.setattr(reading.sys.stderr, "isatty", lambda: True, raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with ReadingProgress("m\x1b[2J", 2_000_000, 4_000_000) as progress:
            progress.add(1_000_000)
            progress.bar.refresh()
        shown = capsys.readouterr().err
        assert ("1.00M/2.00M" in shown and "B/s" in shown) == (rank == "0")
        assert "\x1b[2J" not in shown and (rank == "0" or shown == "")


def test_sizes_are_given_in_the_unit_of_three_digits():
    assert [size_text(size) for size in (12, 1_300, 12_300_000_000, 999_600, 8.1e14)] == [
        "12 bytes", "1.3 kB", "12.3 GB", "1 MB", "810 TB"]
