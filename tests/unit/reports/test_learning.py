# SPDX-License-Identifier: Apache-2.0
"""A run's loss and learning rate, from metrics.jsonl to the page."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report
from adaptclip.reports.learning import MOST_POINTS, learning_curves, learning_section
from adaptclip.reports.plots import BLUE, curve
from adaptclip.reports.render import to_html, to_markdown


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"step": s, "loss": loss, "grad_norm": 1.0, "lr": lr}) + "\n" for s, loss, lr in rows)
    )


STEPS = [(10, 2.5, 0.002), (20, 0.25, 0.001), (30, 0.5, 0.0)]


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(2), size=40).astype(np.float32)
    return build_report(
        Predictions(tuple(map(str, range(40))), rng.integers(2, size=40), probs, ("a", "b")), draws=1000
    )


def test_what_was_logged_is_read(tmp_path):
    write(tmp_path / "metrics.jsonl", STEPS)
    write(tmp_path / "head" / "metrics.jsonl", STEPS[:1])
    write(tmp_path / "nothing" / "metrics.jsonl", [])
    assert learning_curves(tmp_path) == [
        {"stage": "", "every": 1, "step": [10, 20, 30], "loss": [2.5, 0.25, 0.5], "lr": [0.002, 0.001, 0.0]},
        {"stage": "head", "every": 1, "step": [10], "loss": [2.5], "lr": [0.002]},
    ]


def test_lines_that_cannot_be_read_cost_no_report(tmp_path):
    lines = [
        '{"step": 1, "loss": 1.0, "lr": 0.1}', "\x00\x00", "[1]", '{"step": "2", "loss": 1}',
        '{"step": 3, "loss": null}', '{"step": 4, "loss": "x", "lr": true}', '{"step": 5, "loss": 2}',
        '{"step": 6, "lo',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert learning_curves(tmp_path) == [
        {"stage": "", "every": 1, "step": [1, 3, 4, 5], "loss": [1.0, None, None, 2.0], "lr": [0.1, None, None, None]}
    ]


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_a_long_curve_is_thinned_out_and_keeps_its_ends(tmp_path, count):
    write(tmp_path / "metrics.jsonl", [(step, 1 / step, 0.1) for step in range(1, count + 1)])
    (found,) = learning_curves(tmp_path)
    assert found["every"] == math.ceil(count / MOST_POINTS)
    assert (found["step"][0], found["step"][-1]) == (1, count)
    assert MOST_POINTS / 2 <= len(found["step"]) <= MOST_POINTS + 1
    assert set(np.diff(found["step"][1:])) == {found["every"]}


def test_without_steps_there_is_no_section(tmp_path, report):
    (tmp_path / "metrics.jsonl").touch()
    assert learning_curves(tmp_path) == learning_curves(tmp_path / "none") == []
    assert learning_section({"learning": []}, plots=True) is learning_section({}, plots=True) is None
    for found in (report, {**report, "learning": []}):
        assert "Training curve" not in to_markdown(found) + to_html(found)


def test_markdown_says_first_and_last_loss(tmp_path, report):
    write(tmp_path / "metrics.jsonl", STEPS)
    write(tmp_path / "head" / "metrics.jsonl", STEPS[:1])
    page = to_markdown({**report, "learning": learning_curves(tmp_path)})
    section = page[page.index("## Training curve") : page.index("## How to read this")].split("\n\n")
    assert section[1:5] == [
        "Loss 2.5 at step 10, 0.5 at step 30; lowest 0.25 at step 20.",
        "Learning rate 0.002 at step 10, 0 at step 30.",
        "Head: loss 2.5 at step 10, the only one that was logged.",
        "Head: learning rate 0.002 at step 10, the only one that was logged.",
    ]


def test_the_page_draws_both_curves_in_its_own_colours_and_the_same_each_time(tmp_path, report):
    write(tmp_path / "metrics.jsonl", STEPS)
    write(tmp_path / "head" / "metrics.jsonl", [(1, 3.0, 0.1), (2, None, 0.1), (3, 1.0, 0.1)])
    found = {**report, "learning": learning_curves(tmp_path)}
    page = to_html(found)
    assert page == to_html(found)
    section = page[page.index('<h2 id="curve">') : page.index("How to read this</h2>")]
    plots = re.findall(r"<svg.*?</svg>", section, re.S)
    assert len(plots) == 4
    for plot, label, colour in zip(plots, ["loss", "learning rate"] * 2, ["blue", "orange"] * 2, strict=True):
        assert f"{label}</text>" in plot
        assert f"stroke: var(--{colour})" in plot
        assert "#0000" not in plot
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "Loss 2.5 at step 10, 0.5 at step 30; lowest 0.25 at step 20." in section


def test_a_loss_that_is_not_known_is_a_gap():
    whole, gap = (curve("loss", [1, 2, 3], losses, "loss", BLUE) for losses in ([3.0, 2.0, 1.0], [3.0, None, 1.0]))
    assert whole.count("<use") == gap.count("<use") + 1
