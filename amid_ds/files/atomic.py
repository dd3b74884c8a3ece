"""Files and folders that are complete or absent.

Everything is written next to its final name, flushed to disk and renamed into it, so a reader, or
the next start after a crash, sees the old content or the new one and nothing in between.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

from amid_ds.errors import InputError


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one rename: `path` holds what it held before or all of `text`."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """`replace_text` for bytes. A file that is replaced hands down its permissions.

    Where it cannot be written, nothing is left beside it, and the OSError names `path`.
    """
    # Processes of several nodes may write to one file system at the same time.
    staging = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(staging, "wb") as file:
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        fsync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_folder(staging: Path, path: Path) -> None:
    """Move the finished folder `staging` to `path`; the folder that was there is removed last.

    Both lie in the same parent folder. Every file is flushed to disk before the rename. The name of
    `staging` is nobody else's, and neither is the one that the old folder has meanwhile.
    """
    for file in staging.rglob("*"):
        if file.is_file():
            fsync(file)
    fsync(staging)
    previous = staging.with_name(f"{staging.name}.old")
    if os.path.lexists(path):
        os.replace(path, previous)
    os.replace(staging, path)
    fsync(path.parent)
    if previous.is_symlink():
        previous.unlink()
    shutil.rmtree(previous, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush the content of a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_disk_space(folder: Path, needed: int, work: str, otherwise: str) -> None:
    """Raise InputError if the file system of `folder` has less than `needed` bytes free.

    `work` and `otherwise` are the message's: what needs the space, and what to do without it.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{work} needs {needed / 1e6:,.1f} MB, "
                         f"{folder} has {free / 1e6:,.1f} MB free",
                         "room for it on that file system", f"make room there, or {otherwise}")
