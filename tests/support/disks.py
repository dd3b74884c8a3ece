"""Disks that fill, fail and vanish, and folders that refuse: as root, which permissions let by."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# linux/capability.h: version 3, and the two capabilities that let root pass any permission.
CAPABILITY_VERSION = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2


class SmallDisk:
    """A tmpfs on a new folder, which can be filled, made read-only and taken away."""

    def __init__(self, folder: Path, megabytes: float) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting a small tmpfs needs root")
        folder.mkdir(parents=True)
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={int(megabytes * 2**20)}", "tmpfs", str(folder))

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)

    def fill(self) -> None:
        with open(self.folder / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)

    def repair(self) -> None:
        self._mount("-o", "remount,rw", str(self.folder))
        (self.folder / "filler").unlink(missing_ok=True)

    def make_read_only(self) -> None:
        self._mount("-o", "remount,ro", str(self.folder))

    def vanish(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32),
                ("inheritable", ctypes.c_uint32)]


@contextlib.contextmanager
def obeying_permissions() -> Iterator[None]:
    """A context in which this thread, and those that it starts, lack root's powers over files."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(CAPABILITY_VERSION, 0), (_Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    before = data[0].effective
    data[0].effective = before & ~(DAC_OVERRIDE | DAC_READ_SEARCH)
    assert libc.capset(ctypes.byref(header), data) == 0
    try:
        yield
    finally:
        data[0].effective = before
        assert libc.capset(ctypes.byref(header), data) == 0
