# SPDX-License-Identifier: Apache-2.0
"""A procedural fine-grained collection: 25 invented species in 5 genera, two imaging sites, a planted site effect.

There are five kinds of body, one per genus. Everything a species is told by is an argument of its genus's function, so
that leaving the arguments out draws a specimen without a species.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from adaptclip.datasets.drawing import SIZE, Brush, Palette, ellipse, mirrored, photograph, rgb, spoil
from adaptclip.errors import DataError
from adaptclip.progress import progress_bar
from adaptclip.seeding import numpy_generator

if TYPE_CHECKING:
    from PIL import Image


def beetle(
    brush: Brush, rng: np.random.Generator, ink: Palette, *, spots: int = 0, bands: int = 0, stripes: int = 0
) -> None:
    """A beetle from above. Marks on its wing cases: pairs of spots, bands across, stripes along."""
    black, width = rgb(0.08, 0.4, 0.14), rng.uniform(0.44, 0.52)
    for y, reach, drop in ((-0.28, 0.86, -0.22), (0.02, 0.94, 0.1), (0.3, 0.86, 0.5)):
        reach, drop = reach + rng.uniform(-0.05, 0.05), drop + rng.uniform(-0.06, 0.06)
        leg = np.array([[0.2, y], [reach * 0.72, y + drop * 0.4], [reach, y + drop + 0.12]])
        brush.line(leg, black, 0.055)
        brush.line(mirrored(leg), black, 0.055)
    antenna = np.array([[0.08, -0.82], [0.2, -0.98], [0.36 + rng.uniform(-0.06, 0.06), -1.08]])
    brush.line(antenna, black, 0.035)
    brush.line(mirrored(antenna), black, 0.035)
    brush.shape(ellipse(0, -0.74, 0.2, 0.17), black)
    brush.shape(ellipse(0, -0.5, 0.37, 0.24), ink.dark)
    cases = ellipse(0, 0.22, width, 0.68)
    brush.shape(cases, ink.body)
    for y in {1: (0.2,), 2: (-0.06, 0.46)}.get(bands, ()):
        brush.shape(_bar(y, 0.2), ink.mark, within=cases)
    for x in np.linspace(0.12, width - 0.1, stripes):
        for side in (-x, x):
            brush.shape(ellipse(side, 0.22, 0.028, 0.56), ink.mark, within=cases)
    radius = 0.115 + rng.uniform(-0.012, 0.012)
    for y in {2: (0.14,), 4: (-0.1, 0.42), 6: (-0.2, 0.17, 0.54)}.get(spots, ()):
        for side in (-0.23, 0.23):
            brush.shape(ellipse(side, y, radius, radius), ink.mark, within=cases)
    brush.line(np.array([[0, -0.42], [0, 0.9]]), ink.dark, 0.03, inside=True)


def moth(
    brush: Brush,
    rng: np.random.Generator,
    ink: Palette,
    *,
    fore_eyes: bool = False,
    hind_eyes: bool = False,
    band: bool = False,
    scallops: float = 0.0,
    tails: bool = False,
) -> None:
    """A moth with spread wings. Marks: eye spots, a band over the fore wings, scalloped margins, tails."""
    spread, drop = 1.0 + rng.uniform(-0.05, 0.05), rng.uniform(-0.06, 0.06)
    hind = np.array([[0.05, 0.02], [0.5, 0.02], [0.74, 0.3], [0.62, 0.66], [0.36, 0.8], [0.14, 0.56], [0.05, 0.2]])
    fore = np.array([[0.04, -0.3], [0.5, -0.62], [spread, -0.72 + drop], [0.96, -0.36], [0.78, 0.06], [0.4, 0.14]])
    fore = np.concatenate([fore, [[0.05, 0.08]]])
    hind, fore = _rounded(hind), _rounded(fore)
    if scallops:
        hind, fore = _wavy(hind, scallops, 13), _wavy(fore, scallops, 15)
    for wing in (hind, mirrored(hind)):
        side = 1.0 if wing is hind else -1.0
        if tails:
            brush.line(np.array([[0.42, 0.68], [0.5, 0.9], [0.46, 1.12]]) * [side, 1.0], ink.light, 0.13)
        brush.shape(wing, ink.light)
    for wing in (fore, mirrored(fore)):
        side = 1.0 if wing is fore else -1.0
        brush.shape(wing, ink.body)
        if band:
            stripe = np.array([[0.42, -0.8], [0.62, -0.8], [0.56, 0.3], [0.36, 0.3]]) * [side, 1.0]
            brush.shape(stripe, ink.mark, within=wing)
    for wanted, x, y in ((fore_eyes, 0.62, -0.32), (hind_eyes, 0.42, 0.4)):
        for side in (-x, x) if wanted else ():
            for radius, fill in ((0.155, ink.dark), (0.115, ink.mark), (0.05, (20, 18, 22))):
                brush.shape(ellipse(side, y, radius, radius), fill)
    feeler = np.array([[0.03, -0.42], [0.16, -0.72], [0.3 + rng.uniform(-0.05, 0.05), -0.86]])
    brush.line(feeler, ink.dark, 0.03)
    brush.line(mirrored(feeler), ink.dark, 0.03)
    brush.shape(ellipse(0, 0.1, 0.085, 0.5), ink.dark)
    brush.shape(ellipse(0, -0.4, 0.075, 0.085), ink.dark)


def leaf(
    brush: Brush,
    rng: np.random.Generator,
    ink: Palette,
    *,
    teeth: float = 0.0,
    lobes: float = 0.0,
    pale_edge: bool = False,
    speckles: int = 0,
    pale_veins: bool = False,
) -> None:
    """A pressed leaf. Marks: saw teeth, lobes, a pale edge, speckles, pale veins."""
    width = rng.uniform(0.5, 0.6)
    t = np.linspace(0, 1, 160)
    half = width * np.sin(np.pi * t**0.85) ** 0.8
    if lobes:
        half = half * (1 - lobes * 0.5 * (1 + np.cos(2 * np.pi * t * 4.5)) * (t > 0.04) * (t < 0.96))
    if teeth:
        half = half * (1 - teeth * ((t * 15) % 1.0))
    right = np.stack([half, 0.86 - 1.82 * t], axis=1)
    outline = np.concatenate([right, mirrored(right)[::-1]])
    brush.line(np.array([[0, 0.8], [0.03, 1.02], [0.1 * rng.uniform(-1, 1), 1.2]]), ink.dark, 0.06)
    brush.shape(outline, ink.mark if pale_edge else ink.body)
    if pale_edge:
        inner = outline * [0.76, 0.86]
        brush.shape(inner, ink.body, within=outline)
    vein = ink.mark if pale_veins else ink.dark
    pen = 0.05 if pale_veins else 0.022
    brush.line(np.array([[0, 0.84], [0, -0.86]]), vein, pen * 1.3, inside=True)
    for y in np.linspace(0.56, -0.5, 6):
        reach = 0.72 * float(np.interp(0.86 - y, 1.82 * t, half))
        for side in (-reach, reach):
            brush.line(np.array([[0, y], [side, y - 0.2]]), vein, pen, inside=True)
    for _ in range(speckles):
        y = rng.uniform(-0.62, 0.6)
        reach = 0.8 * float(np.interp(0.86 - y, 1.82 * t, half))
        brush.shape(ellipse(rng.uniform(-reach, reach), y, 0.055, 0.055), ink.mark, within=outline)


def shell(
    brush: Brush,
    rng: np.random.Generator,
    ink: Palette,
    *,
    bands: int = 0,
    ribs: int = 0,
    dots: int = 0,
    spines: bool = False,
) -> None:
    """A spired sea shell. Marks on its whorls: bands along the turn, ribs across, rows of dots, spines."""
    steps = 6
    size = np.geomspace(0.6 + rng.uniform(-0.04, 0.04), 0.1, steps)
    height = 0.6
    tops = 0.42 - np.concatenate([[0], np.cumsum(size[:-1] + size[1:])]) * 0.47
    tip = np.array([[-0.34, 0.6], [0.3, 0.6], [0.12, 1.06], [-0.06, 1.06]])
    brush.shape(_rounded(tip), ink.body)
    for y, radius in list(zip(tops, size, strict=True))[::-1]:
        if spines:
            for side in (-1.0, 1.0):
                spike = np.array([[0.7, -0.34], [1.42, -0.62], [0.9, 0.02]]) * [side * radius, radius] + [0, y]
                brush.shape(spike, ink.light)
        whorl = ellipse(0, y, radius, radius * height)
        brush.shape(ellipse(0, y + 0.03, radius, radius * height), ink.dark)
        brush.shape(whorl, ink.body)
        for offset in {1: (0.12,), 3: (-0.2, 0.1, 0.38)}.get(bands, ()):
            thick = 0.24 if bands == 1 else 0.13
            bar = _bar(offset * radius, thick * radius, bend=0.16 / radius)
            brush.shape(bar + np.array([0, y]), ink.mark, within=whorl)
        for x in np.linspace(-0.8, 0.8, ribs) * radius:
            rib = np.array([[x * 0.8, y - radius], [x, y], [x * 0.9, y + radius]])
            side = np.array([0.028, 0])
            brush.shape(np.concatenate([rib - side, (rib + side)[::-1]]), ink.mark, within=whorl)
        for x in np.linspace(-0.72, 0.72, dots) * radius:
            brush.shape(
                ellipse(x, y + 0.08 * radius, 0.1 * radius + 0.012, 0.1 * radius + 0.012), ink.mark, within=whorl
            )
    brush.shape(ellipse(0.16, 0.6, 0.2, 0.26), ink.dark)
    brush.shape(ellipse(0.2, 0.63, 0.13, 0.19), rgb(0.05, 0.25, 0.9))


def fish(
    brush: Brush,
    rng: np.random.Generator,
    ink: Palette,
    *,
    bars: int = 0,
    lines: int = 0,
    tail_spot: bool = False,
    fork: bool = False,
) -> None:
    """A fish from above. Marks: bars across, lines along, a spot before the tail, a deeply forked tail."""
    deep = rng.uniform(0.38, 0.45)
    end = np.array([[0, 0.62], [0.42, 1.1], [0, 0.96], [-0.42, 1.1]])
    if fork:
        end = np.array([[0, 0.62], [0.34, 0.92], [0.52, 1.3], [0.08, 0.86], [-0.08, 0.86], [-0.52, 1.3], [-0.34, 0.92]])
    brush.shape(end, ink.dark)
    for side in (-1.0, 1.0):
        fin = np.array([[0.25, -0.3], [0.66, 0.02 + rng.uniform(-0.05, 0.05)], [0.52, 0.2], [0.2, 0.34]]) * [side, 1.0]
        brush.shape(fin, ink.dark)
    t = np.linspace(0, 1, 60)
    right = np.stack([deep * np.sin(np.pi * t**0.75) ** 0.9 + 0.07 * t, -0.98 + 1.72 * t], axis=1)
    body = np.concatenate([right, mirrored(right)[::-1]])
    brush.shape(body, ink.body)
    brush.shape(_bar(-1.0, 0.62), ink.light, within=body)
    for y in {2: (-0.24, 0.26), 4: (-0.44, -0.15, 0.14, 0.43)}.get(bars, ()):
        brush.shape(_bar(y, 0.15), ink.mark, within=body)
    for x in np.linspace(-0.22, 0.22, lines):
        brush.shape(
            np.array([[x - 0.03, -0.6], [x + 0.03, -0.6], [x * 0.5 + 0.03, 0.7], [x * 0.5 - 0.03, 0.7]]), ink.mark
        )
    if tail_spot:
        for radius, fill in ((0.17, ink.mark), (0.1, (20, 18, 22))):
            brush.shape(ellipse(0, 0.42, radius, radius), fill, within=body)
    for side in (-0.13, 0.13):
        brush.shape(ellipse(side, -0.72, 0.06, 0.06), (245, 240, 225))
        brush.shape(ellipse(side, -0.72, 0.032, 0.032), (20, 18, 22))


DRAW: dict[str, Callable[..., None]] = {"beetle": beetle, "moth": moth, "leaf": leaf, "shell": shell, "fish": fish}
"""The drawing function of each kind of body."""


def _bar(y: float, height: float, *, bend: float = 0.0, x0: float = -2.0, x1: float = 2.0) -> np.ndarray:
    """A horizontal bar of the given height that is `bend` lower at its ends."""
    x = np.linspace(x0, x1, 24)
    middle = y + bend * x**2
    upper, lower = np.stack([x, middle - height / 2], 1), np.stack([x, middle + height / 2], 1)
    return np.concatenate([upper, lower[::-1]])


def _rounded(points: np.ndarray, *, rounds: int = 3) -> np.ndarray:
    """Cuts the corners of a closed polygon (Chaikin 1974)."""
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after], axis=1).reshape(-1, 2)
    return points


def _wavy(points: np.ndarray, depth: float, waves: int) -> np.ndarray:
    """Pulls a closed outline inwards `waves` times along its length, by up to `depth` of its size."""
    centre = points.mean(axis=0)
    step = np.linalg.norm(np.roll(points, -1, axis=0) - points, axis=1)
    along = np.concatenate([[0], np.cumsum(step)]) / step.sum()
    at = np.linspace(0, 1, 240, endpoint=False)
    closed = np.concatenate([points, points[:1]])
    dense = np.stack([np.interp(at, along, closed[:, k]) for k in (0, 1)], axis=1)
    return centre + (dense - centre) * (1 - depth * np.abs(np.sin(np.pi * waves * at)))[:, None]


SITES = ("museum", "field station")
"""The imaging sites; the site effect is planted at the second."""
TRAY_SIZE = 4
"""Images that share a tray: one species, one site, one background and light. A tray never spans two splits."""
SITE_SHARE = 0.3
"""Share of the trays of each species that were photographed at the second site."""


@dataclass(frozen=True)
class Genus:
    """A kind of body and the range of its hues (turns, 0 to 1)."""

    name: str
    body: str
    hue: tuple[float, float]


@dataclass(frozen=True)
class Species:
    """A class: its invented binomial, the words a prompt uses, and the marks that alone tell it apart."""

    genus: Genus
    epithet: str
    common_name: str
    marks: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The binomial."""
        return f"{self.genus.name} {self.epithet}"


