# SPDX-License-Identifier: Apache-2.0
"""Few-shot splits: which images are learnt from, drawn by a named rule and written down as a manifest.

Rules:
    nested: each class's images are put into one random order and the first k are taken, so that 1 ⊂ 2 ⊂ 4 ⊂ 8 ⊂ 16.
        Images of different clusters come first.
    coop: a fresh uniform draw without replacement for every k, training images before validation images (Zhou et al.,
        "Learning to Prompt for Vision-Language Models", IJCV 2022). The published code draws from Python's global
        generator after whatever used it before, so its very images cannot be reproduced.
Under both, a class with fewer than k images gives all it has. Where images show several classes, each class draws its
k among the images that show it, and those that show none draw k as well; an image drawn for several is taken once, so
that a class may have more than k.

Uneven splits start from a balanced one and leave images out, class by class in the order of the draw, so that what is
learnt from is part of what the balanced split has. The manifest lists the images that are left; nothing else is needed
to draw it again. The base-to-new protocol learns half of the classes and judges the other half by its names alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from adaptclip.errors import SplitError, did_you_mean
from adaptclip.files import digest, read_json, write_json
from adaptclip.seeding import numpy_generator

if TYPE_CHECKING:
    from adaptclip.data.dataset import DomainData, ImageDataset


def base_and_new(data: DomainData) -> tuple[DomainData, DomainData]:
    """Cuts the classes of a data set in two: the first ceil(C / 2) label ids are base, the rest new.

    The protocol of CoCoOp (Zhou et al. 2022, arXiv:2203.05557, sec. 4.1). Label ids are numbered anew in either half.

    Raises:
        SplitError: there is only one class.
    """
    names = data.class_names
    if len(names) < 2:
        raise SplitError(f"base and new classes need at least two classes, card {data.card.name} has {len(names)}")
    half = -(-len(names) // 2)
    return select_classes(data, range(half)), select_classes(data, range(half, len(names)))


def select_classes(data: DomainData, classes: Sequence[int]) -> DomainData:
    """Returns the images of some classes (old label ids, rising), numbered 0, 1, … in that order."""
    data.test.require_one_class("dividing the classes into base and new")
    parts = {name: _of_classes(part, classes) for name, part in data.parts.items()}
    return replace(data, class_names=tuple(data.class_names[c] for c in classes), **parts)


def _of_classes(images: ImageDataset, classes: Sequence[int]) -> ImageDataset:
    new_id = np.full(len(images.class_names), -1)
    new_id[list(classes)] = np.arange(len(classes))
    kept = images.select(np.flatnonzero(new_id[images.labels] >= 0))
    return replace(
        kept,
        labels=new_id[kept.labels],
        class_names=tuple(images.class_names[c] for c in classes),
        levels={name: tuple(values[c] for c in classes) for name, values in images.levels.items()},
    )


def harmonic_mean(base: float, new: float) -> float:
    """Returns 2 base new / (base + new), 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


NONE = "none of these"
"""What images draw as that show none of the classes."""

Rule = Literal["nested", "coop"]
MAX_VAL_SHOTS = 4
_FORMAT = "adaptclip few-shot split 1"


