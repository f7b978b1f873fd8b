"""From the results of jobs to tidy rows, and from rows to means with intervals over seeds and paired differences."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

from adaptclip.experiments.methods import METHODS

Row = dict[str, Any]

ALL_CARDS = "mean of the cards"
"""Name of the rows that average the cards, seed by seed, where there are several."""

KEYS = ("protocol", "card", "target", "method", "shots", "seed")
"""Columns that together name a row."""

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
    order = {name: method.cost for name, method in METHODS.items()}
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
    cells = {key: values for key, values in values_by_cell(rows, metric).items() if METHODS[key[3]].learns}
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
        tied: not best, and the interval of its paired difference to the best includes 0.
        full: all seeds are there.
    """

    value: Estimate
    learns: bool = True
    best: bool = False
    tied: bool = False
    full: bool = True


def column_cells(column: Mapping[str, Values], num_seeds: int) -> dict[str, Cell]:
    """Returns the cells of one column, with its best marked and those that may be as good.

    Only methods with all seeds take part in the comparison. With one seed there is a best and no interval, so none is
    marked as tied. The intervals are not adjusted for the number of methods.
    """
    estimates = {method: estimate(list(values.values())) for method, values in column.items()}
    full = [method for method, found in estimates.items() if found.n == num_seeds]
    best = max(full, key=lambda method: estimates[method].mean, default=None)
    cells = {}
    for method, found in estimates.items():
        difference = paired(column[method], column[best]) if best is not None else None
        tied = (
            method in full and method != best and difference is not None and difference.half is not None
            and not difference.is_clear
        )  # fmt: skip
        cells[method] = Cell(found, METHODS[method].learns, method == best, tied, method in full)
    return cells
