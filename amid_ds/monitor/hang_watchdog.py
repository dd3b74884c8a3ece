"""A step that does not end is noticed, told and ended, so that the batch system can start the run again.

Every rank watches itself: a thread sees that the step's time is over, prints each thread's stack, and tells the others
through the rendezvous store where its main thread stands. A rank that was stopped, or whose node has gone, tells
nothing and is named by that. The interpreter's own timer stands behind it for a rank that holds the interpreter lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback

from amid_ds.distributed.world import World
from amid_ds.run.attempts import Attempt

ANSWER_S = 5.0       # how long ranks wait for each other's word on where they stand
GRACE_S = 30.0       # after it the interpreter's own timer ends a rank that could not do so itself
STDERR = 2           # by number: the timer's thread must not touch Python objects
WAITING = (f"torch{os.sep}distributed", f"deepspeed{os.sep}comm")      # a main thread in there waits for its peers


class HangWatchdog:
    """Watches the steps of one rank; each may take `timeout_s` seconds. Use it as a context. Made by all ranks."""

    def __init__(self, timeout_s: float, world: World, life: Attempt) -> None:
        self.timeout_s, self.world, self.life = timeout_s, world, life
        self.hosts = world.gather(socket.gethostname())
        self.deadline: float | None = None      # of the step under way; None: none is
        self.number = 0
        self.left = threading.Event()

    def __enter__(self) -> HangWatchdog:
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self.left.set()
        self.thread.join()

    def step(self, number: int) -> None:
        """Optimizer step `number` begins now."""
        self.number, self.deadline = number, time.monotonic() + self.timeout_s
        faulthandler.dump_traceback_later(self.timeout_s + GRACE_S, exit=True, file=STDERR)

    def rest(self) -> None:
        """What comes now may take its time."""
        self.deadline = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.left.wait(min(1.0, self.timeout_s / 10)):
            deadline = self.deadline
            late = time.monotonic() - deadline if deadline is not None else -1.0
            if late > ANSWER_S:      # stopped meanwhile and woken to be ended: the others have told of it
                _say(f"rank {self.world.rank} was stopped for {late:.0f} s and more, and ends")
                os._exit(1)
            if late >= 0:
                self._end()

    def _end(self) -> None:
        """Tell where this rank stands, learn where the others do, and end with exit status 1."""
        rank, place = self.world.rank, _place()
        _say(f"rank {rank} on {self.hosts[rank]}: step {self.number} has not ended after {self.timeout_s:g} s; "
             f"{place}. Its threads:")
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        places = {rank: place}
        asking = threading.Thread(target=self._ask, args=(places,), daemon=True)      # the store may not answer
        asking.start()
        asking.join(ANSWER_S)
        if rank == 0 or 0 not in places:
            self._name_the_culprit(dict(places))
        time.sleep(1.0)      # the first that ends makes the launcher end the others
        os._exit(1)

    def _ask(self, places: dict[int, str]) -> None:
        """Rank 0, which holds the store, hears everyone; everyone hears rank 0."""
        if self.world.failures is None:
            return
        store = self.world.failures.store
        awaited = set(range(self.world.size) if self.world.is_main else [0]) - places.keys()
        with contextlib.suppress(RuntimeError):      # rank 0, which holds the store, is gone
            store.set(f"place/{self.world.rank}", places[self.world.rank])
            while awaited - places.keys():
                for other in awaited - places.keys():
                    if store.check([f"place/{other}"]):
                        places[other] = store.get(f"place/{other}").decode()
                time.sleep(0.1)

    def _name_the_culprit(self, places: dict[int, str]) -> None:
        silent = [rank for rank in range(self.world.size) if rank not in places]
        if 0 in silent:
            silent = [0]      # it holds the store through which the others would have answered
        for rank in silent:
            places[rank] = "does not answer: it is stopped, or its node is gone"
        busy = [rank for rank, place in places.items() if not place.startswith("it waits")]
        first = (silent or busy or [self.world.rank])[0]
        for rank, place in sorted(places.items()):
            _say(f"  rank {rank} on {self.hosts[rank]}: {place}")
        _say(f"step {self.number} hangs; look at rank {first} on {self.hosts[first]} first: {places[first]}")
        self.life.fail(f"the step has not ended after {self.timeout_s:g} s: {places[first]}", first,
                       self.hosts[first])


def _place() -> str:
    """Where the main thread stands, in one line: the innermost of our own lines, and whether it waits for its peers."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = list(traceback.extract_stack(frame))
    ours = [f for f in stack if f"{os.sep}amid_ds{os.sep}" in f.filename] or stack
    where = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} {ours[-1].name}" if ours else "nowhere"
    innermost = stack[-4:]      # below it are wrappers; ZeRO's own handles have a `wait`
    waits = innermost[-1].name == "wait" or any(part in frame.filename for frame in innermost for part in WAITING)
    return f"it {'waits for its peers' if waits else 'works'} in {where}"


def _say(message: str) -> None:
    print(f"amid-ds: {message}", file=sys.stderr, flush=True)
