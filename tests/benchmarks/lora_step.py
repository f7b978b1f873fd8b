# SPDX-License-Identifier: Apache-2.0
"""Times one training step of CLIP-LoRA: the published way against the packed text path and shared projections.

Shapes of ViT-B/32 (image tower at 224 px, 50 tokens; text tower of 77 tokens) with random weights, rank 2 on query, key
and value of both towers, a batch of 32 images, float32. The published step sends every class's prompt through the text
tower at its full 77 tokens; ours is the forward and backward of `adaptclip.methods.LoRA`. The two take turns, so that
other work on the machine slows both. Every row runs in a process of its own, so that its peak memory can be read.

Run     python tests/benchmarks/lora_step.py results.json
Quick   python tests/benchmarks/lora_step.py results.json --classes 10 --repeats 2
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
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone
from adaptclip.clip.attention import PROJECTIONS, share_weights
from adaptclip.files import write_json
from adaptclip.methods import LoRA
from adaptclip.methods.lora import lora_parameters
from adaptclip.types import Batch

BATCH, RANK, TEMPLATE = 32, 2, "a photo of a {}."
TARGETS = {100: 4.0, 1000: 12.0}
"""Classes -> the speed-up, with the published dropout, below which the benchmark fails."""
PUBLISHED_BYTES_PER_CLASS = 48 * 2**20
"""Peak memory of the published step per class, for the decision on how many classes it can be run here."""
COMPARED_CLASSES = 100
"""Up to it, loss and gradients of both steps are compared without dropout."""

Step = Callable[[], tuple[Tensor, ...]]
"""Returns the loss and the gradients of every A and B, in the order of their names."""


class PublishedProjection(nn.Module):
    """A frozen projection with a low-rank branch as published: the branch is a product with the whole matrix B A.

    Args:
        weight: (T, T) frozen.
        bias: (T,) frozen.
        a: (r, T).
        b: (T, r).
        dropout: of the branch's input; without it the branch is added to the weight, as published.
        low_rank: computes the branch in two steps through its r dimensions instead, which was not published.
    """

    def __init__(self, weight: Tensor, bias: Tensor, a: nn.Parameter, b: nn.Parameter, dropout: float, low_rank: bool):
        super().__init__()
        self.weight, self.bias, self.a, self.b = weight, bias, a, b
        self.dropout, self.low_rank, self.scaling = nn.Dropout(dropout), low_rank, RANK**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """(..., T) to (..., T)."""
        if self.dropout.p == 0 and not self.low_rank:
            return F.linear(x, self.weight + self.b @ self.a * self.scaling, self.bias)
        dropped = self.dropout(x)
        branch = dropped @ self.a.T @ self.b.T if self.low_rank else dropped @ (self.b @ self.a).T
        return F.linear(x, self.weight, self.bias) + branch * self.scaling


class PublishedAttention(nn.Module):
    """Multi-head attention of three such projections, in place of `nn.MultiheadAttention`."""

    def __init__(self, fused: nn.MultiheadAttention, learnt: dict[str, nn.Parameter], dropout: float, low_rank: bool):
        super().__init__()
        assert fused.in_proj_weight is not None
        self.heads, self.out_proj = fused.num_heads, fused.out_proj
        parts = zip(PROJECTIONS, fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True)
        self.projections = nn.ModuleList(
            PublishedProjection(
                weight.detach(), bias.detach(), learnt[f"{name}.lora_A"], learnt[f"{name}.lora_B"], dropout, low_rank
            )
            for name, weight, bias in parts
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(B, L, T) to (B, L, T)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in zip(self.projections, (query, key, value), strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def published_model(backbone: ClipBackbone, learnt: dict[str, nn.Parameter], dropout: float, low_rank: bool) -> Any:
    """Returns the backbone's model with every attention replaced, on the same frozen weights."""
    model = share_weights(backbone.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            own = {key.removeprefix(f"{name}."): p for key, p in learnt.items() if key.startswith(f"{name}.")}
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PublishedAttention(module, own, dropout, low_rank))
    return model


def published_step(
    model: Any,
    learnt: dict[str, nn.Parameter],
    tokens: Tensor,
    images: Tensor,
    labels: Tensor,
    scale: Tensor,
    dtype: torch.dtype | None = None,
) -> Step:
    """Returns the published step: all prompts at 77 tokens, all images, loss, gradients. `tokens` (C, 77) are given,
    though the published step makes them anew in every step. With `dtype`, the forward pass is under autocast.
    """
    parameters = list(learnt.values())

    def step() -> tuple[Tensor, ...]:
        with autocast(images.device, dtype):
            text = F.normalize(model.encode_text(tokens), dim=-1)
            loss = F.cross_entropy(scale * F.normalize(model.encode_image(images), dim=-1) @ text.T, labels)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    return step


