# SPDX-License-Identifier: Apache-2.0
"""What a metric sees: images with their classes, the probabilities given to them, and how the images were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class Sampling:
    """How images came about: which were drawn together, and whether the study fixed how many there are of each class.

    The unit that was drawn is the unit of every interval and test: patients where there are patients. The mix of
    classes is random like everything else about them, unless the study fixed it.

    Attributes:
        unit: (N,) the unit (patient, site) of each image, 0 to U - 1; each image is its own where they are independent.
        stratum: (N,) the class within which the units were drawn, or None where the mix of classes is random.
    """

    unit: np.ndarray
    stratum: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        num: int,
        clusters: Sequence[str] | np.ndarray | None = None,
        classes: np.ndarray | None = None,
    ) -> Sampling:
        """Describes how `num` images were drawn.

        Args:
            num: N.
            clusters: N unit ids (text or numbers), None where the images are independent.
            classes: (N,) class ids where the study fixed the number of each class; None where their mix is random.
        """
        unit = np.arange(num)
        if clusters is not None:
            unit = np.unique(np.asarray(clusters), return_inverse=True)[1]
        return cls(unit, classes)

    @cached_property
    def num_units(self) -> int:
        """Number of units U."""
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    @cached_property
    def clustered(self) -> bool:
        """Whether some unit has several images; units of one image are independent images."""
        return self.num_units < len(self.unit)

    def take(self, rows: np.ndarray | slice) -> Sampling:
        """Of the images at `rows`, in that order; units without one are gone."""
        if isinstance(rows, slice) and rows == slice(None):
            return self
        unit = self.unit[rows]
        unit = np.unique(unit, return_inverse=True)[1] if self.clustered else np.arange(len(unit))
        return Sampling(unit, None if self.stratum is None else self.stratum[rows])

    @cached_property
    def strata(self) -> np.ndarray:
        """(U,) the stratum of each unit, 0 to S - 1; all 0 where the mix of classes is random.

        A unit of several classes belongs to its most frequent one. A class with a single unit would add no variance at
        all, so such classes share one stratum ("collapsed strata", Cochran 1977, section 5A.12), which errs on the wide
        side.
        """
        if self.stratum is None:
            return np.zeros(self.num_units, np.int64)
        table = csr_matrix((np.ones(len(self.unit)), (self.unit, self.stratum)))
        stratum = np.unique(np.asarray(table.argmax(axis=1)).ravel(), return_inverse=True)[1]
        sizes = np.bincount(stratum)
        singles = np.flatnonzero(sizes == 1)
        if len(singles) == 1 and len(sizes) > 1:
            others = np.where(sizes == 1, sizes.max() + 1, sizes)
            stratum[stratum == singles[0]] = others.argmin()
        elif len(singles):
            stratum[np.isin(stratum, singles)] = singles[0]
        return np.unique(stratum, return_inverse=True)[1]


@dataclass(frozen=True)
class Marks:
    """Yes or no for each class of each image: what it shows, and what it was said to show.

    Attributes:
        probs: (N, C) probability of each class by itself, 0 to 1.
        positive: (N, C) bool, whether the image shows the class; a row may hold several, or none.
        named: (N, C) bool, whether the probability reaches the class's threshold.
        known: (N, C) bool, whether it is known if the image shows the class; `positive` is False where it is not. None
            where all is known.
        several: whether the images may show several classes, or none, even where each of these shows one.
    """

    probs: np.ndarray
    positive: np.ndarray
    named: np.ndarray
    known: np.ndarray | None = None
    several: bool = False

    def take(self, rows: np.ndarray | slice) -> Marks:
        """The images at `rows`."""
        known = None if self.known is None else self.known[rows]
        return Marks(self.probs[rows], self.positive[rows], self.named[rows], known, self.several)

    def of_class(self, c: int) -> Marks:
        """Class c alone."""
        own = slice(c, c + 1)
        known = None if self.known is None else self.known[:, own]
        return Marks(self.probs[:, own], self.positive[:, own], self.named[:, own], known, self.several)

    @cached_property
    def certain(self) -> np.ndarray:
        """(N, C) bool `known`, True where that is None."""
        return np.ones_like(self.positive) if self.known is None else self.known

    @cached_property
    def absent(self) -> np.ndarray:
        """(N, C) bool, whether it is known that the image does not show the class."""
        return self.certain & ~self.positive

    @property
    def single(self) -> bool:
        """Whether every image shows exactly one class."""
        return not self.several and bool((self.positive.sum(axis=1) == 1).all())


@dataclass(frozen=True)
class Judged:
    """Images that are judged; all that a metric ever sees.

    Attributes:
        labels: (N,) int64 true class ids, 0 to C - 1.
        probs: (N, C) float32 class probabilities, each row summing to 1.
        sampling: how the images were drawn.
        ranked: how many of the most probable classes are known, in order; None for all of them.
        confident: whether the probabilities are the model's own; where not, only their order means something.
        decided: (N,) the class decided for, where that is not the most probable one; None otherwise.
        prevalence: of a two-sided outcome, the share of positive images where the model will be used, 0 to 1; None
            where it was not declared.
        marks: yes or no for each class, where the model answers so; None otherwise.
        threshold: of a two-sided outcome, the probability above which the answer is positive; None where there is none.
        undecided: why there are no answers yet, though there are probabilities; "" where there are.
    """

    labels: np.ndarray
    probs: np.ndarray
    sampling: Sampling
    ranked: int | None = None
    confident: bool = True
    decided: np.ndarray | None = None
    prevalence: float | None = None
    threshold: float | None = None
    undecided: str = ""
    marks: Marks | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self.probs.shape[1]

    def take(self, rows: np.ndarray | slice) -> Judged:
        """The images at `rows`."""
        return replace(
            self, labels=self.labels[rows], probs=self.probs[rows], sampling=self.sampling.take(rows),
            decided=None if self.decided is None else self.decided[rows],
            marks=None if self.marks is None else self.marks.take(rows),
        )  # fmt: skip

    @cached_property
    def answer(self) -> np.ndarray:
        """(N,) the class decided for; of equally probable ones the lowest id."""
        if self.decided is not None:
            return self.decided
        return self.probs.argmax(axis=1)

    @cached_property
    def right(self) -> np.ndarray:
        """(N,) bool: the answer is the true class."""
        return self.answer == self.labels

    @cached_property
    def top(self) -> np.ndarray:
        """(N,) float64: the highest probability of each row, which is the model's confidence."""
        return self.probs.max(axis=1).astype(np.float64)

    @cached_property
    def counts(self) -> np.ndarray:
        """(C,) images of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)
