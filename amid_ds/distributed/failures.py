"""Ends ranks that would wait for ever for a rank that has failed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

import torch.distributed as dist


class FailureMonitor:
    """Ends a rank that waits, in a collective that cannot complete, for a rank that has failed.

    A failed rank says so in the rendezvous store, which works while collectives do not. Every rank looks there now and
    then, from a thread; one that has not come to its own end GRACE_S later is ended, with exit status 1.
    """

    LOOK_EVERY_S = 2.0
    GRACE_S = 15.0

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self.rank = dist.PrefixStore("amid_ds", store), rank
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="failures", daemon=True)
        self.thread.start()

    def tell(self, message: str) -> None:
        with contextlib.suppress(RuntimeError):      # rank 0 holds the store: it may be gone
            self.store.set("failed", message.splitlines()[0])

    def take_back(self) -> None:
        """Every rank has heard of it: nobody is left waiting."""
        with contextlib.suppress(RuntimeError):
            self.store.delete_key("failed")

    def leave(self) -> None:
        """The end. A thread that is in the store while the interpreter goes down would abort the process."""
        self.left.set()
        self.thread.join(self.LOOK_EVERY_S)

    def _watch(self) -> None:
        while not self.left.wait(self.LOOK_EVERY_S):
            if self._message() is not None and not self.left.wait(self.GRACE_S) and (message := self._message()):
                print(f"amid-ds: rank {self.rank} ends, it was waiting for a rank that failed: {message}",
                      file=sys.stderr, flush=True)
                os._exit(1)

    def _message(self) -> str | None:
        try:
            return self.store.get("failed").decode() if self.store.check(["failed"]) else None
        except RuntimeError:
            return "rank 0 is gone"
