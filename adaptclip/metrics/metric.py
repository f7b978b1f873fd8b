# SPDX-License-Identifier: Apache-2.0
"""One object per metric: its words, its value, what each image does to it, what it needs, and its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from adaptclip.metrics.estimates import MIN_CLUSTERS as MIN_CLUSTERS
from adaptclip.metrics.estimates import Comparison, Estimate, Measurement, changed, measured
from adaptclip.metrics.judged import Judged

Better = Literal["higher", "lower", "neither"]

MIN_IMAGES = 100
"""Images (of every group) that a gate asks for by default: fewer tell a rate to no better than 8 points."""

MIN_OUTCOMES = 30
"""The same for metrics of an outcome: positive images, negative images, or for `auc` the fewer of the two."""

MIN_CLASS_IMAGES = 10
"""Images of every class that a mean over the classes asks for by default."""

_JACKKNIFE_GROUPS = 200
"""Units are left out in this many groups where a metric has no influence of its own."""


@dataclass(frozen=True)
class Support:
    """Images that a metric rests on, where it rests on fewer than it is given.

    Attributes:
        count: how many.
        what: of which kind, in words that follow a number: "positive images", "images of class dog".
        default: how many a gate asks for unless it says otherwise.
    """

    count: int
    what: str = "images"
    default: int = MIN_IMAGES

    def least(self, min_n: int | None) -> int:
        """What a gate asks for, with its own `min_n` or without."""
        return self.default if min_n is None else min_n


@dataclass(frozen=True)
class Drawing:
    """How the bootstrap of the metrics that need one is drawn."""

    draws: int = 2000
    seed: int = 0
    full_bins: bool = False


@dataclass(frozen=True)
class Metric:
    """A number that says how good predictions are.

    Reports, gates, comparisons and tables take what they need to know from here; nothing else asks for a metric's name.

    Attributes:
        name: key in gates, cards and JSON.
        words: in sentences, for example "mean accuracy per class".
        short: for the heads of narrow columns.
        estimate: images -> the number and what each image does to it.
        better: which way is better; "neither" for a rate without a good side.
        scale: lowest and highest value there can be.
        per_cent: shown in per cent and points; False shows decimals.
        of_outcome: it is of a two-sided outcome, and judges images whose classes are 0 (negative) and 1 (positive).
        least_classes: fewer classes than this leave it nothing to say.
        of_labels: it is of images that may have several classes, or none, and judges yes or no for each class.
        instead: of such images, the metric that comes nearest to this one, where this is of images with one class.
        sides: sides of an outcome, 1 positive and 0 negative, of which it needs images.
        over_classes: it is a mean over all classes, and needs images of each.
        decides: it is about decisions, so that an outcome's threshold matters to it.
        undefined: images -> why the number says nothing here, or "".
        selects: images -> (N,) bool, those that the number is about; None for all of them.
        support: images -> what it rests on, which a gate's `min_n` counts.
        about: which of the images it counts, before "images": "positive ".
        values: images -> (N,) numbers of which it is the mean, where it is one: permutation tests deal these out.
        measure_with: measures in a way of its own (the calibration error's bootstrap); None takes the influence.
        is_general: reports show it of any classifier, or of any declared outcome where it is of one.
        in_groups: reports show it of every group.
        meaning: what it says in plain words, for pages; "" where its name does.
        hub: its type on the Hugging Face hub, for model cards; "" leaves it out.
    """

    name: str
    words: str
    short: str
    estimate: Callable[[Judged], Estimate]
    better: Better = "higher"
    scale: tuple[float, float] = (0.0, 1.0)
    per_cent: bool = True
    of_outcome: bool = False
    least_classes: int = 1
    of_labels: bool = False
    instead: str = ""
    sides: tuple[int, ...] = ()
    over_classes: bool = False
    decides: bool = False
    undefined: Callable[[Judged], str] = lambda judged: ""
    selects: Callable[[Judged], np.ndarray] | None = None
    support: Callable[[Judged], tuple[Support, ...]] = lambda judged: (Support(len(judged)),)
    about: str = ""
    values: Callable[[Judged], np.ndarray] | None = None
    measure_with: Callable[[Judged, Judged | None, Drawing], Comparison] | None = None
    is_general: bool = False
    in_groups: bool = False
    meaning: str = ""
    hub: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        function: Callable[[np.ndarray, np.ndarray], float],
        *,
        words: str = "",
        better: Better = "higher",
        scale: tuple[float, float] = (0.0, 1.0),
        per_cent: bool = True,
    ) -> Metric:
        """Makes a metric of any function of true classes and probabilities, as fairlearn's MetricFrame takes callables.

        What each image does to it is found by leaving units out (the jackknife; in 200 groups where there are more).

        Args:
            name: key in gates and tables.
            function: (N,) true class ids and (N, C) probabilities -> number; smooth, so no median or maximum.
            words: in sentences; the name where not given.
            better: which way is better.
            scale: lowest and highest value there can be.
            per_cent: shown in per cent; False shows decimals.

        Example:
            >>> from sklearn.metrics import matthews_corrcoef
            >>> mcc = Metric.of("mcc", lambda y, p: matthews_corrcoef(y, p.argmax(1)), scale=(-1, 1), per_cent=False)
        """
        text = words or name.replace("_", " ")
        return cls(
            name, text, text, lambda judged: _left_out(function, judged), better=better, scale=scale, per_cent=per_cent
        )

    def info(self) -> dict[str, Any]:
        """What a page needs to show the number, JSON-able: its words and unit, and "meaning", "hub"."""
        return {
            "words": self.words, "short": self.short, "per_cent": self.per_cent, "better": self.better,
            "scale": list(self.scale), "meaning": self.meaning, "hub": self.hub,
        }  # fmt: skip

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller number is the better one."""
        return self.better == "lower"

    def value(self, judged: Judged) -> float | None:
        """The number; None where it says nothing here."""
        chosen = self.chosen(judged)
        return None if self.missing(chosen) else self.estimate(chosen).value

    def missing(self, chosen: Judged) -> str:
        """Why there is no number, of images that it is about; "" where there is one."""
        if len(chosen) == 0:
            return "no images"
        if not self.of_labels and chosen.marks is not None and not chosen.marks.single:
            return self.of_one_class
        return (chosen.undecided if self.decides else "") or self.undefined(chosen)

    @property
    def of_one_class(self) -> str:
        """Why a metric that is not `of_labels` says nothing of images with several classes, and what would."""
        nearest = f"the nearest that is: {self.instead}" if self.instead else "ask it of one class (positive: CLASS)"
        return f"images may have several classes here, or none, and {self.words} is of images with one; {nearest}"

    def chosen(self, judged: Judged) -> Judged:
        """The images that the number is about."""
        return judged if self.selects is None else judged.take(np.flatnonzero(self.selects(judged)))

    def supports(self, judged: Judged) -> tuple[Support, ...]:
        """What the number rests on."""
        return self.support(self.chosen(judged))

    def compare(self, judged: Judged, baseline: Judged | None = None, drawing: Drawing | None = None) -> Comparison:
        """Measures the model, the baseline on the same images in the same order, and the paired change.

        Nothing in it is NaN: what cannot be computed is None with a note.
        """
        both = [judged] if baseline is None else [judged, baseline]
        if self.selects is not None:
            rows = np.flatnonzero(self.selects(judged))
            both = [one.take(rows) for one in both]
        n = len(both[0])
        reasons = [self.missing(one) for one in both]
        if self.measure_with is not None and not any(reasons):
            return self.measure_with(both[0], both[1] if len(both) > 1 else None, drawing or Drawing())
        if self.measure_with is not None and len(both) > 1 and not all(reasons):  # one of two models has a number
            known = reasons.index("")
            alone = self.measure_with(both[known], None, drawing or Drawing()).model
            none = Measurement(None, n, note=reasons[1 - known])
            return Comparison(*((alone, none) if known == 0 else (none, alone)), none)
        estimates = [None if reason else self.estimate(one) for one, reason in zip(both, reasons, strict=True)]
        sampling = both[0].sampling
        single = [
            Measurement(None, n, note=reason) if e is None else measured(e, sampling, scale=self.scale)
            for e, reason in zip(estimates, reasons, strict=True)
        ]
        if len(single) == 1:
            return Comparison(single[0])
        if estimates[0] is None or estimates[1] is None:
            return Comparison(single[0], single[1], Measurement(None, n, note=reasons[0] or reasons[1]))
        return Comparison(single[0], single[1], changed(estimates[0], estimates[1], sampling, scale=self.scale))


def _left_out(function: Callable[[np.ndarray, np.ndarray], float], judged: Judged) -> Estimate:
    """Influence of the units by leaving each out, or groups of them."""
    value = float(function(judged.labels, judged.probs))
    units = judged.sampling.num_units
    group = (np.random.default_rng(0).permutation(units) % min(units, _JACKKNIFE_GROUPS))[judged.sampling.unit]
    count = int(group.max()) + 1 if len(group) else 0
    influence = np.zeros(len(judged))
    for g in range(count if count > 1 else 0):
        out = group == g
        left = float(function(judged.labels[~out], judged.probs[~out]))
        # All images without the group weigh 1 - h: value - left is the group's influence divided by that. It is put on
        # one unit of the group, so that the units' squares add up to those of the groups.
        one = out & (judged.sampling.unit == judged.sampling.unit[out.argmax()])
        influence[one] = (value - left) * (1 - out.mean()) / one.sum()
    return Estimate(value, influence - influence.mean())
