# SPDX-License-Identifier: Apache-2.0
"""Numerals drawn by pen strokes and in the fonts that come with matplotlib; only the starter learns from them.

No image of any data set is used, and nothing here is copied from one: the strokes were written down for this file.
What varies is what varies between writers, pens and scanners: form, slant, proportion, weight, position, resolution,
blur and contrast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 64
"""Side of an image in pixels."""
_CANVAS = 320
"""Shapes are drawn about half as large as this, and averaged down."""
_FONT_SIZE = 160
STROKES = "strokes"
"""The hand of what is drawn by strokes; every other hand is a font's file name."""

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("STIXGeneralBolIta", "cmb10", "cmr10", "cmss10", "cmtt10"),
)
"""Fonts in matplotlib's own folder: DejaVu, STIX (OFL) and Computer Modern, all free to draw with."""

Stroke = tuple[str, tuple[tuple[float, float], ...]]
_ROUND, _STRAIGHT = "round", "straight"

FORMS: dict[int, tuple[tuple[Stroke, ...], ...]] = {
    0: (
        ((_ROUND, ((0.5, 0), (0.12, 0.18), (0, 0.5), (0.12, 0.82), (0.5, 1), (0.88, 0.82), (1, 0.5), (0.88, 0.18),
                   (0.5, 0))),),
        ((_ROUND, ((0.62, 0.03), (0.2, 0.1), (0, 0.5), (0.15, 0.9), (0.5, 1), (0.85, 0.88), (1, 0.45), (0.8, 0.08),
                   (0.4, 0.02))),),
    ),
    1: (
        ((_STRAIGHT, ((0.5, 0), (0.5, 1))),),
        ((_STRAIGHT, ((0.1, 0.3), (0.55, 0), (0.55, 1))),),
        ((_STRAIGHT, ((0.25, 0.2), (0.55, 0), (0.5, 1))),),
        ((_STRAIGHT, ((0.2, 0.22), (0.55, 0), (0.55, 1))), (_STRAIGHT, ((0.15, 1), (0.95, 1)))),
    ),
    2: (
        ((_ROUND, ((0.05, 0.25), (0.25, 0.03), (0.6, 0), (0.9, 0.2), (0.82, 0.48), (0.4, 0.78), (0, 1))),
         (_STRAIGHT, ((0, 1), (1, 1)))),
        ((_ROUND, ((0.05, 0.2), (0.4, 0), (0.8, 0.08), (0.85, 0.4), (0.5, 0.75), (0.12, 1), (0.02, 0.85), (0.25, 0.76),
                   (0.6, 0.95), (1, 0.92))),),
        ((_ROUND, ((0.1, 0.15), (0.5, 0), (0.85, 0.22), (0.6, 0.6), (0.05, 0.98), (0.5, 0.94), (1, 1))),),
    ),
    3: (
        ((_ROUND, ((0.05, 0.12), (0.45, 0), (0.88, 0.2), (0.72, 0.43), (0.35, 0.48), (0.8, 0.56), (0.97, 0.77),
                   (0.6, 1), (0.03, 0.9))),),
        ((_STRAIGHT, ((0.05, 0), (0.9, 0), (0.45, 0.42))),
         (_ROUND, ((0.45, 0.42), (0.85, 0.52), (0.95, 0.78), (0.55, 1), (0.02, 0.9)))),
        ((_ROUND, ((0.08, 0.06), (0.6, 0), (0.85, 0.2), (0.5, 0.46))),
         (_ROUND, ((0.5, 0.46), (0.95, 0.62), (0.8, 0.93), (0.35, 1), (0, 0.94)))),
    ),
    4: (
        ((_STRAIGHT, ((0.7, 1), (0.7, 0), (0, 0.66), (1, 0.66))),),
        ((_STRAIGHT, ((0.3, 0), (0, 0.58), (1, 0.58))), (_STRAIGHT, ((0.72, 0.25), (0.66, 1)))),
        ((_ROUND, ((0.1, 0), (0.05, 0.4), (0.25, 0.55), (0.9, 0.48))), (_STRAIGHT, ((0.85, 0), (0.75, 1)))),
        ((_STRAIGHT, ((0.6, 0), (0, 0.55), (0.95, 0.6))), (_STRAIGHT, ((0.6, 0.35), (0.5, 1)))),
    ),
    5: (
        ((_STRAIGHT, ((0.92, 0), (0.18, 0), (0.1, 0.45))),
         (_ROUND, ((0.1, 0.45), (0.5, 0.36), (0.95, 0.6), (0.78, 0.93), (0.35, 1), (0, 0.9)))),
        ((_ROUND, ((0.25, 0.02), (0.18, 0.4), (0.6, 0.42), (0.92, 0.7), (0.6, 0.98), (0.02, 0.95))),
         (_STRAIGHT, ((0.25, 0.02), (1, 0)))),
        ((_ROUND, ((1, 0), (0.4, 0.03), (0.2, 0.3), (0.6, 0.45), (0.85, 0.7), (0.5, 1), (0, 0.95))),),
    ),
    6: (
        ((_ROUND, ((0.75, 0), (0.3, 0.25), (0.03, 0.65), (0.2, 0.97), (0.65, 1), (0.95, 0.76), (0.7, 0.52), (0.3, 0.56),
                   (0.06, 0.75))),),
        ((_ROUND, ((0.4, 0), (0.1, 0.4), (0.05, 0.8), (0.4, 1), (0.85, 0.9), (0.88, 0.66), (0.5, 0.58),
                   (0.12, 0.8))),),
        ((_ROUND, ((0.95, 0.06), (0.5, 0.04), (0.1, 0.4), (0.05, 0.75), (0.4, 1), (0.9, 0.85), (0.8, 0.55), (0.4, 0.5),
                   (0.08, 0.7))),),
    ),
    7: (
        ((_STRAIGHT, ((0, 0), (1, 0), (0.4, 1))),),
        ((_STRAIGHT, ((0, 0.02), (0.95, 0), (0.45, 1))), (_STRAIGHT, ((0.2, 0.52), (0.95, 0.47)))),
        ((_ROUND, ((0, 0.12), (0.3, 0.02), (0.9, 0.04), (0.7, 0.45), (0.5, 1))),),
        ((_STRAIGHT, ((0.05, 0.2), (0.1, 0), (0.95, 0))), (_ROUND, ((0.95, 0), (0.55, 0.5), (0.45, 1)))),
    ),
    8: (
        ((_ROUND, ((0.5, 0.47), (0.12, 0.25), (0.5, 0), (0.88, 0.25), (0.5, 0.47), (0.02, 0.77), (0.5, 1), (0.98, 0.77),
                   (0.5, 0.47))),),
        ((_ROUND, ((0.9, 0.12), (0.5, 0), (0.15, 0.2), (0.5, 0.45), (0.92, 0.75), (0.5, 1), (0.08, 0.8), (0.5, 0.5),
                   (0.9, 0.12))),),
        ((_ROUND, ((0.5, 0), (0.15, 0.22), (0.75, 0.6), (0.7, 0.97), (0.25, 0.95), (0.3, 0.62), (0.85, 0.25),
                   (0.5, 0))),),
    ),
    9: (
        ((_ROUND, ((0.92, 0.22), (0.55, 0), (0.08, 0.2), (0.25, 0.5), (0.7, 0.46), (0.92, 0.22))),
         (_STRAIGHT, ((0.92, 0.15), (0.8, 1)))),
        ((_ROUND, ((0.9, 0.25), (0.5, 0), (0.08, 0.25), (0.4, 0.52), (0.85, 0.35), (0.92, 0.25), (0.9, 0.65), (0.6, 1),
                   (0.1, 0.92))),),
        ((_ROUND, ((0.85, 0.08), (0.3, 0.05), (0.1, 0.38), (0.5, 0.5), (0.85, 0.1))),
         (_ROUND, ((0.85, 0.1), (0.82, 0.6), (0.4, 1)))),
    ),
}  # fmt: skip
"""Ways to write each digit: strokes through points of a unit square, y down; "round" ones are splines."""


