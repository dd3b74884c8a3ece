"""One run in a folder: rank 0 holds the folder's lease for all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from amid_ds.distributed.world import World
from amid_ds.files.lease import Fence, Lease


@contextlib.contextmanager
def exclusive(path: Path, work: str, world: World) -> Iterator[Fence]:
    """Hold the lease `path` for all ranks while the context is open.

    Collective, at the beginning. The ranks other than 0 commit nothing, so theirs checks nothing.
    Raises InputError where another process works there.
    """
    held: list[Lease] = []

    def take() -> str:
        held.append(Lease.take(path, work))
        return held[0].holder.token

    try:
        token = world.run_on_main(take)
        yield Fence(token, held[0].check if held else lambda: None)
    finally:
        for lease in held:
            lease.release()
