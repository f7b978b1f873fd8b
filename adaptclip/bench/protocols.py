# SPDX-License-Identifier: Apache-2.0
"""The protocols: what is learnt from, and which images are judged among which classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptclip.data.dataset import DomainData, ImageDataset
from adaptclip.data.shots import (
    FewShotSplit,
    Rule,
    base_and_new,
    class_order,
    imbalanced_shots,
    missing_classes,
    sample_few_shot,
    without_classes,
)
from adaptclip.errors import ConfigError, SplitError
from adaptclip.prompts import clean_class_name

HARMONIC_MEAN = "harmonic mean"
"""Name of the row that joins two judged sets: 2 a b / (a + b) of each seed's two accuracies."""


@dataclass(frozen=True)
class Judged:
    """Test images and the classes they are judged among.

    Attributes:
        name: what tables call it.
        data: its class names are those to choose from, and its test part is read.
        learnt: whether these are the classes that were learnt; otherwise they are known by their names alone.
        classes: judge only images of these label ids, among all classes; empty judges all.
    """

    name: str
    data: DomainData
    learnt: bool = True
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One draw of a protocol.

    Attributes:
        data: what is learnt from; its class names are those that are learnt.
        split: the images that a method may see, to learn from and to choose settings with.
        judged: what is judged after every choice is made.
        joined: names of two judged sets whose harmonic mean is a row of its own, or None.
    """

    data: DomainData
    split: FewShotSplit
    judged: tuple[Judged, ...]
    joined: tuple[str, str] | None = None


Draw = Callable[[DomainData, Sequence[DomainData], int, int, Rule], Case]


@dataclass(frozen=True)
class Protocol:
    """How cases are drawn.

    Attributes:
        draw: (source, targets, shots, seed, rule) to a case.
        about: one sentence for reports.
        takes_targets: whether it needs cards to judge on beside the one learnt from.
        new_names: whether classes are judged that were not learnt, so that a method must take new names.
    """

    draw: Draw
    about: str
    takes_targets: bool = False
    new_names: bool = False


def _all_classes(data: DomainData, targets: Sequence[DomainData], shots: int, seed: int, rule: Rule) -> Case:
    return Case(data, sample_few_shot(data, shots=shots, seed=seed, rule=rule), (Judged("test", data),))


def _base_to_new(data: DomainData, targets: Sequence[DomainData], shots: int, seed: int, rule: Rule) -> Case:
    base, new = base_and_new(data)
    split = sample_few_shot(base, shots=shots, seed=seed, rule=rule)
    return Case(base, split, (Judged("base", base), Judged("new", new, learnt=False)), ("base", "new"))


def _cross_dataset(data: DomainData, targets: Sequence[DomainData], shots: int, seed: int, rule: Rule) -> Case:
    own = _all_classes(data, targets, shots, seed, rule)
    others = [Judged(target.card.name, target, learnt=False) for target in targets]
    return replace(own, judged=(Judged(data.card.name, data), *others))


def _domain_shift(data: DomainData, targets: Sequence[DomainData], shots: int, seed: int, rule: Rule) -> Case:
    own = _all_classes(data, targets, shots, seed, rule)
    others = [Judged(target.card.name, as_classes_of(target, data)) for target in targets]
    return replace(own, judged=(Judged(data.card.name, data), *others))


def _imbalanced(data: DomainData, targets: Sequence[DomainData], shots: int, seed: int, rule: Rule) -> Case:
    split = imbalanced_shots(sample_few_shot(data, shots=shots, seed=seed, rule=rule), data)
    order = class_order(data, seed)
    half = -(-len(order) // 2)
    frequent, rare = tuple(sorted(order[:half])), tuple(sorted(order[half:]))
    parts = (Judged("frequent classes", data, classes=frequent), Judged("rare classes", data, classes=rare))
    return Case(data, split, (Judged("test", data), *parts))


def _missing_class(data: DomainData, targets: Sequence[DomainData], shots: int, seed: int, rule: Rule) -> Case:
    missing = missing_classes(data, seed)
    split = without_classes(sample_few_shot(data, shots=shots, seed=seed, rule=rule), data, missing)
    seen = tuple(sorted(set(range(len(data.class_names))) - set(missing)))
    parts = (Judged("seen classes", data, classes=seen), Judged("missing classes", data, classes=missing))
    return Case(data, split, (Judged("test", data), *parts), ("seen classes", "missing classes"))


PROTOCOLS: dict[str, Protocol] = {
    "all-classes": Protocol(_all_classes, "k images of every class are learnt from, all test images are judged (CoOp)"),
    "base-to-new": Protocol(
        _base_to_new,
        "the first half of the classes is learnt; the test images of either half are judged among its own classes, the "
        "new half by its names alone (CoCoOp)",
        new_names=True,
    ),
    "cross-dataset": Protocol(
        _cross_dataset,
        "the classes of one card are learnt, those of the target cards are judged by their names alone",
        takes_targets=True,
        new_names=True,
    ),
    "domain-shift": Protocol(
        _domain_shift,
        "the classes of one card are learnt and judged on the target cards, which show the same classes otherwise",
        takes_targets=True,
    ),
    "imbalanced": Protocol(
        _imbalanced,
        "a long tail: from k images of the most frequent class down to k / 10 (at least 1), the order of the classes "
        "drawn by the seed",
    ),
    "missing-class": Protocol(
        _missing_class,
        "a quarter of the classes, drawn by the seed, has no image at all; the method knows their names",
    ),
}
"""Protocol name -> how its cases are drawn."""


def as_classes_of(target: DomainData, source: DomainData) -> DomainData:
    """Returns a data set whose test images carry the label ids of another one's classes of the same names.

    Raises:
        SplitError: the target has a class that the source does not have; the message names it.
    """
    known = {clean_class_name(name).casefold(): label for label, name in enumerate(source.class_names)}
    ids = []
    for name in target.class_names:
        label = known.get(clean_class_name(name).casefold())
        if label is None:
            raise SplitError(
                f"card {target.card.name} has the class {name!r}, card {source.card.name} has not: a domain shift "
                "shows the same classes otherwise. Rename it (`class_names` in the card), or take "
                "--protocol cross-dataset"
            )
        ids.append(label)
    new_id = np.asarray(ids)
    parts = {name: _renamed(part, new_id, source.class_names) for name, part in target.parts.items()}
    return replace(target, class_names=source.class_names, **parts)


def _renamed(images: ImageDataset, new_id: np.ndarray, class_names: tuple[str, ...]) -> ImageDataset:
    images.require_one_class("a shift between domains")
    return replace(images, labels=new_id[images.labels], class_names=class_names, levels={})


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError where two cards have one name, which is what results are told apart by."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two cards are called {name}; results are told apart by the names of their cards")


def check_targets(protocol: str, targets: Sequence[str]) -> None:
    """Raises ConfigError unless target cards are given exactly where a protocol needs them."""
    needs = PROTOCOLS[protocol].takes_targets
    if needs and not targets:
        raise ConfigError(f"the protocol {protocol} judges on other cards: name them with --targets")
    if targets and not needs:
        kinds = [name for name, kind in PROTOCOLS.items() if kind.takes_targets]
        raise ConfigError(
            f"the protocol {protocol} has no target cards, got {', '.join(targets)}; they belong to "
            f"{' and '.join(kinds)}"
        )
