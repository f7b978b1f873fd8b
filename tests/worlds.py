# SPDX-License-Identifier: Apache-2.0
"""Simulated studies whose truth is known, and in which what is usually assumed fails.

Classes differ in recall, patients' images are alike, patients differ in how many images they have, classes are rare,
confidence depends on the class, one class gains what another loses. A world draws whole data sets; what a metric would
be on endless images of it is computed once from images in exactly the shares of the world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from scipy.special import betaincinv, ndtr

from adaptclip.metrics import find_metric
from adaptclip.metrics.estimates import Measurement
from adaptclip.metrics.gaps import largest_difference
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import Drawing, Metric
from adaptclip.predictions import Predictions
from adaptclip.reports.confidence import conformal_sets

_MANY = 42_000
"""Images that stand for endless ones: (nearly) every share and recall of the worlds is a whole number of them."""


@dataclass(frozen=True)
class World:
    """How data sets come about.

    Attributes:
        name: in tables.
        shares: share of each class among patients (or images).
        recalls: recall of each class, of the judged model.
        before: recall of each class of the model it is compared with; None for no comparison.
        patients: number of patients; each image is its own patient where `sizes` is 1.
        sizes: images of a patient, or (fewest, most).
        alike: intra-class correlation of a patient's images, 0 to 1 (a beta distribution over patients).
        mixed: images of one patient have classes of their own; otherwise a patient has one class.
        confidence: confidence of the answers, for each class.
        counts: images of each class, where the study fixed them.
        prevalence: of class 1 where the model will be used, where that was declared.
        threshold: above which the probability of class 1 is an answer; None for the most probable class.
    """

    name: str
    shares: tuple[float, ...]
    recalls: tuple[float, ...]
    before: tuple[float, ...] | None = None
    patients: int = 100
    sizes: int | tuple[int, int] = 1
    alike: float = 0.0
    mixed: bool = False
    confidence: tuple[float, ...] | None = None
    counts: tuple[int, ...] | None = None
    prevalence: float | None = None
    threshold: float | None = None

    def draw(self, rng: np.random.Generator) -> tuple[Judged, Judged | None]:
        """One data set: the judged model and, where there is one, the model before."""
        unit, labels = self._images(rng)
        quantile = rng.random(int(unit.max()) + 1)
        clustered = len(np.unique(unit)) < len(unit)
        sampling = Sampling.of(len(unit), unit if clustered else None, labels if self.counts is not None else None)
        right = rng.random(len(unit)) < self._rates(self.recalls, labels, quantile, unit)
        after = self._answered(labels, right, sampling)
        if self.before is None:
            return after, None
        was = rng.random(len(unit)) < self._rates(self.before, labels, quantile, unit)
        return after, self._answered(labels, was, sampling)

    def _images(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(N,) patient and class of each image."""
        if self.counts is not None:
            labels = np.repeat(np.arange(len(self.counts)), self.counts)
            return np.arange(len(labels)), labels
        low, high = self.sizes if isinstance(self.sizes, tuple) else (self.sizes, self.sizes)
        unit = np.repeat(np.arange(self.patients), rng.integers(low, high + 1, self.patients))
        classes = rng.choice(len(self.shares), len(unit) if self.mixed else self.patients, p=self.shares)
        return unit, classes if self.mixed else classes[unit]

    def _rates(
        self, recalls: tuple[float, ...], labels: np.ndarray, quantile: np.ndarray, unit: np.ndarray
    ) -> np.ndarray:
        """(N,) chance of each image to be right: the class's recall, the same quantile for all images of a patient."""
        of_class = np.asarray(recalls)[labels]
        if not self.alike:
            return of_class
        size = (1 - self.alike) / self.alike
        by_class = {r: betaincinv(r * size, (1 - r) * size, quantile) if 0 < r < 1 else np.full(len(quantile), r)
                    for r in set(recalls)}  # fmt: skip
        return np.choose(labels, [by_class[r][unit] for r in recalls])

    def _answered(self, labels: np.ndarray, right: np.ndarray, sampling: Sampling) -> Judged:
        classes = len(self.shares)
        answer = np.where(right, labels, (labels + 1) % classes)
        sure = np.asarray(self.confidence or (0.8,) * classes)[labels]
        probs = np.repeat(((1 - sure) / max(classes - 1, 1))[:, None], classes, axis=1)
        probs[np.arange(len(labels)), answer] = sure
        return Judged(labels, probs.astype(np.float32), sampling, prevalence=self.prevalence, threshold=self.threshold)

    @cached_property
    def _endless(self) -> tuple[Judged, Judged | None]:
        """Independent images in exactly the shares and with the recalls of this world: nothing is left to chance."""
        shares = self.shares if self.counts is None else np.divide(self.counts, sum(self.counts))
        labels = np.repeat(np.arange(len(shares)), np.rint(np.multiply(shares, _MANY)).astype(int))
        place = np.arange(len(labels)) - np.searchsorted(labels, labels)
        sampling = Sampling.of(len(labels), None)

        def answered(recalls: tuple[float, ...]) -> Judged:
            right = place < np.rint(np.multiply(recalls, np.bincount(labels)))[labels]
            return self._answered(labels, right, sampling)

        return answered(self.recalls), None if self.before is None else answered(self.before)

    def truth(self, metric: Metric | str, change: bool = False) -> float:
        """What the metric, or its change, would be on endless images."""
        found = find_metric(metric)
        value = found.value(self._endless[0])
        assert value is not None
        if not change:
            return value
        assert self._endless[1] is not None
        before = found.value(self._endless[1])
        assert before is not None
        return value - before


