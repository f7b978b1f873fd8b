"""A procedural fine-grained collection: 25 invented species in 5 genera, two imaging sites, a planted site effect."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

from adaptclip.data.bodies import DRAW
from adaptclip.data.drawing import SIZE, Brush, Palette, photograph, spoil
from adaptclip.errors import DataError
from adaptclip.seeding import numpy_generator

SITES = ("museum", "field station")
"""The imaging sites; the site effect is planted at the second."""
TRAY_SIZE = 4
"""Pictures that share a tray: one species, one site, one background and light. A tray never spans two splits."""
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
    """One picture and everything that is true about it.

    Attributes:
        label: index into SPECIES.
        number: position among the pictures of its species.
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
    """Decides site, tray, split and planted damage of every picture, before anything is drawn.

    At the second site `site_effect` of the pictures of each split (to the nearest one) show no marks. A larger effect
    erases the same pictures and more, and leaves all others as they are, byte for byte.

    Args:
        site_effect: share of the second site's pictures that are erased, 0 to 1.
        seed: any integer.
        per_species: pictures per species, at least 40 and a multiple of TRAY_SIZE.

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
    """Positions of the erased pictures: exactly the nearest whole number to `share` of each split's second site."""
    chosen: set[int] = set()
    for split in ("train", "validation", "test"):
        there = [i for i, s in enumerate(specimens) if s.site == 1 and s.split == split]
        # A golden-ratio sequence over pictures ordered by species spreads the damage evenly over the species; its
        # ranks make the counts exact, and the sets of a smaller share subsets of those of a larger one.
        start, golden = rng.random(), (math.sqrt(5) - 1) / 2
        order = np.argsort([(start + golden * k) % 1.0 for k in range(len(there))], kind="stable")
        chosen |= {there[k] for k in order[: math.floor(share * len(there) + 0.5)]}
    return chosen


def draw(specimen: Specimen, *, seed: int = 0) -> Image.Image:
    """Draws one specimen as an RGB picture of SIZE x SIZE pixels; the same picture for the same arguments."""
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
    return [png(draw(s, seed=seed)) for s in tqdm(specimens, desc="drawing specimens", unit="image", disable=None)]
