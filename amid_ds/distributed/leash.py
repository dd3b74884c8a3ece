"""Commands that end with the process that started them, however that ended.

Their standard input is a pipe that the starter alone holds open. The deepspeed launcher hands it on
to its ranks, while a signal would end the launcher and leave the ranks behind; and when the starter
is killed, the kernel closes the pipe. So the end of the input asks each rank to stop, and letting
go of the pipe is the way to ask for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

from amid_ds.errors import ExitStatus

LEASH_VARIABLE = "AMID_DS_LEASH"


def start_on_leash(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command of this package that stops in good order once its `stdin` is closed.

    `options` are those of Popen.
    """
    environment = {**(options.pop("env", None) or os.environ), LEASH_VARIABLE: "stdin"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **options)


def follow_leash() -> None:
    """Have this process stop in good order once its starter has let go, if it is on a leash."""
    # Not for the processes that it starts: their input may be another one.
    if os.environ.pop(LEASH_VARIABLE, None) is not None:
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()


def _stop_at_end_of_input() -> None:
    while os.read(0, 1):
        pass
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        # No step is under way: what is not finished will be done again.
        os._exit(ExitStatus.RESTART)
    os.kill(os.getpid(), signal.SIGTERM)