@dataclass(frozen=True)
class Numeral:
    """One drawn digit.

    Attributes:
        picture: RGB, `SIDE` x `SIDE`.
        value: 0 to 9.
        hand: `STROKES`, or the font.
    """

    picture: Image.Image
    value: int
    hand: str


def draw_numeral(value: int, rng: np.random.Generator) -> Numeral:
    """Draws a digit as some writer or printer would, seen at some resolution.

    Args:
        value: 0 to 9.
        rng: everything that varies is drawn from it.

    Raises:
        OSError: matplotlib's folder lacks one of `FONTS`.
    """
    hand = STROKES if rng.random() < 0.7 else FONTS[rng.integers(len(FONTS))]
    if hand == STROKES:
        ink = _written(FORMS[value][rng.integers(len(FORMS[value]))], rng)
    else:
        ink = _printed(value, hand, rng)
    return Numeral(_seen(ink, rng), value, hand)


def _written(form: tuple[Stroke, ...], rng: np.random.Generator) -> Image.Image:
    """Writes strokes with an unsteady pen: white ink on a black canvas, cut to its box."""
    height = 150.0
    width = height * rng.uniform(0.45, 0.95)
    slant, turn = rng.normal(0.12, 0.15), rng.normal(0, 0.1)
    across = np.array([width, 0.0]), np.array([-slant * height, height])
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    wobble, bend = rng.uniform(0.01, 0.06), rng.normal(0, 0.06)
    pen = height * rng.uniform(0.07, 0.2)
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    brush = ImageDraw.Draw(canvas)
    for kind, points in form:
        unit = np.array(points) + rng.normal(0, wobble, (len(points), 2))
        unit[:, 0] += bend * np.sin(math.pi * unit[:, 1])
        path = (_spline(unit) if kind == _ROUND else unit) - 0.5
        placed = (path[:, :1] * across[0] + path[:, 1:] * across[1]) @ rotation.T + _CANVAS / 2
        line = [(round(float(x)), round(float(y))) for x, y in placed]
        brush.line(line, fill=255, width=round(pen), joint="curve")
        for x, y in (line[0], line[-1]):
            brush.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return canvas.crop(canvas.getbbox())


