# SPDX-License-Identifier: Apache-2.0
"""Full report and gates of predictions of many images: seconds and peak memory.

    python tests/benchmarks/large_reports.py results.json                             # both sizes that have a target
    python tests/benchmarks/large_reports.py results.json --sizes 50000x2000          # images x patients

Images are of 10 classes and in 10 groups, and the baseline has the answers of other images. Each size runs in a process
of its own, so that its peak memory is its own. Exit code 1 where a target is missed: 60 s for a million independent
images, 20 s for 100,000 of 20,000 patients, report and gates together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptclip.files import write_json
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.predictions import Predictions
from adaptclip.reports.full import full_report

CLASSES, GROUPS = 10, 10

TARGETS = {"1000000x0": 60.0, "100000x20000": 20.0}
"""Images x patients (0 for independent images) -> most seconds."""

RULES = [
    GateRule(at_least=0.5),
    GateRule(metric="mean_per_class_accuracy", at_least=0.5),
    GateRule(metric="macro_auc", at_least=0.6),
    GateRule(group="site", gap_at_most=0.1),
    GateRule(group="site", no_worse_than="zero_shot", margin=0.02),
]


def drawn(images: int, patients: int) -> tuple[Predictions, Predictions]:
    """Predictions that are mostly right, and a baseline that is right by chance."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, images)
    probs = rng.dirichlet(np.full(CLASSES, 0.3), images)
    probs[np.arange(images), labels] += 1
    probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    sites = tuple(f"site {g}" for g in rng.integers(0, GROUPS, images))
    clusters = tuple(f"patient {i % patients}" for i in range(images)) if patients else None
    names = tuple(f"class {c}" for c in range(CLASSES))
    model = Predictions(tuple(map(str, range(images))), labels, probs, names, {"site": sites}, clusters)
    return model, replace(model, probs=np.roll(probs, 1, axis=0))


def measure(size: str) -> dict[str, Any]:
    """Seconds of the report and of the gates, and the memory that the process had at most."""
    images, patients = map(int, size.split("x"))
    model, baseline = drawn(images, patients)
    start = time.perf_counter()
    full_report(model, baseline)
    between = time.perf_counter()
    check_gates(model, baseline, RULES)
    return {
        "images": images,
        "patients": patients,
        "report_seconds": between - start,
        "gates_seconds": time.perf_counter() - between,
        "most_seconds": TARGETS.get(size),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    """Runs every size in a process of its own and writes the results; returns 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", nargs="+", default=tuple(TARGETS), metavar="IMAGESxPATIENTS")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        write_json(given.out, measure(given.sizes[0]))
        return 0
    results = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "result.json"
            subprocess.run([sys.executable, __file__, str(own), "--one", "--sizes", size], check=True)
            result = json.loads(own.read_text())
        results.append(result)
        sys.stdout.write(
            f"{result['images']:>9,} images, {result['patients']:>6,} patients: "
            f"report {result['report_seconds']:5.1f} s, gates {result['gates_seconds']:4.1f} s, "
            f"{result['peak_bytes'] / 2**30:4.1f} GiB, load average {result['load_average']:.1f}\n"
        )
        sys.stdout.flush()
    write_json(given.out, results)
    return int(any(r["report_seconds"] + r["gates_seconds"] > (r["most_seconds"] or np.inf) for r in results))


if __name__ == "__main__":
    sys.exit(main())
