"""Plain advice from a grid: which method is best, by how much, what it cost, and whether the dearer was worth it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from adaptclip.experiments.progress import duration
from adaptclip.experiments.protocols import HARMONIC_MEAN
from adaptclip.experiments.summary import Estimate, Row, estimate, honest_difference, paired, values_by_cell
from adaptclip.experiments.tables import METRIC_NAMES, shots_in_words
from adaptclip.methods.registry import named

CHEAPER_BY_S = 1.0
"""A method counts as cheaper when it takes half the time of fitting or less, and saves at least so many seconds."""

CAUTION = (
    "The best of several methods on the same test images looks better than it is, and these intervals count seeds "
    "only. To pick a method for release, decide on other images than those you report."
)
"""What must stand beside any advice of this kind."""


def advice(
    rows: Sequence[Row], *, metric: str, num_seeds: int, not_published: Mapping[str, str] | None = None
) -> list[str]:
    """Returns sentences for every card and number of shots.

    Where methods that are cheaper (CHEAPER_BY_S, by the measured times) may be as good as the best (their paired
    difference does not exclude 0), the best of those is advised: the dearer one was not shown to be worth its cost.
    With one seed nothing can be said about that, and the sentences say so.

    Args:
        rows: of `tidy_rows`; methods without all seeds are left out.
        metric: a key of METRIC_NAMES.
        num_seeds: seeds that were asked for.
        not_published: method -> how its settings differ from the published ones; named after the advice.
    """
    cells = values_by_cell(rows, metric)
    sentences = []
    cards = list(dict.fromkeys(row["card"] for row in rows))
    targets = {row["target"] for row in rows}
    main = HARMONIC_MEAN if HARMONIC_MEAN in targets else next(iter(row["target"] for row in rows), "")
    for card in cards:
        for shots in sorted({row["shots"] for row in rows}, key=lambda k: k or float("inf")):
            column = {m: cells[key] for m in named() if (key := (card, _target(rows, card, main), shots, m)) in cells}
            column = {m: values for m, values in column.items() if len(values) == num_seeds}
            if len(column) > 1:
                cost = {m: _seconds(rows, card, shots, m) for m in column}
                words = f"{card}, {shots_in_words(shots)} ({METRIC_NAMES[metric]})"
                sentences.append(f"{words}: {_sentence(column, cost)}")
    differ = "; ".join(f"{name} ({told})" for name, told in (not_published or {}).items())
    mode = [f"Not with their published settings here, so that nothing is said of them as published: {differ}."]
    return [*sentences, *(mode if differ else []), CAUTION] if sentences else []


def _target(rows: Sequence[Row], card: str, main: str) -> str:
    """The judged set that is advised on: the main one, or the card's first (its own test images)."""
    own = [row["target"] for row in rows if row["card"] == card]
    return main if main in own else own[0]


def _sentence(column: dict[str, dict[int, float]], cost: dict[str, float]) -> str:
    means = {m: estimate(list(values.values())) for m, values in column.items()}
    best = max(means, key=lambda m: means[m].mean)
    text = f"{best} is best with {_rate(means[best])}, fitted in {duration(cost[best])}."
    differences = {m: paired(column[best], column[m]) for m in column if m != best}
    if all(d is None or d.half is None for d in differences.values()):
        return f"{text} With one seed, nothing can be said about whether another is worse; give three or more --seeds."
    cheaper = [m for m in column if 2 * cost[m] <= cost[best] and cost[best] - cost[m] >= CHEAPER_BY_S]
    reach = honest_difference({m: v for m, v in column.items() if set(v) == set(column[best])}) or 0.0
    as_good = [m for m in cheaper if differences[m] is not None and means[best].mean - means[m].mean <= reach]
    if as_good:
        take = max(as_good, key=lambda m: (means[m].mean, -cost[m]))
        gap = differences[take]
        assert gap is not None
        return (
            f"{text} {take} costs {duration(cost[take])} and is behind by {_points(gap)}, which may be chance: take "
            f"{take}; that {best} is worth its cost was not shown."
        )
    if not cheaper:
        runner_up = max((m for m in means if m != best), key=lambda m: means[m].mean)
        gap = differences[runner_up]
        assert gap is not None
        return f"{text} None is much cheaper; the next, {runner_up}, is behind by {_points(gap)}: take {best}."
    runner_up = max(cheaper, key=lambda m: means[m].mean)
    gap = differences[runner_up]
    assert gap is not None
    more = cost[best] / max(cost[runner_up], 1e-9)
    return (
        f"{text} The best of the cheaper ones, {runner_up} ({duration(cost[runner_up])}), is behind by {_points(gap)}: "
        f"the dearer one was worth it, at {more:,.0f} times the time of fitting."
    )


def _rate(found: Estimate) -> str:
    return f"{100 * found.mean:.1f} %" + (f" ± {100 * found.half:.1f}" if found.half is not None else "")


def _points(found: Estimate) -> str:
    low, high = found.mean - (found.half or 0), found.mean + (found.half or 0)
    return f"{100 * found.mean:.1f} points [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "−")


def _seconds(rows: Sequence[Row], card: str, shots: int, method: str) -> float:
    own = [r["fit_s"] for r in rows if (r["card"], r["shots"], r["method"]) == (card, shots, method)]
    return statistics.median(own)