@dataclass(frozen=True)
class Groups:
    """Groups of images of one outcome, each with patients of its own, whose error rates are compared.

    Attributes:
        name: in tables.
        groups: how the images of each come about.
    """

    name: str
    groups: tuple[World, ...]

    def odds(self, rng: np.random.Generator) -> Measurement:
        """The equalised-odds difference of one data set, as reports show it."""
        drawn = [group.draw(rng)[0] for group in self.groups]
        rates = [[find_metric(rate).compare(judged).model for judged in drawn] for rate in _ERROR_RATES]
        return largest_difference(rates)

    @cached_property
    def truth(self) -> float:
        """The difference on endless images."""
        rates = [[group.truth(rate) for group in self.groups] for rate in _ERROR_RATES]
        return max(max(values) - min(values) for values in rates)


_ERROR_RATES = ("sensitivity", "specificity")


@dataclass(frozen=True)
class Validation:
    """Validation images of patients on which sets of classes are calibrated, and endless images like them.

    The probability of the true class is even over 0 to 1, so that the coverage of sets follows from their threshold.

    Attributes:
        patients: number of patients.
        size: images of each.
        alike: correlation of the normal scores behind the probabilities of a patient's images.
    """

    patients: int
    size: int
    alike: float

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.patients} patients x {self.size}, correlation {self.alike:g}"

    def draw(self, rng: np.random.Generator) -> Predictions:
        """One validation set."""
        unit = np.repeat(np.arange(self.patients), self.size)
        shared, own = rng.standard_normal(self.patients)[unit], rng.standard_normal(len(unit))
        sure = ndtr(np.sqrt(self.alike) * shared + np.sqrt(1 - self.alike) * own)
        labels = rng.integers(0, 2, len(unit))
        probs = np.where(labels[:, None] == np.arange(2), sure[:, None], 1 - sure[:, None])
        clusters = tuple(map(str, unit)) if self.size > 1 else None
        return Predictions(tuple(map(str, range(len(unit)))), labels, probs.astype(np.float32), ("a", "b"),
                           clusters=clusters)  # fmt: skip


@dataclass(frozen=True)
class Tally:
    """What many data sets showed.

    Attributes:
        covered: share of the 95 % intervals that hold the truth, of those data sets that have an interval; of ranges of
            a coverage, which promise 90 %, the same.
        passed: share of one-sided bounds that would let a gate at the truth pass, of all data sets; asked is 0.05. Of
            ranges: share whose truth lies below.
        failed: share that would let it fail; of ranges, share whose truth lies above.
        unknown: share of data sets without an interval, or with too few images for a gate.
        repeats: number of data sets.
    """

    covered: float
    passed: float
    failed: float
    unknown: float
    repeats: int


def tally(
    world: World, metric: Metric | str, repeats: int, *, change: bool = False, seed: int = 0, draws: int = 1000
) -> Tally:
    """Draws data sets and counts; a gate's default minimum of images counts as undecided, as in `adaptclip gate`."""
    found = find_metric(metric)

    def measurements() -> Iterator[tuple[Measurement, bool]]:
        rng = np.random.default_rng(seed)
        for repeat in range(repeats):
            after, before = world.draw(rng)
            compared = found.compare(after, before, Drawing(draws, repeat))
            part = compared.change if change else compared.model
            assert part is not None
            yield part, any(support.count < support.default for support in found.supports(after))

    return _counted(measurements(), world.truth(metric, change), repeats, found.lower_is_better)


