# SPDX-License-Identifier: Apache-2.0
"""Before and after a mitigation: what became of each group, of the worst one and of the gap; was it levelled down?

A smaller gap is no gain where the worst group lost too: the others were only brought down to it. So the verdict hangs
on the worst group, and the gap is reported beside it.

How certain the changes of the extremes are. With a_g the rate of group g before and b_g after, the change of the lowest
rate is min b - min a = min over g of max over h of (b_g - a_h). Bounds of all the differences therefore give bounds of
it, whichever groups are truly the worst; that the worst ones were *picked* on the same images is paid for by a
Bonferroni correction over the groups. It also lies between the smallest and the largest paired change of any group,
which needs no correction and is sharper where all groups move alike. Half of the error goes to either way, and the
tighter bound holds. Differences within a group are paired on its images (`measure`); between two groups they combine
the groups' own bounds (Newcombe 1998, method 10). The best rate goes likewise, and the change of the gap is the
difference of the two, whose distances combine as squares, or as a plain sum where the same group or cluster stands on
both sides. All of this errs on the wide side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from adaptclip.errors import DataError, did_you_mean
from adaptclip.gate_rules import Outcome
from adaptclip.metrics import METRICS
from adaptclip.metrics.intervals import Side
from adaptclip.reports.blocks import number
from adaptclip.reports.measuring import align, ask, group_rows, listed
from adaptclip.reports.render import escape_markdown

if TYPE_CHECKING:
    from adaptclip.metrics.estimates import Comparison, Measurement
    from adaptclip.predictions import Predictions

FORMAT_VERSION = 1

EXIT_CODES = {"better": 0, "no worse": 0, "levelled down": 2, "worse": 2, "cannot tell": 3}
"""Verdict -> exit code of `adaptclip compare`."""


def compare_groups(
    before: Predictions,
    after: Predictions,
    attribute: str,
    *,
    metric: str = "accuracy",
    positive: Sequence[str] = (),
    margin: float = 0.02,
    confidence: float = 0.95,
    min_n: int = 100,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares two models on the groups of an attribute, paired on the same images.

    Args:
        before: predictions of the model without the mitigation.
        after: predictions of the model with it, of the same images in any order.
        attribute: name of a group column.
        metric: a rate that is better when higher.
        positive: class or classes that count as positive, for metrics of an outcome (sensitivity, specificity, auc).
        margin: loss of the worst group that is acceptable, in the metric's own unit (0.02 is 2 points).
        confidence: level of the two-sided intervals; a verdict is wrong with at most half of the rest.
        min_n: fewest images of a group that takes part in the verdict; smaller ones are listed.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        JSON-able dict: "verdict", one of

        - "levelled down": the worst group is worse than before, and the gap is smaller;
        - "worse": the worst group is worse than before, and the gap is not smaller;
        - "better": the worst group is better than before;
        - "no worse": the worst group lost no more than the margin;
        - "cannot tell": none of these is sure;

        "reason" (in words), "overall" and "groups" ("before", "after" and paired "change", numbers as in
        `reports.bias.number`; groups also "group", "n", "judged"), "worst" and "gap" (before, after, change with
        interval), and the settings.

    Raises:
        DataError: the two judge other images, the attribute or metric is unknown, a number is out of range.
    """
    _check_metric(metric, tuple(positive), several=after.several)
    if not 0 <= margin < 1 or not 0.5 <= confidence < 1 or min_n < 1:
        raise DataError(
            f"margin must lie within 0 and 1, confidence within 0.5 and 1, min_n be 1 or more; got {margin}, "
            f"{confidence}, {min_n}"
        )
    if len(after) == 0:
        raise DataError("there is nothing to compare: the predictions have no rows")
    outcome = Outcome(positive=tuple(positive)) if positive else None
    question = ask(metric, after, align(after, before), None, outcome)

    def compared(rows: np.ndarray | None) -> Comparison:
        return question.measure(rows, draws=draws, seed=seed)

    rows_of = group_rows(after, attribute)
    groups = {name: compared(rows) for name, rows in rows_of.items()}
    # Of a two-sided outcome the images of the side that the metric is about are counted, where it is known.
    sizes = {name: c.model.n if positive else len(rows_of[name]) for name, c in groups.items()}
    judged = {name: c for name, c in groups.items() if sizes[name] >= min_n and c.model.spread is not None}
    apart = after.clusters is None or _clusters_apart(after.clusters, [rows_of[name] for name in judged])
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "attribute": attribute, "metric": metric, "positive": list(positive),
        "margin": margin, "confidence": confidence, "min_n": min_n, "num_images": len(after),
        "overall": _numbers(compared(None), confidence),
        "groups": [
            {"group": name, "n": sizes[name], "judged": name in judged, **_numbers(c, confidence)}
            for name, c in groups.items()
        ],
        "worst": None, "gap": None,
    }  # fmt: skip
    if len(judged) < 2:
        reason = f"{len(judged)} of {len(groups)} groups have the {min_n} images and the interval a comparison needs"
        return {**result, "verdict": "cannot tell", "reason": f"{reason}, and it takes two."}
    extremes = _Extremes(judged, (1 - confidence) / 2, apart)
    result |= {"worst": extremes.worst(), "gap": extremes.gap()}
    return {**result, **_verdict(result)}


