# SPDX-License-Identifier: Apache-2.0
"""What every report is made of: numbers with their intervals, and sections before they are Markdown, HTML or a screen.

All text in here is plain: it is escaped where it is rendered, and nowhere else. Only the SVG of a figure is markup, and
`reports.plots` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adaptclip.metrics.gaps import GapTest, gap_test
from adaptclip.reports.measuring import listed

if TYPE_CHECKING:
    from adaptclip.metrics.estimates import Comparison, Measurement
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
        f"more than chance explains ({p_words(test.p_value)})"
        if test.p_value <= 1 - confidence
        else f"noise can explain it ({p_words(test.p_value)})"
    )
    small = f"; left out as smaller than {min_group} images: {listed(left_out)}" if left_out else ""
    return f"{noise}, so {far}{small}"


MAX_SCREEN_ROWS = 8
"""Rows of a long table on a screen, worst first; the written report has them all."""

Tone = Literal["", "pass", "fail", "inconclusive", "muted"]


@dataclass(frozen=True)
class Paragraph:
    """One or more sentences; `tone` "muted" for notes."""

    words: str
    tone: Tone = ""


@dataclass(frozen=True)
class Bullets:
    """Points of a list; `caution` marks what a reader must know."""

    points: Sequence[str]
    caution: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        words: what it says.
        numeric: whether it is aligned as a number.
        bar: (value, low, high) drawn beside the words, low and high None without an interval.
        tone: how it stands out.
    """

    words: str
    numeric: bool = False
    bar: tuple[float, float | None, float | None] | None = None
    tone: Tone = ""


@dataclass(frozen=True)
class Rows:
    """A table.

    Attributes:
        title: what it shows.
        header: column heads.
        rows: as long as the header, each.
        scales: column -> (low, high) ends of the bars in it; other columns have none.
        marks: column -> value at which its bars have a line (zero of a change).
        limit: rows shown on a screen; None shows all.
        hidden: what the rest of the rows is called there, after their number.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    marks: Mapping[int, float] = field(default_factory=dict)
    limit: int | None = None
    hidden: str = "more, in the report"


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        title: what it shows.
        svg: the drawing, trusted markup.
        words: what a reader who cannot see it needs to know.
    """

    title: str
    svg: str
    words: str


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail of a judged image.

    Attributes:
        uri: data: URI; None where the image is not at hand.
        words: what it is.
    """

    uri: str | None
    words: str


@dataclass(frozen=True)
class Gallery:
    """Thumbnails in a row."""

    title: str
    pictures: Sequence[Thumbnail]


Block = Paragraph | Bullets | Rows | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A headed part of a report; `anchor` is its address within the page."""

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: its name.
        about: what was judged, in a sentence.
        verdict: "pass", "fail", "inconclusive", "none", or None where gates are no part of it.
        verdict_words: what that means.
        numbers: the three numbers to know, each (name, value, explanation).
        worries: what to worry about, most important first.
        sections: everything else.
    """

    title: str
    about: str
    verdict: str | None
    verdict_words: str
    numbers: Sequence[tuple[str, str, str]]
    worries: Sequence[str]
    sections: Sequence[Section]


def one_line(text: str) -> str:
    """Replaces line breaks and other control characters (terminal escapes among them) by spaces."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _value(number: Mapping[str, Any] | None) -> float | None:
    return None if number is None else number["value"]


def show_rate(number: Mapping[str, Any] | None, *, sign: str = " %", count: bool = False) -> str:
    """Words a rate, for example `71.2 % [67.1, 75.0]`, with `n = 400` on demand; "–" where there is none."""
    if number is None or number["value"] is None:
        return "–"
    text = f"{100 * number['value']:.1f}{sign}"
    if number["low"] is not None:
        text += f" [{100 * number['low']:.1f}, {100 * number['high']:.1f}]"
    return text + (f", n = {number['n']}" if count else "")


def show_points(number: Mapping[str, Any] | None) -> str:
    """Words a change in percentage points, for example `+12.3 [+9.1, +15.4]`."""
    if number is None or number["value"] is None:
        return "–"
    text = f"{100 * number['value']:+.1f}"
    if number["low"] is not None:
        text += f" [{100 * number['low']:+.1f}, {100 * number['high']:+.1f}]"
    return text


def show_plain(number: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Words a number on a scale of its own, for example `1.62 [1.55, 1.69]`."""
    if number is None or number["value"] is None:
        return "–"
    text = f"{number['value']:.{digits}f}"
    if number["low"] is not None:
        text += f" [{number['low']:.{digits}f}, {number['high']:.{digits}f}]"
    return text


def text(words: object, tone: Tone = "") -> Cell:
    """A cell of words."""
    return Cell(str(words), tone=tone)


def count(n: int | None) -> Cell:
    """A cell with a whole number; "–" for None."""
    return Cell("–" if n is None else f"{n:,}", numeric=True)


def rate(number: Mapping[str, Any] | None, *, sign: str = " %") -> Cell:
    """A cell with a rate and its bar."""
    return Cell(show_rate(number, sign=sign), numeric=True, bar=_bar(number))


def points(number: Mapping[str, Any] | None) -> Cell:
    """A cell with a change in points and its bar; a change whose interval excludes zero stands out."""
    return Cell(show_points(number), numeric=True, bar=_bar(number))


def plain(number: Mapping[str, Any] | None, digits: int = 3) -> Cell:
    """A cell with a number on a scale of its own."""
    return Cell(show_plain(number, digits), numeric=True)


def _bar(number: Mapping[str, Any] | None) -> tuple[float, float | None, float | None] | None:
    value = _value(number)
    if number is None or value is None:
        return None
    return value, number["low"], number["high"]


def change_scale(rows: Sequence[Sequence[Cell]], column: int) -> tuple[float, float]:
    """Ends of a common scale for the bars of a column of changes, symmetric about zero, in steps of 0.1."""
    ends = [abs(x) for row in rows if (bar := row[column].bar) for x in bar if x is not None]
    reach = min(1.0, max(0.1, -(-max(ends, default=0.1) * 10 // 1) / 10))
    return -reach, reach
