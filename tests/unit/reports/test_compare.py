# SPDX-License-Identifier: Apache-2.0
"""Before and after: point estimates by numpy, intervals by simulation, and verdicts on cases with a known answer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.predictions import Predictions
from adaptclip.reports.compare import compare_groups, exit_code, levelling_markdown

NAMES = ("a", "b", "c")


def _predictions(right: np.ndarray, groups, clusters=None) -> Predictions:
    """Three classes; right where asked, and otherwise the next class."""
    labels = np.arange(len(right)) % 3
    probs = np.full((len(right), 3), 0.1, np.float32)
    probs[np.arange(len(right)), np.where(right, labels, (labels + 1) % 3)] = 0.8
    ids = tuple(map(str, range(len(right))))
    return Predictions(ids, labels, probs, NAMES, {"site": tuple(groups)}, clusters)


def _exact(n: int, changes: dict[str, tuple[float, float]], **sizes: int):
    """Groups of n images whose rates before and after are exactly those given; as few answers change as possible."""
    before, after, names = [], [], []
    for name, rates in changes.items():
        size = sizes.get(name, n)
        before.append(np.arange(size) < round(rates[0] * size))
        after.append(np.arange(size) < round(rates[1] * size))
        names += [name] * size
    return _predictions(np.concatenate(before), names), _predictions(np.concatenate(after), names)


CASES = {
    "levelled down": {"x": (0.70, 0.60), "y": (0.90, 0.65)},
    "worse": {"x": (0.70, 0.60), "y": (0.80, 0.80)},
    "better": {"x": (0.60, 0.75), "y": (0.80, 0.78)},
    "no worse": {"x": (0.70, 0.70), "y": (0.80, 0.79)},
}


@pytest.mark.parametrize("verdict", CASES)
def test_known_verdicts(verdict):
    before, after = _exact(1000, CASES[verdict])
    result = compare_groups(before, after, "site")
    assert result["verdict"] == verdict
    assert exit_code(result) == (2 if verdict in ("levelled down", "worse") else 0)
    worst, gap = result["worst"], result["gap"]
    rates = np.array([CASES[verdict][name] for name in ("x", "y")])
    low, high = rates.min(axis=0), rates.max(axis=0)
    assert [worst["before"]["value"], worst["after"]["value"]] == pytest.approx(low)
    assert worst["change"]["value"] == pytest.approx(low[1] - low[0])
    assert [gap["before"], gap["after"]] == pytest.approx(high - low)
    for change in (worst["change"], gap["change"]):
        assert change["low"] <= change["value"] <= change["high"]
    assert json.loads(json.dumps(result)) == result


def test_levelling_down_is_said_in_words():
    every = compare_groups(*_exact(1000, CASES["levelled down"]), "site")
    assert "Every group lost, so the smaller gap was bought by making things worse" in every["reason"]
    assert "of the worst group, x, went from 70.0 % to 60.0 %" in every["reason"]
    one = compare_groups(*_exact(1000, {"x": (0.7, 0.6), "y": (0.9, 0.75), "z": (0.7, 0.72)}), "site")
    assert one["verdict"] == "levelled down"
    assert "The worst group lost, so" in one["reason"]


def test_another_group_becomes_the_worst():
    """The group that was worst gains, another falls below where that one was: the lowest rate fell."""
    result = compare_groups(*_exact(1000, {"x": (0.6, 0.72), "y": (0.9, 0.5)}), "site")
    assert result["verdict"] == "levelled down"
    assert result["worst"]["before"]["group"] == "x"
    assert result["worst"]["after"]["group"] == "y"
    assert "(x before, y after)" in result["reason"]


def test_few_images_cannot_tell():
    result = compare_groups(*_exact(120, {"x": (0.7, 0.68), "y": (0.9, 0.85)}), "site")
    assert result["verdict"] == "cannot tell"
    assert exit_code(result) == 3
    assert "nor rule out a loss of more than 2 points" in result["reason"]


def test_small_groups_are_listed_and_not_judged():
    before, after = _exact(1000, {"x": (0.7, 0.7), "y": (0.8, 0.8), "tiny": (1.0, 0.0)}, tiny=60)
    result = compare_groups(before, after, "site")
    assert result["verdict"] == "no worse"
    assert "Not judged, having too few images or clusters: tiny (60)" in result["reason"]
    assert compare_groups(before, after, "site", min_n=50)["verdict"] == "worse"
    alone = compare_groups(before, after, "site", min_n=2000)
    assert (alone["verdict"], alone["worst"]) == ("cannot tell", None)
    assert "0 of 3 groups have the 2000 images" in alone["reason"]
    assert levelling_markdown(alone)


@pytest.mark.parametrize(
    ("rates", "n"),
    [
        ({"x": (0.7, 0.7), "y": (0.7, 0.7), "z": (0.7, 0.7)}, 150),  # ties: where a bootstrap of the gap fails
        ({"x": (0.6, 0.7), "y": (0.85, 0.8), "z": (0.8, 0.8)}, 200),
        ({"x": (0.6, 0.6), "y": (0.85, 0.6)}, 200),
    ],
)
def test_intervals_hold_the_truth_and_no_group_is_accused_falsely(rates, n):
    """120 simulated data sets; answers before and after are correlated, as those of two versions of a model are."""
    rng, draws = np.random.default_rng(0), 120
    truth = np.array(list(rates.values()))
    worst = truth.min(axis=0)
    gap = truth.max(axis=0) - worst
    held, accused = [0, 0], 0
    names = np.repeat(list(rates), n)
    for _ in range(draws):
        difficulty = rng.random(len(names))
        again = np.where(rng.random(len(names)) < 0.7, difficulty, rng.random(len(names)))
        right = [np.repeat(truth[:, i], n) > d for i, d in enumerate((difficulty, again))]
        result = compare_groups(_predictions(right[0], names), _predictions(right[1], names), "site")
        for i, (key, change) in enumerate((("worst", worst[1] - worst[0]), ("gap", gap[1] - gap[0]))):
            interval = result[key]["change"]
            held[i] += interval["low"] - 1e-9 <= change <= interval["high"] + 1e-9
        accused += result["verdict"] in ("levelled down", "worse")
    # A 95 % interval may miss in 6 of 120; 12 lie within chance of it (binomial, 1 %).
    assert min(held) >= draws - 12, held
    assert accused <= 8, accused  # at most 2.5 %, likewise


def test_power_to_catch_levelling_down():
    rng, caught = np.random.default_rng(1), 0
    names = np.repeat(["x", "y"], 400)
    for _ in range(40):
        difficulty = rng.random(800)
        right = [np.repeat(rates, 400) > difficulty for rates in ((0.7, 0.9), (0.6, 0.7))]
        result = compare_groups(_predictions(right[0], names), _predictions(right[1], names), "site")
        caught += result["verdict"] == "levelled down"
    assert caught >= 36


def test_clusters_widen_and_those_that_span_groups_widen_more():
    before, after = _exact(400, {"x": (0.7, 0.75), "y": (0.9, 0.85)})
    apart = tuple(f"{site}{i % 100}" for i, site in enumerate(before.groups["site"]))
    spanning = tuple(str(i % 100) for i in range(800))
    width = {}
    for name, clusters in {"none": None, "apart": apart, "spanning": spanning}.items():
        result = compare_groups(replace(before, clusters=clusters), replace(after, clusters=clusters), "site")
        change = result["gap"]["change"]
        width[name] = change["high"] - change["low"]
    assert width["none"] < width["spanning"]
    assert width["apart"] < width["spanning"]


def test_order_of_rows_does_not_matter():
    before, after = _exact(300, CASES["better"])
    order = np.random.default_rng(0).permutation(600)
    shuffled = Predictions(
        tuple(after.ids[i] for i in order), after.labels[order], after.probs[order], NAMES,
        {"site": tuple(after.groups["site"][i] for i in order)},
    )  # fmt: skip
    assert compare_groups(before, shuffled, "site") == compare_groups(before, after, "site")


def test_markdown_has_every_group_and_escapes_names():
    before, after = _exact(300, {"<b>x</b>": (0.6, 0.7), "y|z": (0.8, 0.8)})
    text = levelling_markdown(compare_groups(before, after, "site", metric="mean_per_class_accuracy"))
    assert text.startswith("# Before and after: mean accuracy per class by site\n\n**better**. ")
    assert "<b>" not in text
    assert r"| y\|z | 300 | 80.0 % [" in text
    assert text.count("\n| ") == 4


def test_bad_input():
    before, after = _exact(200, CASES["better"])
    with pytest.raises(DataError, match="better when higher, not 'ece'"):
        compare_groups(before, after, "site", metric="ece")
    with pytest.raises(DataError, match='Did you mean "accuracy"'):
        compare_groups(before, after, "site", metric="acuracy")
    with pytest.raises(DataError, match=r'no group attribute .sit.*Did you mean "site"'):
        compare_groups(before, after, "sit")
    with pytest.raises(DataError, match="needs the same images"):
        compare_groups(before, _exact(100, CASES["better"])[1], "site")
    with pytest.raises(DataError, match=r"margin must lie within 0 and 1"):
        compare_groups(before, after, "site", margin=2)
