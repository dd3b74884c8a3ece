"""Ends ranks that would wait for ever for a rank that has failed."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import traceback

import torch.distributed as dist

from amid_ds.errors import ExitStatus, print_error

# A thread in a file of these folders waits for its peers.
WAITING_IN = (f"torch{os.sep}distributed", f"deepspeed{os.sep}comm")


class FailureMonitor:
    """Ends a rank that waits, in a collective that cannot complete, for a rank that has failed.

    A failed rank reports to the rendezvous store, which works while collectives do not. A thread of
    every rank checks the store every CHECK_EVERY_S seconds, or less often: all ranks together make
    no more than CHECKS_PER_S checks a second. A rank that has not ended by itself GRACE_S after it
    saw a failure is ended, with exit status 1.

    store: a connection to the rendezvous store in which nobody waits for a key: whoever does keeps
    every other thread from it.
    """

    CHECK_EVERY_S = 2.0
    CHECKS_PER_S = 500.0
    GRACE_S = 15.0

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank = dist.PrefixStore("amid_ds", store), rank
        self.interval = max(self.CHECK_EVERY_S, size / self.CHECKS_PER_S)
        # This rank's own failure, while its peers have not received it.
        self._own: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)
        self._thread.start()

    def report(self, message: str) -> None:
        """Put the message's first line into the store: this rank has failed."""
        self._own = message
        with contextlib.suppress(RuntimeError):
            # RuntimeError: rank 0, which holds the store, may be gone.
            self.store.set("failed", message.splitlines()[0])

    def withdraw(self) -> None:
        """Remove the report: every rank has received the error, and none is left waiting."""
        self._own = None
        with contextlib.suppress(RuntimeError):
            # Not deleted: a rank that has just seen the key would wait for it in `get`, and abort
            # if its interpreter ended meanwhile.
            self.store.set("failed", "")

    def of_a_peer(self) -> str | None:
        """What another rank has reported; None: nothing, or this rank has failed itself."""
        return self._reported() if self._own is None else None

    def stop(self) -> None:
        """End the thread: inside the store at the interpreter's exit it would abort the process."""
        self._stopped.set()
        self._thread.join(self.CHECK_EVERY_S)

    def _watch(self) -> None:
        # Ranks that began together do not ask together. No numbers of the program's own generator.
        generator = random.Random()
        while not self._stopped.wait(self.interval * generator.uniform(0.5, 1.5)):
            # The one that has failed ends last: its end would break the others' collectives, before
            # they have seen why.
            if self._reported() is None or self._stopped.wait(
                    self.GRACE_S + (2 * self.interval if self._own else 0)):
                continue
            # Read again: it may have been withdrawn meanwhile.
            if message := self._reported():
                print_error(self._own or waited_in_vain(self.rank, message))
                os._exit(ExitStatus.FAILED)

    def _reported(self) -> str | None:
        try:
            is_there = self.store.check(["failed"])
            return (self.store.get("failed").decode() or None) if is_there else None
        except RuntimeError:
            return "rank 0 is gone"


def waited_in_vain(rank: int, failure: str) -> str:
    """The message of a rank that ends because a peer has reported a failure."""
    return f"rank {rank} ends, it was waiting for a rank that failed: {failure}"


def broke_in_collective(error: Exception) -> bool:
    """True for an error that a collective raised: a peer may be gone."""
    return isinstance(error, RuntimeError) and any(
        part in frame.filename for frame in traceback.extract_tb(error.__traceback__)
        for part in WAITING_IN)
