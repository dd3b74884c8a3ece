"""The kernel's own figures of this process: bytes from files, bytes from peers, memory. Linux."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.005
# tcpi_bytes_received in struct tcp_info of linux/tcp.h, a u64.
TCP_INFO_BYTES = 192
RECEIVED_OFFSET = 128


@dataclass
class KernelFigures:
    """Bytes of this process within `counting()`.

    asked: of read calls (rchar), from the page cache or not, other than of sockets. disk: fetched
    from storage for it (read_bytes), those of mapped files and of readahead too. received: payload
    over TCP. peak_anonymous: the peak of its anonymous memory, above what it held at the beginning.
    """

    asked: int = 0
    disk: int = 0
    received: int = 0
    peak_anonymous: int = 0

    @property
    def read(self) -> int:
        """Bytes taken from files: pages that are cached cost no `disk`, mapped ones no `asked`."""
        return max(self.asked, self.disk)


@contextlib.contextmanager
def counting() -> Iterator[KernelFigures]:
    """A context at whose end the figures that it gives are filled in. Memory is sampled."""
    figures = KernelFigures()
    sampler = _AnonymousSampler()
    sockets, (asked, disk) = _received_by_socket(), _io()
    sampler.start()
    try:
        yield figures
    finally:
        figures.peak_anonymous = sampler.stop()
        now_asked, now_disk = _io()
        figures.asked, figures.disk = now_asked - asked - sampler.bytes_read, now_disk - disk
        figures.received = sum(received - sockets.get(inode, 0)
                               for inode, received in _received_by_socket().items())


def drop_cached(file: Path) -> None:
    """Ask the kernel to forget the pages of `file`; those that a process maps stay."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _io() -> tuple[int, int]:
    """(rchar, read_bytes) of this process since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    values = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
    return values["rchar"], values["read_bytes"]


def _received_by_socket() -> dict[int, int]:
    """Bytes received by each TCP socket that this process has open, by inode."""
    received = {}
    for name in os.listdir("/proc/self/fd"):
        # The descriptor that listed the folder is closed by now.
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                # Closes the copy.
                with socket.socket(fileno=os.dup(int(name))) as opened:
                    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                received[status.st_ino] = struct.unpack_from("=Q", info, RECEIVED_OFFSET)[0]
    return received


class _AnonymousSampler(threading.Thread):
    """Samples this process's anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        self.bytes_read = 0
        self.statm = Path("/proc/self/statm")
        self.first = self.peak = self._now()

    def _now(self) -> int:
        """Resident pages that are no file's; statm is short, and its bytes count as read."""
        line = self.statm.read_text()
        self.bytes_read += len(line)
        resident, shared = map(int, line.split()[1:3])
        return (resident - shared) * mmap.PAGESIZE

    def run(self) -> None:
        while not self.ending.wait(SAMPLE_S):
            self.peak = max(self.peak, self._now())

    def stop(self) -> int:
        """The peak above the beginning, in bytes."""
        self.ending.set()
        self.join()
        return max(self.peak, self._now()) - self.first
