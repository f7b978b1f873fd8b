# SPDX-License-Identifier: Apache-2.0
"""What is said during a long wait: a bar on a terminal, and where none is, a line every 30 seconds.

Everything in the package that takes long goes through `progress_bar`, so that a log file, a batch job and a notebook
are told as much as somebody who watches a terminal.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from time import monotonic
from typing import Any, Generic, Protocol, TextIO, TypeVar, cast

from adaptclip.errors import agree
from adaptclip.terminal import is_terminal, say

DELAY_S = 1.0
"""Seconds before a bar is drawn: what is done by then needs none."""

EVERY_S = 30.0
"""Seconds between two lines of a process, whatever number of bars they are about."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""What launchers call the number of a process, in the order in which Accelerate reads them."""


def _is_main() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


_BEGAN_AS_MAIN = _is_main()
"""Processes of the bench take their number out of the environment, those of a notebook get one later."""


class Bar(Protocol[T_co]):
    """A bar or what stands for it: iterated over, or opened with `with` and moved by `update`."""

    def __iter__(self) -> Iterator[T_co]: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...
    def update(self, n: int = 1, /) -> Any:
        """Counts `n` more as done."""
        ...


def progress_bar(
    items: Iterable[T] | None = None,
    *,
    desc: str,
    unit: str = "",
    total: int | None = None,
    initial: int = 0,
    show: bool = True,
    more: Callable[[], str] = str,
    **drawn: Any,
) -> Bar[T]:
    """Follows a long wait: a tqdm bar where standard error is a terminal, else a line every `EVERY_S` seconds.

    Args:
        items: what is iterated over; None where `update` counts.
        desc: what is done.
        unit: one of what is counted.
        total: how many there are; None takes the number of items.
        initial: how many were done before.
        show: False says nothing, for the processes beside the main one.
        more: words for a line, asked for when it is said, for example the loss.
        **drawn: of tqdm, for the bar alone (`leave`; `delay`, which is `DELAY_S` where it is not given).
    """
    if show and not is_terminal(sys.stderr):
        return _Lines(items, desc, unit, total, initial, more)
    from tqdm import tqdm

    counted = {"desc": desc, "unit": unit or "it", "total": total, "initial": initial}
    return cast(Any, tqdm(items, **counted, disable=None if show else True, **{"delay": DELAY_S, **drawn}))


class _Voice:
    """When a process says a line, for all its bars together.

    A bar that lasts some seconds says nothing by itself, but a hundred of them one after another are a long wait.
    """

    def __init__(self) -> None:
        self._open = 0
        self._seen = self._heard = -math.inf

    def open(self) -> None:
        """Counts a bar as begun; after a pause in which there was none, the next line is `EVERY_S` away."""
        now = monotonic()
        if not self._open and now - self._seen >= EVERY_S:
            self._heard = now
        self._open, self._seen = self._open + 1, now

    def close(self) -> None:
        """Counts a bar as ended."""
        self._open, self._seen = self._open - 1, monotonic()

    def is_due(self) -> bool:
        """Says whether a line is due now; who asks and hears yes says it."""
        now = monotonic()
        if now - self._heard < EVERY_S:
            return False
        self._heard = now
        return True


_voice = _Voice()
_way: ContextVar[tuple[TextIO | None, str] | None] = ContextVar("way", default=None)


@contextmanager
def lines_to(stream: TextIO | None, before: str = "") -> Iterator[None]:
    """Sends the lines of a block elsewhere than to standard error.

    Args:
        stream: where to; None says nothing.
        before: what every line begins with.
    """
    token = _way.set((stream, before))
    try:
        yield
    finally:
        _way.reset(token)


def _say(line: str) -> None:
    """Says a line of the main process, after all that was printed before; a full disk or closed pipe stops nothing."""
    stream, before = _way.get() or (sys.stderr, "")
    if stream is None or not (_BEGAN_AS_MAIN and _is_main()):
        return
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        say(before + line, to=stream)
        stream.flush()


class _Lines(Generic[T]):
    """What stands for a bar where no terminal is."""

    def __init__(
        self, items: Iterable[T] | None, desc: str, unit: str, total: int | None, initial: int, more: Callable[[], str]
    ) -> None:
        self._items, self._desc, self._unit, self._more = items, desc, unit, more
        self._total = len(cast(Any, items)) if total is None and hasattr(items, "__len__") else total
        self._initial = self._done = initial
        self._begun = monotonic()

    def __enter__(self) -> _Lines[T]:
        self._begun = monotonic()
        _voice.open()
        return self

    def __exit__(self, *error: Any) -> None:
        _voice.close()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items or ():
                yield item
                self.update()

    def update(self, n: int = 1, /) -> None:
        """Counts `n` more as done, and says a line if one is due."""
        self._done += n
        if _voice.is_due():
            _say(self._line(monotonic() - self._begun))

    def _line(self, seconds: float) -> str:
        new, total = self._done - self._initial, self._total
        plural = f"{self._unit}{'es' if self._unit.endswith('ch') else 's'}"
        unit = self._unit and " " + agree(total or self._done, self._unit, plural)
        number = f"{self._done:,}" if total is None else f"{self._done:,}/{total:,}"
        parts = [f"{number}{unit}", self._more(), f"{duration(seconds)} so far"]
        if total is not None and new > 0 and self._done < total:
            parts.append(f"about {duration(seconds / new * (total - self._done))} left")
        return f"{self._desc}: " + ", ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Returns a time in words: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
