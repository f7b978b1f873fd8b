"""The values that travel between the modules, and the one legend of shapes.

Legend of shapes, used in every docstring:
    B  images in a batch            N  images in a data set or split
    C  classes                      D  width of the joint embedding space
    L  tokens of a prompt           T  width of the text transformer
    M  learnt context tokens        V  numbered augmented views of an image
    K  k of a top-k                 H, W  height and width in pixels
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from adaptclip.errors import DataError, did_you_mean
from adaptclip.storage import read_parquet, write_parquet

METRICS = ("accuracy", "mean_per_class_accuracy", "top5_accuracy", "ece")
"""Names of the metrics that a gate can be set on; `ece` is better when lower, the others when higher."""


@dataclass(frozen=True)
class Batch:
    """One step's images, as features (frozen tower) or pixels, with their labels.

    Attributes:
        labels: (B,) int64 class ids.
        index: (B,) int64 positions in the split the batch was drawn from.
        features: (B, D) unit-norm image features, or None.
        images: (B, 3, H, W) transformed pixels, or None.
        tokens: (B, L) int64 token ids of one text per image, or None.
    """

    labels: Tensor
    index: Tensor
    features: Tensor | None = None
    images: Tensor | None = None
    tokens: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Features:
    """Image features of a whole split.

    Attributes:
        values: (V, N, D) float32, unit norm; V is 1 for the evaluation transform.
        labels: (N,) int64.
        ids: N row ids.
        weights: digest of the image weights that made them (`ClipBackbone.image_digest`); "" where it is not known.
    """

    values: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    weights: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Predictions:
    """One row per judged image; all that reports and gates ever see, whichever model made it.

    Attributes:
        ids: N row ids, all different.
        labels: (N,) int64 true class ids.
        probs: (N, C) float32 class probabilities, each row summing to 1.
        class_names: C names.
        groups: attribute name -> N values as text; a missing value is "unknown".
        clusters: N cluster ids (patients, sites), the unit of resampling; None where each image is its own.
        levels: taxonomy level name -> C coarse names, one per class; coarse to fine.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    probs: np.ndarray
    class_names: tuple[str, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    clusters: tuple[str, ...] | None = None
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, c = len(self.ids), len(self.class_names)
        if self.probs.shape != (n, c) or self.labels.shape != (n,):
            raise DataError(
                f"predictions do not fit together: {n} ids, labels {self.labels.shape}, "
                f"probabilities {self.probs.shape}; expected ({n},) and ({n}, {c})"
            )
        if len(set(self.ids)) != n:
            raise DataError(f"predictions have {n - len(set(self.ids))} repeated ids; each row needs its own")
        if n and (self.labels.min() < 0 or self.labels.max() >= c):
            raise DataError(f"predictions have label ids {self.labels.min()}..{self.labels.max()}; allowed 0..{c - 1}")
        if not np.isfinite(self.probs).all():
            raise DataError("predictions have probabilities that are not finite")
        # A weighted sum of half-precision rows may be off by 1e-3; logits or per cent are off by far more.
        if n and (self.probs.min() < 0 or np.abs(self.probs.sum(axis=1, dtype=np.float64) - 1).max() > 5e-3):
            raise DataError("predictions have rows that are not probabilities: each must be >= 0 and sum to 1")
        if len(set(self.class_names)) != c:
            raise DataError("predictions have repeated class names; each class needs its own")
        columns = self.groups if self.clusters is None else {**self.groups, "cluster": self.clusters}
        for name, values in columns.items():
            if len(values) != n:
                raise DataError(f"column {name!r} has {len(values)} values for {n} rows")
        for name, values in self.levels.items():
            if len(values) != c:
                raise DataError(f"taxonomy level {name!r} has {len(values)} names for {c} classes")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pred(self) -> np.ndarray:
        """(N,) int64 most probable class; the lowest id wins a tie."""
        return self.probs.argmax(axis=1)

    def save(self, path: Path | str) -> None:
        """Writes one Parquet file: id, label, pred, prob_<class id>, group:<name>, cluster; names in the metadata.

        Raises:
            StorageError: the file cannot be written.
        """
        columns: dict[str, object] = {"id": list(self.ids), "label": self.labels, "pred": self.pred}
        columns |= {f"prob_{c}": self.probs[:, c] for c in range(len(self.class_names))}
        columns |= {f"group:{name}": list(values) for name, values in self.groups.items()}
        if self.clusters is not None:
            columns["cluster"] = list(self.clusters)
        levels = {name: list(values) for name, values in self.levels.items()}
        write_parquet(Path(path), pa.table(columns), {"class_names": list(self.class_names), "levels": levels})

    @classmethod
    def load(cls, path: Path | str) -> Predictions:
        """Reads what `save` wrote.

        Raises:
            StorageError: the file is missing or damaged.
            DataError: a column is missing or its values do not fit.
        """
        table, metadata = read_parquet(Path(path))
        names = tuple(metadata.get("class_names", ()))
        missing = [c for c in ("id", "label", *(f"prob_{i}" for i in range(len(names)))) if c not in table.column_names]
        if missing or not names:
            raise DataError(f"{path} is not a predictions file of adaptclip: it lacks {missing or 'class names'}")
        groups = {
            c.removeprefix("group:"): tuple("unknown" if v is None else str(v) for v in table[c].to_pylist())
            for c in table.column_names
            if c.startswith("group:")
        }
        return cls(
            ids=tuple(table["id"].to_pylist()),
            labels=table["label"].to_numpy().astype(np.int64),
            probs=np.stack([table[f"prob_{i}"].to_numpy() for i in range(len(names))], axis=1).astype(np.float32),
            class_names=names,
            groups=groups,
            clusters=tuple(table["cluster"].to_pylist()) if "cluster" in table.column_names else None,
            levels={name: tuple(values) for name, values in metadata.get("levels", {}).items()},
        )


class GateRule(BaseModel):
    """One declared condition for release. Exactly one of `at_least`, `at_most`, `no_worse_than` is given.

    Attributes:
        metric: one of METRICS; rates are 0 to 1.
        group: attribute whose every group must satisfy the rule; None judges all images together.
        at_least: lowest acceptable value.
        at_most: highest acceptable value.
        no_worse_than: the reference model of a paired comparison.
        margin: slack in the metric's own unit (0.02 is 2 points), for `no_worse_than`.
        confidence: level of the interval that must lie on the right side.
        min_n: fewest images (of the smallest group, where there are groups) that allow a verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = "accuracy"
    group: str | None = None
    at_least: float | None = Field(default=None, ge=0, le=1)
    at_most: float | None = Field(default=None, ge=0, le=1)
    no_worse_than: Literal["zero_shot"] | None = None
    margin: float = Field(default=0.0, ge=0, le=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    min_n: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _check(self) -> GateRule:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}. {did_you_mean(self.metric, METRICS)}")
        given = [n for n in ("at_least", "at_most", "no_worse_than") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of at_least, at_most, no_worse_than; got {given or 'none'}")
        wrong = "at_least" if self.metric == "ece" else "at_most"
        if given == [wrong]:
            better = "lower" if self.metric == "ece" else "higher"
            right = "at_most" if self.metric == "ece" else "at_least"
            raise ValueError(f"{self.metric} is better when {better}: use {right}, not {wrong}")
        if self.margin and not self.no_worse_than:
            raise ValueError("margin belongs to no_worse_than; put the slack into the limit itself")
        return self

    @property
    def title(self) -> str:
        """The rule in words, for tables and errors."""
        subject = self.metric + (f" of every {self.group}" if self.group else "")
        if self.no_worse_than:
            return f"{subject} no worse than {self.no_worse_than}" + (f" − {self.margin:g}" if self.margin else "")
        return f"{subject} ≥ {self.at_least:g}" if self.at_least is not None else f"{subject} ≤ {self.at_most:g}"
