# SPDX-License-Identifier: Apache-2.0
"""What is asked of a metric is asked of its object: no other module decides by a metric's name."""

from __future__ import annotations

import ast
from pathlib import Path

import adaptclip
from adaptclip.metrics import METRICS

PACKAGE = Path(adaptclip.__file__).parent
ELSEWHERE = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "metrics"]
OTHER_MEANING = {"training/criterion.py", "evaluation/thresholds.py"}
"""There "sensitivity" names what a threshold keeps on validation images, not a metric of predictions."""


def decisions(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name wherever a comparison, a membership test or a match names a metric."""
    found = []
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Subscript | ast.Call):
                    break  # a key of a report is no decision
                if isinstance(leaf, ast.Constant) and leaf.value in METRICS:
                    found.append((getattr(node, "lineno", 0), str(leaf.value)))
    return found


def test_the_search_finds_what_it_looks_for():
    assert decisions(ast.parse("if metric == 'accuracy': pass")) == [(1, "accuracy")]
    assert decisions(ast.parse("x = 1 if m in ('ece', 'brier') else 2")) == [(1, "ece"), (1, "brier")]
    assert decisions(ast.parse("row['accuracy']['value'] is None")) == []


def test_no_other_module_decides_by_a_metrics_name():
    compared = 0
    for path in ELSEWHERE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared += sum(isinstance(node, ast.Compare) for node in ast.walk(tree))
        if str(path.relative_to(PACKAGE)) in OTHER_MEANING:
            continue
        assert not decisions(tree), f"{path} decides by a metric's name: {decisions(tree)}"
    assert len(ELSEWHERE) >= 100
    assert compared >= 1000, f"only {compared} comparisons were looked at"
