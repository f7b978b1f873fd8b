# SPDX-License-Identifier: Apache-2.0
"""A brush, colours and a camera for drawn specimens.

Coordinates are those of a specimen that points up: x to the right and y down, both about -1 to 1.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 96
"""Side of an image in pixels."""
_OVERSAMPLE = 3
"""Shapes are drawn this many times larger and averaged down, which smooths their edges."""

Colour = tuple[int, int, int]


class Brush:
    """Draws shapes in specimen coordinates onto a large image, and keeps the silhouette of all of them.

    Args:
        angle: rotation in radians.
        scale: pixels (of the final image) per unit.
        centre: position of the origin in pixels of the final image.
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
        # Whole pixels, so that the last bit of a cosine cannot change an image from one machine to another.
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


@dataclass(frozen=True)
class Palette:
    """Colours of one specimen. They are drawn at random for every image and say nothing about the species."""

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
        return cls(rgb(h, s, v), rgb(h, s, v * 0.55), rgb(h, s * 0.7, min(1.0, v * 1.3)), rgb(*mark))


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """Returns a colour as 8-bit red, green and blue; hue in turns, the others 0 to 1."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def photograph(brush: Brush, rng: np.random.Generator, background: np.ndarray, *, light: float) -> Image.Image:
    """Lays the specimen on its background, rounds it by shading, and gives it a shadow and sensor noise.

    Args:
        brush: what was drawn.
        rng: source of the noise.
        background: (H, W, 3) float 0..255.
        light: direction of the light in radians.

    Returns:
        An RGB image of SIZE x SIZE pixels.
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
    """Makes an image look faded and out of focus: a blur of 1.4 pixels, 60 % contrast and a yellow cast."""
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.4)), dtype=np.float64)
    faded = (0.6 * blurred + 0.4 * 150.0) * np.array([1.06, 1.0, 0.82])
    return Image.fromarray(np.rint(np.clip(faded, 0, 255)).astype(np.uint8))