def _spline(points: np.ndarray, parts: int = 10) -> np.ndarray:
    """Runs a Catmull-Rom spline through (N, 2) points, closed where they end as they began."""
    near = np.linalg.norm(points[0] - points[-1]) < 0.25 and len(points) > 6
    before, after = (points[-2], points[1]) if near else (points[0], points[-1])
    padded = np.vstack([before, points, after])
    t = np.linspace(0, 1, parts, endpoint=False)[:, None]
    found = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        found.append(b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    return np.vstack([*found, points[-1:]])


def _printed(value: int, font: str, rng: np.random.Generator) -> Image.Image:
    """Prints a digit in a font, slanted, stretched and turned a little, cut to its box."""
    import matplotlib as mpl  # a quarter of a second to import, and only its folder of fonts is needed

    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    middle = (_CANVAS / 2, _CANVAS / 2)
    ImageDraw.Draw(canvas).text(middle, str(value), fill=255, font=ImageFont.truetype(path, _FONT_SIZE), anchor="mm")
    slant, stretch, turn = rng.normal(0.05, 0.12), rng.uniform(0.8, 1.25), rng.normal(0, 5)
    shear = (1 / stretch, slant, _CANVAS / 2 * (1 - 1 / stretch - slant), 0, 1, 0)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    canvas = canvas.rotate(turn, Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        pressed = ImageFilter.MaxFilter(9) if rng.random() < 0.5 else ImageFilter.MinFilter(5)
        changed = canvas.filter(pressed)
        canvas = changed if changed.getbbox() else canvas
    return canvas.crop(canvas.getbbox())


def _seen(ink: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scans ink at a resolution of 8 cells and more, and shows it on paper: dark on light four times in five."""
    cells = 8 if rng.random() < 0.5 else round(8 * 2 ** rng.uniform(0, 3))
    # Placed on a square that it fills, or nearly.
    side = max(ink.size) * rng.choice([1.0, rng.uniform(1.0, 1.5)])
    paper = Image.new("L", (round(side), round(side)), 0)
    free = paper.width - ink.width, paper.height - ink.height
    place = rng.uniform(0.3, 0.7, 2)
    paper.paste(ink, (round(free[0] * place[0]), round(free[1] * place[1])))
    if cells * 4 < max(ink.size) and rng.random() < 0.5:  # a scan in black and white before
        paper = paper.resize((cells * 4, cells * 4), Image.Resampling.BOX).point([0] * 111 + [255] * 145)
    small = np.asarray(paper.resize((cells, cells), Image.Resampling.BOX), dtype=np.float64) / 255
    small = np.pad(small, round(cells * rng.choice([0.125, rng.uniform(0, 0.3)])))
    small = np.clip(small * rng.uniform(0.9, 1.3) + rng.normal(0, rng.choice([0, 0.03]), small.shape), 0, 1)
    light, dark = rng.uniform(200, 255, 3), rng.uniform(0, 70, 3)
    if rng.random() < 0.6:
        light, dark = np.full(3, rng.choice([255.0, light[0]])), np.full(3, rng.choice([0.0, dark[0]]))
    if rng.random() < 0.2:
        light, dark = dark, light
    colours = (light + small[..., None] * (dark - light)).round().astype(np.uint8)
    way = Image.Resampling.BICUBIC if rng.random() < 0.8 else Image.Resampling.BILINEAR
    large = Image.fromarray(colours).resize((SIDE, SIDE), way)
    return large.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5))) if rng.random() < 0.25 else large
