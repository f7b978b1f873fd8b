# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG that goes into a page, and thumbnails of judged images.

A plot's letters are text, its colours the page's, and each run draws the same.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from adaptclip.metrics.metric import MIN_CLASS_IMAGES
from adaptclip.reports.blocks import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib takes most of a second to import; runs that only print need not wait for it.

_COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--muted)",
    "#000003": "var(--line)",
    "#000004": "var(--blue)",
    "#000005": "var(--orange)",
    "#000006": "var(--paper)",
}
"""Colours as drawn -> the page's own, so that a plot follows light, dark and print (hues as Okabe and Ito's)."""

_INK, _MUTED, _LINE, BLUE, ORANGE, _PAPER = _COLOURS

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptclip",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def _draw(name: str, width: float, height: float, paint: Callable[[Axes], None]) -> str:
    """Draws on fresh axes of `width` by `height` inches and returns an <svg> element."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            # Letters are left to the reader's fonts, so it does not matter which ones are known here.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format="svg", metadata=nothing)
    return _for_page(buffer.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Takes the XML head, names and sizes away, and gives the page's colours."""
    svg = svg[svg.index("<svg") :]
    # Its style sheet would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.S)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    # Two plots on a page must not share ids; those that nothing refers to go.
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]+"', "", svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    # As wide as it was drawn (1 pt is 4/3 px), or as the page is.
    width = f'style="max-width: {float(box[1]) * 4 / 3:.0f}px"'
    svg = re.sub(
        r"^<svg[^>]*>", f'<svg {box[0]} {width} stroke-linejoin="round" aria-hidden="true" focusable="false">', svg
    )
    for drawn, own in _COLOURS.items():
        svg = svg.replace(drawn, own)
    svg = re.sub(r"font: ([\d.]+)px 'DejaVu Sans', sans-serif", r"font: \1px var(--sans)", svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def reliability(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]] | None) -> str:
    """Accuracy against confidence by bin, with the intervals of the accuracies; `after` the temperature, where known.

    Args:
        before: bins of `calibration_report`.
        after: those with the temperature, or None.
    """

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_MUTED, lw=1, ls=(0, (4, 3)), label="what it should be")
        _bins(axes, before, BLUE, "o", "as it is")
        if after is not None:
            _bins(axes, after, ORANGE, "s", "with the temperature")
        total = sum(row["n"] for row in before)
        for row in before:
            axes.bar(row["low"], 0.25 * row["n"] / total, row["high"] - row["low"], align="edge", color=_LINE, lw=0)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        _per_cent(axes)
        axes.legend(loc="upper left", fontsize=8.5)

    return _draw("reliability", 4.6, 3.5, paint)


def _bins(axes: Axes, rows: Sequence[Mapping[str, Any]], colour: str, marker: str, label: str) -> None:
    """A line through the bins of enough images; the others are open points, which a line would make too much of."""
    for row in rows:
        few, at, accuracy = row["n"] < MIN_CLASS_IMAGES, row["confidence"], row["accuracy"]
        if accuracy["low"] is not None:
            axes.plot([at, at], [accuracy["low"], accuracy["high"]], color=colour, lw=1.2, alpha=0.4 if few else 1)
        if few:
            axes.plot(at, accuracy["value"], color=colour, marker=marker, ms=4.5, markerfacecolor="none", clip_on=False)
    known = [row for row in rows if row["n"] >= MIN_CLASS_IMAGES]
    x, y = [row["confidence"] for row in known], [row["accuracy"]["value"] for row in known]
    axes.plot(x, y, color=colour, marker=marker, ms=4.5, lw=1.2, label=label, clip_on=False)


def coverage(curve: Sequence[Sequence[float]], accuracy: float) -> str:
    """Accuracy among the most confident images against their share.

    Args:
        curve: (coverage, accuracy) pairs, coverage rising to 1.
        accuracy: on all images, 0 to 1.
    """

    def paint(axes: Axes) -> None:
        x, y = np.asarray(curve).T
        axes.axhline(accuracy, color=_MUTED, lw=1, ls=(0, (4, 3)))
        axes.plot(x, y, color=BLUE, lw=1.8)
        axes.set(xlim=(0, 1.01), ylim=(max(0.0, min(y.min(), accuracy) - 0.08), 1.0))
        axes.set(xlabel="share of the images that are answered", ylabel="accuracy of the answers")
        _per_cent(axes)

    return _draw("coverage", 4.6, 3.5, paint)


