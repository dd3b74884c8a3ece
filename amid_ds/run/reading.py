"""Progress of reading a model's weights: a bar on a terminal, else a message now and then."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from amid_ds.distributed.launch import launched_rank
from amid_ds.errors import printable
from amid_ds.run.log import MESSAGE_INTERVAL_S

logger = logging.getLogger(__name__)


class ReadingProgress:
    """Shows rank 0's bytes as they are read, with bytes per second, and a line at the end.

    A context manager. Ranks read like amounts side by side: rank 0's rate is that of any. What was
    not read to its end, because of an error, gets no line.
    """

    def __init__(self, model: str, own_bytes: int, whole_bytes: int) -> None:
        """own_bytes: that this rank is to read of the `whole_bytes` of the weights of `model`."""
        self.model, self.own, self.whole = model, own_bytes, whole_bytes
        self.read = 0

    def __enter__(self) -> ReadingProgress:
        self.began = self.last_message = time.monotonic()
        shown = launched_rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=self.own, desc=printable(self.model, keep=""), unit="B",
                        unit_scale=True, leave=False, dynamic_ncols=True, disable=not shown)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.bar.close()
        if error is None:
            share = f"{self.whole / max(1, self.own):.1f}".removesuffix(".0")
            logger.info("read %s of %s in %.1f s, %s/s: the share of rank 0, 1/%s of it",
                        size_text(self.read), self.model, self._seconds(), self._rate(), share)

    def add(self, count: int) -> None:
        """Note that `count` bytes more were read. One thread at a time."""
        self.read += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.last_message >= MESSAGE_INTERVAL_S:
            self.last_message = now
            logger.info("reading %s: %s of %s, %s/s", self.model, size_text(self.read),
                        size_text(self.own), self._rate())

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _rate(self) -> str:
        return size_text(self.read / max(1e-3, self._seconds()))


def size_text(size: float) -> str:
    """Bytes in the unit of three digits: 12.3 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
