"""Processes that take jobs off a list until none is left."""

from __future__ import annotations

import contextlib
import io
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptclip.experiments.board import Board
from adaptclip.experiments.jobs import Job
from adaptclip.experiments.progress import Progress

POLL_S = 0.3
"""How often a process that has nothing to do looks whether the others are done."""


@dataclass(frozen=True)
class Place:
    """Which of the processes of a launch this is.

    Attributes:
        rank: 0 to size - 1; process 0 shows the progress and writes the tables.
        size: processes of the launch.
    """

    rank: int
    size: int


def take_place(threads: int) -> Place:
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
    return Place(rank, size)


def run_jobs(
    jobs: Sequence[Job],
    run: Callable[[Job], dict[str, Any]],
    board: Board,
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
        board: where results and claims are.
        progress: is told what happens.
        wait: stay until the jobs of the other processes are done too, and do those whose process has died.
        after: called after every job of this process.
    """
    left = list(jobs)
    while left:
        taken: list[Job] = []
        worked = False
        for job in left:
            if board.is_settled(job.key):
                continue
            with board.claim(job.key) as mine:
                if mine:
                    progress.start(job)
                    _do(job, run, board)
                    worked = True
                elif not board.is_settled(job.key):
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


def _do(job: Job, run: Callable[[Job], dict[str, Any]], board: Board) -> None:
    said = io.StringIO()
    try:
        # Bars of the steps inside a job would run through the table of the jobs.
        with contextlib.redirect_stderr(said):
            result = run(job)
    except Exception as error:
        board.fail(
            job.key,
            {
                "job": str(job), "error": type(error).__name__, "message": str(error),
                "traceback": traceback.format_exc(), "said": said.getvalue()[-2000:],
            },
        )  # fmt: skip
    else:
        board.finish(job.key, result)