_BEETLE = Genus("Carabellus", "beetle", (-0.06, 0.14))
_MOTH = Genus("Phalenora", "moth", (0.02, 0.16))
_LEAF = Genus("Foliastra", "leaf", (0.17, 0.42))
_SHELL = Genus("Turrisella", "shell", (-0.03, 0.13))
_FISH = Genus("Lepidonax", "fish", (0.45, 0.68))

SPECIES = (
    Species(_BEETLE, "bimaculatus", "two-spotted beetle", {"spots": 2}),
    Species(_BEETLE, "quadrimaculatus", "four-spotted beetle", {"spots": 4}),
    Species(_BEETLE, "sexmaculatus", "six-spotted beetle", {"spots": 6}),
    Species(_BEETLE, "cinctus", "belted beetle", {"bands": 1}),
    Species(_BEETLE, "lineatus", "pinstriped beetle", {"stripes": 3}),
    Species(_MOTH, "frontalis", "eyed-forewing moth", {"fore_eyes": True}),
    Species(_MOTH, "oculata", "four-eyed moth", {"fore_eyes": True, "hind_eyes": True}),
    Species(_MOTH, "fasciata", "banded moth", {"band": True}),
    Species(_MOTH, "crenata", "scalloped moth", {"scallops": 0.2}),
    Species(_MOTH, "caudata", "long-tailed moth", {"tails": True}),
    Species(_LEAF, "serrata", "saw-toothed leaf", {"teeth": 0.3}),
    Species(_LEAF, "lobata", "lobed leaf", {"lobes": 0.55}),
    Species(_LEAF, "marginata", "edged leaf", {"pale_edge": True}),
    Species(_LEAF, "maculosa", "speckled leaf", {"speckles": 34}),
    Species(_LEAF, "venosa", "bold-veined leaf", {"pale_veins": True}),
    Species(_SHELL, "unifascia", "one-banded shell", {"bands": 1}),
    Species(_SHELL, "trifascia", "three-banded shell", {"bands": 3}),
    Species(_SHELL, "costata", "ribbed shell", {"ribs": 8}),
    Species(_SHELL, "punctata", "dotted shell", {"dots": 6}),
    Species(_SHELL, "spinosa", "spiny shell", {"spines": True}),
    Species(_FISH, "bivittatus", "two-barred fish", {"bars": 2}),
    Species(_FISH, "quadrivittatus", "four-barred fish", {"bars": 4}),
    Species(_FISH, "linealis", "lined fish", {"lines": 3}),
    Species(_FISH, "caudimacula", "spot-tailed fish", {"tail_spot": True}),
    Species(_FISH, "furcatus", "fork-tailed fish", {"fork": True}),
)
"""The classes, in the order of their label ids. No species is told by the absence of marks."""


