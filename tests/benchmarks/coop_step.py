# SPDX-License-Identifier: Apache-2.0
"""Times one training step of CoOp: the published way against the packed shared-prefix path.

Shapes of ViT-B/32 (text: width 512, 12 layers, 8 heads, 77 tokens) with random weights, 16 context tokens, a batch of
32 images, float32. The published step encodes the images, encodes every prompt at its full 77 tokens and goes backward
through all of it. Ours reads the image features from the cache, encodes the prompts with `CoOp`, and goes backward. The
two take turns, so that other work on the machine slows both. Every count of classes runs in a process of its own, so
that its peak memory can be read.

Run     python tests/benchmarks/coop_step.py results.json
Quick   python tests/benchmarks/coop_step.py results.json --classes 10 100 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import GIB, PeakMemory, autocast, available_bytes, class_names, timed, untrained
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone
from adaptclip.files import write_json
from adaptclip.methods import CoOp
from adaptclip.types import Batch

BATCH, N_CTX = 32, 16
TARGETS = {100: 20.0, 1000: 25.0}
"""Classes -> the speed-up below which the benchmark fails."""
TARGET_BYTES = {10_000: 8 * GIB}
"""Classes -> the peak memory of our step above which the benchmark fails."""
PUBLISHED_BYTES_PER_CLASS = 24 * 2**20
"""Peak memory of the published step per class, for the decision on how many classes it can be run here."""
MOST_PUBLISHED_CLASSES = 1000
"""Beyond it, the published step is always scaled up from a part: it would take most of an hour."""


def published_step(
    backbone: ClipBackbone,
    names: list[str],
    images: Tensor,
    labels: Tensor,
    context: Tensor,
    dtype: torch.dtype | None = None,
) -> Callable[[], Tensor]:
    """Returns the step as it was published: live image features, prompts of 77 tokens, all of them at once.

    The step returns the gradient of the (16, T) context, as `our_step` does. With `dtype`, the forward pass is under
    autocast.
    """
    model: Any = backbone.model
    tokens = backbone.tokenize([" ".join(["X"] * N_CTX) + f" {name}." for name in names]).to(backbone.device)
    every = torch.arange(len(names), device=tokens.device)
    with torch.no_grad():
        embedded = model.token_embedding(tokens)
    start, end = embedded[:, :1], embedded[:, 1 + N_CTX :]
    context = context.clone().requires_grad_()

    def step() -> Tensor:
        with autocast(tokens.device, dtype):
            with torch.no_grad():
                features = backbone.encode_image(images)
            x = torch.cat([start, context.expand(len(names), -1, -1), end], dim=1)
            x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
            x = model.ln_final(x)[every, tokens.argmax(-1)] @ model.text_projection
            logits = backbone.logit_scale * features @ F.normalize(x, dim=-1).T
            loss = F.cross_entropy(logits, labels)
        return torch.autograd.grad(loss, context)[0]

    return step


def our_step(coop: CoOp, features: Tensor, labels: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Returns our step: cached image features, packed suffixes behind a shared prefix."""
    batch = Batch(labels=labels, index=torch.arange(len(labels)), features=features)

    def step() -> Tensor:
        with autocast(labels.device, dtype):
            loss = F.cross_entropy(coop(batch), labels)
        return torch.autograd.grad(loss, coop.context)[0]

    return step


