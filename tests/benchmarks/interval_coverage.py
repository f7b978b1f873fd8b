# SPDX-License-Identifier: Apache-2.0
"""Coverage of the 95 % intervals, and wrong passes and fails of gates at their limit, in worlds whose truth is known.

    OMP_NUM_THREADS=1 python tests/benchmarks/interval_coverage.py results.json    # 1,000 data sets a line
    python tests/benchmarks/interval_coverage.py results.json --repeats 200 --metric accuracy
    python tests/benchmarks/interval_coverage.py results.json --table              # what was found, as Markdown

The worlds are those of tests/worlds.py, which tests/statistics holds to their levels in the gate. A share over 1,000
data sets has a standard error of 0.7 points at 95 %. The results are written after every line, and a second call goes
on: a line that is there with as many data sets of the same seed is not drawn again, and one with fewer is drawn anew
from the first, so that the earlier data sets are part of the later ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from worlds import lines

from adaptclip.metrics.intervals import exact_bound

_NAMED = 4
"""Lines named in the summary for each of coverage, passes and fails."""


def summary(found: list[dict[str, Any]]) -> str:
    """What stands out: how many data sets there were, and the lines farthest from what was asked."""
    counts = sorted({line["repeats"] for line in found})
    known = [line for line in found if line["unknown"] < 1 or line["covered"]]  # the others have no interval
    parts = [f"{len(found)} lines, data sets a line: {', '.join(map(str, counts))}"]
    for words, key, sign in (
        ("lowest coverage", "covered", 1),
        ("wrong passes", "passed", -1),
        ("fails", "failed", -1),
    ):
        for line in sorted(known, key=lambda line: sign * line[key])[:_NAMED]:
            what = f"{line['metric']}{', change' * line['change']}: {line['world']}"
            parts.append(f"{words} {_share(line[key], line['repeats'])}, {what}")
    return "\n".join(f"- {part}" for part in parts) + "\n"


def _share(share: float, repeats: int) -> str:
    """A share with its Monte-Carlo interval, Clopper and Pearson's 95 %, in per cent."""
    low, high = (exact_bound(share, repeats, side, 0.025) for side in ("low", "high"))
    return f"{100 * share:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


def table(found: list[dict[str, Any]]) -> str:
    """One table for all worlds that were studied with the same metrics: a row for a world, a column for a metric."""
    worlds: dict[str, dict[str, str]] = {}
    for line in found:
        name = line["metric"] + (", change" if line["change"] else "")
        cell = " / ".join(f"{100 * line[key]:.1f}" for key in ("covered", "passed", "failed"))
        unknown = f" ({100 * line['unknown']:.0f} % open)" if line["unknown"] >= 0.005 else ""
        silent = line["unknown"] == 1 and line["covered"] == 0
        worlds.setdefault(line["world"], {})[name] = "no interval" if silent else cell + unknown
    kinds: dict[tuple[str, ...], list[str]] = {}
    for world, cells in worlds.items():
        kinds.setdefault(tuple(cells), []).append(world)
    parts = []
    for metrics, names in kinds.items():
        rows = [f"| {name} | {' | '.join(worlds[name].values())} |" for name in names]
        parts.append("\n".join([f"| world | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|", *rows]) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Runs the lines one by one, prints each, writes them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other data sets")
    parser.add_argument("--metric", default="*", help="only these metrics, such as 'npv' or '*_accuracy'")
    parser.add_argument("--world", default="", help="only worlds whose name holds this")
    parser.add_argument("--table", action="store_true", help="print the results that are there as Markdown")
    args = parser.parse_args()
    before = json.loads(args.out.read_text(encoding="utf-8"))["lines"] if args.out.exists() else []
    if args.table:
        sys.stdout.write(summary(before) + "\n" + table(before))
        return 0
    found = {(line["world"], line["metric"], line["change"]): line for line in before}
    studied = lines()
    for world, metric, change, tally in studied:
        there = found.get((world, metric, change))
        enough = there is not None and there["repeats"] >= args.repeats and there.get("seed", 0) == args.seed
        if enough or not fnmatch(metric, args.metric) or args.world not in world:
            continue
        started = time.perf_counter()
        result = tally(args.repeats, seed=args.seed)
        found[world, metric, change] = {
            "world": world, "metric": metric, "change": change, **asdict(result), "seed": args.seed
        }  # fmt: skip
        sys.stdout.write(
            f"{metric:24} {'change' if change else '':6} {world:60} covered {100 * result.covered:5.1f}  "
            f"wrong pass {100 * result.passed:4.1f}  wrong fail {100 * result.failed:4.1f}  "
            f"undecided {100 * result.unknown:5.1f}  {time.perf_counter() - started:.0f} s\n"
        )
        sys.stdout.flush()
        ordered = [found[line[:3]] for line in studied if line[:3] in found]
        args.out.write_text(json.dumps({"lines": ordered}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