@dataclass(frozen=True)
class FewShotSplit:
    """A drawn split, by row ids.

    Attributes:
        card: name of the card.
        data_digest: digest of the training and validation images that it was drawn from.
        shots: images per class asked for; 0 is all.
        val_shots: validation images per class asked for; None is all of the validation part.
        seed: seed of the draw.
        rule: how it was drawn.
        train: ids to learn from, class by class.
        validation: ids to choose settings with.
        short_classes: classes that have fewer training images than asked for -> how many they have.
    """

    card: str
    data_digest: str
    shots: int
    val_shots: int | None
    seed: int
    rule: Rule
    train: tuple[str, ...]
    validation: tuple[str, ...]
    short_classes: dict[str, int]

    @property
    def digest(self) -> str:
        """SHA-256 of all fields."""
        return digest(json.dumps(asdict(self), sort_keys=True, ensure_ascii=False))

    def save(self, path: Path | str) -> None:
        """Writes the manifest as JSON, atomically. Raises StorageError when it cannot be written."""
        write_json(Path(path), {"format": _FORMAT, **asdict(self), "digest": self.digest})

    @classmethod
    def load(cls, path: Path | str) -> FewShotSplit:
        """Reads what `save` wrote.

        Raises:
            StorageError: the file is missing or damaged.
            SplitError: it is no few-shot manifest, or was changed by hand.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise SplitError(f"{path} is not a few-shot manifest of this version ({_FORMAT!r}); draw the split again")
        stated = content.pop("digest", None)
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        try:
            split = cls(**fields)
        except TypeError as error:
            raise SplitError(f"{path} is not a whole few-shot manifest ({error}); draw the split again") from error
        if split.digest != stated:
            raise SplitError(f"{path} was changed after it was written (its digest does not fit); draw the split again")
        return split

    def check(self, data: DomainData) -> None:
        """Raises SplitError unless the split was drawn from exactly these images."""
        if self.data_digest != _data_digest(data):
            known = {*data.train.ids, *data.validation.ids}
            lost = [row for row in (*self.train, *self.validation) if row not in known]
            detail = f"{len(lost)} of its images are not there" if lost else "labels, images or groups changed"
            raise SplitError(
                f"the few-shot split of card {self.card!r} was drawn from other data than card {data.card.name!r} now "
                f"gives ({detail}). Use the data it was drawn from, or draw a new split"
            )

    def select(self, data: DomainData) -> tuple[ImageDataset, ImageDataset]:
        """Returns the training and the validation images of the split.

        Raises:
            SplitError: it was drawn from other data.
        """
        self.check(data)
        row_of = {row: i for i, row in enumerate(data.train.ids)}
        train = data.train.select([row_of[row] for row in self.train])
        if all(row in row_of for row in self.validation):
            return train, data.train.select([row_of[row] for row in self.validation])
        row_of = {row: i for i, row in enumerate(data.validation.ids)}
        return train, data.validation.select([row_of[row] for row in self.validation])


def sample_few_shot(
    data: DomainData, *, shots: int, seed: int, rule: Rule = "nested", val_shots: int | None = None
) -> FewShotSplit:
    """Draws images to learn from and images to choose settings with; the test part is not touched.

    No cluster and no copy of an image is in both. The draw depends on the ids, not on the order of rows.

    Args:
        data: the data set.
        shots: training images per class; 0 takes all.
        seed: 0 is a seed like any other.
        rule: see the head of this module.
        val_shots: validation images per class; by default min(shots, 4), or the whole validation part for shots 0.
            They come from the validation part, or else from the training images that are left over.

    Raises:
        SplitError: a number or the rule is not valid, or there are no training images.
    """
    if rule not in get_args(Rule):
        raise SplitError(f"no few-shot rule {rule!r}. {did_you_mean(str(rule), get_args(Rule))}")
    for name, value in (("shots", shots), ("val_shots", val_shots)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise SplitError(f"{name} must be a whole number from 0 up, got {value!r}")
    if val_shots is None and shots > 0:
        val_shots = min(shots, MAX_VAL_SHOTS)
    rng = _Draws(rule, seed, shots)
    train = rng.draw(data.train, range(len(data.train)), shots or None, "train")
    source = data.validation if len(data.validation) else data.train
    left = range(len(source)) if source is data.validation else _left_over(source, train)
    validation = rng.draw(source, left, val_shots, "validation") if val_shots != 0 else []
    if not train:
        raise SplitError(f"card {data.card.name}: there are no training images to draw from")
    counts = data.train.class_counts()
    return FewShotSplit(
        card=data.card.name,
        data_digest=_data_digest(data),
        shots=shots,
        val_shots=val_shots,
        seed=seed,
        rule=rule,
        train=tuple(data.train.ids[i] for i in train),
        validation=tuple(source.ids[i] for i in validation),
        short_classes={data.class_names[c]: int(n) for c, n in enumerate(counts) if n < shots},
    )


def _data_digest(data: DomainData) -> str:
    return digest(data.train.digest, data.validation.digest)


@dataclass(frozen=True)
class _Draws:
    rule: Rule
    seed: int
    shots: int

    def draw(self, images: ImageDataset, rows: Sequence[int], count: int | None, part: str) -> list[int]:
        """Returns `count` (None: all) of `rows` per class, class by class, each class in the order of the draw."""
        by_class: defaultdict[int, list[int]] = defaultdict(list)
        kinds, names = images.kinds(), (*images.class_names, NONE)
        for row in sorted(rows, key=lambda row: images.ids[row]):
            if count is not None and images.nothing_known(row):
                continue  # it would teach nothing, and is none of "none of these"
            for kind in kinds[row]:
                by_class[kind].append(row)
        chosen: list[int] = []
        for label in sorted(by_class):
            # A generator per class: a class that gains an image does not change what is drawn of the others.
            purpose = [part, names[label], *([self.shots] if self.rule == "coop" else [])]
            order = numpy_generator(self.seed, "few-shot", self.rule, *purpose).permutation(by_class[label]).tolist()
            if self.rule == "nested" and images.clusters is not None:
                order = _clusters_first(order, images.clusters)
            chosen += order[:count]
        return list(dict.fromkeys(chosen))


def _clusters_first(order: list[int], clusters: Sequence[str]) -> list[int]:
    """Reorders rows: the first of each cluster, then the second of each, and so on."""
    seen: defaultdict[str, int] = defaultdict(int)
    turn = []
    for row in order:
        turn.append(seen[clusters[row]])
        seen[clusters[row]] += 1
    return [order[i] for i in np.argsort(turn, kind="stable")]


def _left_over(images: ImageDataset, taken: Sequence[int]) -> list[int]:
    """Returns the rows that share neither image nor cluster with `taken`."""
    columns = [images.contents] if images.clusters is None else [images.contents, images.clusters]
    used = [{column[row] for row in taken} for column in columns]
    taken_rows = set(taken)
    return [
        row
        for row in range(len(images))
        if row not in taken_rows and not any(column[row] in seen for column, seen in zip(columns, used, strict=True))
    ]


def class_order(data: DomainData, seed: int) -> tuple[int, ...]:
    """Returns all label ids in a random order that the seed alone decides: who keeps its images, the first before all.

    It is drawn and not taken from the data, so that what a rare class costs is not mixed up with which class is rare.
    """
    data.test.require_one_class("a long tail of classes")
    order = numpy_generator(seed, "uneven shots").permutation(len(data.class_names))
    return tuple(int(c) for c in order)


def imbalanced_shots(split: FewShotSplit, data: DomainData, *, ratio: float = 10.0) -> FewShotSplit:
    """Thins a split out to an exponential long tail (Cui et al. 2019, arXiv:1901.05555, sec. 5).

    The class at place r of C in `class_order` keeps max(1, round(k · ratio^(-r / (C - 1)))) of its k images, and as
    many validation images at most: a class with one labelled image has no four others.

    Args:
        split: drawn from `data`.
        data: the data set.
        ratio: of the most to the fewest images, 1 or more.

    Raises:
        SplitError: the ratio is below 1, there is one class only, or the split is of other data.
    """
    if not 1 <= ratio < float("inf"):
        raise SplitError(f"the ratio of the most to the fewest images must be a number from 1 up, got {ratio}")
    order = class_order(data, split.seed)
    if len(order) < 2:
        raise SplitError(f"an imbalanced split needs at least two classes, card {data.card.name} has {len(order)}")
    split.check(data)
    found, kept = _by_class(split.train, data), {}
    for place, label in enumerate(order):
        share = ratio ** (-place / (len(order) - 1))
        kept[label] = max(1, round(len(found[label]) * share))
    return _keep(split, data, kept)


def missing_classes(data: DomainData, seed: int, *, share: float = 0.25) -> tuple[int, ...]:
    """Returns the label ids that have no image: the last round(share · C) of `class_order`, one or more, not all.

    Raises:
        SplitError: there is one class only, or the share is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise SplitError(f"the share of missing classes must lie between 0 and 1, got {share}")
    order = class_order(data, seed)
    if len(order) < 2:
        raise SplitError(f"missing classes need at least two classes, card {data.card.name} has {len(order)}")
    count = min(max(1, round(share * len(order))), len(order) - 1)
    return tuple(sorted(order[-count:]))


