# SPDX-License-Identifier: Apache-2.0
"""One training step of CoOp and of LoRA on full-size shapes with random weights: seconds and peak memory.

    python tests/benchmarks/full_size.py results.json                         # every model and method, one at a time
    python tests/benchmarks/full_size.py results.json --models ViT-B-16 --methods coop

Each step runs in a process of its own, so that its peak memory is its own. SigLIP 2 gets the small SentencePiece-like
tokenizer of the tests, since its own is on the hub; the tower fills every prompt up to its 64 tokens whatever they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from measuring import GIB, PeakMemory, class_names, timed, untrained
from open_clip.tokenizer import HFTokenizer
from torch.nn import functional as F

from adaptclip.clip import ClipBackbone
from adaptclip.files import write_json
from adaptclip.methods import CoOp, LoRA
from adaptclip.types import Batch

MODELS = ("ViT-B-16", "ViT-L-14", "ViT-B-16-SigLIP2-256")
METHODS = {"coop": CoOp, "lora": LoRA}


def model_of(name: str) -> ClipBackbone:
    """A model of the published shapes with random weights."""
    if "SigLIP2" not in name:
        return untrained(name)
    model = open_clip.create_model(name, pretrained=None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tiny_kinds import gemma

    with tempfile.TemporaryDirectory() as folder:
        gemma().save_pretrained(folder)
        tokenizer = HFTokenizer(folder, context_length=64, clean="canonicalize")
    return ClipBackbone(model, tokenizer, name=name, digest="untrained")


def measure(name: str, method: str, num_classes: int, batch_size: int) -> dict[str, Any]:
    """Builds one model and adapter, and takes one step of AdamW."""
    torch.manual_seed(0)
    backbone = model_of(name)
    adapter = METHODS[method](backbone, class_names(num_classes)).train()
    side = backbone.image_size
    images, labels = torch.randn(batch_size, 3, side, side), torch.arange(batch_size) % num_classes
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-3)
    batch = Batch(labels=labels, index=labels, images=images)
    if adapter.consumes == "features":
        with torch.no_grad():
            batch = Batch(labels=labels, index=labels, features=backbone.encode_image(images))

    def step() -> None:
        F.cross_entropy(adapter(batch), batch.labels).backward()
        optimizer.step()

    with PeakMemory() as peak:
        seconds = timed(step)
    gradients = [p.grad for p in adapter.trainable_parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    return {
        "model": name,
        "method": method,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "trainable": sum(p.numel() for p in adapter.trainable_parameters()),
        "classes": num_classes,
        "batch": batch_size,
        "seconds": seconds,
        "peak_bytes": peak.bytes,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Runs every pair in a process of its own and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        write_json(given.out, measure(given.models[0], given.methods[0], given.classes, given.batch))
        return
    results = []
    for model in given.models:
        for method in given.methods:
            with tempfile.TemporaryDirectory() as folder:
                own = Path(folder) / "result.json"
                sizes = ["--classes", str(given.classes), "--batch", str(given.batch)]
                command = [sys.executable, __file__, str(own), "--one", "--models", model, "--methods", method, *sizes]
                subprocess.run(command, check=True)
                result = json.loads(own.read_text())
            results.append(result)
            sys.stdout.write(
                f"{model:<22}{method:<6}{result['parameters'] / 1e6:6.0f} M  {result['trainable']:>9,} trainable  "
                f"{result['seconds']:6.1f} s  {result['peak_bytes'] / GIB:5.2f} GiB\n"
            )
            sys.stdout.flush()
    write_json(given.out, results)


if __name__ == "__main__":
    main()
