# SPDX-License-Identifier: Apache-2.0
"""What is looked for in a data set before anything is trained on it.

Among it: columns that divide the images into training and test by their values, whatever the column is called, and
classes that come from one group only, so that nobody can tell what a model learnt: the class or the group.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from adaptclip.data.card_block import PARTS
from adaptclip.data.columns import as_text, is_missing, shared_values
from adaptclip.data.dataset import ALONE, UNKNOWN, DomainData, ImageDataset
from adaptclip.data.feature_rows import FeatureRows, near_copies
from adaptclip.data.fingerprints import Fingerprint, fingerprints, similar_pairs
from adaptclip.errors import AdaptclipError, DataError, SplitError, agree, did_you_mean
from adaptclip.words import is_fold, plain, role_of, several_spellings, spelt, split_part, words_of

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
        found = [words for c in range(len(data.class_names)) if (words := _one_group(data, parts, values, known, c))]
        if found:
            more = f"; and so for {len(found) - _EXAMPLES} more classes" if len(found) > _EXAMPLES else ""
            sentences.append(
                f"{name} and class cannot be told apart: {'; '.join(found[:_EXAMPLES])}{more}. What is learnt of the "
                f"class may be the {name}"
            )
    return tuple(sentences)


def _one_group(data: DomainData, parts: Sequence[ImageDataset], values: np.ndarray, known: np.ndarray, c: int) -> str:
    """Words how a class is of one group only, or "" where it is not."""
    shown, absent = (
        np.concatenate([ask(part, c) for part in parts]) for ask in (ImageDataset.shows, ImageDataset.lacks)
    )
    own, others = values[known & shown].tolist(), values[known & absent].tolist()
    if not own:
        return ""
    group, count = Counter(own).most_common(1)[0]
    elsewhere = others.count(group)
    if not others or count < ALWAYS * len(own) or elsewhere == len(others):
        return ""
    chance = hypergeom.sf(count - 1, len(own) + len(others), count + elsewhere, len(own))
    if chance >= SELDOM:
        return ""
    all_of = f"all {count}" if count == len(own) else f"{count} of {len(own)}"
    name, rest = data.class_names[c], f"{elsewhere} of {len(others)} of the other classes"
    return f"{all_of} images of {name!r} are of {group!r}, but {rest}"


_FOLDS = frozenset(("fold", "folds", "kfold", "cvfold", "cv", "faltung"))
_MOST_FOLDS = 20
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}


def division(name: str, cells: Sequence[Any]) -> dict[str, str]:
    """Returns part -> value of a column that says which images are for training and which for the test.

    All its values are names of parts ("train", "val", "Test"), where the column is called "split" or the like some of
    them; or it is a flag whose name says what it marks ("is_test" with 0 and 1).

    Returns:
        Parts in their order, with the values as the card must write them; {} for any other column.
    """
    values = sorted({as_text(cell) for cell in cells if not is_missing(cell)})
    named = {part: value for value in values for part in PARTS if split_part(value) == (part, "")}
    if (len(named) == len(values) or role_of(name) == "split") and {"train", "test"} <= set(named):
        return {part: named[part] for part in PARTS if part in named}
    marked, _ = split_part(" ".join(word for word in words_of(name) if word not in ("is", "in", "use", "for", "flag")))
    flags = {_FLAGS[plain(value)]: value for value in values if plain(value) in _FLAGS}
    if marked in ("train", "test") and len(values) == len(flags) == 2:
        other = "test" if marked == "train" else "train"
        found = {marked: flags[True], other: flags[False]}
        return {part: found[part] for part in PARTS if part in found}
    return {}


def folds(name: str, cells: Sequence[Any]) -> list[str]:
    """Returns the values of a column of folds ("fold" with 0 to 4, "split" with 1 to 3), sorted; [] for any other."""
    values = sorted({as_text(cell) for cell in cells if not is_missing(cell)}, key=lambda value: (len(value), value))
    called_so = role_of(name) == "split" or bool(set(words_of(name)) & _FOLDS)
    numbered = all(value.isdecimal() or is_fold(value) for value in values)
    return values if called_so and numbered and 2 <= len(values) <= _MOST_FOLDS else []


def fold_parts(values: Sequence[str]) -> dict[str, list[str]]:
    """Returns part -> folds: the first for the test, the second for validation where there are three or more."""
    test, *rest = values
    validation, train = (rest[:1], rest[1:]) if len(rest) > 1 else ([], rest)
    parts = {"train": train, "validation": validation, "test": [test]}
    return {part: own for part, own in parts.items() if own}


def folds_in_words(name: str, values: Sequence[str]) -> tuple[str, str]:
    """Returns what is wrong where a column of folds is not followed, and how a card follows it."""
    info = ", ".join(f"{part}: {json.dumps(own, ensure_ascii=False)}" for part, own in fold_parts(values).items())
    return (
        f"the column {name!r} seems to number {len(values)} folds ({', '.join(values)}), and the card does not follow "
        "it: what was kept together in one fold can be in two parts",
        "Say which values are for training and which for the test, for example "
        f"`splits: {{column: {json.dumps(name, ensure_ascii=False)}, {info}}}`",
    )


def division_lines(name: str, division: Mapping[str, str]) -> str:
    """Words `splits:` of a card that follows the column, for a message."""
    parts = ", ".join(f'{part}: "{value}"' for part, value in division.items())
    return f'`splits: {{column: "{name}", {parts}}}`'


LEAKS = ("duplicate_images", "similar_images", "shared_clusters", "shared_values", "unused_folds")
"""Checks whose failing makes results look better than they are."""


@dataclass(frozen=True)
class Problem:
    """Something found wrong.

    Attributes:
        message: what is wrong, with examples.
        remedy: how to mend it.
        error: the kind of error it is.
        check: its name in the card's `allow`; empty for what cannot be allowed.
    """

    message: str
    remedy: str
    error: type[AdaptclipError]
    check: str = ""


@dataclass(frozen=True)
class Checked:
    """What was found, and is no reason to stop.

    Attributes:
        notes: sentences about problems that the card allows and about what else is worth knowing.
        worries: those of them that put every result in doubt: allowed leaks, clusters and groups that are missing or
            spelt in several ways, and classes that cannot be told from groups.
    """

    notes: tuple[str, ...] = ()
    worries: tuple[str, ...] = ()


def check_data(
    data: DomainData,
    *,
    found: Mapping[str, Fingerprint] | None = None,
    unused: Mapping[str, Sequence[Any]] | None = None,
) -> Checked:
    """Checks classes, labels, groups and leaks between the parts.

    Args:
        data: the data set.
        found: content digest -> image hashes; None computes them.
        unused: column that the card does not name -> cells by row of the source.

    Raises:
        SplitError: parts share images, clusters or values of an unused column, or lack classes.
        DataError: classes, labels or groups are not usable.
    """
    problems = [*_check_names(data), *_check_labels(data)]
    if not problems:
        problems += [
            *_check_classes(data),
            *_check_groups(data),
            *_check_clusters(data),
            *_check_similar(data, found),
        ]
        problems += [*_check_unused(data, unused or {}), *_check_folds(data, unused or {}), *_check_conflicts(data)]
    fatal = [problem for problem in problems if problem.check not in data.card.allow]
    if fatal:
        lines = "\n  ".join(f"{problem.message}. {problem.remedy}.{_how_to_allow(problem)}" for problem in fatal)
        raise fatal[0].error(f"card {data.card.name}: the data did not pass the checks:\n  {lines}")
    allowed = {f"{problem.message} (allowed by the card: {problem.check})": problem.check for problem in problems}
    leaks = [note for note, check in allowed.items() if check.partition(".")[0] in LEAKS]
    doubts = [*_doubts(data), *inseparable(data)]
    return Checked((*allowed, *doubts, *_remarks(data), *_divisions(data, unused or {})), (*leaks, *doubts))


def _how_to_allow(problem: Problem) -> str:
    if not problem.check:
        return ""
    quoted = problem.check if re.fullmatch(r"[\w.]+", problem.check) else json.dumps(problem.check, ensure_ascii=False)
    return f" If it must be so, the card can say `allow: [{quoted}]`."


def _check_names(data: DomainData) -> Iterator[Problem]:
    names, card = data.class_names, data.card
    if len(names) < 2 and data.has_classes:
        message = f"there is only one class ({', '.join(names) or 'none'}), and a classifier needs at least two"
        yield Problem(message, "Add images of what it must be told apart from", DataError)
    for name in card.aliases:
        if name not in names:
            yield Problem(
                f"aliases has no class {name!r}",
                did_you_mean(name, names, lead="The classes are").rstrip("."),
                DataError,
            )
    words = defaultdict(list)
    for name in names:
        spoken = " ".join(card.aliases.get(name, name).replace("_", " ").split())
        words[spoken.casefold()].append(name)
    for same in words.values():
        if len(same) > 1:
            message = f"the classes {', '.join(map(repr, same))} read the same in a prompt"
            yield Problem(message, "Merge them, or tell them apart by other words under `aliases`", DataError)
    if "" in words:
        yield Problem("a class has no name", "Give it words: they are what CLIP reads", DataError)


def _check_labels(data: DomainData) -> Iterator[Problem]:
    for part, images in data.parts.items():
        wrong = np.flatnonzero((images.labels < 0) | (images.labels >= len(data.class_names)))
        if len(wrong):
            first = int(wrong[0])
            have = agree(len(wrong), "image has", "images have")
            message = f"{len(wrong)} {part} {have} a label id out of range, for example {images.labels[first]}"
            allowed = f"Allowed are 0 to {len(data.class_names) - 1}, as there are {len(data.class_names)} class names"
            yield Problem(f"{message} ({images.where(first)})", allowed, DataError)


def _check_classes(data: DomainData) -> Iterator[Problem]:
    test_only = data.card.splits is not None and data.card.splits.is_test_only
    for part in ("test",) if test_only else ("train", "test"):
        missing = _missing_classes(data, data.parts[part])
        if missing:
            have = agree(len(missing), "has", "have")
            message = f"{len(missing)} of {len(data.class_names)} classes {have} no {part} image: {_listed(missing)}"
            yield Problem(message, "Add some, or take the classes out", SplitError, "missing_classes")


def _missing_classes(data: DomainData, images: ImageDataset) -> list[str]:
    return [data.class_names[c] for c in np.flatnonzero(images.class_counts() == 0)]


def _check_groups(data: DomainData) -> Iterator[Problem]:
    card, known = data.card, data.test.groups
    for place, name in [*(("groups", n) for n in card.groups), *(("gates", r.group) for r in card.gates if r.group)]:
        if name not in known:
            hint = did_you_mean(name, known, lead="There are").rstrip(".")
            yield Problem(f"{place} of the card has no group {name!r}", hint, DataError)
    for name, values in known.items():
        empty = sorted(set(card.groups[name].names) - set(values)) if name in card.groups else []
        if set(values) <= {UNKNOWN}:
            message = f"group {name!r} is unknown for every test image"
            yield Problem(message, "Fill its column, or take it out of columns.groups", DataError, "empty_groups")
        elif empty:
            message = f"group {name!r} has no test image in {_listed(empty)}"
            yield Problem(message, "Merge bins, or add images", DataError, "empty_groups")


def _check_clusters(data: DomainData) -> Iterator[Problem]:
    kind = data.card.columns.cluster or "cluster"
    for (first, a), (second, b) in combinations(data.parts.items(), 2):
        shared = set(a.clusters or ()) & set(b.clusters or ())
        if shared:
            rows = sum(cluster in shared for cluster in b.clusters or ())
            yield Problem(
                f"{len(shared)} {agree(len(shared), 'value', 'values')} of {kind!r} (patient, site, ...) "
                f"{agree(len(shared), 'is', 'are')} in both {first} and {second}, with {rows} {second} "
                f"{agree(rows, 'image', 'images')}: {_listed(sorted(shared))}",
                "What is learnt from one image of a patient or site helps with the next, so the result would look "
                "better than it is: put each into one split (`splits: {fractions: ...}` does)",
                SplitError,
                "shared_clusters",
            )
        again = {plain(cluster) for cluster in a.clusters or ()} & {plain(cluster) for cluster in b.clusters or ()}
        values = [c for c in {*(a.clusters or ()), *(b.clusters or ())} - shared if plain(c) in again]
        if several := several_spellings(values):
            rows = sum(cluster in values for cluster in b.clusters or ())
            yield Problem(
                f"{len(several)} {agree(len(several), 'value', 'values')} of {kind!r} (patient, site, ...) "
                f"{agree(len(several), 'is', 'are')} in both {first} and {second} but for the spelling, with {rows} "
                f"{second} {agree(rows, 'image', 'images')}: {spelt(several)}",
                "Write each patient or site in one way, and put it into one split",
                SplitError,
                "shared_clusters",
            )


def _check_unused(data: DomainData, unused: Mapping[str, Sequence[Any]]) -> Iterator[Problem]:
    """Columns that the card does not name, and that may say who or what images are of; see `unused`."""
    for name, cells in unused.items():
        words = shared_values(data, name, cells)
        if words:
            yield Problem(
                f"the column {name!r}, which the card does not use, {words}",
                f"If it says who or what an image is of, write `columns: {{cluster: {json.dumps(name)}}}`, so that "
                "none is in two parts",
                SplitError,
                f"shared_values.{name}",
            )


def _check_folds(data: DomainData, unused: Mapping[str, Sequence[Any]]) -> Iterator[Problem]:
    """Columns of folds that the card does not follow."""
    for name, cells in unused.items():
        values = folds(name, [cells[row] for images in data.parts.values() for row in images.rows])
        parts = [{as_text(cells[row]) for row in images.rows} & set(values) for images in data.parts.values()]
        if any(a & b for a, b in combinations(parts, 2)):
            message, remedy = folds_in_words(name, values)
            yield Problem(message, remedy, SplitError, f"unused_folds.{name}")


def _check_conflicts(data: DomainData) -> Iterator[Problem]:
    """The very same file under several classes within one part."""
    for part, images in data.parts.items():
        rows = _conflicts([images])
        if rows:
            shown = [f"{images.where(row)} ({images.label_text(row)})" for _, row in rows[:_EXAMPLES]]
            more = ", ..." if len(rows) > _EXAMPLES else ""
            yield Problem(
                f"label conflict: {len(rows)} of {len(images)} {part} images are the same file as one of another "
                f"class: {', '.join(shown)}{more}",
                "Keep each image under the class that is right; if it shows several, give it one row that names them "
                "all, and say `several_labels:` in the card",
                DataError,
                "label_conflicts",
            )


def _check_similar(data: DomainData, found: Mapping[str, Fingerprint] | None) -> Iterator[Problem]:
    if found is None and data.test.has_pixels:
        found = {
            content: one
            for images in data.parts.values()
            for content, one in zip(images.contents, _fingerprints_of(images), strict=True)
        }
    for (first, a), (second, b) in combinations(data.parts.items(), 2):
        row_of = {content: row for row, content in enumerate(a.contents)}
        copies = {j: row_of[content] for j, content in enumerate(b.contents) if content in row_of}
        if copies:
            are = agree(len(copies), "is", "are")
            yield _leak(f"{second} images {are} the same file as a {first} image", a, b, copies, "duplicate_images")
        alike = {j: i for i, j in look_alikes(a, b, found=found or {}) if j not in copies}
        if alike:
            look = agree(len(alike), "looks", "look")
            yield _leak(f"{second} images {look} the same as a {first} image", a, b, alike, "similar_images")


def look_alikes(
    first: ImageDataset, second: ImageDataset | None = None, *, found: Mapping[str, Fingerprint]
) -> Iterator[tuple[int, int]]:
    """Yields the positions of images that look the same or, where there are features alone, have nearly the same ones.

    Args:
        first: images.
        second: images of the same source to compare them with; None compares `first` with itself, each pair once.
        found: content digest -> image hashes; not read where there are no pixels.
    """
    both = (first,) if second is None else (first, second)
    if isinstance(first.store, FeatureRows):
        return near_copies(*(first.store.values[0, images.rows] for images in both))
    return similar_pairs(*([found[content] for content in images.contents] for images in both))


def _fingerprints_of(images: ImageDataset) -> list[Fingerprint]:
    return fingerprints(
        images.read, images.contents, where=images.where, window=images.window, frames=images.frames, store=None
    )


def _leak(what: str, a: ImageDataset, b: ImageDataset, pairs: dict[int, int], check: str) -> Problem:
    """Words a leak: `pairs` maps positions in `b` to one of their counterparts in `a`."""
    shown = [f"{b.where(j)} = {a.where(i)}" for j, i in sorted(pairs.items())[:_EXAMPLES]]
    more = ", ..." if len(pairs) > _EXAMPLES else ""
    remedy = (
        "The model would be asked what it was shown: remove them from one of the splits, or let the split be made here "
        "(`splits: {fractions: ...}` keeps them together)"
    )
    return Problem(f"{len(pairs)} of {len(b)} {what}: {', '.join(shown)}{more}", remedy, SplitError, check)


def _doubts(data: DomainData) -> list[str]:
    """What no rule forbids, and what may well make figures wrong: clusters that are missing, and spellings."""
    doubts, total = [], sum(map(len, data.parts.values()))
    clusters = [cluster for images in data.parts.values() for cluster in images.clusters or ()]
    alone = sum(cluster.startswith(ALONE) for cluster in clusters)
    if alone:
        doubts.append(
            f"{alone} of {total} images {agree(alone, 'has', 'have')} no value of {data.card.columns.cluster!r} "
            "(patient, site, ...): each such image is treated as one of its own, also where several are of the same, "
            "in any part"
        )
    names = {"clusters": clusters}
    for images in data.parts.values():
        for group, values in images.groups.items():
            names.setdefault(f"group {group!r}", []).extend(values)
    for what, values in names.items():
        if several := several_spellings(values):
            doubts.append(
                f"{what}: {spelt(several)} count as different, and differ only in case, blanks or zeros; if they are "
                "the same, write each in one way"
            )
    return doubts


def _divisions(data: DomainData, unused: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Columns that divide the images into parts, other than the card does."""
    part_of = {int(row): part for part, images in data.parts.items() for row in images.rows}
    for name, cells in unused.items():
        parts = division(name, cells)
        if any(
            not is_missing(cells[row]) and as_text(cells[row]) != parts[part]
            for row, part in part_of.items()
            if part in parts
        ):
            yield (
                f"the column {name!r} says which images are for training and which for the test, and the card divides "
                f"them otherwise; is that meant? To follow the column: {division_lines(name, parts)}"
            )


