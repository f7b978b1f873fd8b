# SPDX-License-Identifier: Apache-2.0
"""What an answer to a two-sided outcome is worth in use: predictive values, and the net benefit of acting on it.

They depend on how frequent the positive side is. Where its prevalence in use was declared they follow from sensitivity
and specificity (Bayes), whose own intervals are put together (MOVER: Zou & Donner 2008), so that a false positive rate
of 0 on a hundred images does not make a predictive value certain. Without one they are of the share among the images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import root_scalar

from adaptclip.metrics.estimates import Comparison, Estimate, Measurement, changed, mean, measured, share
from adaptclip.metrics.intervals import DifferenceSpread, Side, Spread
from adaptclip.metrics.judged import Judged
from adaptclip.metrics.metric import MIN_OUTCOMES, Drawing, Metric, Support


@dataclass(frozen=True)
class TwoRates:
    """The rates at which an answer is given to images of its own side (`good`) and to others (`bad`).

    Attributes:
        good: rate and its uncertainty, on images of the side.
        bad: the same on the other images.
        correlation: of the two, which images of the same clusters bring about.
    """

    good: tuple[float, Spread]
    bad: tuple[float, Spread]
    correlation: float = 0.0

    def bound(self, gain: float, cost: float, side: Side, alpha: float, *, exact: bool) -> float:
        """One-sided bound of gain * good - cost * bad."""
        other: Side = "high" if side == "low" else "low"
        (good, of_good), (bad, of_bad) = self.good, self.bad
        up = gain * (good - of_good.bound(side, alpha, exact=exact))
        down = cost * (of_bad.bound(other, alpha, exact=exact) - bad)
        reach = np.sqrt(max(up**2 + down**2 - 2 * self.correlation * up * down, 0.0))
        return gain * good - cost * bad + (-reach if side == "low" else reach)


@dataclass(frozen=True)
class PredictiveSpread:
    """Uncertainty of a predictive value: it is at least v where (1 - v) p good - v (1 - p) bad is at least 0.

    Attributes:
        rates: of the answer.
        frequency: p, share of images of the answer's side where the model will be used.
    """

    rates: TwoRates
    frequency: float

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "bayes, from the intervals of both rates"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """The value at which the contrast's own bound is 0."""

        def excess(value: float) -> float:
            gain, cost = self.frequency * (1 - value), (1 - self.frequency) * value
            return self.rates.bound(gain, cost, side, alpha, exact=exact)

        if excess(0.0) <= 0:
            return 0.0
        return 1.0 if excess(1.0) >= 0 else float(root_scalar(excess, bracket=(0.0, 1.0), method="brentq").root)


@dataclass(frozen=True)
class BenefitSpread:
    """Uncertainty of gain * good - cost * bad."""

    rates: TwoRates
    gain: float
    cost: float

    @property
    def method(self) -> str:
        """Name of the method, for the report."""
        return "linear, from the intervals of both rates"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """Bound of the contrast."""
        return self.rates.bound(self.gain, self.cost, side, alpha, exact=exact)


def _rates(judged: Judged, side: int) -> TwoRates | str:
    """The rates of an answer, or why one of them has no interval."""
    rows = [np.flatnonzero(judged.labels == s) for s in (side, 1 - side)]
    parts = [measured(share(judged.answer[r] == side), judged.sampling.take(r)) for r in rows]
    found = [(part.value, part.spread) for part in parts if part.value is not None and part.spread is not None]
    if len(found) < 2:
        return next(part.note for part in parts if part.spread is None)
    units = np.zeros((2, judged.sampling.num_units))
    for k, r in enumerate(rows):
        hits = judged.answer[r] == side
        units[k] = np.bincount(judged.sampling.unit[r], hits - hits.mean(), minlength=units.shape[1])
    size = float(np.sqrt((units[0] ** 2).sum() * (units[1] ** 2).sum()))
    return TwoRates(found[0], found[1], float(units[0] @ units[1]) / size if size > 0 else 0.0)


def _sides_missing(judged: Judged) -> str:
    return "" if judged.counts.min() > 0 else "images of both sides are needed"


def _not_called(side: int, judged: Judged) -> str:
    words = "positive" if side else "negative"
    return _sides_missing(judged) or ("" if (judged.answer == side).any() else f"no image is called {words}")


def _predictive(side: int, judged: Judged) -> Estimate:
    """The predictive value of an answer and what each image does to it (delta method)."""
    called, own = judged.answer == side, judged.labels == side
    if judged.prevalence is None:
        value, weights = float(own[called].mean()), called / called.sum()
        at = f"at the {100 * float((judged.labels == 1).mean()):.3g} % of positive images here; no prevalence declared"
        return Estimate(value, weights * (own - value), weights, n=int(called.sum()), note=at)
    frequency = judged.prevalence if side else 1 - judged.prevalence
    good, bad = float(called[own].mean()), float(called[~own].mean())
    true, false = frequency * good, (1 - frequency) * bad
    total = true + false
    by_good, by_bad = frequency * false / total**2, -(1 - frequency) * true / total**2
    influence = np.where(own, by_good * (called - good) / own.sum(), by_bad * (called - bad) / (~own).sum())
    return Estimate(true / total, influence, _even(own), judged.labels, note=_at(judged))