def measure(count: int, repeats: int, budget_bytes: int, seed: int = 0) -> dict[str, Any]:
    """Measures both steps at one count of classes, in turns.

    Returns:
        Seconds as medians, their ratio, peak bytes of either step, and on how many classes the published step was run:
        fewer than `count` where the memory does not suffice. Its text part is then scaled up in proportion, which
        favours it, as its time per class grows with the number of classes.
    """
    torch.manual_seed(seed)
    backbone = untrained("ViT-B-32")
    names = class_names(count)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(0, min(count, 10), (BATCH,))
    with torch.no_grad():
        features = backbone.encode_image(images)
    room = int((available_bytes() - 3 * GIB) / PUBLISHED_BYTES_PER_CLASS)
    run_on = min(count, room) if count <= MOST_PUBLISHED_CLASSES else 200
    coop = CoOp(backbone, names, n_ctx=N_CTX, memory_budget_bytes=budget_bytes)
    ours = our_step(coop, features, labels)
    published = published_step(backbone, names[:run_on], images, labels, coop.context.detach())
    with PeakMemory() as base:
        time.sleep(0.05)
    with PeakMemory() as our_peak:
        our_gradient = ours()
    gradient = published() if count <= 100 else None
    our_s, published_s, image_s, published_peak = [], [], [], 0
    for _ in range(repeats):
        our_s.append(timed(ours))
        with PeakMemory() as peak:
            published_s.append(timed(published))
        published_peak = max(published_peak, peak.bytes)
        with torch.no_grad():
            image_s.append(timed(lambda: backbone.encode_image(images)))
        our_s.append(timed(ours))
    image, whole, our = (statistics.median(values) for values in (image_s, published_s, our_s))
    scaled = whole if run_on == count else image + (whole - image) * count / run_on
    return {
        "classes": count,
        "suffix_tokens_per_class": sum(len(ids) for ids in backbone.text.word_ids([f"{n}." for n in names])) / count
        + 1,
        "published_s": scaled,
        "published_image_s": image,
        "published_run_on_classes": run_on,
        "ours_s": our,
        "ratio": scaled / our,
        "ours_s_per_class": our / count,
        "process_bytes": base.bytes,
        "ours_peak_bytes": our_peak.bytes,
        "published_peak_bytes": published_peak if run_on == count else None,
        "gradient_difference": None if gradient is None else float((our_gradient - gradient).abs().max()),
        "gradient_size": float(our_gradient.abs().max()),
        "load_average": os.getloadavg()[0],
        "samples": {"published_s": published_s, "published_image_s": image_s, "ours_s": our_s},
    }


def main() -> int:
    """Runs every count in its own process, prints the table, writes the JSON; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=5, help="turns of the published step (fewer from 1,000 on)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-gib", type=float, default=4.0, help="memory_budget_bytes of CoOp")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        torch.set_num_threads(args.threads)
        repeats = args.repeats if args.one < 1000 else min(args.repeats, 2)
        write_json(args.out, measure(args.one, repeats, int(args.budget_gib * GIB)))
        return 0
    rows = []
    for count in args.classes:
        part = args.out.with_suffix(f".{count}.json")
        subprocess.run([sys.executable, __file__, str(part), *sys.argv[2:], "--one", str(count)], check=True)
        rows.append(json.loads(part.read_text()))
        part.unlink()
    missed = [f"{r['classes']} classes: {r['ratio']:.1f}x" for r in rows if r["ratio"] < TARGETS.get(r["classes"], 0)]
    missed += [
        f"{r['classes']} classes: {r['ours_peak_bytes'] / GIB:.1f} GiB"
        for r in rows
        if r["ours_peak_bytes"] > TARGET_BYTES.get(r["classes"], float("inf"))
    ]
    write_json(args.out, {"torch": torch.__version__, "threads": args.threads, "rows": rows, "missed": missed})
    show(rows, missed)
    return 1 if missed else 0


def show(rows: list[dict[str, Any]], missed: list[str]) -> None:
    """Prints the table."""
    table = Table(title="One CoOp step, published / ours (ViT-B/32 shapes, 16 context tokens, batch 32, float32)")
    for column in ("classes", "ratio", "published ms", "ours ms", "ours µs per class", "published GiB", "ours GiB"):
        table.add_column(column, justify="right")
    for r in rows:
        mark = "" if r["published_run_on_classes"] == r["classes"] else f" (from {r['published_run_on_classes']:,})"
        peak = r["published_peak_bytes"]
        table.add_row(
            f"{r['classes']:,}",
            f"{r['ratio']:.1f}x",
            f"{r['published_s'] * 1e3:,.0f}{mark}",
            f"{r['ours_s'] * 1e3:,.0f}",
            f"{r['ours_s_per_class'] * 1e6:,.0f}",
            "–" if peak is None else f"{peak / GIB:.1f}",
            f"{r['ours_peak_bytes'] / GIB:.1f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"Below target: {'; '.join(missed)}" if missed else "All targets met.")


if __name__ == "__main__":
    sys.exit(main())