def without_classes(split: FewShotSplit, data: DomainData, missing: Sequence[int]) -> FewShotSplit:
    """Takes all images of some classes out of a split; their names stay among the classes to choose from.

    Raises:
        SplitError: a class is not one of the data, none would be left, or the split is of other data.
    """
    known = range(len(data.class_names))
    if not set(missing) < set(known):
        raise SplitError(f"missing classes must be some of the label ids 0..{len(known) - 1}, got {sorted(missing)}")
    split.check(data)
    found = _by_class(split.train, data)
    return _keep(split, data, {label: 0 if label in missing else len(found[label]) for label in known})


def _by_class(ids: Sequence[str], data: DomainData) -> defaultdict[int, list[str]]:
    """Label id -> its ids, in their order."""
    label_of = {
        row: int(label)
        for part in (data.train, data.validation)
        for row, label in zip(part.ids, part.labels, strict=True)
    }
    found: defaultdict[int, list[str]] = defaultdict(list)
    for row in ids:
        found[label_of[row]].append(row)
    return found


def _keep(split: FewShotSplit, data: DomainData, kept: dict[int, int]) -> FewShotSplit:
    """Keeps the first images of every class, and no more validation images than training images."""
    train, validation = (
        tuple(row for label, rows in sorted(_by_class(ids, data).items()) for row in rows[: kept[label]])
        for ids in (split.train, split.validation)
    )
    short = {
        data.class_names[label]: min(count, len(_by_class(split.train, data)[label]))
        for label, count in sorted(kept.items())
        if count < split.shots or split.shots == 0
    }
    return replace(split, train=train, validation=validation, short_classes=short)
