# SPDX-License-Identifier: Apache-2.0
"""False alarms, coverage and power of gates and gap tests on simulated predictions whose truth is known.

    python tests/benchmarks/gate_statistics.py results.json                 # 400 data sets per line
    python tests/benchmarks/gate_statistics.py results.json --repeats 200   # half the time

Every line draws whole data sets (labels, right and wrong answers per group) and runs the same functions as a report and
`adaptclip gate`. Exit code 1 where a stated level is missed by more than chance (binomial, 0.1 %).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.metrics.estimates import mean_of
from adaptclip.metrics.gaps import gap_test, holm
from adaptclip.predictions import Predictions
from adaptclip.reports.measuring import difference, group_rows, sampling_of

GROUPS = (2, 6, 12)
SIZES = (100, 400, 1000)
EFFECTS = (0.0, 0.05, 0.10, 0.20)


def simulate(rng: np.random.Generator, rates: list[float], n: int, patients: int = 0) -> Predictions:
    """Draws n images per group, right at the group's rate; with `patients`, five images of each share their fate."""
    right, clusters = [], None
    for rate in rates:
        if patients:
            right.append(np.repeat(rng.random(n // patients) < rate, patients))
        else:
            right.append(rng.random(n) < rate)
    hits = np.concatenate(right)
    if patients:
        clusters = tuple(f"p{i // patients}" for i in range(len(hits)))
    labels = np.arange(len(hits)) % 4
    probs = np.full((len(hits), 4), 0.1, np.float32)
    probs[np.arange(len(hits)), np.where(hits, labels, (labels + 1) % 4)] = 0.7
    groups = {"site": tuple(f"g{i:02}" for i in np.repeat(np.arange(len(rates)), n))}
    names = ("a", "b", "c", "d")
    return Predictions(tuple(map(str, range(len(hits)))), labels, probs, names, groups, clusters)


def coverage(rng: np.random.Generator, effect: float, n: int, repeats: int, patients: int = 0) -> float:
    """Share of data sets whose 95 % interval of the difference of two groups holds the planted effect."""
    held = 0
    for _ in range(repeats):
        model = simulate(rng, [0.85, 0.85 - effect], n, patients)
        right = model.pred == model.labels
        one, other = (mean_of(right[rows], sampling_of(model, rows)) for rows in group_rows(model, "site").values())
        low, high = difference(one, other).interval(0.95) or (1.0, -1.0)
        held += low <= effect <= high
    return held / repeats


def verdict_shares(rng: np.random.Generator, rule: GateRule, draw: Callable[[], Predictions], repeats: int) -> dict:
    """Shares of pass and fail over simulated data sets."""
    verdicts = [check_gates(draw(), None, [rule], draws=1000)[0].verdict for _ in range(repeats)]
    return {kind: verdicts.count(kind) / repeats for kind in ("pass", "fail")}


def permutation_alarms(rng: np.random.Generator, groups: int, repeats: int, patients: int = 0) -> dict[str, float]:
    """Shares of data sets of equal groups in which the gap, or any group against the rest, is found at 5 %."""
    gap = rest = 0
    for seed in range(repeats):
        model = simulate(rng, [0.8] * groups, 100, patients)
        code = np.unique(model.groups["site"], return_inverse=True)[1]
        test = gap_test(model.pred == model.labels, code, sampling_of(model), draws=1000, seed=seed)
        gap += test.p_value <= 0.05
        rest += holm(test.rest_p).min() <= 0.05
    return {"gap": gap / repeats, "any group against the rest": rest / repeats}


def study(repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every line of the study; `most` or `least` is what a line may show, `kind` what it is about."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for patients in (0, 5):
        for effect in EFFECTS:
            share_held = coverage(rng, effect, 400, repeats, patients)
            lines.append({"kind": "coverage", "effect": effect, "n": 400, "images per patient": patients or 1,
                          "share": share_held, "least": 0.95})  # fmt: skip
    for groups in GROUPS:
        for patients in (0, 5):
            for what, found in permutation_alarms(rng, groups, repeats, patients).items():
                lines.append({"kind": f"equal groups: {what}", "groups": groups, "n": 100,
                              "images per patient": patients or 1, "share": found, "most": 0.05})  # fmt: skip
        floor = GateRule(group="site", at_least=0.8)
        got = verdict_shares(rng, floor, lambda g=groups: simulate(rng, [0.8] * g, 120), repeats)
        lines += [{"kind": f"every group at least, all at the limit: {k}", "groups": groups, "n": 120, "share": v,
                   "most": 0.05} for k, v in got.items()]  # fmt: skip
        gap = GateRule(group="site", gap_at_most=0.05, at_least=0.3)
        got = verdict_shares(rng, gap, lambda g=groups: simulate(rng, [0.8] * g, 120), repeats)
        lines.append({"kind": "gap at most 5 points, equal groups: fail", "groups": groups, "n": 120,
                      "share": got["fail"], "most": 0.05})  # fmt: skip
        at_limit = lambda g=groups: simulate(rng, [0.85] * (g - 1) + [0.75], 1000)  # noqa: E731
        got = verdict_shares(rng, GateRule(group="site", gap_at_most=0.1, at_least=0.3), at_limit, repeats)
        lines += [{"kind": f"gap at most 10 points, true gap 10: {k}", "groups": groups, "n": 1000, "share": v,
                   "most": 0.05} for k, v in got.items()]  # fmt: skip
    lines += power(rng, repeats)
    return lines


def power(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """How often gates decide, by images per group; two groups."""
    lines = []
    for n in SIZES:
        for effect in EFFECTS:
            rates = [0.85, 0.85 - effect]
            for name, rule in (
                ("every group at least 0.75", GateRule(group="site", at_least=0.75)),
                ("gap at most 10 points", GateRule(group="site", gap_at_most=0.1, at_least=0.3)),
            ):
                got = verdict_shares(rng, rule, lambda r=rates, m=n: simulate(rng, r, m), repeats)
                lines.append({"kind": f"power: {name}", "effect": effect, "n": n, **got})
            found = 0
            for seed in range(repeats):
                model = simulate(rng, rates, n)
                code = np.unique(model.groups["site"], return_inverse=True)[1]
                found += gap_test(model.pred == model.labels, code, draws=1000, seed=seed).p_value <= 0.05
            lines.append({"kind": "power: permutation test", "effect": effect, "n": n, "share": found / repeats})
    return lines


def missed(line: dict[str, Any], repeats: int) -> bool:
    """Whether a line misses its level by more than one in a thousand studies would by chance."""
    count = round(line.get("share", 0) * repeats)
    if "most" in line:
        return bool(count > binom.isf(0.001, repeats, line["most"]))
    return "least" in line and bool(count < binom.ppf(0.001, repeats, line["least"]))


def main() -> int:
    """Runs the study, prints it, writes it; returns 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=400)
    args = parser.parse_args()
    lines = study(args.repeats)
    for line in lines:
        line["missed"] = missed(line, args.repeats)
        sys.stdout.write(json.dumps(line) + "\n")
    args.out.write_text(json.dumps({"repeats": args.repeats, "lines": lines}, indent=2) + "\n", encoding="utf-8")
    return int(any(line["missed"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
