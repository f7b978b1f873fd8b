# SPDX-License-Identifier: Apache-2.0
"""One row per judged image (`Predictions`): all that reports and gates see. Importing it needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adaptclip.errors import DataError, agree, did_you_mean, listed
from adaptclip.files import write_parquet
from adaptclip.gate_rules import Expected, Outcome
from adaptclip.prediction_files import read_predictions


@dataclass(frozen=True)
class Predictions:
    """One row per judged image; all that reports and gates ever see, whichever model made it.

    Attributes:
        ids: N row ids, all different.
        labels: (N,) int64 true class ids; of several, the first class that the image shows (0 where it shows none).
        probs: (N, C) float32 class probabilities, each row summing to 1.
        class_names: C names.
        groups: attribute name -> N values as text; a missing value is "unknown".
        clusters: N cluster ids (patients, sites), the unit of resampling; None where each image is its own.
        levels: taxonomy level name -> C coarse names, one per class; coarse to fine.
        outcomes: two-sided questions that are reported beside the classes, such as malignant or not.
        intersections: lists of group attributes that are also reported crossed.
        ranked: how many of the most probable classes are known, in order; None for all of them.
        confident: whether the probabilities are the model's own; where not, only their order means something.
        notes: what to know of the source of these predictions.
        sigmoid: (N, C) float32 probability of each class by itself, 0 to 1, rows of any sum; None where the model was
            not made to answer yes or no for each class.
        positive: (N, C) bool, the classes of each image where it may have several, or none; None where each has the one
            of `labels`. False where it is not known.
        known: (N, C) bool, False where nobody knows whether the image shows the class; only beside `positive`. None
            where all is known.
        thresholds: (C,) probability from which a class is named by itself, chosen on other images; None for 0.5.
        fixed_classes: whether the study fixed how many images there are of each class (card: sampling); otherwise their
            mix is random, like the images.
        strata: (N,) the classes whose numbers of images the study fixed, where these are sums of them; None otherwise.
        decided: (N,) the class decided for, where that is not the most probable one; None otherwise.
        expected: groups and classes that must be among the images for gates on them to pass (card: expect), or None.
        made_by: "method" and "backbone" that made these predictions, as far as they are known.
        asked: the outcome that these two classes answer (`outcomes.two_sided`); None for classes of their own.
        features: (N, D) float32 features of the images, where they are at hand; they are not saved.
        files: N names of the images' files, "" where an image has none; or None.
        cluster_name: what the source calls the clusters, such as patient_id; "" where it says nothing.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    probs: np.ndarray
    class_names: tuple[str, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    clusters: tuple[str, ...] | None = None
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    intersections: tuple[tuple[str, ...], ...] = ()
    ranked: int | None = None
    confident: bool = True
    notes: tuple[str, ...] = ()
    sigmoid: np.ndarray | None = None
    positive: np.ndarray | None = None
    known: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    fixed_classes: bool = False
    strata: np.ndarray | None = None
    decided: np.ndarray | None = None
    asked: Outcome | None = None
    expected: Expected | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    features: np.ndarray | None = None
    files: tuple[str, ...] | None = None
    cluster_name: str = ""

    def __post_init__(self) -> None:
        n, c = len(self.ids), len(self.class_names)
        if self.probs.shape != (n, c) or self.labels.shape != (n,):
            raise DataError(
                f"predictions do not fit together: {n} ids, labels {self.labels.shape}, "
                f"probabilities {self.probs.shape}; expected ({n},) and ({n}, {c})"
            )
        if len(set(self.ids)) != n:
            twice = next(row for row, count in Counter(self.ids).items() if count > 1)
            raise DataError(
                f"predictions have {(again := n - len(set(self.ids)))} repeated {agree(again, 'id', 'ids')}, for "
                f"example {twice!r}; each row needs its own"
            )
        if n and (self.labels.min() < 0 or self.labels.max() >= c):
            raise DataError(f"predictions have label ids {self.labels.min()}..{self.labels.max()}; allowed 0..{c - 1}")
        if not np.isfinite(self.probs).all():
            raise DataError("predictions have probabilities that are not finite")
        # A weighted sum of half-precision rows may be off by 1e-3; logits or per cent are off by far more.
        if n and (self.probs.min() < 0 or np.abs(self.probs.sum(axis=1, dtype=np.float64) - 1).max() > 5e-3):
            raise DataError(self._no_probabilities())
        own = self.sigmoid
        if own is not None and (own.shape != (n, c) or not ((own >= 0) & (own <= 1)).all()):
            raise DataError(
                f"probabilities of single classes should be ({n}, {c}) numbers from 0 to 1, got shape {own.shape}"
                + (f" and values from {own.min()} to {own.max()}" if own.size else "")
            )
        self._check_marks()
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != n):
            raise DataError(f"features should have a row for each of {n} images, got shape {self.features.shape}")
        if self.files is not None and len(self.files) != n:
            raise DataError(f"files should be {n} names, one for each image, got {len(self.files)}")
        if len(set(self.class_names)) != c:
            raise DataError("predictions have repeated class names; each class needs its own")
        columns = self.groups if self.clusters is None else {**self.groups, "cluster": self.clusters}
        for name, values in columns.items():
            if len(values) != n:
                raise DataError(f"column {name!r} has {len(values)} values for {n} rows")
        for name, values in self.levels.items():
            if len(values) != c:
                raise DataError(f"taxonomy level {name!r} has {len(values)} names for {c} classes")
        self._check_declared()

    def _check_marks(self) -> None:
        """Sets of classes and thresholds belong to probabilities of single classes, and have their shape."""
        n, c = self.probs.shape
        for marks in (self.positive, self.known):
            if marks is not None and (marks.shape != (n, c) or marks.dtype != bool):
                raise DataError(f"sets of classes should be ({n}, {c}) yes or no, got {marks.shape} of another kind")
        if self.known is not None and (self.positive is None or (self.positive & ~self.known).any()):
            raise DataError(
                "what is known of an image belongs to sets of classes, and an image shows no class of which that is "
                "not known"
            )
        if (self.positive is not None or self.thresholds is not None) and self.sigmoid is None:
            raise DataError(
                "sets of classes and thresholds need the probability of each class by itself (sigmoid_CLASS)"
            )
        least = self.thresholds
        if least is not None and (least.shape != (c,) or not ((least >= 0) & (least <= 1)).all()):
            raise DataError(f"thresholds should be {c} numbers from 0 to 1, one for each class")

    def _no_probabilities(self) -> str:
        """Names the first row that holds no probabilities, and what it may hold."""
        sums = self.probs.sum(axis=1, dtype=np.float64)
        bad = (self.probs < 0).any(axis=1) | (np.abs(sums - 1) > 5e-3)
        first = int(np.argmax(bad))
        mends = "; divide per cent by 100" if np.allclose(sums, 100, atol=0.5) else "; logits need a softmax first"
        return (
            f"predictions have {int(bad.sum()):,} {agree(int(bad.sum()), 'row', 'rows')} whose numbers are not "
            "probabilities: each must be >= 0 and sum to 1; "
            f"{self.ids[first]!r} has {self.probs[first].min():g} to {self.probs[first].max():g} with the sum "
            f"{sums[first]:g}{mends}"
        )

    def _check_declared(self) -> None:
        """Outcomes and intersections speak of levels, classes and groups that there are."""
        for outcome in self.outcomes:
            outcome.check(self.class_names, self.levels, several=self.several)
        for crossed in self.intersections:
            for name in crossed:
                if name not in self.groups:
                    has = did_you_mean(name, self.groups, lead="There are")
                    raise DataError(f"intersection {list(crossed)}: no group attribute {name!r}. {has}")

    def __repr__(self) -> str:
        """One line; the numbers are attributes."""
        units = "" if self.clusters is None else f", {len(set(self.clusters)):,} clusters"
        more = f", groups {', '.join(self.groups)}" if self.groups else ""
        return f"<Predictions: {len(self):,} images, {listed(self.class_names, 'classes')}{units}{more}>"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def several(self) -> bool:
        """Whether an image may show several classes, or none of them."""
        return self.positive is not None

    @property
    def shown_counts(self) -> np.ndarray:
        """(C,) images of each class; of several, those that show it."""
        if self.positive is not None:
            return self.positive.sum(axis=0)
        return np.bincount(self.labels, minlength=len(self.class_names))

    @property
    def names(self) -> tuple[str, ...]:
        """N names by which a person finds the images: those of their files, or the id of one that has none."""
        return self.ids if self.files is None else tuple(f or row for f, row in zip(self.files, self.ids, strict=True))

    @property
    def pred(self) -> np.ndarray:
        """(N,) int64 class decided for: the most probable one, of which the lowest id wins a tie."""
        return self.probs.argmax(axis=1) if self.decided is None else self.decided

    def save(self, path: Path | str) -> None:
        """Writes one Parquet file: id, file, label, pred, prob_<class id>, group:<name>, cluster; metadata has names.

        Where there are probabilities of single classes they are columns sigmoid_<class id>. Images that may show
        several classes have columns positive_<class id>, empty where that is not known, in the place of label and pred.

        Raises:
            StorageError: the file cannot be written.
        """
        import pyarrow as pa

        columns: dict[str, object] = {"id": list(self.ids)}
        columns |= {} if self.files is None else {"file": list(self.files)}
        columns |= {} if self.several else {"label": self.labels, "pred": self.pred}
        columns |= {f"prob_{c}": self.probs[:, c] for c in range(len(self.class_names))}
        if self.sigmoid is not None:
            columns |= {f"sigmoid_{c}": self.sigmoid[:, c] for c in range(len(self.class_names))}
        if self.positive is not None:
            unknown = np.zeros_like(self.positive) if self.known is None else ~self.known
            columns |= {
                f"positive_{c}": pa.array(self.positive[:, c], mask=unknown[:, c]) for c in range(len(self.class_names))
            }
        columns |= {f"group:{name}": list(values) for name, values in self.groups.items()}
        if self.clusters is not None:
            columns["cluster"] = list(self.clusters)
        metadata = {
            "class_names": list(self.class_names),
            "levels": {name: list(values) for name, values in self.levels.items()},
            "outcomes": [outcome.model_dump() for outcome in self.outcomes],
            "intersections": [list(crossed) for crossed in self.intersections],
            "ranked": self.ranked,
            "confident": self.confident,
            "notes": list(self.notes),
            "fixed_classes": self.fixed_classes,
            "thresholds": None if self.thresholds is None else self.thresholds.tolist(),
            "expected": self.expected and self.expected.model_dump(mode="json"),
            "made_by": self.made_by,
            "cluster_name": self.cluster_name,
        }
        write_parquet(Path(path), pa.table(columns), metadata)

    @classmethod
    def load(cls, path: Path | str, *, classes: Sequence[str] | None = None) -> Predictions:
        """Reads what `save` wrote, or the predictions of any other model (columns: `adaptclip.prediction_files`).

        Args:
            path: a Parquet, CSV or TSV file.
            classes: class names in the order of their ids, where labels are numbers and the file has no names.

        Raises:
            StorageError: the file is missing or damaged.
            DataError: a column is missing or its values do not fit; the message names the file and the column.
        """
        fields = read_predictions(Path(path), classes)
        fields["outcomes"] = tuple(Outcome.model_validate(outcome) for outcome in fields["outcomes"])
        fields["intersections"] = tuple(map(tuple, fields["intersections"]))
        fields["expected"] = fields["expected"] and Expected.model_validate(fields["expected"])
        try:
            return cls(**fields)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
