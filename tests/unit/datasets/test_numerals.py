# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from adaptclip.datasets import numerals
from adaptclip.datasets.numerals import FONTS, FORMS, SIDE, STROKES, draw_numeral


def test_a_drawing_depends_on_its_generator_alone():
    first, again = (draw_numeral(3, np.random.default_rng(5)) for _ in range(2))
    other = draw_numeral(3, np.random.default_rng(6))
    assert (first.picture.size, first.picture.mode, first.value) == ((SIDE, SIDE), "RGB", 3)
    assert first.picture.tobytes() == again.picture.tobytes() != other.picture.tobytes()


@pytest.mark.parametrize("value", range(10))
def test_every_form_and_font_leaves_ink(value):
    rng, looked_at = np.random.default_rng(0), 0
    for form in FORMS[value]:
        ink = numerals._written(form, rng)
        assert 8 < min(ink.size) < max(ink.size) < 300
        assert np.asarray(ink).max() == 255
        looked_at += 1
    for font in FONTS:
        ink = numerals._printed(value, font, rng)
        assert 8 < min(ink.size) < max(ink.size) < 256
        assert np.asarray(ink).max() > 200
        looked_at += 1
    assert looked_at == len(FORMS[value]) + 16


def test_drawings_of_one_digit_are_more_alike_than_those_of_several():
    """Ink on paper, whatever its colours, at 8 x 8: the nearest other drawing is mostly of the same digit."""
    rng = np.random.default_rng(0)
    drawn = [draw_numeral(i % 10, rng) for i in range(150)]
    assert {STROKES} < {d.hand for d in drawn} < {STROKES, *FONTS}
    cells = []
    for d in drawn:
        grey = np.asarray(d.picture.convert("L"), dtype=float)
        ink = np.abs(grey - np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])))
        rows, columns = (np.flatnonzero(ink.max(axis=axis) > 0.4 * ink.max()) for axis in (1, 0))
        box = d.picture.convert("L").crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)).resize((8, 8))
        small = np.asarray(box, dtype=float) * (1 if grey[0].mean() > 128 else -1)
        cells.append((small - small.mean()).ravel() / (small.std() + 1e-6))
    distances = np.linalg.norm(np.array(cells)[:, None] - np.array(cells)[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    values = np.array([d.value for d in drawn])
    alike = (values[distances.argmin(axis=1)] == values).mean()
    assert alike > 0.4, f"{alike:.0%} of the nearest drawings are of the same digit; 10 % by chance"
