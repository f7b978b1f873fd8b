# SPDX-License-Identifier: Apache-2.0
"""How long `adaptclip card check` takes and how much memory it needs, and how both grow with the number of images.

    python tests/benchmarks/many_images.py results.json                          # 5,000, 15,000 and 50,000 images
    python tests/benchmarks/many_images.py results.json --images 500 1500 5000   # a minute

Each set is a table of tiny JPEGs, all different, of two classes with patients and sex, and no split. The check runs in
a process of its own, with an empty cache (every image is read and decoded) and again with a filled one. The exponents
are slopes of a line through the logarithms: 1 is in proportion to the number of images. Seconds are the processor's, of
all cores together, so that other work on the machine changes them little. Peak memory is that of the process; what an
image adds is the slope over the sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def make_images(folder: Path, number: int) -> None:
    """Writes images of 32 x 32 pixels that look different, and their table with a card."""
    rng = np.random.default_rng(0)
    lines = ["image,label,patient,sex"]
    for i in range(number):
        place = folder / f"images/{i // 1000:03d}"
        if i % 1000 == 0:
            place.mkdir(parents=True)
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{i:06d}.jpg", quality=90)
        lines.append(f"images/{i // 1000:03d}/{i:06d}.jpg,{'ab'[i % 2]},P{i // 4:06d},{'mf'[i // 4 % 2]}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    card = (
        "---\nadaptclip:\n  source: {kind: manifest, files: table.csv}\n"
        "  splits: {fractions: {train: 0.6, validation: 0.1, test: 0.3}}\n"
        "  columns: {cluster: patient, groups: {sex: sex}}\n---\n"
    )
    (folder / "card.md").write_text(card, encoding="utf-8")


def check(folder: Path) -> tuple[float, float]:
    """Returns the processor's seconds and the peak memory in MiB of one `adaptclip card check`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(folder / "card.md")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ADAPTCLIP_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    seconds, mib = map(float, done.stdout.splitlines()[-1].split())
    return seconds, mib


def one(card: str) -> None:
    """Runs the check in this process, and prints its seconds and its peak memory in MiB last."""
    from adaptclip.cli import main

    try:
        main(["card", "check", card])
    except SystemExit as end:
        if end.code:
            raise
    used = resource.getrusage(resource.RUSAGE_SELF)
    sys.stdout.write(f"{used.ru_utime + used.ru_stime:.2f} {used.ru_maxrss / 1024:.1f}\n")


def slope(x: list[float], y: list[float]) -> float:
    """Returns the slope of the line that fits best."""
    return float(np.polyfit(x, y, 1)[0])


def run(sizes: list[int], out: Path) -> None:
    """Measures all sizes, prints a line each, and writes them with the fits."""
    rows = []
    for number in sizes:
        with tempfile.TemporaryDirectory(prefix="tables-many-") as name:
            folder = Path(name)
            make_images(folder, number)
            first, peak = check(folder)
            again, peak_again = check(folder)
        rows.append({"images": number, "s": first, "mib": peak, "again_s": again, "again_mib": peak_again})
        sys.stdout.write(
            f"{number:>8,} images: {first:6.1f} s, {peak:6.0f} MiB; again {again:5.1f} s, {peak_again:6.0f} MiB\n"
        )
    logs = [float(np.log(row["images"])) for row in rows]
    fits = {key: slope(logs, [float(np.log(row[key])) for row in rows]) for key in ("s", "again_s")}
    kib = slope([float(row["images"]) for row in rows], [row["mib"] * 1024 for row in rows])
    sys.stdout.write(
        f"time grows with the power {fits['s']:.2f} (again: {fits['again_s']:.2f}); an image adds {kib:.1f} KiB\n"
    )
    info = {"rows": rows, "exponents": fits, "kib_per_image": kib, "load": os.getloadavg(), "cores": os.cpu_count()}
    out.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path("many_images.json"))
    parser.add_argument("--images", nargs="+", type=int, default=[5_000, 15_000, 50_000])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    one(given.one) if given.one else run(given.images, given.results)
