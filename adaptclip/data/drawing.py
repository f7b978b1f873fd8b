"""Drawn museum specimens: five kinds of body (one per genus), each with marks that tell its species apart.

Coordinates are those of a specimen that points up: x to the right and y down, both about -1 to 1. Everything a species
is told by is an argument of its genus's function, so that leaving the arguments out draws a specimen without a species.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 96
"""Side of a picture in pixels."""
_OVERSAMPLE = 3
"""Shapes are drawn this many times larger and averaged down, which smooths their edges."""

Colour = tuple[int, int, int]


class Brush:
    """Draws shapes in specimen coordinates onto a large picture, and keeps the silhouette of all of them.

    Args:
        angle: rotation in radians.
        scale: pixels (of the final picture) per unit.
        centre: position of the origin in pixels of the final picture.
        ground: colour under the shapes; only the blend at their edges shows it.
    """

    def __init__(self, *, angle: float, scale: float, centre: tuple[float, float], ground: Colour) -> None:
        side = SIZE * _OVERSAMPLE
        self.colour = Image.new("RGB", (side, side), ground)
        self.silhouette = Image.new("L", (side, side), 0)
        self._angle, self._scale, self._centre = angle, scale, centre

    def _pixels(self, points: np.ndarray) -> list[tuple[int, int]]:
        cos, sin = math.cos(self._angle), math.sin(self._angle)
        x = points[:, 0] * cos - points[:, 1] * sin
        y = points[:, 0] * sin + points[:, 1] * cos
        # Whole pixels, so that the last bit of a cosine cannot change a picture from one machine to another.
        px = np.rint((x * self._scale + self._centre[0]) * _OVERSAMPLE).astype(int)
        py = np.rint((y * self._scale + self._centre[1]) * _OVERSAMPLE).astype(int)
        return list(zip(px.tolist(), py.tolist(), strict=True))

    def shape(self, points: np.ndarray, fill: Colour, *, within: np.ndarray | None = None) -> None:
        """Fills a polygon of (n, 2) points; with `within`, only where it lies inside that polygon."""
        pixels = self._pixels(points)
        if within is None:
            ImageDraw.Draw(self.colour).polygon(pixels, fill=fill)
            ImageDraw.Draw(self.silhouette).polygon(pixels, fill=255)
            return
        mark, frame = Image.new("1", self.colour.size), Image.new("1", self.colour.size)
        ImageDraw.Draw(mark).polygon(pixels, fill=1)
        ImageDraw.Draw(frame).polygon(self._pixels(within), fill=1)
        self.colour.paste(fill, mask=ImageChops.logical_and(mark, frame))

    def line(self, points: np.ndarray, fill: Colour, width: float, *, inside: bool = False) -> None:
        """Draws a line `width` units wide; `inside` leaves the silhouette as it is."""
        pixels, pen = self._pixels(points), max(1, round(width * self._scale * _OVERSAMPLE))
        ImageDraw.Draw(self.colour).line(pixels, fill=fill, width=pen, joint="curve")
        if not inside:
            ImageDraw.Draw(self.silhouette).line(pixels, fill=255, width=pen, joint="curve")


def ellipse(x: float, y: float, rx: float, ry: float, *, num: int = 40) -> np.ndarray:
    """Returns the (num, 2) outline of an upright ellipse."""
    turn = np.linspace(0, 2 * np.pi, num, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def mirrored(points: np.ndarray) -> np.ndarray:
    """Returns the points with left and right exchanged."""
    return points * np.array([-1.0, 1.0])


def _bar(y: float, height: float, *, bend: float = 0.0, x0: float = -2.0, x1: float = 2.0) -> np.ndarray:
    """A horizontal bar of the given height that is `bend` lower at its ends."""
    x = np.linspace(x0, x1, 24)
    middle = y + bend * x**2
    upper, lower = np.stack([x, middle - height / 2], 1), np.stack([x, middle + height / 2], 1)
    return np.concatenate([upper, lower[::-1]])


@dataclass(frozen=True)
class Palette:
    """Colours of one specimen. They are drawn at random for every picture and say nothing about the species."""

    body: Colour
    dark: Colour
    light: Colour
    mark: Colour

    @classmethod
    def sample(cls, rng: np.random.Generator, *, hue: tuple[float, float]) -> Palette:
        """Draws a body colour with a hue from the range (turns, 0 to 1) and marks that stand out from it."""
        h, s, v = rng.uniform(*hue) % 1.0, rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.72)
        pale = bool(rng.random() < 0.5)
        mark = (h + rng.uniform(-0.06, 0.06), 0.18, 0.97) if pale else (h + rng.uniform(-0.06, 0.06), 0.55, 0.13)
        return cls(_rgb(h, s, v), _rgb(h, s, v * 0.55), _rgb(h, s * 0.7, min(1.0, v * 1.3)), _rgb(*mark))


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def beetle(
    brush: Brush, rng: np.random.Generator, ink: Palette, *, spots: int = 0, bands: int = 0, stripes: int = 0
) -> None:
    """A beetle from above. Marks on its wing cases: pairs of spots, bands across, stripes along."""
    black, width = _rgb(0.08, 0.4, 0.14), rng.uniform(0.44, 0.52)
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
            bar = _bar(offset * radius, thick * radius, bend=0.16 / radius) + [0, y]
            brush.shape(bar, ink.mark, within=whorl)
        for x in np.linspace(-0.8, 0.8, ribs) * radius:
            rib = np.array([[x * 0.8, y - radius], [x, y], [x * 0.9, y + radius]])
            brush.shape(np.concatenate([rib - [0.028, 0], (rib + [0.028, 0])[::-1]]), ink.mark, within=whorl)
        for x in np.linspace(-0.72, 0.72, dots) * radius:
            brush.shape(ellipse(x, y + 0.08 * radius, 0.1 * radius + 0.012, 0.1 * radius + 0.012), ink.mark, within=whorl)
    brush.shape(ellipse(0.16, 0.6, 0.2, 0.26), ink.dark)
    brush.shape(ellipse(0.2, 0.63, 0.13, 0.19), _rgb(0.05, 0.25, 0.9))


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
        brush.shape(np.array([[x - 0.03, -0.6], [x + 0.03, -0.6], [x * 0.5 + 0.03, 0.7], [x * 0.5 - 0.03, 0.7]]), ink.mark)
    if tail_spot:
        for radius, fill in ((0.17, ink.mark), (0.1, (20, 18, 22))):
            brush.shape(ellipse(0, 0.42, radius, radius), fill, within=body)
    for side in (-0.13, 0.13):
        brush.shape(ellipse(side, -0.72, 0.06, 0.06), (245, 240, 225))
        brush.shape(ellipse(side, -0.72, 0.032, 0.032), (20, 18, 22))


DRAW: dict[str, Callable[..., None]] = {"beetle": beetle, "moth": moth, "leaf": leaf, "shell": shell, "fish": fish}
"""The drawing function of each kind of body."""


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


def photograph(brush: Brush, rng: np.random.Generator, background: np.ndarray, *, light: float) -> Image.Image:
    """Lays the specimen on its background, rounds it by shading, and gives it a shadow and sensor noise.

    Args:
        brush: what was drawn.
        rng: source of the noise.
        background: (H, W, 3) float 0..255.
        light: direction of the light in radians.

    Returns:
        An RGB picture of SIZE x SIZE pixels.
    """
    mask = brush.silhouette.reduce(_OVERSAMPLE)
    cover = np.asarray(mask, dtype=np.float64)[..., None] / 255
    specimen = np.asarray(brush.colour.reduce(_OVERSAMPLE), dtype=np.float64)
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(4)), dtype=np.float64)[..., None] / 255
    dx, dy = round(2 * math.cos(light)), round(2 * math.sin(light))
    slope = np.roll(height, (dy, dx), (0, 1)) - np.roll(height, (-dy, -dx), (0, 1))
    shade = 0.78 + 0.26 * height - 0.5 * slope
    shadow = np.roll(height, (2 * dy, 2 * dx), (0, 1))
    picture = background * (1 - 0.35 * shadow) * (1 - cover) + specimen * shade * cover
    picture += rng.normal(0, 3.0, picture.shape[:2])[..., None]
    return Image.fromarray(np.rint(np.clip(picture, 0, 255)).astype(np.uint8))


def spoil(picture: Image.Image) -> Image.Image:
    """Makes a picture look faded and out of focus: a blur of 1.4 pixels, 60 % contrast and a yellow cast."""
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.4)), dtype=np.float64)
    faded = (0.6 * blurred + 0.4 * 150.0) * np.array([1.06, 1.0, 0.82])
    return Image.fromarray(np.rint(np.clip(faded, 0, 255)).astype(np.uint8))
