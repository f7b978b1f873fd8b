# SPDX-License-Identifier: Apache-2.0
"""Whether probabilities mean what they say: proper scores, temperature, selective prediction, conformal sets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import beta, norm, t

from adaptclip.errors import DataError
from adaptclip.metrics.estimates import Measurement, linearised, share, variance
from adaptclip.reports.measuring import sampling_of

if TYPE_CHECKING:
    from adaptclip.metrics.judged import Sampling
    from adaptclip.predictions import Predictions

_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST_LOG_T = 5.0


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Returns the predictions with their logits divided by `temperature` (above 0); no decision changes.

    Raises:
        DataError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise DataError(f"a temperature must be above 0, got {temperature}")
    logits = np.log(np.maximum(predictions.probs, _SMALLEST, dtype=np.float64))
    probs = np.exp(log_softmax(logits / temperature, axis=1)).astype(np.float32)
    return replace(predictions, probs=probs)


def fit_temperature(predictions: Predictions) -> float:
    """Temperature of least log loss (Guo et al. 2017, section 4.2), found within 0.007 to 148.

    Args:
        predictions: of validation images, never of those that are judged.

    Raises:
        DataError: no images.
    """
    if len(predictions) == 0:
        raise DataError("a temperature needs validation images, got none")
    logits = np.log(np.maximum(predictions.probs, _SMALLEST, dtype=np.float64))
    rows = np.arange(len(logits))

    def loss(log_t: float) -> float:
        return -float(log_softmax(logits / math.exp(log_t), axis=1)[rows, predictions.labels].mean())

    bounds = -_LARGEST_LOG_T, _LARGEST_LOG_T
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


@dataclass(frozen=True)
class SelectiveCurve:
    """What is right among the images that a model is most confident of.

    Attributes:
        coverage: (P,) share of the images that are answered, rising to 1; one point per distinct confidence.
        accuracy: (P,) share of those that are right.
        threshold: (P,) confidence at or above which is answered.
        aurc: area under the risk-coverage curve with its interval, 0 to 1, lower is better.
    """

    coverage: np.ndarray
    accuracy: np.ndarray
    threshold: np.ndarray
    aurc: Measurement


def selective_curve(predictions: Predictions) -> SelectiveCurve:
    """Accuracy against coverage, answering the most confident images first (Geifman & El-Yaniv 2017).

    Images of equal confidence are answered together, in the curve; in the area they come in random order, of which the
    expectation is taken.

    Raises:
        DataError: no images.
    """
    n = len(predictions)
    if n == 0:
        raise DataError("a coverage curve needs at least one image, got none")
    confidence = predictions.probs.max(axis=1)
    wrong = predictions.pred != predictions.labels
    values, block = np.unique(-confidence, return_inverse=True)  # most confident first
    sizes, errors = np.bincount(block), np.bincount(block, wrong)
    ends, wrongs = np.cumsum(sizes), np.cumsum(errors)
    # Risk among the i most confident, i = 1..n; within a block of ties errors come in at the block's own rate.
    i = np.arange(1, n + 1)
    of = np.repeat(np.arange(len(sizes)), sizes)
    before = (wrongs - errors)[of] + (errors / sizes)[of] * (i - (ends - sizes)[of])
    aurc = float((before / i).mean())
    # Influence: an error at rank r counts 1/i in every i >= r; a more confident image also moves everyone's rank.
    later = np.cumsum((1 / i)[::-1])[::-1] / n
    risk_later = np.cumsum((before / i**2)[::-1])[::-1] / n
    own = (np.add.reduceat(later, ends - sizes) / sizes)[block]
    others = (np.add.reduceat(risk_later, ends - sizes) / sizes)[block]
    risk_here = (np.add.reduceat(before / i, ends - sizes) / sizes)[block]
    influence = own * wrong - others + (risk_here - aurc) / n
    return SelectiveCurve(ends / n, 1 - wrongs / ends, -values, linearised(aurc, influence, sampling_of(predictions)))


@dataclass(frozen=True)
class ConformalSets:
    """A threshold that turns probabilities into sets of classes with a promised coverage.

    Attributes:
        level: promised share of images whose set holds the true class, 0 to 1.
        least_probability: a class is in the set when its probability is at least this.
        num_validation: images it was calibrated on.
        expected: 5 % and 95 % quantiles of the coverage that calibration on so many images ends up with.
    """

    level: float
    least_probability: float
    num_validation: int
    expected: tuple[float, float]

    def members(self, probs: np.ndarray) -> np.ndarray:
        """Returns (N, C) bool: the classes in each image's set."""
        return probs >= self.least_probability


def fewest_validation_images(level: float) -> int:
    """Fewest validation images with which sets of this level are not simply all classes."""
    return math.ceil(round(level / (1 - level), 9))


def conformal_sets(validation: Predictions, level: float = 0.9) -> ConformalSets:
    """Split-conformal sets by the probability of the class itself (Vovk et al. 2005; Sadinle et al. 2019).

    Coverage is at least `level` on average over validation sets, for images drawn like those of the validation set.

    Raises:
        DataError: the level is not within 0 and 1, or there are too few validation images for it.
    """
    if not 0 < level < 1:
        raise DataError(f"level must lie within 0 and 1 (0.9 is usual), got {level}")
    n, needed = len(validation), fewest_validation_images(level)
    if n < needed:
        raise DataError(f"sets that cover {100 * level:g} % need at least {needed} validation images, got {n}")
    rank = math.ceil(round((n + 1) * level, 9))
    own = np.take_along_axis(validation.probs, validation.labels[:, None], axis=1)[:, 0]
    least = float(np.sort(own)[::-1][rank - 1])
    return ConformalSets(level, least, n, _expected_coverage(own >= least, sampling_of(validation), rank))


def _expected_coverage(held: np.ndarray, sampling: Sampling, rank: int) -> tuple[float, float]:
    """5 % and 95 % quantiles of the coverage that calibration on these images ends up with.

    Of independent images the coverage has a beta distribution (Vovk 2012). Images of a patient are alike, so that there
    are in effect fewer of them: as many as give the share of held images its variance between patients.
    """
    n = len(held)
    if not sampling.clustered:
        low, high = beta.ppf([0.05, 0.95], rank, n + 1 - rank)
        return float(low), float(high)
    level = rank / (n + 1)
    one = level * (1 - level)
    found = variance(share(held), sampling, one) if sampling.num_units > 1 else None
    if found is None:  # a single patient says nothing of others
        return 0.0, 1.0
    size = found.units if found.value <= 0 else min(one / found.value, float(n))
    size *= float(norm.isf(0.05) / t.isf(0.05, found.df)) ** 2
    low, high = beta.ppf([0.05, 0.95], level * (size + 1), (1 - level) * (size + 1))
    return float(low), float(high)