def _check_metric(metric: str, positive: tuple[str, ...], *, several: bool) -> None:
    """Raises DataError unless groups of such images can be compared by the metric."""
    higher = [name for name, one in METRICS.items() if one.better == "higher"]
    allowed = [name for name in higher if positive or not METRICS[name].of_outcome]
    if metric not in allowed:
        if metric in higher:
            raise DataError(f"{metric} needs to know what is positive: name the class (--positive CLASS)")
        raise DataError(
            f"groups are compared by a rate that is better when higher, not {metric!r}. {did_you_mean(metric, allowed)}"
        )
    chosen = METRICS[metric]
    if several and not positive and not chosen.of_labels:
        raise DataError(chosen.of_one_class)
    if positive and chosen.of_labels:
        raise DataError(f"{metric} is of all classes at once; leave --positive out, or use sensitivity or auc")


def exit_code(result: dict[str, Any]) -> int:
    """Returns 0 when the worst group is no worse, 2 when it is (levelled down or not), 3 when the data cannot tell."""
    return EXIT_CODES[result["verdict"]]


def _numbers(compared: Comparison, confidence: float) -> dict[str, Any]:
    assert compared.baseline is not None
    assert compared.change is not None
    parts = {"before": compared.baseline, "after": compared.model, "change": compared.change}
    return {name: number(part, confidence) for name, part in parts.items()}


def _clusters_apart(clusters: tuple[str, ...], rows: list[np.ndarray]) -> bool:
    """Whether no cluster has images in two of the groups, so that the groups are independent."""
    names = np.asarray(clusters, dtype=str)
    found = [np.unique(names[positions]) for positions in rows]
    return sum(map(len, found)) == len(np.unique(np.concatenate(found)))


@dataclass(frozen=True)
class _Extremes:
    """The lowest and the highest rate of the judged groups, before and after.

    Attributes:
        groups: name -> comparison of the metric, two or more.
        alpha: chance that the truth lies beyond one bound.
        apart: whether different groups are independent.
    """

    groups: dict[str, Comparison]
    alpha: float
    apart: bool

    def values(self, when: str) -> dict[str, float]:
        """Group -> rate, "before" or "after"."""
        found = {name: c.model if when == "after" else c.baseline for name, c in self.groups.items()}
        return {name: m.value for name, m in found.items() if m is not None and m.value is not None}

    def worst(self) -> dict[str, Any]:
        """The lowest rate before and after with the group that has it, and the change with its interval."""
        before, after = self.values("before"), self.values("after")
        low, high = self.change("lowest")
        a, b = min(before, key=before.__getitem__), min(after, key=after.__getitem__)
        change = {"value": after[b] - before[a], "low": low, "high": high}
        return {"before": {"group": a, "value": before[a]}, "after": {"group": b, "value": after[b]}, "change": change}

    def gap(self) -> dict[str, Any]:
        """The largest difference between two groups before and after, and its change with an interval."""
        before, after = self.values("before"), self.values("after")
        gaps = [max(rates.values()) - min(rates.values()) for rates in (before, after)]
        lowest, highest = (pick(after.values()) - pick(before.values()) for pick in (min, max))
        (low_least, low_most), (high_least, high_most) = self.change("lowest"), self.change("highest")
        ends = [{pick(rates, key=rates.__getitem__) for rates in (before, after)} for pick in (min, max)]
        join = math.hypot if self.apart and not ends[0] & ends[1] else add
        change = highest - lowest
        interval = {
            "low": max(-1.0, change - join(highest - high_least, low_most - lowest)),
            "high": min(1.0, change + join(high_most - highest, lowest - low_least)),
        }
        return {"before": gaps[0], "after": gaps[1], "change": {"value": change, **interval}}

    def change(self, which: str) -> tuple[float, float]:
        """Bounds of the change of the lowest or highest rate (module text)."""
        ends = []
        for side, tighter, widest in (("low", max, min), ("high", min, max)):
            table, paired = self._bounds[side]
            picked = table.max(axis=1).min() if which == "lowest" else table.min(axis=1).max()
            ends.append(tighter(float(picked), widest(paired)))
        return ends[0], ends[1]

    @cached_property
    def _bounds(self) -> dict[str, tuple[np.ndarray, list[float]]]:
        """Side -> (G, G) bounds of group g after less group h before, and the G paired ones (module text)."""
        names, found = list(self.groups), {}
        for side in get_args(Side):
            table = np.array([[self._bound(g, h, side, self.alpha / 2 / len(names)) for h in names] for g in names])
            found[side] = table, [self._bound(g, g, side, self.alpha / 2) for g in names]
        return found

    def _bound(self, now: str, then: str, side: Side, alpha: float) -> float:
        """One-sided bound of the rate of group `now` after, less that of group `then` before."""
        if now == then:
            return _known(self.groups[now].change, side, alpha)
        after, before = self.groups[now].model, self.groups[then].baseline
        assert after.value is not None
        assert before is not None
        assert before.value is not None
        other: Side = "high" if side == "low" else "low"
        distances = abs(after.value - _known(after, side, alpha)), abs(before.value - _known(before, other, alpha))
        distance = math.hypot(*distances) if self.apart else sum(distances)
        return after.value - before.value + (distance if side == "high" else -distance)


