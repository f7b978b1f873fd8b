# SPDX-License-Identifier: Apache-2.0
"""From a data card to images in train, validation and test (`open_data`).

Which image plays which part is as the source says, or drawn here without tearing apart what belongs together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from adaptclip.data.captions import caption_values, join_repeated_images
from adaptclip.data.card_block import PARTS, Splits
from adaptclip.data.checks import check_data, look_alikes
from adaptclip.data.columns import (
    as_text,
    group_values,
    is_missing,
    level_values,
    merged_labels,
    resolve_labels,
    row_ids,
)
from adaptclip.data.dataset import ALONE, UNLABELLED, DomainData, ImageDataset, file_names
from adaptclip.data.declared import check_declared
from adaptclip.data.feature_rows import FeatureRows, read_features
from adaptclip.data.fingerprints import Fingerprint, content_digests, fingerprints
from adaptclip.data.frames import spread
from adaptclip.data.label_sets import first_shown, in_words, one_class_each, read_flags, read_label_sets
from adaptclip.data.readers import (
    RawRows,
    joined,
    read_embedded,
    read_hub,
    read_image_folder,
    read_manifest,
    read_parquet_files,
)
from adaptclip.data.shards import read_webdataset
from adaptclip.errors import CardError, DataError, SplitError, agree, did_you_mean
from adaptclip.files import digest
from adaptclip.words import plain

if TYPE_CHECKING:
    from adaptclip.data.card import Card

UNUSED = ""
"""The part of a row that the card does not use."""


def named_parts(splits: Splits | None, source_splits: Sequence[str]) -> tuple[str, ...]:
    """Returns each row's part from the names of the splits it lies in.

    Args:
        splits: the card's names of its parts; None stands for "train", "validation" and "test".
        source_splits: N names of source splits.

    Returns:
        N parts; UNUSED for rows of a split that the card does not name.

    Raises:
        SplitError: there is no row for the training or the test part; the former only where the card names one.
    """
    rule = splits or Splits()
    names, part_of = rule.names, rule.parts
    parts = tuple(part_of.get(name, UNUSED) for name in source_splits)
    for part in ("train", "test"):
        if part in names and part not in parts:
            found = Counter(source_splits)
            raise SplitError(
                f"no image is in the split {names[part]!r}, which the card takes for {part}. "
                f"{did_you_mean(names[part], found, lead='There are')} Name them under `splits:`, or let a split be "
                "made with `splits: {fractions: {train: 0.6, validation: 0.1, test: 0.3}}`"
            )
    return parts


def units(count: int, *, keys: Iterable[Sequence[str]], pairs: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Groups rows that must stay together: equal in any of `keys`, or linked by `pairs`, also by way of other rows.

    Args:
        count: number of rows N.
        keys: columns of N values, for example clusters and image digests.
        pairs: linked rows.

    Returns:
        (N,) int64 number of each row's unit.
    """
    links = list(pairs)
    for column in keys:
        first: dict[str, int] = {}
        links += [(first.setdefault(value, row), row) for row, value in enumerate(column)]
    ends = np.asarray(links, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def drawn_parts(
    splits: Splits, kinds: Sequence[tuple[int, ...]], contents: Sequence[str], unit_of_row: np.ndarray
) -> tuple[str, ...]:
    """Draws a split stratified by class that keeps units whole; the same for any order of rows, on every machine.

    Units are taken in an order that depends only on the seed and on their images (the largest first, as they are the
    hardest to place), and each goes where its classes lack most. A class of two or more units has images in train and
    test, as far as units of several classes allow it.

    Args:
        splits: with `fractions` and `seed`.
        kinds: of each of N images the classes that it counts to (`ImageDataset.kinds`).
        contents: N digests of the images.
        unit_of_row: (N,) int64, see `units`.

    Returns:
        N parts.

    Raises:
        SplitError: too few units for the parts.
    """
    assert splits.fractions is not None
    chosen = [part for part in PARTS if splits.fractions.get(part, 0) > 0]
    shares = np.asarray([splits.fractions[part] for part in chosen])  # pyright: ignore[reportArgumentType]
    members = _members(unit_of_row)
    if len(members) < len(chosen):
        raise SplitError(
            f"{len(kinds)} images in {len(members)} clusters cannot be divided into {', '.join(chosen)}; clusters and "
            "copies of an image stay together"
        )
    order = sorted(members, key=lambda rows: (-len(rows), _rank(splits.seed, [contents[int(row)] for row in rows])))
    counted = [np.unique(np.concatenate([kinds[int(row)] for row in rows]), return_counts=True) for rows in order]
    totals = np.bincount([kind for own in kinds for kind in own]).astype(float)
    lacking = shares[:, None] * totals[None]
    needed = np.asarray([part in ("train", "test") for part in chosen], dtype=float)[:, None] * np.ones_like(lacking)
    left = np.bincount(np.concatenate([classes for classes, _ in counted]), minlength=len(totals))
    result = [UNUSED] * len(kinds)
    for rows, (classes, counts) in zip(order, counted, strict=True):
        # A needed part without an image of the class is preferred a little, and above all when units run out.
        urgent = left[classes] <= needed[:, classes].sum(axis=0)
        bonus = needed[:, classes] * (1 + urgent * totals[classes])
        want = (lacking[:, classes] + bonus) * counts / totals[classes]
        best = int(want.sum(axis=1).argmax())
        lacking[best, classes] -= counts
        needed[best, classes] = 0
        left[classes] -= 1
        for row in rows:
            result[row] = chosen[best]
    return tuple(result)


def _members(unit_of_row: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(unit_of_row, kind="stable")
    edges = np.flatnonzero(np.diff(unit_of_row[order])) + 1
    return np.split(order, edges)


def _rank(seed: int, contents: Iterable[str]) -> str:
    return digest(str(seed), "split", sorted(contents))


_log = logging.getLogger(__name__)

READERS: dict[str, Callable[[Card, Path | None], RawRows]] = {
    "hub": read_hub,
    "parquet": read_parquet_files,
    "image_folder": read_image_folder,
    "manifest": read_manifest,
    "webdataset": read_webdataset,
    "embedded": read_embedded,
    "features": read_features,
}
"""Kind of source -> its reader."""


def read_rows(card: Card, data_root: Path | None) -> RawRows:
    """Reads what is at the card's source, a row for each image in a file, with the columns of tables joined to it."""
    return spread(joined(card, READERS[card.source.kind](card, data_root), data_root), card)


MAX_UNIT_SHARE = 0.5
"""Largest share of all images that may hang together as copies or look-alikes when a split is drawn."""


def open_data(
    card: Card,
    *,
    data_root: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    check: bool = True,
) -> DomainData:
    """Opens the images of a card, divides them into parts and checks them.

    Digests and image hashes are kept under `cache_root()`, so that only the first call reads every image.

    Args:
        card: a loaded card.
        data_root: folder that the card's paths are relative to; by default the card's own folder. For a hub card: the
            folder that holds a local copy.
        on_bad_image: whether an unreadable image is an error, or is left out and listed in `DomainData.skipped`.
        check: whether to look for leaks, missing classes and unreadable images (see `adaptclip.data.checks`).

    Raises:
        CardError: an outcome, intersection or gate of the card names what the data do not have.
        DataError: files, columns, labels or images are missing or not usable.
        SplitError: the parts leak, lack classes or cannot be made.
    """
    raw = read_rows(card, Path(data_root) if data_root is not None else None)
    if not len(raw):
        passed = f" Passed over: {'; '.join(raw.passed_over)}." if raw.passed_over else ""
        raise DataError(
            f"card {card.name}: there is not a single image at its source; see `source:` in the card.{passed}"
        )
    kept = digest(card.source.model_dump_json(), raw.origin)[:24]
    contents = content_digests(raw.store.read, raw.stamps, store=kept)
    rule = card.splits or raw.split_rule
    skip = on_bad_image == "skip" or "unreadable_images" in card.allow
    found: dict[str, Fingerprint] = {}
    skipped: list[str] = []
    images = _all_images(card, raw, contents)
    _check_card(card, images)
    if check or skip or (rule and rule.fractions):
        if isinstance(raw.store, FeatureRows):
            seen = [Fingerprint(flat=True)] * len(raw)  # equal features have equal digests; nothing can be seen
        else:
            seen = fingerprints(
                raw.store.read, contents, where=raw.store.where, window=card.window, frames=card.frame, store=kept
            )
        found = dict(zip(contents, seen, strict=True))
        good, skipped = _usable(card, seen, skip=skip, demand=check)
        images = images.select(good)
    if images.captions is not None:
        names = _split_names(raw, rule)
        images, joined = join_repeated_images(images, [str(names[row]) for row in images.rows])
        skipped += joined
    parts = _parts(card, raw, rule, images, found)
    unused = Counter(
        _split_names(raw, rule)[row] for row, part in zip(images.rows, parts, strict=True) if part == UNUSED
    )
    skipped += [
        f"{count} {agree(count, 'image', 'images')} of the split {name!r} {agree(count, 'is', 'are')} not used"
        for name, count in unused.items()
    ]
    skipped += raw.passed_over
    for sentence in skipped:
        _log.warning("card %s: %s", card.name, sentence)
    train, validation, test = (images.select([i for i, p in enumerate(parts) if p == part]) for part in PARTS)
    values = {name: {as_text(cell) for cell in cells if not is_missing(cell)} for name, cells in raw.unused.items()}
    data = DomainData(
        card, images.class_names, train, validation, test, tuple(skipped),
        unused_columns={name: len(different) for name, different in values.items()},
    )  # fmt: skip
    if not check:
        return data
    checked = check_data(data, found=found, unused=raw.unused)
    label = raw.columns.label
    merged = merged_labels(raw.values[label], raw.store.where) if label is not None else ()
    several = () if images.multi_hot is None else (in_words(images.multi_hot, images.class_names),)
    notes = (*merged, *several, *checked.notes, *raw.notes)
    return replace(data, notes=notes, worries=(*merged, *checked.worries))


def _check_card(card: Card, images: ImageDataset) -> None:
    """Refuses a card whose outcomes, intersections, gates or hard pairs name what the data do not have."""
    known = {"groups": images.groups.keys(), "levels": images.levels, "class_names": images.class_names}
    several = images.several
    try:
        check_declared(card.gates, card.outcomes, card.intersections, expect=card.expect, several=several, **known)
    except ValueError as error:
        raise CardError(f"card {card.name}: {error}") from error
    for name in (name for pair in card.hard_pairs for name in pair):
        if name not in images.class_names:
            nearest = did_you_mean(name, images.class_names, lead="The classes are")
            raise CardError(f"card {card.name}: hard_pairs has no class {name!r}. {nearest}")


def _usable(card: Card, seen: Sequence[Fingerprint], *, skip: bool, demand: bool) -> tuple[np.ndarray, list[str]]:
    """Returns the rows to use, and sentences about those that cannot be decoded."""
    bad = [one.problem for one in seen if one.problem]
    if bad and not skip and demand:
        shown = "\n  ".join(bad[:5]) + (f"\n  … and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise DataError(
            f"card {card.name}: {len(bad)} of {len(seen)} images cannot be used:\n  {shown}\n"
            "Mend or remove them, or leave such images out with `--on-bad-image skip`."
        )
    if not skip:
        return np.arange(len(seen)), []
    if len(bad) == len(seen):
        raise DataError(f"card {card.name}: none of the {len(seen)} images can be used; the first: {bad[0]}")
    return np.flatnonzero([not one.problem for one in seen]), [f"left out {problem}" for problem in bad]


def _all_images(card: Card, raw: RawRows, contents: tuple[str, ...]) -> ImageDataset:
    """Returns all rows as one data set, so that class ids and row ids are the same for all parts."""
    columns, values = raw.columns, raw.values
    labels, names, marks = _labels(card, raw)
    levels = {
        level: level_values(values[column], labels, names, name=level) for level, column in columns.levels.items()
    }
    groups = {
        group: group_values(values[column], card.groups.get(group), name=group)
        for group, column in columns.groups.items()
    }
    return ImageDataset(
        store=raw.store,
        rows=np.arange(len(raw)),
        class_names=names,
        ids=row_ids(values[columns.id] if columns.id else None, contents),
        labels=labels,
        contents=contents,
        clusters=_clusters(values[columns.cluster], contents) if columns.cluster else None,
        groups=groups,
        levels={**raw.class_levels, **levels},
        window=card.window,
        frames=card.frame,
        captions=caption_values(values[columns.captions], where=raw.store.where) if columns.captions else None,
        fixed_classes=card.sampling.classes == "fixed",
        multi_hot=marks,
        files=file_names(raw.store, raw.origin),
        cluster_name=card.columns.cluster or "",
    )


def _labels(card: Card, raw: RawRows) -> tuple[np.ndarray, tuple[str, ...], np.ndarray | None]:
    """Returns (N,) class ids, C names and, where an image may show several, (N, C) what each shows."""
    columns, rule, where = raw.columns, card.several_labels, raw.store.where
    if columns.labels:
        cells = {name: raw.values[name] for name in columns.labels}
        marks, names = read_flags(cells, rule, card_names=card.class_names, where=where)
        if rule is None:
            return one_class_each(marks, names, where), names, None
    elif columns.label is None:
        return np.zeros(len(raw), dtype=np.int64), (UNLABELLED,), None
    else:
        known: dict[str, Any] = {"card_names": card.class_names, "source_names": raw.class_names, "where": where}
        if rule is None:
            return *resolve_labels(raw.values[columns.label], **known), None
        marks, names = read_label_sets(raw.values[columns.label], rule, **known)
    return first_shown(marks), names, marks


def _clusters(cells: Sequence[Any], contents: Sequence[str]) -> tuple[str, ...]:
    """Returns cluster ids; an image without one is a cluster of its own, together with its exact copies."""
    return tuple(
        f"{ALONE}{content[:16]}" if is_missing(cell) else as_text(cell)
        for cell, content in zip(cells, contents, strict=True)
    )


def _split_names(raw: RawRows, rule: Splits | None) -> Sequence[str]:
    if rule and rule.column:
        return ["" if is_missing(cell) else as_text(cell) for cell in raw.values[rule.column]]
    return raw.splits or [""] * len(raw)


def _parts(
    card: Card, raw: RawRows, rule: Splits | None, images: ImageDataset, found: dict[str, Fingerprint]
) -> tuple[str, ...]:
    if rule is None or rule.fractions is None:
        if raw.splits is None and not (rule and rule.column):
            raise SplitError(
                f"card {card.name}: nothing says which images are for training and which for the test. Name a column "
                "(`splits: {column: split}`), give `files` per split, or let a split be made: "
                "`splits: {fractions: {train: 0.6, validation: 0.1, test: 0.3}}`"
            )
        names = _split_names(raw, rule)
        return named_parts(rule, [str(names[row]) for row in images.rows])
    keys = [images.contents] if images.clusters is None else [images.contents, list(map(plain, images.clusters))]
    alike = [] if "similar_images" in card.allow else look_alikes(images, found=found)
    unit_of_row = units(len(images), keys=keys, pairs=alike)
    largest = int(np.bincount(unit_of_row).max())
    if largest > MAX_UNIT_SHARE * len(images):
        raise SplitError(
            f"card {card.name}: {largest} of {len(images)} images are tied together as clusters, copies or "
            "look-alikes, so no split can be drawn. Check the cluster column; where all images look alike by "
            "nature, the card can "
            "say `allow: [similar_images]`"
        )
    return drawn_parts(rule, images.kinds(), images.contents, unit_of_row)
