"""Whose a file or folder is: what this package did not write, it neither removes nor overwrites.

Every kind of output has a sign, something in it that this package writes first and nobody else
writes: a run its provenance.json, prepared data their plan.json, an export its model card, answers
their OUT.made, a page its generator. Most were there before this rule, so that older outputs are
known by it too. An output that exists, holds something and lacks its sign is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from amid_ds.errors import InputError
from amid_ds.files.atomic import replace_folder
from amid_ds.files.lease import Lease

# The sign of a folder that has no other; it holds the kind of the folder.
SIGN_FILE = ".amid-ds"
# In the names of folders that are being made, between the final name and the maker.
STAGING_SIGN = ".amid-ds."


def is_signed(folder: Path, kind: str) -> bool:
    """True if `folder` has the sign that `sign` writes for this kind."""
    try:
        return (folder / SIGN_FILE).read_text(encoding="utf-8").strip() == kind
    except (OSError, UnicodeDecodeError):
        return False


def sign(folder: Path, kind: str) -> None:
    """Make `folder` and write its sign, before anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIGN_FILE).write_text(f"{kind}\n", encoding="utf-8")


def require_own_folder(folder: Path, is_own: bool, setting: str,
                       spared: Callable[[Path], bool] = lambda entry: False) -> None:
    """Raise InputError unless `folder` is ours, or holds nothing of anybody's, or is not there.

    setting: what names the folder, for the message. Hidden entries and those that `spared` is true
    for do not count; neither do folders without a file, such as the place of a mount.
    """
    if is_own or not os.path.lexists(folder):
        return
    try:
        foreign = [folder] if not folder.is_dir() else [
            entry for entry in sorted(folder.iterdir())
            if not entry.name.startswith(".") and not spared(entry) and _holds_a_file(entry)]
    except OSError as error:
        raise InputError(f"{setting}, {folder}, cannot be read: {error.strerror}",
                         "a folder that can be read and written", "check its permissions") from None
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(f"{setting}, {folder}, is there already and not amid-ds's own: "
                         f"it holds {foreign[0].name}{more}",
                         "a new or empty folder, or one that this command made",
                         "choose another folder, or move that away")


def _holds_a_file(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return True
    return any(files for _, _, files in os.walk(path))


def require_new_folder(out: str | Path, setting: str) -> Path:
    """The absolute path of an output folder.

    Raises InputError unless it is new or empty, and where a new one cannot be made.
    """
    path = Path(os.path.abspath(out))
    if not str(out).strip() or path in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{setting} {str(out)!r}", "a new folder, not the one that you are in",
                         "name a folder")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{setting} {out} is there already and not empty",
                         "a new or empty folder", "choose another name")
    above = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not above.is_dir() or not os.access(above, os.W_OK):
        # `os.access` does not say which it is.
        problem = (errno.ENOTDIR if not above.is_dir() else errno.EROFS
                   if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES)
        raise InputError(f"{setting} {out} cannot be made: {above} is no folder to write in "
                         f"({os.strerror(problem)})", "a place where a folder can be made",
                         "choose another place")
    return path


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, to be filled; renamed to `out` at the end.

    Raises InputError unless `out` is new or empty, and where another process makes it.
    """
    out = require_new_folder(out, "the output")
    with Lease.held(out.with_name(f".{out.name}.lease.json"), f"the output {out}"):
        # Somebody may have finished it meanwhile.
        require_new_folder(out, "the output")
        with replacing_folder(out) as staging:
            yield staging


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, to be filled; renamed to `path` at the end.

    What `path` held, which the caller knows to be ours, stays until then. The caller has a lease:
    other hidden folders of this name are those of makers that were killed.
    """
    prefix = f".{path.name}{STAGING_SIGN}"
    ours = re.compile(rf"{re.escape(prefix)}.+\.\d+")
    for leftover in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        shutil.rmtree(leftover, ignore_errors=True)
    staging = path.with_name(f"{prefix}{os.uname().nodename}.{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        replace_folder(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_own_file(path: Path, is_own: Callable[[str], bool], setting: str) -> None:
    """Raise InputError unless `path` can be written: a file that is not there, or one of ours.

    is_own: says so of the first characters of the file's text.
    """
    if path.is_dir() or not path.name:
        raise InputError(f"{setting} {str(path)!r}", "the path of a file", "name a file")
    if not os.path.lexists(path):
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            beginning = file.read(4096)
    except OSError as error:
        raise InputError(f"{setting} {path} cannot be read: {error.strerror}",
                         "a new file, or one that this command made",
                         "choose another name") from None
    if beginning and not is_own(beginning):
        raise InputError(f"{setting} {path} is there already and not amid-ds's own",
                         "a new file, or one that this command made",
                         "choose another name, or move it away")
