# SPDX-License-Identifier: Apache-2.0
"""Exports an artifact and compares what comes out with the adapter, on real images: answers first, then speed.

    python tests/benchmarks/onnx_speed.py RUN IMAGES [--count 500] [--threads 1] [--repeats 3]

RUN is a run folder, IMAGES a data card or a folder. The stock open_clip export (where the method has one), the
classifier and the ONNX graph answer for the first `count` images; the largest differences are printed. Then PyTorch
(the merged tower and head) and onnxruntime take turns on the same pixels in one process; shown are medians and
their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import timed
from rich.console import Console
from rich.table import Table

from adaptclip.artifact import load
from adaptclip.artifact.export import FORMATS, export_artifact
from adaptclip.artifact.export.onnx_graph import GRAPH_FILE, require
from adaptclip.artifact.export.stock import ImageClassifier, head_of, merged_model
from adaptclip.data.image_files import find_images
from adaptclip.data.transforms import decode_image
from adaptclip.retrieval import card_as_images


def main() -> int:
    """Prints two tables; leaves with 1 when an export differs by more than its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if Path(args.images).is_dir():
        pictures = [decode_image(path, row=str(path)) for path in find_images([Path(args.images)])[0][: args.count]]
    else:
        parts, _ = card_as_images(args.images, data_root=args.data_root, part="test")
        chosen = itertools.islice(((part, i) for part in parts for i in range(len(part))), args.count)
        pictures = [part.image(i) for part, i in chosen]
    model = load(args.run, allow_failed_gates=True)
    console = Console(width=110)
    table = Table("export", "images", "same label", "probabilities", "logits / scale", "features", "allowed")
    with tempfile.TemporaryDirectory() as temporary:
        for to in ("open_clip", "classifier", "onnx"):
            if to == "open_clip" and not model.adapter.is_clip:
                continue
            found = export_artifact(args.run, to, Path(temporary) / to, pictures=pictures, allow_failed_gates=True)
            gaps = (found.probabilities, found.cosines, found.features, FORMATS[to].tolerance)
            table.add_row(to, str(found.num_pictures), str(found.same_label), *(f"{gap:.1e}" for gap in gaps))
        console.print(table)
        speed(console, model, Path(temporary) / "onnx" / GRAPH_FILE, args.threads, args.repeats)
    return 0


def speed(console: Console, model: object, graph: Path, threads: int, repeats: int) -> None:
    """Times both on the same random pixels, by turns."""
    classifier = ImageClassifier(merged_model(model).visual, head_of(model))  # type: ignore[arg-type]
    options = require("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    session = require("onnxruntime").InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    side = model.backbone.image_size  # type: ignore[attr-defined]
    table = Table("batch", "PyTorch, images/s", "onnxruntime, images/s", "ratio")
    for batch in (1, 16):
        pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        # The layout that the library itself gives convolutions.
        nhwc = pixels.contiguous(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {"torch": [], "onnx": []}

        def by_torch(own: torch.Tensor = nhwc) -> object:
            with torch.inference_mode():
                return classifier(own)

        def by_onnx(own: np.ndarray = pixels.numpy()) -> object:  # noqa: B008
            return session.run(["probabilities"], {"pixels": own})

        for warm_up in (by_torch, by_onnx):
            warm_up()
        for _ in range(repeats * (8 if batch == 1 else 1)):
            times["torch"].append(timed(by_torch))
            times["onnx"].append(timed(by_onnx))
        own, other = (statistics.median(times[name]) for name in ("torch", "onnx"))
        table.add_row(str(batch), f"{batch / own:.1f}", f"{batch / other:.1f}", f"{own / other:.2f}x")
    console.print(table)
    console.print(f"{threads} threads each; load {os.getloadavg()[0]:.1f} when done")


if __name__ == "__main__":
    sys.exit(main())