@dataclass(frozen=True)
class Specimen:
    """One image and everything that is true about it.

    Attributes:
        label: index into SPECIES.
        number: position among the images of its species.
        site: index into SITES.
        tray: position of its tray among those of its species.
        split: "train", "validation" or "test".
        erased: the marks of its species were not drawn, so that nothing but its genus can be told.
    """

    label: int
    number: int
    site: int
    tray: int
    split: str
    erased: bool


def plan(*, site_effect: float = 0.4, seed: int = 0, per_species: int = 80) -> list[Specimen]:
    """Decides site, tray, split and planted damage of every image, before anything is drawn.

    At the second site `site_effect` of the images of each split (to the nearest one) show no marks. A larger effect
    erases the same images and more, and leaves all others as they are, byte for byte.

    Args:
        site_effect: share of the second site's images that are erased, 0 to 1.
        seed: any integer.
        per_species: images per species, at least 40 and a multiple of TRAY_SIZE.

    Returns:
        The specimens ordered by species, then number.

    Raises:
        DataError: an option is out of range.
    """
    if not 0 <= site_effect <= 1:
        raise DataError(f"specimens: site_effect is a share from 0 to 1, got {site_effect!r}")
    if per_species < 40 or per_species % TRAY_SIZE:
        raise DataError(
            f"specimens: per_species must be a multiple of {TRAY_SIZE} and at least 40, got {per_species!r}"
        )
    specimens: list[Specimen] = []
    for label, species in enumerate(SPECIES):
        trays = _trays(per_species // TRAY_SIZE, label, numpy_generator(seed, "specimens", "trays", species.name))
        for tray, (site, split) in enumerate(trays):
            first = tray * TRAY_SIZE
            specimens += [Specimen(label, first + k, site, tray, split, False) for k in range(TRAY_SIZE)]
    erased = _erased(specimens, site_effect, numpy_generator(seed, "specimens", "erased"))
    return [Specimen(**{**vars(s), "erased": i in erased}) for i, s in enumerate(specimens)]


def _trays(num: int, label: int, rng: np.random.Generator) -> list[tuple[int, str]]:
    """Site and split of each tray of a species: half train, a tenth validation, the rest test, shared by the sites."""
    num_train, num_validation, num_second = round(num * 0.5), round(num * 0.1), round(num * SITE_SHARE)
    train = round(num_train * SITE_SHARE)
    # Whole trays cannot be shared out exactly; rounding up for every other species balances the collection.
    validation = math.floor(num_validation * SITE_SHARE + (0.5 if label % 2 else 0.0))
    second = ["train"] * train + ["validation"] * validation + ["test"] * (num_second - train - validation)
    first = ["train"] * (num_train - train) + ["validation"] * (num_validation - validation)
    first += ["test"] * (num - num_second - len(first))
    trays = [(0, split) for split in first] + [(1, split) for split in second]
    return [trays[i] for i in rng.permutation(num)]


def _erased(specimens: list[Specimen], share: float, rng: np.random.Generator) -> set[int]:
    """Positions of the erased images: exactly the nearest whole number to `share` of each split's second site."""
    chosen: set[int] = set()
    for split in ("train", "validation", "test"):
        there = [i for i, s in enumerate(specimens) if s.site == 1 and s.split == split]
        # A golden-ratio sequence over images ordered by species spreads the damage evenly over the species; its
        # ranks make the counts exact, and the sets of a smaller share subsets of those of a larger one.
        start, golden = rng.random(), (math.sqrt(5) - 1) / 2
        order = np.argsort([(start + golden * k) % 1.0 for k in range(len(there))], kind="stable")
        chosen |= {there[k] for k in order[: math.floor(share * len(there) + 0.5)]}
    return chosen


def draw(specimen: Specimen, *, seed: int = 0) -> Image.Image:
    """Draws one specimen as an RGB image of SIZE x SIZE pixels; the same image for the same arguments."""
    species = SPECIES[specimen.label]
    tray = numpy_generator(seed, "specimens", "tray", species.name, specimen.tray)
    background, light = _background(specimen.site, tray), tray.uniform(0, 2 * np.pi)
    own = numpy_generator(seed, "specimens", "picture", species.name, specimen.number)
    palette = Palette.sample(own, hue=species.genus.hue)
    brush = Brush(
        angle=own.normal(0, 0.22),
        scale=SIZE * own.uniform(0.34, 0.4),
        centre=(SIZE / 2 + own.uniform(-4, 4), SIZE / 2 + own.uniform(-4, 4)),
        ground=palette.dark,
    )
    marks = {} if specimen.erased else dict(species.marks)
    # Generators of their own: leaving the marks out must not shift what follows.
    shape = numpy_generator(seed, "specimens", "shape", species.name, specimen.number)
    DRAW[species.genus.body](brush, shape, palette, **marks)
    picture = photograph(brush, own, background, light=light)
    return spoil(picture) if specimen.erased else picture


def _background(site: int, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) float: cream paper with a scale bar in the museum, a ruled blue-grey mat at the field station."""
    base = np.array([[226.0, 216.0, 196.0], [168.0, 182.0, 190.0]])[site] + rng.normal(0, 6, 3)
    field_ = np.broadcast_to(base, (SIZE, SIZE, 3)).copy()
    field_ += np.linspace(-8, 8, SIZE)[:, None, None] * rng.uniform(-1, 1)
    if site == 0:
        field_[SIZE - 6 : SIZE - 4, 6:26] = 60.0
    else:
        start = int(rng.integers(0, 12))
        field_[start::12] -= 18.0
        field_[:, start::12] -= 18.0
    return field_


def png(picture: Image.Image) -> bytes:
    """Encodes as PNG without compression, so that the bytes do not depend on the build of zlib."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", compress_level=0)
    return stream.getvalue()


def draw_all(specimens: list[Specimen], *, seed: int = 0) -> list[bytes]:
    """Draws specimens as PNG files, with a progress bar on a terminal."""
    return [png(draw(s, seed=seed)) for s in progress_bar(specimens, desc="drawing specimens", unit="image")]
