# SPDX-License-Identifier: Apache-2.0
"""`adaptclip embed` and `adaptclip search`: images found by words or by an image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from adaptclip.cli.predict import Answers, Format
from adaptclip.errors import DataError
from adaptclip.settings import ExistingPath
from adaptclip.terminal import say


def embed(
    images: str,
    /,
    *,
    out: Path,
    model: ExistingPath | None = None,
    backbone: str | None = None,
    pretrained: str | None = None,
    data_root: ExistingPath | None = None,
    part: Literal["all", "train", "validation", "test"] = "all",
    on_bad_image: Literal["error", "skip"] = "error",
    batch_size: int = 64,
    device: str = "cpu",
    cache: Path = Path(".cache/features"),
    allow_failed_gates: bool = False,
    overwrite: bool = False,
) -> int:
    """Encode images as an index for `adaptclip search`. Started again after a stop, it goes on where it was.

    Args:
        images: a folder that is searched for images, an image, or a data card.
        out: the new index folder.
        model: an artifact or run folder whose towers encode.
        backbone: instead, a pretrained model; starter if neither is given.
        pretrained: open_clip weights tag or checkpoint file of --backbone.
        data_root: folder that holds a card's files.
        part: which part of a card.
        on_bad_image: stop at an unreadable image, or list what was skipped.
        batch_size: images per forward pass.
        device: cpu, cuda, cuda:1 ...
        cache: where features are kept, shared with the recipes.
        allow_failed_gates: use a model although one of its gates failed.
        overwrite: replace an earlier index in that folder.
    """
    from adaptclip.clip.checkpoints import split_choice
    from adaptclip.clip.loading import local_folders
    from adaptclip.data.card import load_card
    from adaptclip.data.image_files import find_images
    from adaptclip.data.readers import card_places
    from adaptclip.features import FeatureCache
    from adaptclip.outputs import check_cache, check_folder
    from adaptclip.retrieval import build_index, card_as_images, files_as_images, load_encoder

    is_card = not Path(images).exists() or Path(images).suffix.lower() == ".md"
    card = load_card(images) if is_card else None
    read, roots = card_places(card, data_root) if card else ([Path(images)], [])
    read += [*local_folders(backbone), *(split_choice(given)[0] for given in (model, pretrained) if given)]
    check_folder(out, "index", overwrite=overwrite, inputs=[*read, cache], roots=roots)
    check_cache(cache, read, roots)
    read.append(cache)
    if card is None:
        paths, passed = find_images([Path(images)])
        found, skipped = files_as_images(paths, skip_bad=on_bad_image == "skip")
        parts, skipped = [found], [*skipped, *([f"passed over: {passed}"] if passed else [])]
    else:
        parts, skipped = card_as_images(card, data_root=data_root, part=part, on_bad_image=on_bad_image)
    encoder, named = load_encoder(model, backbone, pretrained, device=device, allow_failed_gates=allow_failed_gates)
    count = build_index(
        out, encoder, named, parts, cache=FeatureCache(cache), batch_size=batch_size, overwrite=overwrite, inputs=read
    )
    for sentence in skipped:
        say(sentence if sentence.startswith("passed over") else f"skipped: {sentence}")
    say(f'{out}: {count} images. Search: adaptclip search {out} "some words"')
    return 0


def search(
    index: ExistingPath,
    query: str,
    /,
    *,
    top_k: int = 10,
    format: Format | None = None,
    out: Path | None = None,
    raw_csv: bool = False,
    model: ExistingPath | None = None,
    backbone: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    engine: Literal["exact", "faiss"] = "exact",
    allow_failed_gates: bool = False,
) -> int:
    """Find the images of an index that are nearest to words or to an image.

    Args:
        index: folder that `adaptclip embed` wrote.
        query: some words, or the path of an image.
        top_k: how many images.
        format: table, csv or jsonl; without, a table, or what the ending of --out says.
        out: a new file for the answers.
        raw_csv: leave text in CSV as it is; without, what a spreadsheet would run gets a ' before it.
        model: where the artifact that made the index is now, if it was moved.
        backbone: the same for a pretrained model.
        pretrained: its weights.
        device: cpu, cuda, cuda:1 ...
        engine: exact, or faiss where that is installed.
        allow_failed_gates: use an artifact although one of its gates failed.
    """
    from adaptclip.data.image_files import IMAGE_SUFFIXES
    from adaptclip.retrieval import encode_picture, encode_texts, load_encoder, load_named, open_index

    answers = Answers(form=format, out=out, raw_csv=raw_csv)
    opened = open_index(index)
    is_image = Path(query).suffix.lower() in IMAGE_SUFFIXES
    if is_image and not Path(query).is_file():
        raise DataError(f"there is no image {query}; a query that ends in {Path(query).suffix} is taken for a path")
    if model is None and backbone is None:
        encoder = load_named(opened.manifest["model"], device=device, allow_failed_gates=allow_failed_gates)
    else:
        encoder = load_encoder(model, backbone, pretrained, device=device, allow_failed_gates=allow_failed_gates)[0]
    if is_image:
        window = opened.manifest.get("window")
        window, frames = tuple(window) if window else None, opened.manifest.get("frames")
        vector, cut = encode_picture(encoder, Path(query), window=window, frames=frames), 0
    else:
        vector, cut = encode_texts(encoder, [query])
    if cut:
        say(f"the query is longer than the {encoder.context_length} tokens the model reads; it was cut", to=sys.stderr)
    hits = opened.search(encoder, vector, k=top_k, engine=engine)[0]
    with answers.start(["image", "score"], ["image", "score"]):
        for hit in hits:
            values = {"image": hit.name, "score": round(hit.score, 6)}
            answers.add(values, [hit.name, f"{hit.score:.6f}"], [hit.name, f"{hit.score:.3f}"])
    return 0
