# SPDX-License-Identifier: Apache-2.0
"""Heights against networkx, level accuracy and least severe decisions against plain loops."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest

from adaptclip.errors import DataError
from adaptclip.gate_rules import Outcome
from adaptclip.metrics.rates import ancestor_heights, least_severe
from adaptclip.predictions import Predictions
from adaptclip.reports.measuring import coarsen, measure

LEVELS = {
    "kingdom": ("a", "a", "a", "b", "b", "a"),
    "family": ("x", "x", "y", "x", "z", "y"),  # "x" is in both kingdoms: two nodes
}


def heights_by_networkx(levels, num_classes):
    """Longest way down from the lowest common ancestor to a leaf, in the tree of paths."""
    tree = nx.DiGraph()
    for c in range(num_classes):
        path: list[tuple[str, ...]] = [()]
        for names in levels.values():
            path.append((*path[-1], names[c]))
        path.append((*path[-1], f"class {c}"))
        nx.add_path(tree, path)
    leaves = {path[-1]: path for path in tree if tree.out_degree(path) == 0}
    depth = nx.dag_longest_path_length(tree)
    found = np.zeros((num_classes, num_classes), int)
    for i in range(num_classes):
        for j in range(num_classes):
            ancestor = nx.lowest_common_ancestor(tree, leaves[f"class {i}"], leaves[f"class {j}"])
            found[i, j] = depth - nx.shortest_path_length(tree, (), ancestor)
    return found


def test_heights_agree_with_networkx():
    assert (ancestor_heights(LEVELS, 6) == heights_by_networkx(LEVELS, 6)).all()
    rng = np.random.default_rng(0)
    compared = 0
    for num_levels in range(4):
        levels = {f"l{k}": tuple(f"n{v}" for v in rng.integers(0, k + 2, 9)) for k in range(num_levels)}
        ours = ancestor_heights(levels, 9)
        assert (ours == heights_by_networkx(levels, 9)).all()
        compared += ours.size
    assert compared == 4 * 81


def test_known_heights():
    heights = ancestor_heights(LEVELS, 6)
    assert heights[0, 0] == 0
    assert heights[0, 1] == 1
    assert heights[0, 2] == 2
    assert heights[0, 3] == 3  # both are an "x", of different kingdoms
    assert (ancestor_heights({}, 3) == 1 - np.eye(3)).all()


def predictions(n=200, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(6) / 2, n).astype(np.float32)
    return Predictions(
        tuple(map(str, range(n))), rng.integers(0, 6, n), probs, tuple("pqrstu"), {"g": ("k",) * n}, None, LEVELS
    )


def test_a_levels_probability_is_the_sum_of_its_classes():
    p = predictions()
    asked = (Outcome(level="kingdom", positive=("b",)), Outcome(positive=("p",)))
    coarse = coarsen(replace(p, outcomes=asked), "family")
    assert coarse.class_names == ("x", "y", "z")
    assert coarse.groups == p.groups
    for i in range(len(p)):
        for g, name in enumerate(coarse.class_names):
            total = sum(float(p.probs[i, c]) for c in range(6) if LEVELS["family"][c] == name)
            assert coarse.probs[i, g] == pytest.approx(total, abs=1e-6)
        assert coarse.class_names[coarse.labels[i]] == LEVELS["family"][p.labels[i]]


def test_unknown_levels_are_named():
    with pytest.raises(DataError, match='Did you mean "family"'):
        coarsen(predictions(), "famly")
    bare = Predictions(("a",), np.zeros(1, int), np.ones((1, 1), np.float32), ("c",))
    with pytest.raises(DataError, match="no taxonomy levels at all"):
        coarsen(bare, "family")


def test_a_level_of_a_ranking_knows_its_first_name_only():
    p = predictions(20)
    assert coarsen(p, "family").ranked is None
    for part in (replace(p, ranked=3), replace(p, ranked=1, confident=False)):
        assert coarsen(part, "family").ranked == 1
    # Probabilities below the head are made up, so no number is made of them.
    found = measure(coarsen(replace(p, ranked=3), "family"), metrics=("accuracy", "brier", "macro_auc"))
    assert found["accuracy"].model.value is not None
    assert [found[m].model.value for m in ("brier", "macro_auc")] == [None, None]


def test_a_tie_of_two_names_is_not_broken_by_rounding():
    # Ten classes of 0.05 and one of 0.5: in float32 the ten add up to a little more, and would win.
    probs = np.array([[0.5] + [0.05] * 10], np.float32)
    levels = {"side": ("one",) + ("ten",) * 10}
    p = Predictions(("i",), np.zeros(1, int), probs, tuple("abcdefghijk"), levels=levels)
    assert coarsen(p, "side").probs[0].tolist() == [0.5, 0.5]
    assert coarsen(p, "side").pred[0] == 0


def test_least_severe_decisions_by_hand_and_by_loop():
    p, heights = predictions(), ancestor_heights(LEVELS, 6)
    expected = [
        min(range(6), key=lambda c: (round(sum(float(row[k]) * heights[k, c] for k in range(6)), 9), c))
        for row in p.probs
    ]
    assert least_severe(p.probs, heights).tolist() == expected
    # 0.4 for a stranger loses against 0.6 shared by two siblings, none of which is the most probable.
    row = np.array([[0.31, 0.29, 0.0, 0.4, 0.0, 0.0]], np.float32)
    assert row.argmax() == 3
    assert least_severe(row, heights).tolist() == [0]
    # Without a taxonomy all mistakes are alike, and it is the most probable class.
    assert (least_severe(p.probs, ancestor_heights({}, 6)) == p.pred).all()
