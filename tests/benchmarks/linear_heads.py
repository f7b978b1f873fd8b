# SPDX-License-Identifier: Apache-2.0
"""Times the fit of every linear head against the same fit written plainly, in one run, and prints the ratio.

    python tests/benchmarks/linear_heads.py [--threads 2] [--repeats 3] [--views 20]

16 images of each of 100 classes, 512 wide, with the structure of CLIP features (cosine about 0.63 between and 0.78
within classes). The plain fits: torch's SGD with autograd and a batch gathered per step (text_init, clap,
lp_plus_plus), and scikit-learn on float64 (logistic, C = 10). Each repeat runs one after the other;
shown is the fastest.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from adaptclip.methods.linear_fits import (
    epoch_rate,
    fit_from_text,
    fit_logistic,
    fit_lp_plus_plus,
    initial_weights,
    step_sizes,
    zero_shot_confidence,
)

SHOTS, CLASSES, WIDTH, SCALE, EPOCHS, BATCH = 16, 100, 512, 100.0, 300, 256


def clip_like(views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features (V, N, D), labels (N,) and text features (C, D)."""
    draw = torch.Generator().manual_seed(0)
    shared, classes = torch.randn(WIDTH, generator=draw), torch.randn(CLASSES, WIDTH, generator=draw)
    labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    own = torch.randn(len(labels), WIDTH, generator=draw)
    images = 1.2 * shared + 0.6 * classes[labels] + 0.7 * own
    crops = 0.3 * torch.randn(views, len(labels), WIDTH, generator=draw)
    words = 0.5 * torch.randn(WIDTH, generator=draw) + 0.3 * classes
    words = words + 0.5 * torch.randn(CLASSES, WIDTH, generator=draw)
    return F.normalize(images + crops, dim=-1), labels, F.normalize(words, dim=-1)


def plain_from_text(values: Tensor, labels: Tensor, text: Tensor, penalty: Tensor | None) -> Tensor:
    """ZS-LP and CLAP with autograd."""
    weight = nn.Parameter(text.clone())
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(0)
    for epoch in range(EPOCHS):
        sgd.param_groups[0]["lr"] = epoch_rate(epoch, epochs=EPOCHS, lr=0.1)
        order = torch.randperm(len(labels), generator=draw)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            features = values[epoch % len(values), rows]
            loss = F.cross_entropy(SCALE * features @ F.normalize(weight, dim=-1).T, labels[rows])
            if penalty is not None:
                loss = loss + (penalty * (weight - text).square().sum(1)).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    return weight.detach()


def plain_lp_plus_plus(features: Tensor, labels: Tensor, text: Tensor) -> Tensor:
    """LP++ with autograd."""
    lr_w, lr_alpha = step_sizes(features, text)
    weight, alpha = (nn.Parameter(t) for t in initial_weights(features, labels, text))
    sgd = torch.optim.SGD([weight], lr=lr_w, momentum=0.9)
    for epoch in range(EPOCHS):
        alpha.grad = weight.grad = None
        F.cross_entropy(features @ (weight + alpha[:, None] * text).T, labels).backward()
        sgd.step()
        if (epoch + 1) % 10 == 0 and alpha.grad is not None:
            alpha.data -= lr_alpha * alpha.grad
    return weight.detach()


def lp_plus_plus(features: Tensor, labels: Tensor, text: Tensor) -> Tensor:
    """LP++ as the library fits it, step sizes included."""
    lr_w, lr_alpha = step_sizes(features, text)
    return fit_lp_plus_plus(features, labels, text, lr_w=lr_w, lr_alpha=lr_alpha, epochs=EPOCHS, reading="paper").weight


def fastest(fit: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Returns the least wall-clock and processor time in seconds."""
    times = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        fit()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return min(t[0] for t in times), min(t[1] for t in times)


def main() -> int:
    """Prints one row per head; leaves with 1 when a head misses the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--target-s", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)  # scikit-learn's matrix products
    values, labels, text = clip_like(args.views)
    evaluation, y = values[0], labels.numpy()

    def clap(fit: Callable[[Tensor], object]) -> None:
        fit(zero_shot_confidence(values, torch.nn.functional.one_hot(labels, len(text)), text, SCALE))

    def ours(penalty: Tensor | None) -> Tensor:
        return fit_from_text(
            values, labels, text, SCALE, penalty=penalty, lr=0.1, epochs=EPOCHS, batch_size=BATCH, seed=0,
            start_norm=1.0,
        )  # fmt: skip

    plain_logistic = LogisticRegression(C=10, max_iter=1000)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "logistic, C = 10": (
            lambda: fit_logistic(evaluation.numpy(), y, CLASSES, c=10.0),
            lambda: plain_logistic.fit(evaluation.double().numpy(), y),
        ),
        "text_init": (lambda: ours(None), lambda: plain_from_text(values, labels, text, None)),
        "clap": (lambda: clap(ours), lambda: clap(lambda p: plain_from_text(values, labels, text, p))),
        "lp_plus_plus": (
            lambda: lp_plus_plus(evaluation, labels, text),
            lambda: plain_lp_plus_plus(evaluation, labels, text),
        ),
    }
    table = Table("head", "wall s", "processor s", "plain: wall s", "processor s", "plain / ours (wall)")
    missed = []
    for name, (own, plain) in pairs.items():
        wall, processor = fastest(own, args.repeats)
        plain_wall, plain_processor = fastest(plain, args.repeats)
        cells = [wall, processor, plain_wall, plain_processor, plain_wall / wall]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
        if wall >= args.target_s:
            missed.append(name)
    console = Console(width=100)
    console.print(
        f"{SHOTS} images x {CLASSES} classes, {WIDTH} wide, {args.views} views, {args.threads} threads; "
        f"load {os.getloadavg()[0]:.1f} when done"
    )
    console.print(table)
    target = f"{args.target_s:g} s"
    console.print(f"Slower than {target}: {', '.join(missed)}" if missed else f"Every head took less than {target}.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