def tally_odds(world: Groups, repeats: int, *, seed: int = 0) -> Tally:
    """The same of the equalised-odds difference between groups."""
    rng = np.random.default_rng(seed)
    return _counted(((world.odds(rng), False) for _ in range(repeats)), world.truth, repeats, lower_is_better=True)


def tally_conformal(world: Validation, repeats: int, *, level: float = 0.9, seed: int = 0) -> Tally:
    """How often the coverage that sets of classes have lies within the range that calibration promises of it."""
    rng = np.random.default_rng(seed)
    below = above = 0
    for _ in range(repeats):
        sets = conformal_sets(world.draw(rng), level)
        below += 1 - sets.least_probability < sets.expected[0]
        above += 1 - sets.least_probability > sets.expected[1]
    return Tally(1 - (below + above) / repeats, below / repeats, above / repeats, 0.0, repeats)


def _counted(
    measurements: Iterator[tuple[Measurement, bool]], truth: float, repeats: int, lower_is_better: bool
) -> Tally:
    good, bad = ("high", "low") if lower_is_better else ("low", "high")
    covered = passed = failed = unknown = silent = 0
    for part, small in measurements:
        bounds = part.interval(0.95)
        silent += bounds is None
        covered += bounds is not None and bounds[0] - 1e-9 <= truth <= bounds[1] + 1e-9
        open_ = bounds is None or small
        unknown += open_
        if not open_:
            passed += _beyond(part, truth, good)
            failed += _beyond(part, truth, bad)
    known = max(repeats - silent, 1)
    return Tally(covered / known, passed / repeats, failed / repeats, unknown / repeats, repeats)


def _beyond(part: Measurement, truth: float, side: str) -> bool:
    bound = part.bound("low" if side == "low" else "high", 0.05, exact=True)
    assert bound is not None
    return bound > truth + 1e-9 if side == "low" else bound < truth - 1e-9


UNEQUAL = ((0.98, 0.2), (0.98, 0.5))
"""Recalls of a common and a rarer class."""

_TWO = (0.7, 0.3)


def _patients(
    patients: int, sizes: int | tuple[int, int], recalls: tuple[float, float], alike: float, mixed: bool
) -> World:
    images = str(sizes) if isinstance(sizes, int) else f"{sizes[0]} to {sizes[1]}"
    name = f"{patients} patients x {images}, recalls {recalls[0]:g}/{recalls[1]:g}, ICC {alike:g}" + ", mixed" * mixed
    return World(name, _TWO, recalls, patients=patients, sizes=sizes, alike=alike, mixed=mixed)


PATIENTS: tuple[World, ...] = tuple(
    _patients(patients, sizes, recalls, alike, mixed)
    for patients, sizes in ((100, 5), (40, 10), (12, 10), (50, (1, 20)), (20, (1, 20)), (8, 20))
    for recalls in (*UNEQUAL, (0.85, 0.85))
    for alike in (0.0, 0.3, 0.8)
    for mixed in (False, True)
)
"""Patients whose classes differ in recall, whose images are alike, who differ in how many images they have."""

RARE = World("4 classes, two at 1 %, n = 500", (0.49, 0.49, 0.01, 0.01), (0.95, 0.85, 0.5, 0.7), patients=500)

SMALL_CLASSES = (
    World("100/100/5 images, recalls .97/.97/.7", (0.4878, 0.4878, 0.0244), (0.97, 0.97, 0.7), counts=(100, 100, 5)),
    World("60 classes of 2 to 5", (1 / 60,) * 60, (0.9, 0.6, 0.97) * 20, counts=(2, 3, 4, 5) * 15),
    World("8 classes of 3", (1 / 8,) * 8, (0.9, 0.6) * 4, counts=(3,) * 8),
    World("20 classes of 30, recalls .99/.5", (1 / 20,) * 20, (0.99, 0.5) * 10, counts=(30,) * 20),
)

CALIBRATION = (
    *(
        World(f"confidence .9/.6, recalls .98/.3, n = {n}", _TWO, (0.98, 0.3), patients=n, confidence=(0.9, 0.6))
        for n in (100, 500)
    ),
    World("calibrated, n = 500", _TWO, (0.9, 0.6), patients=500, confidence=(0.9, 0.6)),
)


