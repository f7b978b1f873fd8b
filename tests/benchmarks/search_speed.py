# SPDX-License-Identifier: Apache-2.0
"""Search: the time of a query over 100,000 vectors, and recall over real captions against a plain computation.

    python tests/benchmarks/search_speed.py [--vectors 100000] [--width 512] [--threads 1]
    python tests/benchmarks/search_speed.py --card flickr8k --data-root DATA [--cache FOLDER]

The first form writes an index of random vectors, opens it by memory mapping, and times single queries (the first one
reads the file) and batches of 64. The second indexes the test images of a card with captions and looks for each of them
by each of its captions; R@1, R@5 and R@10 are compared with numpy's full ranking of the same images, encoded apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import timed
from rich.console import Console

import adaptclip
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.features import FeatureCache
from adaptclip.files import write_json, write_tensors
from adaptclip.retrieval import build_index, encode_texts, load_encoder, open_index
from adaptclip.retrieval.index import nearest
from adaptclip.seals import describe_files, write_sealed

TARGET_S = 0.05
KS = (1, 5, 10)


def main() -> int:
    """Prints what was measured; leaves with 1 when a target is missed or recalls differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--card")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".cache/features"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as temporary:
        if args.card:
            return recall(console, args.card, args.data_root, args.cache, Path(temporary) / "index")
        return speed(console, args, Path(temporary) / "index")


def speed(console: Console, args: argparse.Namespace, folder: Path) -> int:
    """Times queries over random vectors."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(args.vectors, args.width, generator=draw), dim=-1)
    names = [str(i) for i in range(args.vectors)]
    write_tensors(folder / "vectors.safetensors", {"vectors": vectors})
    write_json(folder / "names.json", names)
    about = {"format_version": 2, "model": {"digest": ""}, "transform": {}, "count": len(names), "width": args.width}
    files = describe_files(folder, ["vectors.safetensors", "names.json"])
    write_sealed(folder / "manifest.json", about | {"files": files})
    del vectors
    opening = timed(lambda: open_index(folder))
    index = open_index(folder)
    queries = torch.nn.functional.normalize(torch.randn(args.queries + 64, args.width, generator=draw), dim=-1)
    first = timed(lambda: nearest(queries[:1], index.vectors, 10))
    wall, processor = [], []
    for i in range(args.queries):
        before = time.process_time()
        wall.append(timed(lambda i=i: nearest(queries[i : i + 1], index.vectors, 10)))
        processor.append(time.process_time() - before)
    batch = timed(lambda: nearest(queries[-64:], index.vectors, 10)) / 64
    console.print(
        f"{args.vectors:,} vectors of width {args.width}, opened and checked in {opening:.2f} s; top 10, "
        f"{args.threads} threads, per query: median "
        f"{statistics.median(wall) * 1e3:.1f} ms ({statistics.median(processor) * 1e3:.1f} ms of processor time; "
        f"fastest {min(wall) * 1e3:.1f} ms), {batch * 1e3:.2f} ms in batches of 64, the first {first * 1e3:.1f} ms; "
        f"load {os.getloadavg()[0]:.1f} when done"
    )
    # Other work on the same cores stretches the wall clock; what the search itself costs is processor time.
    return 0 if statistics.median(processor) < TARGET_S else 1


def recall(console: Console, card: str, data_root: Path | None, cache: Path, folder: Path) -> int:
    """Compares recall by the index with a plain computation."""
    test = open_data(load_card(card), data_root=data_root, check=False).test
    assert test.captions is not None, f"the card {card} has no captions"
    encoder, named = load_encoder()
    build_index(folder, encoder, named, [test], cache=FeatureCache(cache))
    index = open_index(folder)
    texts = [(text, i) for i, own in enumerate(test.captions) for text in own]
    vectors, cut = encode_texts(encoder, [text for text, _ in texts])
    hits = index.search(encoder, vectors, k=max(KS))
    worker = {name: i for i, name in enumerate(index.names)}
    by_index = {
        k: sum(any(worker[hit.name] == owner for hit in row[:k]) for row, (_, owner) in zip(hits, texts, strict=True))
        for k in KS
    }
    # Apart from all of the above: images through the plain model one batch at a time, prompts whole, numpy's sort.
    backbone = adaptclip.load_backbone()
    with torch.no_grad():
        images = torch.cat(
            [
                backbone.encode_image(torch.stack([backbone.transform(test.image(int(i))) for i in rows]))
                for rows in np.array_split(np.arange(len(test)), max(1, len(test) // 50))
            ]
        )
        tokens = backbone.tokenizer([text for text, _ in texts], context_length=backbone.context_length)
        words = torch.cat([backbone.encode_text(part) for part in tokens.split(100)])
    order = np.argsort(-(words.numpy() @ images.numpy().T), axis=1, kind="stable")
    owners = np.array([owner for _, owner in texts])[:, None]
    plain = {k: int((order[:, :k] == owners).any(axis=1).sum()) for k in KS}
    console.print(f"{len(test)} images, {len(texts)} captions ({cut} cut at the context)")
    for k in KS:
        console.print(
            f"R@{k}: {by_index[k] / len(texts):.4f} by the index ({by_index[k]}), {plain[k] / len(texts):.4f} plainly "
            f"({plain[k]})"
        )
    return 0 if by_index == plain else 1


if __name__ == "__main__":
    sys.exit(main())