def class_spread(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every class's accuracy with its interval, worst first.

    Args:
        rows: `per_class` of a report; classes without images are left out.
    """
    known = sorted((r for r in rows if r["accuracy"]["value"] is not None), key=lambda r: r["accuracy"]["value"])

    def paint(axes: Axes) -> None:
        x = np.arange(1, len(known) + 1)
        for marker, enough, label in (("o", True, "10 images or more"), ("D", False, "fewer: says little")):
            here = [i for i, r in enumerate(known) if r["sufficient"] == enough]
            if not here:
                continue
            colour = BLUE if enough else ORANGE
            for i in here:
                number = known[i]["accuracy"]
                if number["low"] is not None:
                    axes.plot([x[i], x[i]], [number["low"], number["high"]], color=colour, lw=1, alpha=0.55)
            values = [known[i]["accuracy"]["value"] for i in here]
            axes.plot(x[here], values, color=colour, marker=marker, ms=3.5, ls="", label=label)
        axes.set(xlim=(0, len(known) + 1), ylim=(0, 1.02), xlabel="classes, worst first", ylabel="accuracy")
        _per_cent(axes, x=False)
        axes.legend(loc="lower right", fontsize=8.5)

    return _draw("classes", 7.2, 2.9, paint)


def curve(name: str, steps: Sequence[int], values: Sequence[float | None], label: str, colour: str) -> str:
    """A number by training step; where it is not known the line has a gap.

    Args:
        name: of the drawing, one of its own on a page.
        steps: numbers of the steps, rising.
        values: one for each step, or None.
        label: what the number is.
        colour: of the line.
    """
    from matplotlib.ticker import MaxNLocator

    def paint(axes: Axes) -> None:
        y = np.array([np.nan if value is None else value for value in values])
        axes.plot(steps, y, color=colour, lw=1.5, marker="o" if len(steps) <= 30 else "", ms=3, clip_on=False)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if np.nanmin(y) >= 0:
            axes.set_ylim(bottom=0)
        axes.grid(True)

    return _draw(name, 7.2, 2.4, paint)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """Share of each true class (row) that was taken for each class (column); numbers are images.

    Args:
        counts: (C, C) images by true and predicted class.
        names: C class names; long ones are cut in the middle, and say themselves in full to who points at them.
    """
    short = [_short(name) for name in names]

    def paint(axes: Axes) -> None:
        size = len(names)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for (i, j), share in np.ndenumerate(shares):
            if counts[i, j]:
                colour = BLUE if i == j else ORANGE
                axes.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=colour, alpha=0.12 + 0.68 * share, lw=0)
                axes.text(j + 0.5, i + 0.5, str(counts[i, j]), ha="center", va="center", fontsize=7.5)
        ticks = np.arange(size) + 0.5
        axes.set_xticks(ticks, short, rotation=90 if max(map(len, short)) > 3 else 0, parse_math=False)
        axes.set_yticks(ticks, short, parse_math=False)
        axes.set(xlim=(0, size), ylim=(size, 0), xlabel="predicted", ylabel="true")
        axes.tick_params(length=0, labelsize=8)

    width = 2.2 + 0.36 * len(names)
    return _with_full_names(_draw("confusion", width + 0.6, width, paint), short, names)


def _short(name: str, longest: int = 22) -> str:
    """Cuts a name in the middle: what tells files and subclasses apart stands at the end more often than not."""
    plain = one_line(name)
    end = longest // 2
    return plain if len(plain) <= longest else f"{plain[: longest - end - 1]}…{plain[-end:]}"


def _with_full_names(svg: str, short: Sequence[str], names: Sequence[str]) -> str:
    """Gives every cut name of a drawing its full one as a tooltip; those that are cut to the same come in order."""
    full: dict[str, list[str]] = {}
    for cut, name in zip(short, names, strict=True):
        if cut != one_line(name):
            full.setdefault(escape(cut, quote=False), []).append(escape(one_line(name)))
    for cut, own in full.items():
        turn = cycle(own)
        svg = re.sub(f">{re.escape(cut)}</text>", lambda m, t=turn: f"><title>{next(t)}</title>{m[0][1:]}", svg)
    return svg


def _per_cent(axes: Axes, *, x: bool = True) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    if x:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(True)


SIDE = 112
"""Longest side in pixels."""

_QUALITY = 80


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """Returns a data: URI of the image as a JPEG whose longest side is at most `side` pixels; nothing is cropped."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # No metadata is carried over: what a camera wrote into the file (place, serial number) stays out of the report.
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnails(ids: Iterable[str], picture: Callable[[str], Image.Image | None]) -> dict[str, str]:
    """Makes thumbnails of the images that `picture` knows, one per id.

    Args:
        ids: row ids, repeated ones are read once.
        picture: RGB image of a row id, or None where there is none.

    Returns:
        id -> data: URI.
    """
    found = {row: picture(row) for row in dict.fromkeys(ids)}
    return {row: thumbnail(image) for row, image in found.items() if image is not None}