def _paired(patients: int, size: int, alike: float) -> World:
    name = f"{patients} patients x {size}, one class gains and one loses, ICC {alike:g}"
    return World(name, _TWO, (0.95, 0.5), before=(0.85, 0.75), patients=patients, sizes=size, alike=alike)


PAIRED = tuple(
    _paired(patients, size, alike) for patients, size in ((100, 5), (40, 10), (12, 10)) for alike in (0.0, 0.3, 0.8)
)


def _outcome(patients: int, size: int, recalls: tuple[float, float], alike: float) -> World:
    images = f"{patients} patients x {size}, ICC {alike:g}" if size > 1 else f"n = {patients}"
    name = f"{images}, specificity {recalls[0]:g}, sensitivity {recalls[1]:g}"
    return World(name, _TWO, recalls, patients=patients, sizes=size, alike=alike, threshold=0.5)


OUTCOMES = tuple(
    _outcome(patients, size, recalls, alike)
    for patients, size, alike in ((200, 1, 0.0), (1000, 1, 0.0), (100, 5, 0.3), (40, 10, 0.8), (12, 10, 0.3))
    for recalls in ((0.98, 0.5), (0.95, 0.8), (0.85, 0.85))
)
"""Two sides of an outcome, of which class 1 is positive; PREVALENCE adds that 2 % are where the model will be used."""

PREVALENCE = tuple(replace(world, name=f"{world.name}, prevalence 2 %", prevalence=0.02) for world in OUTCOMES)


def _groups(name: str, rates: tuple[tuple[float, float], ...], patients: int, size: int, alike: float) -> Groups:
    of = f"{name}, {patients} patients x {size}, ICC {alike:g}" if size > 1 else f"{name}, n = {patients} each"
    return Groups(of, tuple(_outcome(patients, size, pair, alike) for pair in rates))


ODDS = tuple(
    _groups(name, rates, *drawn)
    for name, rates in (
        ("2 groups, sensitivity .9 and .7", ((0.9, 0.9), (0.9, 0.7))),
        ("2 equal groups", ((0.9, 0.8),) * 2),
        ("6 groups, one of sensitivity .6", ((0.9, 0.8),) * 5 + ((0.9, 0.6),)),
        ("6 equal groups", ((0.9, 0.8),) * 6),
    )
    for drawn in ((300, 1, 0.0), (60, 5, 0.3))
)

RANGES = tuple(
    Validation(patients, size, alike)
    for patients, size, alike in (
        (100, 1, 0.0), (400, 1, 0.0), (100, 5, 0.0), (100, 5, 0.3), (100, 5, 0.8), (40, 10, 0.3), (40, 10, 0.8),
        (12, 10, 0.3), (12, 10, 0.8),
    )
)  # fmt: skip

Line = tuple[str, str, bool, Callable[..., Tally]]


def lines() -> list[Line]:
    """World, metric, whether it is of a paired change, and what counts it (repeats, seed): all that is studied."""
    found: list[tuple[World, str, bool]] = [(world, "accuracy", False) for world in PATIENTS]
    found += [(world, "mean_per_class_accuracy", False) for world in (*PATIENTS, RARE, *SMALL_CLASSES)]
    found += [(world, "macro_f1", False) for world in (RARE, *SMALL_CLASSES, *PATIENTS[:12])]
    found += [(world, "macro_auc", False) for world in (RARE, *SMALL_CLASSES, *PATIENTS[:12])]
    found += [(world, "brier", False) for world in (RARE, *PATIENTS[:18])]
    found += [(world, "ece", False) for world in CALIBRATION]
    found += [(world, metric, True) for world in PAIRED for metric in ("accuracy", "mean_per_class_accuracy", "brier")]
    found += [(world, metric, False) for world in OUTCOMES for metric in ("sensitivity", "specificity")]
    found += [(world, metric, False) for world in (*OUTCOMES, *PREVALENCE) for metric in ("ppv", "npv", "net_benefit")]
    counted: list[Line] = [(w.name, m, change, partial(tally, w, m, change=change)) for w, m, change in found]
    counted += [(world.name, "equalized_odds_difference", False, partial(tally_odds, world)) for world in ODDS]
    counted += [(world.name, "conformal range (90 %)", False, partial(tally_conformal, world)) for world in RANGES]
    return counted
