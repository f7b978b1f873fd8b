# SPDX-License-Identifier: Apache-2.0
"""From the results of jobs to tidy rows, and from rows to means with intervals over seeds and paired differences."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import studentized_range, t

from adaptclip.methods.registry import named

Row = dict[str, Any]

ALL_CARDS = "mean of the cards"
"""Name of the rows that average the cards, seed by seed, where there are several."""

KEYS = ("protocol", "card", "target", "method", "shots", "seed")
"""Columns that together name a row."""

FALL = 0.05
"""A seed counts as collapsed only where it lies further below the others than this, 5 points."""

TIMES = ("fit_s", "total_s")
"""Columns that differ between runs of the same jobs."""


def tidy_rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns one row per job and judged set, sorted by KEYS; rates from 0 to 1, times in seconds."""
    rows = []
    for result in results:
        job = result["job"]
        for target, measured in result["judged"].items():
            rows.append(
                {
                    **{name: job[name] for name in ("protocol", "card")}, "target": target,
                    **{name: job[name] for name in ("method", "shots", "seed")}, **measured,
                    **{name: result[name] for name in (
                        "train_images", "validation_images", "validation_used_for", "schedule", "trainable_parameters",
                        "fit_s", "total_s",
                    )},
                    "chosen": json.dumps(result["chosen"], sort_keys=True),
                    "settings": json.dumps(job["settings"], sort_keys=True),
                    "backbone": job["backbone"], "pretrained": job["pretrained"] or "", "weights": job["weights"],
                    "split": job["split"], "job": result["key"],
                }
            )  # fmt: skip
    order = {name: method.cost for name, method in named().items()}
    return sorted(rows, key=lambda r: (r["protocol"], r["card"], order[r["method"]], r["shots"], r["seed"]))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the seeds' values.
        half: half width of its 95 % t interval; None with one seed.
        n: number of seeds.
    """

    mean: float
    half: float | None
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of values of independent seeds with its two-sided 95 % t interval (n - 1 degrees of freedom).

    What varies between seeds is the draw of the training images and the method's own chance; the test images are the
    same, so the interval says nothing about other test images.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, n)
    return Estimate(mean, float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n), n)


Values = dict[int, float]
"""Seed -> value."""


def values_by_cell(rows: Sequence[Row], metric: str) -> dict[tuple[str, str, int, str], Values]:
    """Returns (card, target, shots, method) -> seed -> value of a metric; with several cards also their mean.

    The mean of the cards is taken where every card has the method, shots, target and seed.
    """
    found: dict[tuple[str, str, int, str], Values] = {}
    for row in rows:
        if row[metric] is not None:
            found.setdefault((row["card"], row["target"], row["shots"], row["method"]), {})[row["seed"]] = row[metric]
    cards = list(dict.fromkeys(row["card"] for row in rows))
    if len(cards) > 1:
        for _, target, shots, method in list(found):
            own = [found.get((card, target, shots, method), {}) for card in cards]
            shared = set.intersection(*(set(values) for values in own))
            if shared and (ALL_CARDS, target, shots, method) not in found:
                means = {seed: math.fsum(values[seed] for values in own) / len(cards) for seed in sorted(shared)}
                found[ALL_CARDS, target, shots, method] = means
    return found


def paired(values: Values, reference: Values) -> Estimate | None:
    """Returns the mean difference to a reference on the same seeds with its interval; None without a common seed."""
    shared = sorted(set(values) & set(reference))
    return estimate([values[seed] - reference[seed] for seed in shared]) if shared else None


def clear_falls(rows: Sequence[Row], metric: str) -> tuple[int, list[str]]:
    """Looks for curves that fall: from one number of shots to the next, paired by seed.

    Returns:
        How many steps of methods that learn were looked at (those with an interval), and in words those whose 95 %
        interval lies below 0. They are not adjusted for their number: of 40 level steps, one would be found.
    """
    cells = {key: values for key, values in values_by_cell(rows, metric).items() if named()[key[3]].learns}
    shots = sorted({key[2] for key in cells}, key=lambda k: k or float("inf"))
    looked_at, falls = 0, []
    for card, target, method in dict.fromkeys((card, target, method) for card, target, _, method in cells):
        for fewer, more in itertools.pairwise(shots):
            own = cells.get((card, target, more, method)), cells.get((card, target, fewer, method))
            change = paired(own[0], own[1]) if own[0] and own[1] else None
            if change is not None and change.half is not None:
                looked_at += 1
                if change.is_clear and change.mean < 0:
                    size = f"{-100 * change.mean:.1f} ± {100 * change.half:.1f} points"
                    falls.append(f"{card}, {target}, {method} from {fewer} to {more or 'all'} shots: {size}")
    return looked_at, falls


@dataclass(frozen=True)
class Cell:
    """One method at one number of shots.

    Attributes:
        value: mean over seeds.
        learns: False where the value does not depend on images, so that it has no interval over seeds.
        best: the highest mean of its column.
        tied: not best, and no further behind than noise alone puts one of so many equal methods.
        full: all seeds are there.
        collapsed: seeds that fell far out of line with all others, each with its value. Such a cell is no mean with a
            spread around it: it shows the median and no interval, and takes no part in the comparison.
    """

    value: Estimate
    learns: bool = True
    best: bool = False
    tied: bool = False
    full: bool = True
    collapsed: tuple[tuple[int, float], ...] = ()


def column_cells(column: Mapping[str, Values], num_seeds: int) -> dict[str, Cell]:
    """Returns the cells of one column, with its best marked and those that may be as good.

    Only methods with all seeds take part in the comparison. With one seed there is a best and no interval, so none is
    marked as tied. The best was picked among all, so what may be as good is everything within Tukey's honest
    significant difference of it: where all methods are equal, each is marked in 95 % of cases.
    """
    fallen = collapsed_seeds(column)
    values = {
        method: {seed: value for seed, value in own.items() if method not in fallen} or own
        for method, own in column.items()
    }
    estimates = {method: estimate(list(own.values())) for method, own in column.items()}
    for method in fallen:
        middle = statistics.median(column[method].values())
        estimates[method] = Estimate(middle, None, len(column[method]))
    full = [method for method, found in estimates.items() if found.n == num_seeds and method not in fallen]
    best = max(full, key=lambda method: estimates[method].mean, default=None)
    reach = honest_difference({method: values[method] for method in full})
    cells = {}
    for method, found in estimates.items():
        tied = (
            best is not None and method in full and method != best and reach is not None
            and estimates[best].mean - found.mean <= reach
        )  # fmt: skip
        cells[method] = Cell(
            found, named()[method].learns, method == best, tied, found.n == num_seeds, fallen.get(method, ())
        )
    return cells


def honest_difference(column: Mapping[str, Values]) -> float | None:
    """Tukey's honest significant difference at 95 % between the means of methods on the same seeds.

    Seeds are blocks: a draw of images that suits one method suits others too (a two-way layout without interaction).
    Methods that no seed changes tell nothing of noise. With two methods this is the paired t interval.

    Args:
        column: method -> values; each has the same seeds.

    Returns:
        None with fewer than two methods that vary, or a single seed.
    """
    table = np.array([[own[seed] for seed in sorted(own)] for own in column.values() if len(set(own.values())) > 1])
    compared = len(column)
    if table.ndim != 2 or table.shape[1] < 2 or compared < 2:
        return None
    methods, seeds = table.shape
    if methods == 1:  # against methods that no seed changes: its own t interval
        return float(t.ppf(1 - 0.025 / (compared - 1), seeds - 1) * table.std(ddof=1) / math.sqrt(seeds))
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    df = (methods - 1) * (seeds - 1)
    error = math.sqrt(float((rest**2).sum()) / df / seeds)
    return _studentized_range(compared, df) * error


@cache
def _studentized_range(means: int, df: int) -> float:
    """Its 95 % point, which takes a tenth of a second to compute and is the same for every column of a table."""
    return float(studentized_range.ppf(0.95, means, df))


def collapsed_seeds(column: Mapping[str, Values]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Returns method -> the seeds whose value fell far below its others, each with its value.

    Far is more than FALL and more than six robust standard deviations (of all methods' seeds about their medians), so
    that a method whose seeds all scatter is not accused of one.
    """
    middles = {method: statistics.median(own.values()) for method, own in column.items() if len(own) >= 3}
    apart = [abs(value - middles[m]) for m in middles for value in column[m].values() if named()[m].learns]
    if not apart:
        return {}
    usual = 1.4826 * statistics.median(apart)
    found = {}
    for method, middle in middles.items():
        low = [(seed, value) for seed, value in column[method].items() if middle - value > max(FALL, 6 * usual)]
        if low and 2 * len(low) < len(column[method]):
            found[method] = tuple(sorted(low))
    return found
