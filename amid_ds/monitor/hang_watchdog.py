"""A step that hangs is reported and ended, so that the batch system can start the run again.

Every rank watches itself: a thread sees that the step's time is over, prints each thread's stack,
and tells the others through the rendezvous store where its main thread is and how many collectives
it has launched. A rank that was stopped, or whose node is gone, answers nothing and is named for
that; else the one that is behind in its collectives; else one that does not wait. The interpreter's
own timer ends a rank whose interpreter lock is held, where the thread cannot run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from amid_ds.distributed.failures import WAITING_IN
from amid_ds.distributed.progress import launched_collectives, rank_behind
from amid_ds.distributed.world import World
from amid_ds.errors import ExitStatus, print_error
from amid_ds.run.attempts import HANG_ERROR, Attempt

# Seconds that ranks wait for each other's answers.
ANSWER_S = 5.0
# A rank asks for them so many times as often as for failures: on few ranks every 0.1 s.
ASKED_AS_OFTEN = 20
# Ranks whose places are printed.
MAX_RANKS_SHOWN = 64
# Seconds that a rank waits for its GPU's answer.
GPU_ANSWER_S = 1.0
# Seconds after the timeout at which the interpreter's own timer ends a rank that could not end
# itself.
GRACE_S = 30.0
# A file descriptor and not sys.stderr: the timer's thread must not touch Python objects.
STDERR = 2


@dataclass(frozen=True)
class RankState:
    """Where a rank's main thread is, in words, and the collectives it has launched by group."""

    place: str
    launched: Mapping[str, int]


class HangWatchdog:
    """Watches the steps of one rank; each may take `timeout_s` seconds. Use it as a context.

    Made by all ranks.
    """

    def __init__(self, timeout_s: float, world: World, attempt: Attempt) -> None:
        self.timeout_s, self.world, self.attempt = timeout_s, world, attempt
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
        now = time.monotonic()
        while not self.closed.wait(min(1.0, self.timeout_s / 10)):
            before, now = now, time.monotonic()
            deadline = self.deadline
            if deadline is None or now < deadline:
                continue
            if now - before > ANSWER_S:
                # The process was stopped meanwhile and is woken to be ended: the others have
                # reported it, or are about to, for it does not answer.
                print_error(f"rank {self.world.rank} was stopped for {now - before:.0f} s, "
                            "and ends")
                os._exit(ExitStatus.FAILED)
            self._end()

    def _end(self) -> None:
        """Report where this rank is, learn where the others are, and end with exit status 1."""
        rank, place = self.world.rank, _main_thread_place(_gpu_is_at_work(self.world.device))
        print_error(f"{self.world.name_of(rank)}: step {self.number} has not ended after "
                    f"{self.timeout_s:g} s; {place}. Its threads:")
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        states = {rank: RankState(place, launched_collectives(self.world))}
        # In a thread, because the store may not answer.
        exchange = threading.Thread(target=self._exchange, args=(states,), daemon=True)
        exchange.start()
        exchange.join(ANSWER_S)
        if rank == 0 or 0 not in states:
            self._report_culprit(dict(states))
        # The first rank that ends makes the launcher end the others.
        time.sleep(1.0)
        os._exit(ExitStatus.FAILED)

    def _exchange(self, states: dict[int, RankState]) -> None:
        """Add other ranks' states to `states`: all of them on rank 0, rank 0's elsewhere."""
        failures = self.world.failures
        if failures is None:
            return
        store = failures.store
        awaited = set(range(self.world.size) if self.world.is_main else [0]) - states.keys()
        # A RuntimeError: rank 0, which holds the store, is gone.
        with contextlib.suppress(RuntimeError):
            store.set(f"state/{self.world.rank}", json.dumps(asdict(states[self.world.rank])))
            while awaited - states.keys():
                for other in awaited - states.keys():
                    if store.check([f"state/{other}"]):
                        states[other] = RankState(**json.loads(store.get(f"state/{other}")))
                time.sleep(failures.interval / ASKED_AS_OFTEN)

    def _report_culprit(self, states: Mapping[int, RankState]) -> None:
        """Print every rank's place and the rank to look at first; record that one's failure."""
        silent = [rank for rank in range(self.world.size) if rank not in states]
        if 0 in silent:
            # It holds the store through which the others would have answered.
            silent = [0]
        places = {rank: state.place for rank, state in states.items()}
        places |= dict.fromkeys(silent, "does not answer: it is stopped, or its node is gone")
        candidates = silent or [
            rank for rank, place in places.items() if not place.startswith("it waits")]
        behind = rank_behind({rank: state.launched for rank, state in states.items()})
        if behind is not None and not silent:
            places[behind] += ", and its peers wait for it in a collective"
            candidates = [behind]
        first = (candidates or [self.world.rank])[0]
        for rank, place in sorted(places.items())[:MAX_RANKS_SHOWN]:
            print_error(f"  {self.world.name_of(rank)}: {place}")
        if len(places) > MAX_RANKS_SHOWN:
            print_error(f"  and {len(places) - MAX_RANKS_SHOWN} more")
        place = places[first]
        print_error(f"step {self.number} hangs; look at {self.world.name_of(first)} first: {place}")
        self.attempt.record_failure(f"{HANG_ERROR} after {self.timeout_s:g} s: {place}", first,
                                    self.world.hosts.get(first))


def _gpu_is_at_work(device: torch.device) -> bool:
    """True while the GPU has not finished what was launched; False without an answer, or a GPU."""
    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(not torch.cuda.default_stream(device).query())

    if device.type == "cuda":
        # In a thread, because a driver may not answer.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(GPU_ANSWER_S)
    return any(answers)


def _main_thread_place(gpu_is_at_work: bool) -> str:
    """The innermost line of ours that the main thread is in, and what it waits for, if it does."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = list(traceback.extract_stack(frame))
    ours = [f for f in stack if f"{os.sep}amid_ds{os.sep}" in f.filename] or stack
    line = "nowhere"
    if ours:
        line = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} {ours[-1].name}"
    # Below the call are wrappers of torch; ZeRO's own handles have a `wait`.
    innermost = stack[-4:]
    if innermost[-1].name == "wait" or any(
            part in frame.filename for frame in innermost for part in WAITING_IN):
        return f"it waits for its peers in {line}"
    # A number that the host needs, wherever that is: `.tolist()` is no frame. Or another stream
    # than the default one, such as ZeRO-3's for its reductions.
    waits = gpu_is_at_work or innermost[-1].name == "synchronize"
    return f"it {'waits for its GPU' if waits else 'works'} in {line}"
