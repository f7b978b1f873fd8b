"""How many images (and clusters, such as patients) make a rule decide: before any are collected, and after some were.

Both questions are one: what is the chance that the rule's bound lies beyond its limit when there are `factor` times as
many images? Before collecting, the truth is assumed and the estimate varies around it: the *power* (see
`gates.planning`). After judging, nobody knows the truth. To take the present estimate for it makes the answer jump with
every image: what is left to the limit enters squared, and an estimate that happens to lie at the limit asks for endless
numbers. So the truth is as uncertain as the present images leave it, and the chance is the *predictive* one, that the
present and the further images together decide, either way (Spiegelhalter, Abrams & Myles 2004, section 6.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from scipy.optimize import brentq
from scipy.stats import norm

from adaptclip.metrics.intervals import PairedSpread, RateSpread, ScaledSpread, Side, Spread

_Any = TypeVar("_Any", bound=Spread)

POWER = 0.8
"""The chance that is planned for unless another is asked for."""

MOST = 10.0
"""Beyond this many times the present images no number is given."""


@dataclass(frozen=True)
class Claim:
    """A one-sided claim about a number, and how much the images at hand say about it.

    Attributes:
        value: the estimate, or the assumed truth.
        spread: its uncertainty with the images at hand.
        limit: what the number is compared with.
        upwards: whether it should be at least the limit.
        alpha: chance of a wrong "pass".
        family: judgements that share the chance of a wrong "fail".
    """

    value: float
    spread: Spread
    limit: float
    upwards: bool
    alpha: float
    family: int = 1

    def power(self, factor: float = 1.0) -> float:
        """Chance that the rule passes with `factor` times the images, if `value` is the truth."""
        return self._chance(factor, passing=True, share=1 / factor)

    def decided(self, factor: float) -> float:
        """Chance that it passes or fails once there are `factor` times the images, the present ones among them."""
        return sum(self._chance(factor, passing=passing, share=1 - 1 / factor) for passing in (True, False))

    def _chance(self, factor: float, *, passing: bool, share: float) -> float:
        """Chance that the estimate lies beyond the critical one; `share` of its present variance is still to come."""
        up = self.upwards == passing
        side: Side = "low" if up else "high"
        alpha = self.alpha if passing else self.alpha / self.family
        if self._rate is not None:
            spread, limit = self._rate
            known = _larger(spread, factor)
            critical = _critical(known, limit, side, alpha)
            if critical is None:
                return 0.0
            ahead = math.asin(math.sqrt(spread.rate)) - math.asin(math.sqrt(critical))
            error = 0.5 / math.sqrt(min(spread.size, spread.cap))
        else:
            known = _larger(self.spread, factor)
            distance = abs(known.bound(side, alpha, exact=True) - self.value)
            if known is self.spread:
                distance /= math.sqrt(factor)
            ahead = self.value - self.limit - (distance if up else -distance)
            error = abs(self.spread.bound(side, self.alpha) - self.value) / float(norm.isf(self.alpha))
        ahead = ahead if up else -ahead
        spread_left = error * math.sqrt(max(share, 0.0))
        return float(norm.cdf(ahead / spread_left)) if spread_left > 1e-12 else float(ahead >= 0)

    @property
    def _rate(self) -> tuple[RateSpread, float] | None:
        """The uncertainty as that of a rate, and the limit on its scale; None where it is not one."""
        if isinstance(self.spread, RateSpread):
            return self.spread, self.limit
        if isinstance(self.spread, ScaledSpread) and isinstance(self.spread.spread, RateSpread):
            low, high = self.spread.low, self.spread.high
            return self.spread.spread, (self.limit - low) / (high - low)
        return None


def _larger(spread: _Any, factor: float) -> _Any:
    """The same uncertainty with more images; itself where only the root of their number tells."""
    if isinstance(spread, RateSpread | PairedSpread):
        df = None if spread.df is None else spread.df * factor
        return replace(spread, size=spread.size * factor, cap=spread.cap * factor, df=df)
    return spread


def _critical(spread: RateSpread, limit: float, side: Side, alpha: float) -> float | None:
    """The rate at which a bound of this many images lies at the limit; None where no rate has its bound beyond it."""

    def beyond(rate: float) -> float:
        return replace(spread, rate=rate).bound(side, alpha, exact=True) - limit

    sign, worst, best = (1, 0.0, 1.0) if side == "low" else (-1, 1.0, 0.0)
    if sign * beyond(best) < 0:
        return None
    if sign * beyond(worst) >= 0:
        return worst
    return float(brentq(beyond, 0.0, 1.0, xtol=1e-5))  # type: ignore[arg-type]


def smallest_factor(chance: Callable[[float], float], asked: float, most: float = MOST) -> float | None:
    """Returns the smallest multiple of the images, to a hundredth and from 1 to `most`, with a chance as asked.

    Args:
        chance: of a multiple; it does not fall.
        asked: 0 to 1.
        most: None is returned where even this multiple has a smaller chance.
    """
    if chance(1.0) >= asked:
        return 1.0
    if chance(most) < asked:
        return None
    low, high = 1.0, most
    while high - low > 0.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if chance(middle) >= asked else (middle, high)
    return high


@dataclass(frozen=True)
class More:
    """How many more images would settle a rule.

    Attributes:
        images: with an even chance of "pass" or "fail"; None where ten times the data would not have it.
        likely: with a chance of POWER; None likewise.
        per_cluster: images of a cluster at present, where images come in clusters.
    """

    images: int | None
    likely: int | None
    per_cluster: float | None = None

    @property
    def clusters(self) -> int | None:
        """`images` as clusters of the present size."""
        return None if self.images is None or self.per_cluster is None else self.clusters_for(self.images)

    def clusters_for(self, images: int) -> int:
        """Clusters of the present size that hold so many images."""
        return math.ceil(images / (self.per_cluster or 1.0))


def more_images(claim: Claim | None, n: int, units: int, missing: int = 0) -> More | None:
    """How many more images would settle what is not decided yet.

    Args:
        claim: what is asked; None where nothing is known of the number's uncertainty.
        n: images at hand.
        units: clusters that they come from; `n` where they are independent.
        missing: images that the rule's min_n still asks for; no fewer are named.

    Returns:
        The numbers; None where there is neither a claim nor an image missing.
    """
    each = n / units if 0 < units < n else None
    if claim is None:
        return More(missing, missing, each) if missing else None
    found = [smallest_factor(claim.decided, chance) for chance in (0.5, POWER)]
    even, likely = (None if f is None else max(math.ceil(n * (f - 1)), missing, 1) for f in found)
    return More(even, likely, each)
