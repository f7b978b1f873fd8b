"""Classes that come from one group only, so that nobody can tell what a model learnt: the class or the group."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.stats import hypergeom

from adaptclip.data.dataset import UNKNOWN, DomainData

ALWAYS = 0.95
"""From this share of its images on a class counts as being always of one group."""

SELDOM = 0.01
"""Chance explains what has a probability of at least this."""

_EXAMPLES = 3


def inseparable(data: DomainData) -> tuple[str, ...]:
    """Returns a sentence for each attribute of which some classes are (nearly) always of one group and others are not.

    A class counts where at least ALWAYS of its images are of one group and chance does not explain it: Fisher's exact
    test against the images of the other classes, one-sided, below SELDOM. Images of all parts are counted, those of an
    unknown group left out. Attributes that are a level of the taxonomy are passed over: a class has one value of them
    by definition.
    """
    parts = [part for part in data.parts.values() if len(part)]
    labels = np.concatenate([part.labels for part in parts])
    sentences = []
    for name in data.test.groups:
        values = np.asarray([value for part in parts for value in part.groups.get(name, (UNKNOWN,) * len(part))])
        pairs = set(zip(labels.tolist(), values.tolist(), strict=True))
        if any(pairs <= set(enumerate(level)) for level in data.test.levels.values()):
            continue
        known = values != UNKNOWN
        found = [words for c in np.unique(labels[known]) if (words := _one_group(data, labels, values, known, int(c)))]
        if found:
            more = f"; and so for {len(found) - _EXAMPLES} more classes" if len(found) > _EXAMPLES else ""
            sentences.append(
                f"{name} and class cannot be told apart: {'; '.join(found[:_EXAMPLES])}{more}. What is learnt of the "
                f"class may be the {name}"
            )
    return tuple(sentences)


def _one_group(data: DomainData, labels: np.ndarray, values: np.ndarray, known: np.ndarray, c: int) -> str:
    """Words how a class is of one group only, or "" where it is not."""
    own, others = values[known & (labels == c)].tolist(), values[known & (labels != c)].tolist()
    group, count = Counter(own).most_common(1)[0]
    elsewhere = others.count(group)
    if not others or count < ALWAYS * len(own) or elsewhere == len(others):
        return ""
    chance = hypergeom.sf(count - 1, len(own) + len(others), count + elsewhere, len(own))
    if chance >= SELDOM:
        return ""
    all_of = f"all {count}" if count == len(own) else f"{count} of {len(own)}"
    return (
        f"{all_of} images of {data.class_names[c]!r} are of {group!r}, but {elsewhere} of {len(others)} of the other "
        "classes"
    )
