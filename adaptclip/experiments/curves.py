"""Few-shot curves: the metric over the number of shots, one line per method, as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from adaptclip.experiments.summary import Row, estimate, values_by_cell
from adaptclip.experiments.tables import METRIC_NAMES
from adaptclip.methods.registry import named

MARKERS = "osD^v<>PX*hp"


def draw_curves(rows: Sequence[Row], *, metric: str) -> dict[str, dict[str, bytes]]:
    """Returns, for every card (and the mean of several), a figure as bytes by format: "svg" and "png".

    Every judged set has a panel. Bars are 95 % t intervals over seeds; methods that learn from no image are horizontal
    lines. The same rows give the same bytes.

    Args:
        rows: of `tidy_rows`.
        metric: a key of METRIC_NAMES.
    """
    cells = values_by_cell(rows, metric)
    figures = {}
    for card in dict.fromkeys(key[0] for key in cells):
        own = {key[1:]: values for key, values in cells.items() if key[0] == card}
        figures[card] = _figure(card, own, metric)
    return figures


def _figure(card: str, cells: Mapping[tuple[str, int, str], dict[int, float]], metric: str) -> dict[str, bytes]:
    import matplotlib
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(target for target, _, _ in cells))
    found = {shots for _, shots, _ in cells}
    shots = [k for k in sorted(found) if k] + [0] * (0 in found)
    place = {k: i for i, k in enumerate(shots)}
    methods = [method for method in named() if any(key[2] == method for key in cells)]
    with matplotlib.rc_context({"svg.hashsalt": "adaptclip", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * len(targets) + 1.6, 4.2), layout="constrained")
        panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
        for panel, target in zip(panels, targets, strict=True):
            for number, method in enumerate(methods):
                line = {k: cells[target, k, method] for k in shots if (target, k, method) in cells}
                # A little apart, so that bars of several methods can be told from each other.
                apart = 0.03 * (number - (len(methods) - 1) / 2) if named()[method].learns else 0.0
                _line(panel, [place[k] + apart for k in line], list(line.values()), method)
            low, high = panel.get_ylim()
            panel.set_ylim(max(low, 0), min(high, 100))
            panel.set_xticks(range(len(shots)), [str(k or "all") for k in shots])
            panel.set_xlabel("images per class")
            panel.set_title(f"{card}: {target}")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"{METRIC_NAMES[metric]}, %")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return {"svg": _bytes(figure, "svg"), "png": _bytes(figure, "png")}


def _line(panel: Any, places: list[float], seeds: list[dict[int, float]], method: str) -> None:
    from matplotlib import colormaps

    number = list(named()).index(method)  # a method looks the same in every figure
    colour = colormaps["tab20"](number % 20)
    estimates = [estimate(list(values.values())) for values in seeds]
    means = [100 * e.mean for e in estimates]
    if not named()[method].learns:
        panel.plot(places, means, color=colour, linestyle=":" if number % 2 else "--", label=method)
        return
    halves = [100 * (e.half or 0.0) for e in estimates]
    panel.errorbar(
        places, means, halves, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.2,
        elinewidth=0.7, capsize=2, label=method,
    )  # fmt: skip


def _bytes(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()
