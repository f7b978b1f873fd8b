"""Simulated studies whose truth is known, and in which what is usually assumed fails.

Classes differ in recall, patients' images are alike, patients differ in how many images they have, classes are rare,
confidence depends on the class, one class gains what another loses. A world draws whole data sets; what a metric would
be on endless images of it is computed once from a large sample of independent images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.stats import beta

from adaptclip.metrics import find_metric
from adaptclip.metrics.estimates import Measurement
from adaptclip.metrics.judged import Judged, Sampling
from adaptclip.metrics.metric import Drawing, Metric


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
        by_class = {r: beta.ppf(quantile, r * size, (1 - r) * size) if 0 < r < 1 else np.full(len(quantile), r)
                    for r in set(recalls)}  # fmt: skip
        return np.choose(labels, [by_class[r][unit] for r in recalls])

    def _answered(self, labels: np.ndarray, right: np.ndarray, sampling: Sampling) -> Judged:
        classes = len(self.shares)
        answer = np.where(right, labels, (labels + 1) % classes)
        sure = np.asarray(self.confidence or (0.8,) * classes)[labels]
        probs = np.repeat(((1 - sure) / max(classes - 1, 1))[:, None], classes, axis=1)
        probs[np.arange(len(labels)), answer] = sure
        return Judged(labels, probs.astype(np.float32), sampling)

    @cached_property
    def _endless(self) -> tuple[Judged, Judged | None]:
        """So many independent images that their number is the truth to 0.1 points."""
        many = replace(self, patients=400_000, sizes=1, alike=0.0, counts=None)
        if self.counts is not None:
            many = replace(many, shares=tuple(c / sum(self.counts) for c in self.counts))
        return many.draw(np.random.default_rng(123))

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
class Tally:
    """What many data sets showed.

    Attributes:
        covered: share of the 95 % intervals that hold the truth, of those data sets that have an interval.
        passed: share of one-sided bounds that would let a gate at the truth pass, of all data sets; asked is 0.05.
        failed: share that would let it fail.
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
    found, truth = find_metric(metric), world.truth(metric, change)
    rng = np.random.default_rng(seed)
    covered = passed = failed = unknown = silent = 0
    for repeat in range(repeats):
        after, before = world.draw(rng)
        compared = found.compare(after, before, Drawing(draws, repeat))
        part = compared.change if change else compared.model
        assert part is not None
        bounds = part.interval(0.95)
        silent += bounds is None
        covered += bounds is not None and bounds[0] - 1e-9 <= truth <= bounds[1] + 1e-9
        open_ = bounds is None or any(support.count < support.default for support in found.supports(after))
        unknown += open_
        if not open_:
            passed += _beyond(part, truth, "low")
            failed += _beyond(part, truth, "high")
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

Line = tuple[World, str, bool]


def lines() -> list[Line]:
    """World, metric and whether it is of a paired change: all that is studied."""
    found: list[Line] = [(world, "accuracy", False) for world in PATIENTS]
    found += [(world, "mean_per_class_accuracy", False) for world in (*PATIENTS, RARE, *SMALL_CLASSES)]
    found += [(world, "macro_f1", False) for world in (RARE, *SMALL_CLASSES, *PATIENTS[:12])]
    found += [(world, "macro_auc", False) for world in (RARE, *SMALL_CLASSES, *PATIENTS[:12])]
    found += [(world, "brier", False) for world in (RARE, *PATIENTS[:18])]
    found += [(world, "ece", False) for world in CALIBRATION]
    found += [(world, metric, True) for world in PAIRED for metric in ("accuracy", "mean_per_class_accuracy", "brier")]
    return found
