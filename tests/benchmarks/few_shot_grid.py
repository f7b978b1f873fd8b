# SPDX-License-Identifier: Apache-2.0
"""Times a grid of few-shot experiments: the bench against the same grid done job by job.

The bench encodes every image once for all jobs and trains CoOp on cached features with packed prompts. Job by job
means: every job encodes the images it needs by itself (its crops, its validation images, the test images), and CoOp
crops and encodes the images of every step and reads every prompt at its full length, as its published code does. Both
run here, one after the other, in one process on one thread, on the same data and the same backbone.

The grid job by job is timed on its first seed and multiplied by the number of seeds; of CoOp's steps, `--steps` of each
job are timed and multiplied. What is left out favours it: each of its jobs would also start Python, load the backbone
and open the data. Seconds are those that the process computes (all its threads), not those of the clock, so that other
work on the machine distorts them less.

Run     python tests/benchmarks/few_shot_grid.py results.json --data-root DATA
Quick   python tests/benchmarks/few_shot_grid.py results.json --card digits --shots 1 2 --seeds 1
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from coop_step import N_CTX, published_step
from rich.console import Console
from rich.table import Table

import adaptclip as ac
from adaptclip.bench.jobs import FeatureStore, Job, Worker, make_grid
from adaptclip.bench.methods import choose_methods, read_settings
from adaptclip.files import write_json
from adaptclip.methods.coop import initial_context
from adaptclip.training.pixels import PixelLoader

METHODS: tuple[str, ...] = ("zero_shot", "ss_text", "logistic", "lp_plus_plus", "gda", "tip_adapter_f", "clap", "coop")
TARGET = 10.0
"""Ratio of the whole grid below which the benchmark fails."""


def worker_of(data: Any, backbone: Any, cache: Path | None, shots: list[int], seeds: list[int], locks: Path) -> Worker:
    """Returns a worker for a grid on one card; without a cache it encodes whatever it needs."""
    settings = read_settings((), choose_methods(METHODS, new_names=False))
    grid = make_grid(
        {data.card.name: data}, [], backbone, protocol="all-classes", settings=settings, shots=shots, seeds=seeds
    )
    return Worker(grid, FeatureStore(ac.FeatureCache(cache), backbone, locks), ac.make_accelerator(cpu=True))


def computed(call: Callable[[], object]) -> float:
    """Returns the seconds of computing of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def whole_grid(worker: Worker) -> dict[str, float]:
    """Runs every job and returns seconds by method."""
    seconds = dict.fromkeys(METHODS, 0.0)
    for job in worker.grid.jobs:
        seconds[job.method] += computed(lambda job=job: worker.run(job))
    return seconds


def alone(data: Any, backbone: Any, job: Job, locks: Path, steps: int) -> float:
    """Returns the seconds of one job that shares nothing."""
    worker = worker_of(data, backbone, None, [job.shots], [job.seed], locks)
    own = next(j for j in worker.grid.jobs if j.method == job.method)
    if job.method != "coop":
        return computed(lambda: worker.run(own))
    support, crop = worker.support(own), ac.training_crop(backbone, data.card.augmentation)
    epochs = 50 if job.shots == 1 else 100 if job.shots <= 4 else 200
    loader = PixelLoader(
        support.images,
        backbone,
        augment=crop,
        batch_size=32,
        seed=job.seed,
        accelerator=worker.accelerator,
    )
    context = initial_context(backbone, N_CTX, "", job.seed)
    seconds = []
    for number in range(steps + 1):
        started = time.process_time()
        batch = loader.batch(number)
        assert batch.images is not None
        published_step(backbone, list(data.prompt_names), batch.images, batch.labels, context)()
        seconds.append(time.process_time() - started)
    test_s = computed(lambda: ac.FeatureCache(None).get(backbone, data.test))
    # The first step makes its own crops and those of the second.
    return test_s + statistics.median(seconds[1:]) * epochs * loader.steps_per_epoch


def main() -> int:
    """Runs both grids, prints the table, writes the JSON; 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--card", default="flowers17")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=4, help="CoOp steps that are timed per job")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = ac.open_data(ac.load_card(args.card), data_root=args.data_root)
    backbone = ac.load_backbone()
    with tempfile.TemporaryDirectory() as folder:
        worker = (Path(folder) / "cache", args.shots, args.seeds, Path(folder) / "locks")
        empty = whole_grid(worker_of(data, backbone, *worker))
        full = whole_grid(worker_of(data, backbone, *worker))
        first = worker_of(data, backbone, None, args.shots, args.seeds[:1], Path(folder) / "locks").grid.jobs
        apart = dict.fromkeys(METHODS, 0.0)
        for number, job in enumerate(first):
            apart[job.method] += alone(data, backbone, job, Path(folder) / "locks" / str(number), args.steps)
    apart = {method: seconds * len(args.seeds) for method, seconds in apart.items()}
    sums = {name: sum(own.values()) for name, own in (("apart", apart), ("empty", empty), ("full", full))}
    ratio = sums["apart"] / sums["empty"]
    write_json(
        args.out,
        {
            "card": args.card, "shots": args.shots, "seeds": args.seeds, "torch": torch.__version__,
            "load_average": os.getloadavg()[0], "seconds": {"apart": apart, "empty": empty, "full": full}, "sums": sums,
            "ratio_empty": ratio, "ratio_full": sums["apart"] / sums["full"],
        },
    )  # fmt: skip
    count = len(METHODS) * len(args.shots) * len(args.seeds)
    table = Table(title=f"{args.card}: {count} jobs, seconds of computing")
    for column in ("method", "job by job", "bench, empty cache", "bench, full cache", "ratio, empty", "ratio, full"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, a, b, c in itertools.chain(
        ((m, apart[m], empty[m], full[m]) for m in METHODS), [("all", sums["apart"], sums["empty"], sums["full"])]
    ):
        table.add_row(method, f"{a:,.1f}", f"{b:,.1f}", f"{c:,.1f}", f"{a / b:,.1f}x", f"{a / c:,.1f}x")
    Console(width=120).print(table)
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
