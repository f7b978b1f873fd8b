# SPDX-License-Identifier: Apache-2.0
"""When a loop saves between its steps and when it stops: by the clock, and when the process is asked to end.

SLURM and cluster managers send SIGTERM before they take a machine back, Ctrl-C sends SIGINT. While a loop of a run goes
on, either lets it finish its step and save it; elsewhere, and the second time, it ends the program at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from adaptclip.errors import Stopped

SAME_S = 1.0
"""A launcher passes on what the terminal has sent to its children already: a signal that comes again this soon is the
same one."""

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: which signal comes when the parent ends."""

_COUNT_BITS = 20
_running: list[Pace] = []
"""The pace of the loop that goes on, innermost last; signals, too, belong to the whole process."""


class Signals:
    """Turns signals into `Stopped` while its block runs: at once, or with `later` when they come a second time.

    A signal that is ignored (a job in the background), or has a handler that is not Python's, is left alone; so are all
    of them outside of the main thread, where Python allows no other.

    Attributes:
        got: number of the signal that came; 0 for none.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT), *, later: str = "") -> None:
        """Listens to `signals`; `later` is what to tell a person when one comes that is not obeyed at once."""
        self.got = 0
        self._signals, self._later, self._came = signals, later, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                if signal.getsignal(signum) not in (None, signal.SIG_IGN):
                    self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), self.got != 0
        if again and now - self._came < SAME_S:
            return
        self.got, self._came = signum, now
        if again or not self._later:
            raise Stopped(signum)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{signal.Signals(signum).name}: {self._later}\n".encode())


def hear_launcher() -> None:
    """Asks the kernel for SIGTERM when `accelerate launch` ends, which passes nothing on to a single process.

    A recipe that it has started would else train on unseen, or be killed without a checkpoint. Only Linux can do that;
    torchrun, and `accelerate launch` of several processes, pass SIGTERM on and wait 30 s.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_accelerate(parent):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), signal.SIGTERM)


def _is_accelerate(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    names = [Path(word).name for word in command[:3]]
    known = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}
    return names[0].startswith("python") and not known.isdisjoint(names[1:])


class Pace:
    """Says after which steps of a loop a checkpoint is due beside the regular ones, and whether to stop then.

    Processes agree: one that saved or stopped alone would leave the others waiting. They do so in the sum over all
    processes that every step has anyway (`backward_and_step`), so that it costs nothing.
    """

    def __init__(self, *, is_main: bool, num_processes: int, minutes: float) -> None:
        """Saves `minutes` after the last checkpoint by the clock of the main process; 0 never does by the clock."""
        self._is_main, self._num_processes, self._seconds = is_main, num_processes, 60 * minutes
        self._saved_at = time.monotonic()
        self._signals = Signals()
        self._save = self._stop = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Lets signals wait for the end of a step while a loop goes on.

        Raises:
            Stopped: a signal came and no step was left to wait for; or one came twice.
        """
        self._saved_at, self._save, self._stop = time.monotonic(), 0, 0
        self._signals = Signals(later="the step is finished and saved first; once more ends at once")
        _running.append(self)
        try:
            with self._signals:
                yield
        finally:
            _running.remove(self)
        if self._signals.got:
            raise Stopped(self._signals.got)

    def asks_to_save(self) -> bool:
        """Whether a checkpoint is due after this step because of the clock or of a signal."""
        if self._num_processes == 1:
            self.take(self.wishes())
        return bool(self._save or self._stop)

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved_at, self._save = time.monotonic(), 0

    def stop_if_asked(self) -> None:
        """Raises Stopped when a signal came, to whichever process; call it after a step that was saved."""
        if self._stop:
            raise Stopped(self._signals.got or signal.SIGTERM)

    def wishes(self) -> int:
        """Returns what this process wishes, as a number whose sum over the processes `take` understands."""
        by_clock = self._is_main and 0 < self._seconds <= time.monotonic() - self._saved_at
        return (int(by_clock) << _COUNT_BITS) + (int(self._signals.got != 0) << 2 * _COUNT_BITS)

    def take(self, total: int) -> None:
        """Takes over what all processes together wish."""
        self._save |= (total >> _COUNT_BITS) % (1 << _COUNT_BITS)
        self._stop |= total >> 2 * _COUNT_BITS


def wishes() -> int:
    """Returns what the loop that goes on wishes, to be added to a count before it is summed over the processes."""
    return _running[-1].wishes() if _running else 0


def take(total: int) -> int:
    """Takes over the wishes of all processes and returns the count that they were added to."""
    if _running:
        _running[-1].take(total)
    return total % (1 << _COUNT_BITS)