def _benefit(judged: Judged) -> Estimate:
    """Net benefit and what each image does to it."""
    assert judged.threshold is not None  # `_no_threshold` has seen to that
    odds = judged.threshold / (1 - judged.threshold)
    called, own = judged.answer == 1, judged.labels == 1
    prevalence = float(own.mean()) if judged.prevalence is None else judged.prevalence
    everyone = prevalence - (1 - prevalence) * odds
    note = f"{_at(judged)}; a missed image counts as {1 / odds:.3g} false alarms; calling all positive: {everyone:.3f}"
    if judged.prevalence is None:
        plain = mean(called * np.where(own, 1.0, -odds))
        return Estimate(plain.value, plain.influence, note=note)
    good, bad = float(called[own].mean()), float(called[~own].mean())
    gain, cost = prevalence, (1 - prevalence) * odds
    influence = np.where(own, gain * (called - good) / own.sum(), -cost * (called - bad) / (~own).sum())
    return Estimate(gain * good - cost * bad, influence, _even(own), judged.labels, note=note)


def _even(own: np.ndarray) -> np.ndarray:
    """(N,) weights by which both sides count alike."""
    return np.where(own, 0.5 / own.sum(), 0.5 / (~own).sum())


def _at(judged: Judged) -> str:
    if judged.prevalence is None:
        return "at the share of positive images here, as no prevalence was declared"
    return f"at the declared prevalence of {100 * judged.prevalence:.3g} %"


def _no_threshold(judged: Judged) -> str:
    if judged.threshold is None:
        return "it needs a decision threshold, and here the most probable class decides"
    return _sides_missing(judged)


def _compare(
    judged: Judged,
    baseline: Judged | None,
    drawing: Drawing,
    *,
    estimate: Callable[[Judged], Estimate],
    side: int,
    spread: Callable[[Judged, TwoRates], Spread],
    scale: Callable[[Judged], tuple[float, float]],
) -> Comparison:
    """Measures from the two rates where a prevalence was declared, and as any mean where none was."""
    both = [judged] if baseline is None else [judged, baseline]
    estimates = [estimate(one) for one in both]
    if judged.prevalence is None:
        single = [measured(e, judged.sampling, scale=scale(judged)) for e in estimates]
        change = changed(estimates[0], estimates[1], judged.sampling, scale=scale(judged)) if len(both) > 1 else None
        return Comparison(single[0], single[1] if change else None, change)
    single = []
    for one, found in zip(both, estimates, strict=True):
        rates = _rates(one, side)
        known = isinstance(rates, TwoRates)
        note = "; ".join(filter(None, (found.note, "" if known else str(rates))))
        single.append(Measurement(found.value, len(one), spread(one, rates) if known else None, note))
    if len(single) == 1:
        return Comparison(single[0])
    spreads = [part.spread for part in single if part.spread is not None]
    values = [found.value for found in estimates]
    # As if of different images: the change of paired models is at least as certain.
    between = DifferenceSpread((values[0], spreads[0]), (values[1], spreads[1])) if len(spreads) == 2 else None
    change = Measurement(values[0] - values[1], len(judged), between, single[0].note)
    return Comparison(single[0], single[1], change)


def _predictive_spread(side: int, judged: Judged, rates: TwoRates) -> Spread:
    assert judged.prevalence is not None
    return PredictiveSpread(rates, judged.prevalence if side else 1 - judged.prevalence)


def _benefit_spread(judged: Judged, rates: TwoRates) -> Spread:
    assert judged.prevalence is not None
    assert judged.threshold is not None
    return BenefitSpread(rates, judged.prevalence, (1 - judged.prevalence) * judged.threshold / (1 - judged.threshold))


def _benefit_scale(judged: Judged) -> tuple[float, float]:
    assert judged.threshold is not None
    return -judged.threshold / (1 - judged.threshold), 1.0


def _smaller_side(judged: Judged) -> tuple[Support, ...]:
    return (Support(int(judged.counts.min()), "images on the smaller side", MIN_OUTCOMES),)


def _called(side: int, judged: Judged) -> tuple[Support, ...]:
    if judged.prevalence is not None:
        return _smaller_side(judged)
    words = f"images called {'positive' if side else 'negative'}"
    return (Support(int((judged.answer == side).sum()), words, MIN_OUTCOMES),)


def _predictive_value(side: int, name: str, words: str, short: str, meaning: str) -> Metric:
    compare = partial(
        _compare, estimate=partial(_predictive, side), side=side, spread=partial(_predictive_spread, side),
        scale=lambda judged: (0.0, 1.0),
    )  # fmt: skip
    return Metric(
        name, words, short, partial(_predictive, side), of_outcome=True, sides=(1, 0), decides=True,
        undefined=partial(_not_called, side), support=partial(_called, side), measure_with=compare, is_general=True,
        meaning=meaning,
    )  # fmt: skip


PPV = _predictive_value(
    1, "ppv", "positive predictive value", "PPV", "of the images called positive, the share that truly is"
)

NPV = _predictive_value(
    0, "npv", "negative predictive value", "NPV", "of the images called negative, the share that truly is"
)

NET_BENEFIT = Metric(
    "net_benefit", "net benefit", "net benefit", _benefit, scale=(-1.0, 1.0), per_cent=False, of_outcome=True,
    sides=(1, 0), decides=True, undefined=_no_threshold, support=_smaller_side, is_general=True,
    measure_with=partial(_compare, estimate=_benefit, side=1, spread=_benefit_spread, scale=_benefit_scale),
    meaning="positive images found, less false alarms weighed at the decision threshold, per image; 0 is what calling "
    "none positive gives (decision curve, Vickers & Elkin 2006)",
)  # fmt: skip