def image_step(
    model: Any, learnt: dict[str, nn.Parameter], images: Tensor, dtype: torch.dtype | None = None
) -> Callable[[], object]:
    """Returns the image tower's part of the published step, for scaling up the rest."""
    parameters = [p for name, p in learnt.items() if name.startswith("visual.")]

    def step() -> object:
        with autocast(images.device, dtype):
            features = F.normalize(model.encode_image(images), dim=-1).sum()
        return torch.autograd.grad(features, parameters)

    return step


def our_step(adapter: LoRA, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None) -> Step:
    """Returns our step on the same pixels."""
    batch = Batch(labels=labels, index=torch.arange(len(labels)), images=images)
    parameters = adapter.trainable_parameters()

    def step() -> tuple[Tensor, ...]:
        with autocast(images.device, dtype):
            loss = F.cross_entropy(adapter(batch), labels)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    return step


def drawn_update(adapter: LoRA) -> dict[str, Tensor]:
    """Returns a state with a drawn B: where it is zero, as at the start, half of the gradients are zero too."""
    return {n: p if ".lora_A" in n else torch.randn_like(p) * 0.02 for n, p in adapter.adapter_state().items()}


def published_parameters(adapter: LoRA) -> dict[str, nn.Parameter]:
    """Returns copies of an adapter's A and B, by the names that `published_model` knows them by."""
    names = lora_parameters(adapter.model)
    return {name.replace(".default.weight", ""): nn.Parameter(p.detach().clone()) for name, p in names.items()}


def compare(ours: Step, published: Step) -> dict[str, float]:
    """Both steps without dropout: their losses, and the largest difference of any gradient beside its largest value."""
    (our_loss, *our_gradients), (loss, *gradients) = ours(), published()
    differences = [float((a - b).abs().max()) for a, b in zip(our_gradients, gradients, strict=True)]
    return {
        "our_loss": float(our_loss),
        "published_loss": float(loss),
        "gradient_difference": max(differences),
        "gradient_size": max(float(gradient.abs().max()) for gradient in gradients),
    }


def both_clocks(step: Callable[[], object]) -> tuple[float, float]:
    """Returns wall-clock and processor seconds of one call; the second is less sensitive to other work."""
    started = time.process_time()
    seconds = timed(step)
    return seconds, time.process_time() - started


