# SPDX-License-Identifier: Apache-2.0
"""Processes that take jobs off a list until none is left, and what is seen meanwhile."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.live import Live
from rich.text import Text

from adaptclip.progress import duration, lines_to
from adaptclip.terminal import console, is_terminal, table

if TYPE_CHECKING:
    from adaptclip.bench.jobs import Job, JobStore


class Progress:
    """Follows the results of all processes through their job store; only one process shows them."""

    def __init__(
        self, jobs: Sequence[Job], store: JobStore, *, metric: str, processes: int = 1, show: bool = True
    ) -> None:
        """Follows `jobs`.

        Args:
            jobs: the whole list.
            store: where results appear.
            metric: shown of every job.
            processes: that share the jobs, for the time left.
            show: False shows nothing.
        """
        self._jobs, self._store, self._metric = tuple(jobs), store, metric
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
        if self._show and is_terminal(self._console.file):
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

    def lines(self, job: Job) -> AbstractContextManager[None]:
        """Lets the steps of a job say their lines of progress, except through the table and in processes beside it."""
        stream = sys.stderr if self._show and self._live is None else None
        return lines_to(stream, f"[{self._told + 1}/{len(self._jobs)}] {job}: ")

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
            result = self._store.result(job.key)
            if result is not None:
                self._known[job.key] = result
                new.append(job)
            elif (failure := self._store.failure(job.key)) is not None:
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
        shots = sorted({job.shots for job in self._jobs}, key=lambda k: k or float("inf"))
        title = f"{len(self._known)} of {len(self._jobs)} jobs{self._left_in_words()}"
        made = table("method", *(f"{k or 'all'} shots" for k in shots), title=title, title_justify="left")
        for column in made.columns[1:]:
            column.justify = "right"
        cards = list(dict.fromkeys(job.card for job in self._jobs))
        for card in cards:
            for method in dict.fromkeys(job.method for job in self._jobs):
                cells = [self._cell(card, method, k) for k in shots]
                made.add_row(method if len(cards) == 1 else f"{card}: {method}", *cells)
        parts: list[Any] = [made]
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


POLL_S = 0.3
"""How often a process that has nothing to do looks whether the others are done."""


@dataclass(frozen=True)
class WorkerRank:
    """Which of the processes of a launch this is.

    Attributes:
        rank: 0 to size - 1; process 0 shows the progress and writes the tables.
        size: processes of the launch.
    """

    rank: int
    size: int


def worker_rank(threads: int) -> WorkerRank:
    """Makes this process of a launch (torchrun, `accelerate launch`) a worker of its own, and says which one it is.

    Jobs are small, so processes share them out instead of dividing each; nothing is sent between them. Accelerate must
    therefore not join them: what it would join them by is taken from the environment. Each takes the GPU of its local
    rank where there is one. On a CPU, the number of threads is the same for every process, because it decides the last
    bits of sums.

    Args:
        threads: of torch on a CPU, 1 or more.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    else:
        torch.set_num_threads(threads)
    return WorkerRank(rank, size)


def run_jobs(
    jobs: Sequence[Job],
    run: Callable[[Job], dict[str, Any]],
    store: JobStore,
    progress: Progress,
    *,
    wait: bool,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Does every job that nobody else does, in the order of the list.

    An error of a job is written down and the next one is taken; Ctrl-C stops.

    Args:
        jobs: the list, the same in every process.
        run: does a job and returns its result.
        store: where results and claims are.
        progress: is told what happens.
        wait: stay until the jobs of the other processes are done too, and do those whose process has died.
        after: called after every job of this process.
    """
    left = list(jobs)
    while left:
        taken: list[Job] = []
        worked = False
        for job in left:
            if store.is_settled(job.key):
                continue
            with store.claim(job.key) as mine:
                if mine:
                    progress.start(job)
                    with progress.lines(job):
                        _do(job, run, store)
                    worked = True
                elif not store.is_settled(job.key):
                    taken.append(job)
            progress.update()
            if mine:
                after()
        left = taken
        if left and not worked:
            if not wait:
                return
            time.sleep(POLL_S)
            progress.update()
    progress.update()


def _do(job: Job, run: Callable[[Job], dict[str, Any]], store: JobStore) -> None:
    said = io.StringIO()
    try:
        # Bars of the steps inside a job would run through the table of the jobs.
        with contextlib.redirect_stderr(said):
            result = run(job)
    except Exception as error:
        store.fail(
            job.key,
            {
                "job": str(job), "error": type(error).__name__, "message": str(error),
                "traceback": traceback.format_exc(), "said": said.getvalue()[-2000:],
            },
        )  # fmt: skip
    else:
        store.finish(job.key, result)