def _known(measurement: Measurement | None, side: Side, alpha: float) -> float:
    bound = measurement.bound(side, alpha) if measurement is not None else None
    assert bound is not None, "only groups with intervals are judged"
    return bound


def _verdict(result: dict[str, Any]) -> dict[str, str]:
    """Returns "verdict" and "reason"."""
    worst, gap = result["worst"], result["gap"]
    change, name = worst["change"], _named(result)
    smaller = gap["change"]["value"] < 0
    if change["high"] < 0:
        verdict = "levelled down" if smaller else "worse"
    elif change["low"] > 0:
        verdict = "better"
    else:
        verdict = "no worse" if change["low"] >= -result["margin"] else "cannot tell"
    before, after = worst["before"], worst["after"]
    where = f"of the worst group ({before['group']} before, {after['group']} after)"
    if before["group"] == after["group"]:
        where = f"of the worst group, {before['group']},"
    sentences = [
        f"The {name} {where} went from {_percent(before['value'])} to {_percent(after['value'])}: {_in_words(change)}. "
        f"The gap between the groups went from {100 * gap['before']:.1f} to {100 * gap['after']:.1f} points: "
        f"{_in_words(gap['change'])}."
    ]
    judged = [row for row in result["groups"] if row["judged"]]
    if change["high"] < 0:
        every = all(row["change"]["value"] < 0 for row in judged)
        sentences.append(
            ("Every group lost" if every else "The worst group lost")
            + (
                ", so the smaller gap was bought by making things worse."
                if smaller
                else ", and the gap did not shrink."
            )
        )
    elif verdict == "cannot tell":
        sentences.append(
            f"The data neither show that the worst group lost nor rule out a loss of more than "
            f"{100 * result['margin']:g} points."
        )
    left_out = [f"{row['group']} ({row['n']})" for row in result["groups"] if not row["judged"]]
    if left_out:
        sentences.append(f"Not judged, having too few images or clusters: {listed(left_out)}.")
    return {"verdict": verdict, "reason": " ".join(sentences)}


def _named(result: dict[str, Any]) -> str:
    """The metric in words, with what counts as positive."""
    of = f" ({' or '.join(result['positive'])})" if result["positive"] else ""
    return METRICS[result["metric"]].words + of


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _in_words(change: dict[str, Any]) -> str:
    """For example `a change of +2.1 points (-0.4 to +4.6)`."""
    return (
        f"a change of {100 * change['value']:+.1f} points ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
    )


def _points(change: dict[str, Any]) -> str:
    """For example `+2.1 [-0.4, +4.6]`; "–" where there is no value."""
    if change["value"] is None:
        return "–"
    text = f"{100 * change['value']:+.1f}"
    return text if change["low"] is None else f"{text} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def _rate(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "–"
    text = _percent(value["value"])
    return text if value["low"] is None else f"{text} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def levelling_markdown(result: dict[str, Any]) -> str:
    """Renders what `compare_groups` returned: the verdict first, then a table with a row per group."""
    rows = [("all images", result["num_images"], result["overall"])]
    rows += [(row["group"], row["n"], row) for row in result["groups"]]
    attribute = escape_markdown(result["attribute"])
    table = [f"| {attribute} | n | before | after | change |", "|---|---|---|---|---|"]
    for name, n, row in rows:
        cells = escape_markdown(name), str(n), _rate(row["before"]), _rate(row["after"]), _points(row["change"])
        table.append("| " + " | ".join(cells) + " |")
    notes = sorted(
        {f"{row['group']}: {row[k]['note']}" for row in result["groups"] for k in ("after", "change") if row[k]["note"]}
    )
    parts = [
        f"# Before and after: {escape_markdown(_named(result))} by {attribute}",
        f"**{result['verdict']}**. {escape_markdown(result['reason'])}",
        "\n".join(table),
        f"Brackets hold {100 * result['confidence']:g} % intervals; changes are paired, on the same images, in "
        "percentage points.",
        *["\n".join(f"- {escape_markdown(note)}." for note in notes)] * bool(notes),
    ]
    return "\n\n".join(parts) + "\n"
