"""A step that hangs is reported and ended, so that the batch system can start the run again.

Every rank watches itself: a thread sees that the step's time is over, prints each thread's stack,
and tells the others through the rendezvous store where its main thread is. A rank that was stopped,
or whose node is gone, answers nothing and is named for that. The interpreter's own timer ends a
rank whose interpreter lock is held, where the thread cannot run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence

from amid_ds.distributed.world import World
from amid_ds.errors import ExitStatus, print_error
from amid_ds.run.attempts import HANG_ERROR, Attempt

# Seconds that ranks wait for each other's answers.
ANSWER_S = 5.0
# Seconds after the timeout at which the interpreter's own timer ends a rank that could not end
# itself.
GRACE_S = 30.0
# A file descriptor and not sys.stderr: the timer's thread must not touch Python objects.
STDERR = 2
# A main thread in a file of these folders waits for its peers.
WAITING_IN = (f"torch{os.sep}distributed", f"deepspeed{os.sep}comm")


class HangWatchdog:
    """Watches the steps of one rank; each may take `timeout_s` seconds. Use it as a context.

    hosts: each rank's. Made by all ranks.
    """

    def __init__(self, timeout_s: float, world: World, attempt: Attempt,
                 hosts: Sequence[str]) -> None:
        self.timeout_s, self.world, self.attempt, self.hosts = timeout_s, world, attempt, hosts
        # Of the step under way; None between steps.
        self.deadline: float | None = None
        self.number = 0
        self.closed = threading.Event()

    def __enter__(self) -> HangWatchdog:
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self.closed.set()
        self.thread.join()

    def step(self, number: int) -> None:
        """Start the time of optimizer step `number`."""
        self.number, self.deadline = number, time.monotonic() + self.timeout_s
        faulthandler.dump_traceback_later(self.timeout_s + GRACE_S, exit=True, file=STDERR)

    def rest(self) -> None:
        """Stop watching until the next step."""
        self.deadline = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.timeout_s / 10)):
            deadline = self.deadline
            late = time.monotonic() - deadline if deadline is not None else -1.0
            if late > ANSWER_S:
                # The process was stopped meanwhile and is woken to be ended: the others have
                # reported it.
                print_error(f"rank {self.world.rank} was stopped for {late:.0f} s and more, "
                            "and ends")
                os._exit(ExitStatus.FAILED)
            if late >= 0:
                self._end()

    def _end(self) -> None:
        """Report where this rank is, learn where the others are, and end with exit status 1."""
        rank, location = self.world.rank, _main_thread_location()
        print_error(f"rank {rank} on {self.hosts[rank]}: step {self.number} has not ended after "
                    f"{self.timeout_s:g} s; {location}. Its threads:")
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        locations = {rank: location}
        # In a thread, because the store may not answer.
        exchange = threading.Thread(target=self._exchange, args=(locations,), daemon=True)
        exchange.start()
        exchange.join(ANSWER_S)
        if rank == 0 or 0 not in locations:
            self._report_culprit(dict(locations))
        # The first rank that ends makes the launcher end the others.
        time.sleep(1.0)
        os._exit(ExitStatus.FAILED)

    def _exchange(self, locations: dict[int, str]) -> None:
        """Add other ranks' locations to `locations`: all of them on rank 0, rank 0's elsewhere."""
        if self.world.failures is None:
            return
        store = self.world.failures.store
        awaited = set(range(self.world.size) if self.world.is_main else [0]) - locations.keys()
        # A RuntimeError: rank 0, which holds the store, is gone.
        with contextlib.suppress(RuntimeError):
            store.set(f"place/{self.world.rank}", locations[self.world.rank])
            while awaited - locations.keys():
                for other in awaited - locations.keys():
                    if store.check([f"place/{other}"]):
                        locations[other] = store.get(f"place/{other}").decode()
                time.sleep(0.1)

    def _report_culprit(self, locations: Mapping[int, str]) -> None:
        """Print every rank's location and the rank to look at first; record that one's failure."""
        silent = [rank for rank in range(self.world.size) if rank not in locations]
        if 0 in silent:
            # It holds the store through which the others would have answered.
            silent = [0]
        no_answer = "does not answer: it is stopped, or its node is gone"
        answers = {**locations, **dict.fromkeys(silent, no_answer)}
        busy = [rank for rank, answer in answers.items() if not answer.startswith("it waits")]
        first = (silent or busy or [self.world.rank])[0]
        for rank, answer in sorted(answers.items()):
            print_error(f"  rank {rank} on {self.hosts[rank]}: {answer}")
        host, answer = self.hosts[first], answers[first]
        print_error(f"step {self.number} hangs; look at rank {first} on {host} first: {answer}")
        self.attempt.record_failure(
            f"{HANG_ERROR} after {self.timeout_s:g} s: {answer}", first, host)


def _main_thread_location() -> str:
    """The innermost line of ours that the main thread is in, and whether it waits for its peers."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = list(traceback.extract_stack(frame))
    ours = [f for f in stack if f"{os.sep}amid_ds{os.sep}" in f.filename] or stack
    line = "nowhere"
    if ours:
        line = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} {ours[-1].name}"
    # Below the call are wrappers of torch; ZeRO's own handles have a `wait`.
    innermost = stack[-4:]
    waits = innermost[-1].name == "wait" or any(
        part in frame.filename for frame in innermost for part in WAITING_IN)
    return f"it {'waits for its peers' if waits else 'works'} in {line}"
