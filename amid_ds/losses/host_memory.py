"""How glibc treats large blocks, the one thing about host memory that torch leaves to the C library.

By itself glibc returns a freed temporary of half a megabyte to the kernel and maps it anew a moment later; the page
faults cost several times the arithmetic between. Kept, freed blocks are used again; but while models are loaded, where
each weight is made whole and a part of it stays, the holes between the parts would be kept too; nor do gathered weights
of all sizes leave holes that fit the next. So: what a tile of the loss takes is kept, larger blocks and all that is
made while loading is given back. Settings of the whole process; a C library without mallopt goes as it goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3      # mallopt's parameters, of malloc.h
_KEPT = 64 << 20                               # free bytes at an arena's top that stay in the process


@functools.lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """From now on blocks of up to 5 MiB (a tile takes 2, or 4 in fp64) come from the heap, and 64 MiB of it stay when
    freed. Measured in `bench step`: the peak of two ranks' step 2,907 MB, 3,412 MB where blocks of up to 32 MiB do."""
    _mallopt(_MMAP_THRESHOLD, 5 << 20)
    _mallopt(_TRIM_THRESHOLD, _KEPT)


@contextlib.contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within it every large block is mapped on its own, so that a freed one leaves the process at once.

    Measured while loading: 964 MB for a partition of 268 MB at four ranks, 318 MB in here.
    """
    _mallopt(_MMAP_THRESHOLD, 128 << 10)
    _mallopt(_TRIM_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        keep_freed_memory.cache_clear()
        keep_freed_memory()


def _mallopt(parameter: int, value: int) -> None:
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, value)
