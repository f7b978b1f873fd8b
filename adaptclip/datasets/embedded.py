# SPDX-License-Identifier: Apache-2.0
"""Image sets that need no download: scikit-learn's handwritten digits and the procedural specimens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from adaptclip.datasets.specimens import SITES, SPECIES, draw_all, plan, png
from adaptclip.seeding import numpy_generator

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOSED_LOOP = frozenset({"zero", "six", "eight", "nine"})
"""Digits whose usual written form encloses a patch of paper; the 4 of these writers mostly stays open."""
STROKE_WEIGHTS = ("thin", "medium", "heavy")
_DIGIT_SIDE = 64


@dataclass(frozen=True)
class EmbeddedSet:
    """An image set as it leaves its generator, one entry per image in every list.

    Attributes:
        images: PNG files.
        labels: class ids.
        class_names: names in the order of their ids.
        ids: stable names of the images.
        splits: "train", "validation" or "test".
        clusters: images with the same value must stay in one split; None when every image stands alone.
        groups: attribute name to value per image.
        levels: taxonomy level name to value per class.
    """

    images: list[bytes]
    labels: list[int]
    class_names: tuple[str, ...]
    ids: list[str]
    splits: list[str]
    clusters: list[str] | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)


def digits() -> EmbeddedSet:
    """The 1,797 handwritten digits of scikit-learn (8 x 8, 17 grey levels), enlarged to 64 x 64, dark on white.

    The group `stroke_weight` divides the whole set into thirds by ink (the sum of the 64 grey values); the level `loop`
    tells digits with a closed loop from open ones. Splits are stratified by class: half train, a tenth validation.
    """
    from sklearn.datasets import load_digits  # half a second to import, and only this card needs it

    cells, target = load_digits(return_X_y=True)
    grey = np.asarray(cells).reshape(-1, 8, 8).astype(np.int64)
    labels = np.asarray(target).astype(int).tolist()
    ink = grey.sum(axis=(1, 2))
    weight = np.searchsorted(np.quantile(ink, [1 / 3, 2 / 3]), ink, side="left")
    return EmbeddedSet(
        images=[_enlarged(digit) for digit in grey],
        labels=labels,
        class_names=DIGIT_NAMES,
        ids=[f"digit-{i:04d}" for i in range(len(labels))],
        splits=_stratified_splits(labels),
        groups={"stroke_weight": [STROKE_WEIGHTS[w] for w in weight]},
        levels={"loop": tuple("closed loop" if name in CLOSED_LOOP else "open" for name in DIGIT_NAMES)},
    )


def _enlarged(digit: np.ndarray) -> bytes:
    """Turns (8, 8) ink from 0 to 16 into a PNG of dark strokes on white paper with a margin of one cell."""
    paper = np.pad(255 - np.minimum(digit * 16, 255), 1, constant_values=255).astype(np.uint8)
    large = Image.fromarray(paper).resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
    return png(large.convert("RGB"))


def _stratified_splits(labels: list[int]) -> list[str]:
    """Half of each class for training, a tenth for validation, the rest for the test; always the same images."""
    splits = ["test"] * len(labels)
    for label in sorted(set(labels)):
        members = np.flatnonzero(np.asarray(labels) == label)
        order = numpy_generator(0, "digits", "splits", label).permutation(members)
        train, validation = round(0.5 * len(order)), round(0.1 * len(order))
        for i in order[:train]:
            splits[i] = "train"
        for i in order[train : train + validation]:
            splits[i] = "validation"
    return splits


def specimens(*, site_effect: float = 0.4, seed: int = 0, per_species: int = 80) -> EmbeddedSet:
    """The procedural specimens: 25 species in 5 genera, two imaging sites, a planted site effect.

    Groups are `site` and `marks` ("visible" or "erased", the planted truth); the cluster is the tray.

    Args:
        site_effect: share of the second site's images on which the marks of the species are erased, 0 to 1.
        seed: chooses all that is random.
        per_species: images per species, a multiple of 4 and at least 40.

    Raises:
        DataError: an option is out of range.
    """
    drawn = plan(site_effect=site_effect, seed=seed, per_species=per_species)
    keys = [SPECIES[s.label].name.lower().replace(" ", "-") for s in drawn]
    return EmbeddedSet(
        images=draw_all(drawn, seed=seed),
        labels=[s.label for s in drawn],
        class_names=tuple(species.name for species in SPECIES),
        ids=[f"{key}-{s.number:03d}" for key, s in zip(keys, drawn, strict=True)],
        splits=[s.split for s in drawn],
        clusters=[f"{key}-tray-{s.tray:02d}" for key, s in zip(keys, drawn, strict=True)],
        groups={
            "site": [SITES[s.site] for s in drawn],
            "marks": ["erased" if s.erased else "visible" for s in drawn],
        },
        levels={"genus": tuple(species.genus.name for species in SPECIES)},
    )


EMBEDDED: dict[str, Callable[..., EmbeddedSet]] = {"digits": digits, "specimens": specimens}
"""The embedded sets by the name that a card's source gives."""
