"""What is seen while jobs run: a table on a terminal, a line per job elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adaptclip.experiments.board import Board
from adaptclip.experiments.jobs import Job
from adaptclip.terminal import console


class Progress:
    """Follows the results of all processes through their board; only one process shows them."""

    def __init__(
        self, jobs: Sequence[Job], board: Board, *, metric: str, processes: int = 1, show: bool = True
    ) -> None:
        """Follows `jobs`.

        Args:
            jobs: the whole list.
            board: where results appear.
            metric: shown of every job.
            processes: that share the jobs, for the time left.
            show: False shows nothing.
        """
        self._jobs, self._board, self._metric = tuple(jobs), board, metric
        self._processes, self._show = processes, show
        self._known: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, dict[str, Any]] = {}
        self._current: Job | None = None
        self._console = console()
        self._live: Live | None = None
        self._told = 0

    def __enter__(self) -> Progress:
        self._look()
        self._told = len(self._known)
        if self._show and self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=1)
            self._live.__enter__()
        elif self._show:
            before = f", {self._told} of them done before" if self._told else ""
            self._print(f"{len(self._jobs)} jobs{before}")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)
            self._live = None

    def start(self, job: Job) -> None:
        """Says that this process has begun a job."""
        self._current = job

    def update(self) -> None:
        """Looks for new results and, where there is no table, prints a line for each."""
        for job in self._look():
            self._told += 1
            if self._show and self._live is None:
                self._print(self._line(job))

    def seconds_left(self) -> float | None:
        """Returns the expected time to the end in seconds, from the jobs that are done; None before the first.

        A job is expected to take as long as those of its method and card did per training image, else as long as those
        of its method; a method that was not seen yet as long as the dearest so far, so the first guesses are low.
        """
        if not self._known:
            return None
        rate_of: dict[tuple[str, ...], list[float]] = {}
        for job in self._jobs:
            result = self._known.get(job.key)
            if result is not None:
                # What a job encodes for all that come after it is not expected of those.
                rate = (result["total_s"] - result["read_s"]) / max(1, result["train_images"])
                for group in ((job.method, job.card), (job.method,)):
                    rate_of.setdefault(group, []).append(rate)
        images = {}
        for job in self._jobs:
            if job.key in self._known:
                images[job.card] = self._known[job.key]["train_images"] / max(1, job.shots)
        usual = statistics.median(images.values())
        dearest = max(statistics.median(rates) for group, rates in rate_of.items() if len(group) == 1)
        total = 0.0
        for job in self._jobs:
            if job.key in self._known or job.key in self._failed:
                continue
            rates = rate_of.get((job.method, job.card)) or rate_of.get((job.method,))
            rate = statistics.median(rates) if rates else dearest
            total += rate * max(1, job.shots) * images.get(job.card, usual)
        return total / self._processes

    def _look(self) -> list[Job]:
        """Returns the jobs that were settled since the last look."""
        new = []
        for job in self._jobs:
            if job.key in self._known or job.key in self._failed:
                continue
            result = self._board.result(job.key)
            if result is not None:
                self._known[job.key] = result
                new.append(job)
            elif (failure := self._board.failure(job.key)) is not None:
                self._failed[job.key] = failure
                new.append(job)
        return new

    def _line(self, job: Job) -> str:
        number = f"[{self._told}/{len(self._jobs)}] {job}"
        if job.key in self._failed:
            failure = self._failed[job.key]
            return f"{number}: failed, {failure['error']}: {failure['message'].splitlines()[0][:200]}"
        result = self._known[job.key]
        return f"{number}: {self._value(result)} ({result['total_s']:.1f} s{self._left_in_words()})"

    def _value(self, result: dict[str, Any]) -> str:
        name, value = next((n, j[self._metric]) for n, j in result["judged"].items())
        return f"{name} –" if value is None else f"{name} {100 * value:.1f} %"

    def _left_in_words(self) -> str:
        left = self.seconds_left()
        return f"; about {duration(left)} left" if left else ""

    def _table(self) -> Group:
        self._look()
        table = Table(
            title=f"{len(self._known)} of {len(self._jobs)} jobs{self._left_in_words()}", title_justify="left"
        )
        shots = list(dict.fromkeys(job.shots for job in self._jobs))
        table.add_column("method")
        for k in sorted(shots, key=lambda k: k or float("inf")):
            table.add_column(f"{k or 'all'} shots", justify="right")
        cards = list(dict.fromkeys(job.card for job in self._jobs))
        for card in cards:
            for method in dict.fromkeys(job.method for job in self._jobs):
                cells = [self._cell(card, method, k) for k in sorted(shots, key=lambda k: k or float("inf"))]
                table.add_row(method if len(cards) == 1 else f"{card}: {method}", *cells)
        parts: list[Any] = [table]
        if self._current is not None:
            parts.append(Text(f"now: {self._current}   {time.strftime('%H:%M:%S')}", style="dim"))
        parts += [Text(f"failed: {failure['job']}: {failure['message'][:150]}") for failure in self._failed.values()]
        return Group(*parts)

    def _cell(self, card: str, method: str, shots: int) -> str:
        own = [job for job in self._jobs if (job.card, job.method, job.shots) == (card, method, shots)]
        values = []
        for job in own:
            if job.key in self._known:
                value = next(iter(self._known[job.key]["judged"].values()))[self._metric]
                values += [] if value is None else [value]
        failed = sum(job.key in self._failed for job in own)
        text = f"{100 * statistics.fmean(values):.1f}" if values else "·"
        if len(values) < len(own):
            text += f" ({len(values)}/{len(own)})"
        return text + (f" {failed} failed" if failed else "")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


def duration(seconds: float) -> str:
    """Returns a time in words: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
