# SPDX-License-Identifier: Apache-2.0
"""A limit on the time that a read may take, which also ends those that no signal gets through to."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT_S = 5
"""Seconds of computing; a machine may be busy with other things, so that the clock on the wall has to wait longer."""

WAIT_S = 30


class Hang(BaseException):
    """A read took longer than LIMIT_S; no `except Exception` may swallow it."""


@contextlib.contextmanager
def limit(path: Path) -> Iterator[None]:
    """Raises Hang in the end. Who waits for the other end of a pipe hears no signal, so somebody opens that end."""

    def ring(*_: Any) -> None:
        raise Hang

    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WAIT_S)
    is_pipe = os.path.lexists(path) and stat.S_ISFIFO(path.lstat().st_mode)
    opens = ["timeout", str(WAIT_S), "sh", "-c", f"sleep {LIMIT_S}; echo > '{path}'"]
    other_end = subprocess.Popen(opens, start_new_session=True) if is_pipe else None
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if other_end is not None:
            with contextlib.suppress(ProcessLookupError):  # it has opened the pipe, and is done
                os.killpg(other_end.pid, signal.SIGKILL)  # the shell too, which would wait for a reader for ever
            other_end.wait()
            if time.monotonic() - started >= LIMIT_S:
                raise Hang
