"""The building blocks of every report: a number with its interval, a comparison, and a gap between groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptclip.evaluation.grouping import listed
from adaptclip.metrics.estimates import Comparison, Measurement
from adaptclip.metrics.gaps import GapTest, gap_test
from adaptclip.metrics.judged import Sampling

MIN_GROUP = 30
"""A smaller group is shown, and takes no part in gaps and tests: it would be the best or the worst by chance."""


def number(measurement: Measurement, confidence: float) -> dict[str, Any]:
    """Turns a measurement into a JSON-able dict: value, low, high, n, method, note; absent ones are None or ""."""
    low, high = measurement.interval(confidence) or (None, None)
    method = measurement.spread.method if measurement.spread else None
    return {
        "value": measurement.value,
        "low": low,
        "high": high,
        "n": measurement.n,
        "method": method,
        "note": measurement.note,
    }


def comparison(compared: Comparison, confidence: float) -> dict[str, Any]:
    """Turns a comparison into {"model", "zero_shot", "change"}; the latter two None without a baseline."""
    parts = {"model": compared.model, "zero_shot": compared.baseline, "change": compared.change}
    return {name: None if part is None else number(part, confidence) for name, part in parts.items()}


def gap_of_means(
    values: np.ndarray,
    code: np.ndarray,
    names: Sequence[str],
    sampling: Sampling,
    *,
    what: str,
    min_group: int = MIN_GROUP,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, Any] | None, GapTest | None]:
    """Compares the means of an attribute's groups, those of `min_group` images or more, with what noise would give.

    Args:
        values: (N,) what is averaged.
        code: (N,) group of each image, as a position in `names`.
        names: the groups.
        sampling: how the images were drawn.
        what: the mean in words, for the definition.
        min_group: images that a group needs to take part.
        confidence: level of the gap that noise stays within.
        draws: random deals of the group labels.
        seed: of the deals.

    Returns:
        A JSON-able gap and the test behind it; both None with fewer than two groups. Keys: "definition", "value",
        "best_group", "worst_group", "n", "p_value", "null_95" (gap that noise alone stays within at `confidence`),
        "test", "left_out" (groups that are too small) and "note".
    """
    counts = np.bincount(code, minlength=len(names))
    kept: list[int] = np.flatnonzero(counts >= min_group).tolist()
    left_out = [names[i] for i in map(int, np.flatnonzero((counts > 0) & (counts < min_group)))]
    if len(kept) < 2:
        return None, None
    rows = np.isin(code, kept)
    place = np.searchsorted(kept, code[rows])
    test = gap_test(
        values[rows], place, sampling.take(np.flatnonzero(rows)), draws=draws, seed=seed, confidence=confidence
    )
    best, worst = names[kept[test.best]], names[kept[test.worst]]
    return {
        "definition": f"max-min {what} over the groups",
        "value": test.value,
        "best_group": best,
        "worst_group": worst,
        "n": int(rows.sum()),
        "p_value": test.p_value,
        "null_95": test.null_quantile,
        "test": test.method,
        "left_out": left_out,
        "note": _gap_note(test, confidence, left_out, min_group),
    }, test


def p_words(p_value: float) -> str:
    """Words a p-value, for example `p = 0.014` or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _gap_note(test: GapTest, confidence: float, left_out: list[str], min_group: int) -> str:
    noise = f"noise alone gives up to {100 * test.null_quantile:.1f} points in {100 * confidence:g} % of cases"
    far = (
        f"more than noise explains ({p_words(test.p_value)})"
        if test.p_value <= 1 - confidence
        else f"noise can explain it ({p_words(test.p_value)})"
    )
    small = f"; left out as smaller than {min_group} images: {listed(left_out)}" if left_out else ""
    return f"{noise}, so {far}{small}"
