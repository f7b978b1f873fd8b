"""Few-shot splits that are not balanced: classes with fewer images than others, and classes without any.

Both start from a balanced split and leave images out, class by class in the order of the draw, so that what is learnt
from is part of what the balanced split has. The manifest lists the images that are left; nothing else is needed to draw
it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from adaptclip.data.dataset import DomainData
from adaptclip.data.fewshot import FewShotSplit
from adaptclip.errors import SplitError
from adaptclip.seeding import numpy_generator


def class_order(data: DomainData, seed: int) -> tuple[int, ...]:
    """Returns all label ids in a random order that the seed alone decides: who keeps its images, the first before all.

    It is drawn and not taken from the data, so that what a rare class costs is not mixed up with which class is rare.
    """
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
