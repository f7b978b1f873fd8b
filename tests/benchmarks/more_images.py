# SPDX-License-Identifier: Apache-2.0
"""How stable the answer to "how many more images would settle it" is, and how often that many do settle it.

    python tests/benchmarks/more_images.py results.json                 # 1,000 data sets a line

Data sets are drawn from a known rate, as independent images or patients with several. Of those that leave the gate
inconclusive the answer is noted, so many images of the same kind are added, and the gate is judged again. Beside it
stands the answer of taking the present estimate for the truth: the smallest number with which the bound would cross.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from worlds import World

from adaptclip.gates.sample_size import MOST, Claim, more_images
from adaptclip.metrics import find_metric
from adaptclip.metrics.estimates import Measurement
from adaptclip.metrics.judged import Judged, Sampling

LINES = [
    (World(f"rate {rate:g}, limit {limit:g}, {units} x {size}, ICC {icc:g}", (0.5, 0.5), (rate, rate), patients=units,
           sizes=size, alike=icc), limit)
    for rate, limit in ((0.85, 0.8), (0.83, 0.8), (0.8, 0.8), (0.78, 0.8), (0.97, 0.95))
    for units, size, icc in ((200, 1, 0.0), (60, 5, 0.3))
]  # fmt: skip


def claim_of(measured: Measurement, limit: float) -> Claim:
    """That the rate is at least the limit."""
    assert measured.value is not None
    assert measured.spread is not None
    return Claim(measured.value, measured.spread, limit, upwards=True, alpha=0.05)


def measured(judged: Judged) -> Measurement:
    """Accuracy."""
    return find_metric("accuracy").compare(judged).model


def verdict(claim: Claim) -> str:
    """Of a gate with 95 % confidence."""
    low, high = (claim.spread.bound(side, 0.05, exact=True) for side in ("low", "high"))
    return "pass" if low >= claim.limit else "fail" if high < claim.limit else "inconclusive"


def plugged_in(claim: Claim, n: int) -> float:
    """The number with which the bound crosses if the estimate is the truth; infinite beyond 10,000 times."""
    distance = claim.value - claim.limit
    bound = claim.spread.bound("low" if distance >= 0 else "high", claim.alpha, exact=True)
    return n * (max((claim.value - bound) ** 2 / max(distance**2, 1e-12), 1.0) - 1)


def joined(first: Judged, second: Judged) -> Judged:
    """Both sets of images, of different units."""
    unit = np.concatenate([first.sampling.unit, first.sampling.num_units + second.sampling.unit])
    labels, probs = np.concatenate([first.labels, second.labels]), np.concatenate([first.probs, second.probs])
    return Judged(labels, probs, Sampling(unit))


def study(world: World, limit: float, repeats: int, seed: int = 0) -> dict[str, object]:
    """Quartiles of both answers over the inconclusive ones of `repeats` data sets, and what came of ours."""
    rng, ours, plain, settled, offered, likely = np.random.default_rng(seed), [], [], 0, 0, []
    for _ in range(repeats):
        judged, _ = world.draw(rng)
        claim, units = claim_of(measured(judged), limit), judged.sampling.num_units
        if verdict(claim) != "inconclusive":
            continue
        plain.append(plugged_in(claim, len(judged)))
        more = more_images(claim, len(judged), units)
        assert more is not None
        ours.append(np.inf if more.images is None else more.images)
        likely.append(np.inf if more.likely is None else more.likely)
        if more.images is not None:
            offered += 1
            further, _ = replace(world, patients=round(more.images * units / len(judged))).draw(rng)
            settled += verdict(claim_of(measured(joined(judged, further)), limit)) != "inconclusive"
    quartiles = {
        name: [float(q) for q in np.quantile(found, (0.25, 0.5, 0.75), method="nearest")]
        for name, found in (("even", ours), ("likely", likely), ("plugged_in", plain))
    }
    return {"world": world.name, "n": len(judged), "open": len(ours), **quartiles, "settled": settled / max(offered, 1),
            "beyond": MOST}  # fmt: skip


def main() -> int:
    """Prints a row for each line, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args()
    found = []
    for world, limit in LINES:
        found.append(row := study(world, limit, args.repeats))
        words = "  ".join(
            f"{k} {row[k][1]:,.0f} ({row[k][0]:,.0f} to {row[k][2]:,.0f})"  # type: ignore[index]
            for k in ("plugged_in", "even", "likely")
        )
        sys.stdout.write(f"{row['world']:42} open {row['open']:4}  {words}  settled {100 * row['settled']:.0f} %\n")  # type: ignore[operator]
        sys.stdout.flush()
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
