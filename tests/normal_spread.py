# SPDX-License-Identifier: Apache-2.0
"""An uncertainty whose bounds can be written down: value ± z · error, and further where they have to be exact."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import norm

from adaptclip.metrics.estimates import Measurement
from adaptclip.metrics.intervals import Side


@dataclass(frozen=True)
class Normal:
    """A number with a normal error."""

    value: float
    error: float
    exactly: float = 2.0
    plainly: float = 1.0
    method: str = "normal"

    def bound(self, side: Side, alpha: float, *, exact: bool = False) -> float:
        half = float(norm.isf(alpha)) * self.error * (self.exactly if exact else self.plainly)
        return self.value - half if side == "low" else self.value + half


def number(value: float, error: float, n: int = 1000, exactly: float = 2.0, plainly: float = 1.0) -> Measurement:
    """A measurement with a normal error."""
    return Measurement(value, n, Normal(value, error, exactly, plainly))
