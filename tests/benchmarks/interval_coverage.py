"""Coverage of the 95 % intervals, and wrong passes and fails of gates at their limit, in worlds whose truth is known.

    python tests/benchmarks/interval_coverage.py results.json                 # 1,000 data sets a line
    python tests/benchmarks/interval_coverage.py results.json --repeats 200 --metric accuracy
    python tests/benchmarks/interval_coverage.py results.json --table         # as Markdown, of what was found before

The worlds are those of tests/worlds.py, which tests/statistics holds to their levels in the gate. A share over 1,000
data sets has a standard error of 0.7 points at 95 %.
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
    parser.add_argument("--metric", default="*", help="only these metrics, such as 'npv' or '*_accuracy'")
    parser.add_argument("--world", default="", help="only worlds whose name holds this")
    parser.add_argument("--table", action="store_true", help="print the results that are there as Markdown")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(table(json.loads(args.out.read_text(encoding="utf-8"))["lines"]))
        return 0
    found = []
    for world, metric, change, tally in lines():
        if not fnmatch(metric, args.metric) or args.world not in world:
            continue
        started = time.perf_counter()
        result = tally(args.repeats)
        found.append({"world": world, "metric": metric, "change": change, **asdict(result)})
        sys.stdout.write(
            f"{metric:24} {'change' if change else '':6} {world:60} covered {100 * result.covered:5.1f}  "
            f"wrong pass {100 * result.passed:4.1f}  wrong fail {100 * result.failed:4.1f}  "
            f"undecided {100 * result.unknown:5.1f}  {time.perf_counter() - started:.0f} s\n"
        )
        sys.stdout.flush()
        args.out.write_text(json.dumps({"repeats": args.repeats, "lines": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