def _remarks(data: DomainData) -> list[str]:
    remarks = []
    if len(data.validation):
        missing = _missing_classes(data, data.validation)
        if missing:
            have = agree(len(missing), "class has", "classes have")
            remarks.append(f"{len(missing)} {have} no validation image: {_listed(missing)}")
    conflicts = [data_part.ids[row] for data_part, row in _conflicts(list(data.parts.values()))]
    if conflicts:
        remarks.append(f"{len(conflicts)} images are found under several classes: {_listed(conflicts)}")
    everywhere = [name for c, name in enumerate(data.class_names) if data.several and not data.test.lacks(c).any()]
    if everywhere:
        remarks.append(f"every test image shows {_listed(everywhere)}: nothing says how often it is named wrongly")
    for name, values in data.test.groups.items():
        counts = Counter(values)
        if 0 < counts[UNKNOWN] < len(values):
            remarks.append(f"group {name!r} is unknown for {counts[UNKNOWN]:,} of {len(values):,} test images")
    return remarks


def _conflicts(parts: Sequence[ImageDataset]) -> list[tuple[ImageDataset, int]]:
    """Returns the part and place there of images whose very file also has another label in one of `parts`."""
    labels: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for images in parts:
        for content, kinds in zip(images.contents, images.kinds(), strict=True):
            labels[content].add(kinds)
    return [
        (images, row) for images in parts for row, content in enumerate(images.contents) if len(labels[content]) > 1
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_EXAMPLES])
    return shown + (f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else "")
