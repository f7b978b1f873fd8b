"""How many more images would settle an inconclusive gate: an estimate, as if the rates stayed what they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from adaptclip.metrics.intervals import PairedSpread, RateSpread, Side, Spread

MOST = 10_000.0
"""Beyond this many times the present images nothing is promised."""


@dataclass(frozen=True)
class Enlarged:
    """The uncertainty of an estimate if there were `factor` times as many images of the same kind.

    Attributes:
        value: the estimate.
        spread: its present uncertainty.
        factor: at least 1.
    """

    value: float
    spread: Spread
    factor: float

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.spread.method

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        """The same kind of bound with more images; what is no rate shrinks with the root of their number."""
        if isinstance(self.spread, RateSpread | PairedSpread):
            size, cap = self.spread.size * self.factor, self.spread.cap * self.factor
            return replace(self.spread, size=size, cap=cap).bound(side, alpha, exact=exact)
        now = self.spread.bound(side, alpha, exact=exact)
        return self.value + (now - self.value) / math.sqrt(self.factor)


def smallest_factor(settled: Callable[[float], bool]) -> float | None:
    """Returns the smallest multiple of the present images, to a hundredth, at which `settled` holds; None beyond MOST.

    Args:
        settled: whether a multiple settles the rule; once it does, every larger one does.
    """
    high = 1.0
    while not settled(high):
        high *= 2
        if high > MOST:
            return None
    low = high / 2
    while high - low > 0.01 * low and high > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return max(high, 1.0)


def more_images(n: int, factor: float | None, missing: int = 0) -> int | None:
    """Returns how many more than `n` images a factor means, at least `missing` (what a rule's min_n asks for)."""
    if factor is None:
        return None
    return max(math.ceil(n * (factor - 1)), missing, 1)