def measure(count: int, dropout: float, repeats: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Measures both steps at one count of classes, in turns.

    Returns:
        Seconds as medians, their ratio, peak bytes of either step, and on how many classes the published step was run:
        fewer than `count` where the memory does not suffice. Its text part is then scaled up in proportion, which
        favours it, as its time per class grows with the number of classes.
    """
    torch.manual_seed(0)
    backbone = untrained("ViT-B-32")
    names = class_names(count)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(0, min(count, 10), (BATCH,))
    budget = int(settings.budget_gib * GIB)
    adapters = {p: LoRA(backbone, names, dropout=p, memory_budget_bytes=budget) for p in {dropout, 0.0}}
    drawn = drawn_update(adapters[0.0])
    for adapter in adapters.values():
        adapter.load_adapter_state(drawn)
        adapter.train()
    learnt = published_parameters(adapters[0.0])
    tokens = backbone.tokenize([TEMPLATE.format(name) for name in names])

    room = max(1, int((available_bytes() - 4 * GIB) / PUBLISHED_BYTES_PER_CLASS))
    run_on = min(count, room, settings.most_published)
    model = published_model(backbone, learnt, dropout, settings.low_rank).train()
    published = published_step(model, learnt, tokens[:run_on], images, labels, backbone.logit_scale)
    ours = our_step(adapters[dropout], images, labels)
    compared: dict[str, float] = {}
    if count <= COMPARED_CLASSES and run_on == count:
        plain = published_model(backbone, learnt, 0.0, settings.low_rank).train()
        same = published_step(plain, learnt, tokens, images, labels, backbone.logit_scale)
        compared = compare(our_step(adapters[0.0], images, labels), same)
    with PeakMemory() as base:
        time.sleep(0.05)
    with PeakMemory() as our_peak:
        ours()
    turns: dict[str, list[tuple[float, float]]] = {"ours": [], "published": [], "published_image": []}
    published_peak = 0
    for _ in range(repeats):
        turns["ours"].append(both_clocks(ours))
        with PeakMemory() as peak:
            turns["published"].append(both_clocks(published))
        published_peak = max(published_peak, peak.bytes)
        turns["published_image"].append(both_clocks(image_step(model, learnt, images)))
        turns["ours"].append(both_clocks(ours))
    seconds = {}
    for i, clock in enumerate(("s", "processor_s")):
        our, whole, image = (statistics.median(turn[i] for turn in turns[name]) for name in turns)
        scaled = whole if run_on == count else image + (whole - image) * count / run_on
        seconds |= {f"ours_{clock}": our, f"published_{clock}": scaled, f"published_image_{clock}": image}
    return {
        "classes": count,
        "dropout": dropout,
        **seconds,
        "published_run_on_classes": run_on,
        "ratio": seconds["published_s"] / seconds["ours_s"],
        "processor_ratio": seconds["published_processor_s"] / seconds["ours_processor_s"],
        "process_bytes": base.bytes,
        "ours_peak_bytes": our_peak.bytes,
        "published_peak_bytes": published_peak if run_on == count else None,
        **compared,
        "load_average": os.getloadavg()[0],
        "samples": turns,
    }


def main() -> int:
    """Runs every row in its own process, prints the table, writes the JSON; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.25, 0.0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of the published step (fewer from 1,000 on)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-gib", type=float, default=4.0, help="memory_budget_bytes of LoRA")
    parser.add_argument("--most-published", type=int, default=1000, help="most classes the published step is run on")
    parser.add_argument("--low-rank", action="store_true", help="spare the published step its product with all of B A")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        torch.set_num_threads(args.threads)
        count, dropout = int(args.one[0]), float(args.one[1])
        repeats = args.repeats if count < 1000 else min(args.repeats, 2)
        write_json(args.out, measure(count, dropout, repeats, args))
        return 0
    rows = []
    for count in args.classes:
        for dropout in args.dropouts:
            part = args.out.with_suffix(f".{count}.{dropout}.json")
            one = ["--one", str(count), str(dropout)]
            subprocess.run([sys.executable, __file__, str(part), *sys.argv[2:], *one], check=True)
            rows.append(json.loads(part.read_text()))
            part.unlink()
    missed = [
        f"{r['classes']} classes: {r['ratio']:.1f}x"
        for r in rows
        if r["dropout"] > 0 and r["ratio"] < TARGETS.get(r["classes"], 0)
    ]
    missed += [
        f"{r['classes']} classes: gradients differ by {r['gradient_difference']:.1e}"
        for r in rows
        if r.get("gradient_difference", 0) > 1e-3 * r.get("gradient_size", 1)
    ]
    head = {"torch": torch.__version__, "threads": args.threads, "low_rank": args.low_rank}
    write_json(args.out, {**head, "rows": rows, "missed": missed})
    show(rows, missed)
    return 1 if missed else 0


def show(rows: list[dict[str, Any]], missed: list[str]) -> None:
    """Prints the table."""
    table = Table(title="One CLIP-LoRA step, published / ours (ViT-B/32 shapes, both towers, batch 32, float32)")
    for column in (
        "classes",
        "dropout",
        "ratio",
        "of processor s",
        "published ms",
        "ours ms",
        "published GiB",
        "ours GiB",
        "gradients",
    ):
        table.add_column(column, justify="right")
    for r in rows:
        mark = "" if r["published_run_on_classes"] == r["classes"] else f" (from {r['published_run_on_classes']:,})"
        peak = r["published_peak_bytes"]
        table.add_row(
            f"{r['classes']:,}",
            f"{r['dropout']:g}",
            f"{r['ratio']:.1f}x",
            f"{r['processor_ratio']:.1f}x",
            f"{r['published_s'] * 1e3:,.0f}{mark}",
            f"{r['ours_s'] * 1e3:,.0f}",
            "–" if peak is None else f"{peak / GIB:.1f}",
            f"{r['ours_peak_bytes'] / GIB:.1f}",
            f"{r['gradient_difference'] / r['gradient_size']:.0e}" if "gradient_size" in r else "–",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"Below target: {'; '.join(missed)}" if missed else "All targets met.")


if __name__ == "__main__":
    sys.exit(main())
