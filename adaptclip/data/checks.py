"""What is looked for in a data set before anything is trained on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from adaptclip.data.dataset import UNKNOWN, DomainData, ImageDataset
from adaptclip.data.fingerprints import Picture, pictures, similar_pairs
from adaptclip.errors import AdaptclipError, DataError, SplitError, did_you_mean

_EXAMPLES = 3


@dataclass(frozen=True)
class Problem:
    """Something found wrong.

    Attributes:
        check: its name in the card's `allow`; empty for what cannot be allowed.
        message: what is wrong, with examples, and how to mend it.
        error: the kind of error it is.
    """

    check: str
    message: str
    error: type[AdaptclipError]


def check_data(data: DomainData, *, found: Mapping[str, Picture] | None = None) -> list[str]:
    """Checks classes, labels, groups and leaks between the parts.

    Args:
        data: the data set.
        found: content digest -> picture hashes; None computes them.

    Returns:
        Sentences about problems that the card allows and about what else is worth knowing.

    Raises:
        SplitError: parts share pictures or clusters, or lack classes.
        DataError: classes, labels or groups are not usable.
    """
    problems = [*_check_names(data), *_check_labels(data)]
    if not problems:
        problems += [*_check_classes(data), *_check_groups(data), *_check_clusters(data), *_check_pictures(data, found)]
    fatal = [problem for problem in problems if problem.check not in data.card.allow]
    if fatal:
        lines = "\n  ".join(problem.message + _how_to_allow(problem) for problem in fatal)
        raise fatal[0].error(f"card {data.card.name}: the data did not pass the checks:\n  {lines}")
    allowed = [f"allowed by the card ({problem.check}): {problem.message}" for problem in problems]
    return [*allowed, *_remarks(data)]


def _how_to_allow(problem: Problem) -> str:
    return f" If it must be so, the card can say `allow: [{problem.check}]`." if problem.check else ""


def _check_names(data: DomainData) -> Iterator[Problem]:
    names, card = data.class_names, data.card
    if len(names) < 2:
        yield Problem(
            "",
            f"there is only one class ({', '.join(names) or 'none'}); a classifier needs at least two: add the images "
            "that it must be told apart from",
            DataError,
        )
    for name in card.aliases:
        if name not in names:
            yield Problem("", f"aliases has no class {name!r}. {did_you_mean(name, names)}", DataError)
    words = defaultdict(list)
    for name in names:
        spoken = " ".join(card.aliases.get(name, name).replace("_", " ").split())
        words[spoken.casefold()].append(name)
    for same in words.values():
        if len(same) > 1:
            yield Problem(
                "",
                f"the classes {', '.join(map(repr, same))} read the same in a prompt; merge them, or tell them apart "
                "by other words under `aliases`",
                DataError,
            )
    if "" in words:
        yield Problem("", "a class has no name; CLIP needs words for each class", DataError)


def _check_labels(data: DomainData) -> Iterator[Problem]:
    for part, images in data.parts.items():
        wrong = np.flatnonzero((images.labels < 0) | (images.labels >= len(data.class_names)))
        if len(wrong):
            yield Problem(
                "",
                f"{len(wrong)} {part} images have a label id out of range, for example {images.labels[wrong[0]]} "
                f"({images.where(int(wrong[0]))}); allowed are 0 to {len(data.class_names) - 1}",
                DataError,
            )


def _check_classes(data: DomainData) -> Iterator[Problem]:
    for part in ("train", "test"):
        missing = _missing_classes(data, data.parts[part])
        if missing:
            yield Problem(
                "missing_classes",
                f"{len(missing)} of {len(data.class_names)} classes have no {part} image: {_listed(missing)}. Add "
                "some, or take the classes out.",
                SplitError,
            )


def _missing_classes(data: DomainData, images: ImageDataset) -> list[str]:
    return [data.class_names[c] for c in np.flatnonzero(images.class_counts() == 0)]


def _check_groups(data: DomainData) -> Iterator[Problem]:
    card, known = data.card, data.test.groups
    for place, name in [*(("groups", n) for n in card.groups), *(("gates", r.group) for r in card.gates if r.group)]:
        if name not in known:
            yield Problem("", f"{place} of the card has no group {name!r}. {did_you_mean(name, known)}", DataError)
    for name, values in known.items():
        empty = sorted(set(card.groups[name].names) - set(values)) if name in card.groups else []
        if set(values) <= {UNKNOWN}:
            yield Problem(
                "empty_groups",
                f"group {name!r} is unknown for every test image; fill its column, or take it out of columns.groups.",
                DataError,
            )
        elif empty:
            yield Problem(
                "empty_groups",
                f"group {name!r} has no test image in {_listed(empty)}; merge bins, or add images.",
                DataError,
            )


def _check_clusters(data: DomainData) -> Iterator[Problem]:
    for (first, a), (second, b) in combinations(data.parts.items(), 2):
        shared = sorted(set(a.clusters or ()) & set(b.clusters or ()))
        if shared:
            rows = sum(cluster in set(shared) for cluster in b.clusters or ())
            yield Problem(
                "shared_clusters",
                f"{len(shared)} clusters ({data.card.columns.cluster or 'cluster'}) are in both {first} and {second}, "
                f"with {rows} {second} images: {_listed(shared)}. What was learnt from one image of a patient or site "
                "helps with the next, so the result would be too good. Put each cluster into one split; "
                "`splits: {fractions: …}` does.",
                SplitError,
            )


def _check_pictures(data: DomainData, found: Mapping[str, Picture] | None) -> Iterator[Problem]:
    for (first, a), (second, b) in combinations(data.parts.items(), 2):
        rows = {content: row for row, content in enumerate(a.contents)}
        copies = [(rows[content], row) for row, content in enumerate(b.contents) if content in rows]
        if copies:
            yield _leak("duplicate_pictures", "are the same file as", first, second, a, b, copies)
        hashes_a, hashes_b = (_pictures_of(images, found) for images in (a, b))
        alike = {j: i for i, j in similar_pairs(hashes_a, hashes_b) if a.contents[i] != b.contents[j]}
        if alike:
            pairs = [(i, j) for j, i in sorted(alike.items())]
            yield _leak("similar_pictures", "look the same as", first, second, a, b, pairs)


def _pictures_of(images: ImageDataset, found: Mapping[str, Picture] | None) -> list[Picture]:
    if found is not None:
        return [found[content] for content in images.contents]
    return pictures(images.read, images.contents, where=images.where, window=images.window, store=None)


def _leak(
    check: str, what: str, first: str, second: str, a: ImageDataset, b: ImageDataset, pairs: list[tuple[int, int]]
) -> Problem:
    shown = [f"{b.where(j)} and {a.where(i)}" for i, j in pairs[:_EXAMPLES]]
    return Problem(
        check,
        f"{len(pairs)} of {len(b)} {second} images {what} a {first} image: {'; '.join(shown)}"
        f"{' …' if len(pairs) > _EXAMPLES else ''}. The model would be asked what it was shown. Remove them from one "
        "of the splits, or let the split be made here (`splits: {fractions: …}` keeps them together).",
        SplitError,
    )


def _remarks(data: DomainData) -> list[str]:
    remarks = []
    if len(data.validation):
        missing = _missing_classes(data, data.validation)
        if missing:
            remarks.append(f"{len(missing)} classes have no validation image: {_listed(missing)}")
    for name, values in data.test.groups.items():
        counts = Counter(values)
        if 0 < counts[UNKNOWN] < len(values):
            remarks.append(f"group {name!r} is unknown for {counts[UNKNOWN]} of {len(values)} test images")
    return remarks


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_EXAMPLES])
    return shown + (f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else "")
