# SPDX-License-Identifier: Apache-2.0
"""Which model makes the vectors, and how images and texts become vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adaptclip.artifact import load
from adaptclip.clip import ClipBackbone, load_backbone
from adaptclip.data.card import Card, load_card
from adaptclip.data.dataset import FileStore, ImageDataset
from adaptclip.data.fingerprints import content_digest
from adaptclip.data.given_images import one_image
from adaptclip.data.sources import open_data
from adaptclip.data.transforms import decode_image, read_file
from adaptclip.errors import ConfigError, DataError, did_you_mean
from adaptclip.methods.contrastive import caption_tokens

PARTS = ("all", "train", "validation", "test")
"""Parts of a data card that can be indexed."""


def load_encoder(
    artifact: Path | str | None = None,
    backbone: str | None = None,
    pretrained: str | None = None,
    *,
    device: str = "cpu",
    allow_failed_gates: bool = False,
) -> tuple[ClipBackbone, dict[str, Any]]:
    """Loads the towers that make vectors: those of an artifact, adapted where it adapts them, or a pretrained CLIP.

    Args:
        artifact: an artifact or run folder.
        backbone: instead of an artifact, a pretrained model by any spelling; None is the starter.
        pretrained: its weights tag or file.
        device: where the towers go.
        allow_failed_gates: load an artifact although one of its gates failed.

    Returns:
        The towers, and what an index says of them: how they were named, and the digest of their weights.

    Raises:
        ConfigError: an artifact and a backbone are both named.
        ArtifactError: see `adaptclip.load`.
        BackboneError: see `load_backbone`.
    """
    if artifact is not None and (backbone is not None or pretrained is not None):
        raise ConfigError("name either an artifact (--model) or a pretrained model (--backbone), not both")
    if artifact is not None:
        encoder = load(artifact, device=device, allow_failed_gates=allow_failed_gates).adapter.encoder
        return encoder, {"artifact": str(Path(artifact).resolve()), "digest": encoder.digest}
    encoder = load_backbone(*([backbone] if backbone else []), pretrained=pretrained, device=device)
    return encoder, {"backbone": encoder.name, "pretrained": pretrained, "digest": encoder.digest}


def load_named(named: Mapping[str, Any], *, device: str = "cpu", allow_failed_gates: bool = False) -> ClipBackbone:
    """Loads the towers that an index names; whether they are still the same, `Index.search` looks at."""
    artifact = named.get("artifact")
    return load_encoder(
        artifact, None if artifact else named.get("backbone"), None if artifact else named.get("pretrained"),
        device=device, allow_failed_gates=allow_failed_gates,
    )[0]  # fmt: skip


def files_as_images(paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[ImageDataset, list[str]]:
    """Makes unlabelled images of files; their ids are the paths.

    Args:
        paths: image files.
        skip_bad: leave out those that cannot be decoded.

    Returns:
        The images, and a sentence per file that was left out.

    Raises:
        DataError: a file cannot be read (or none can).
    """
    good: list[Path] = []
    contents: list[str] = []
    skipped: list[str] = []
    for path in dict.fromkeys(paths):
        reason = _unreadable(path) if skip_bad else None
        if reason is None:
            contents.append(content_digest(read_file(path)))
            good.append(path)
        else:
            skipped.append(reason)
    if not good:
        raise DataError(f"none of {len(paths)} images can be read; the first: {(skipped or ['there are none'])[0]}")
    return _unlabelled(FileStore(good), [str(path) for path in good], contents), skipped


def card_as_images(
    card: Card | str,
    *,
    data_root: Path | None = None,
    part: str = "all",
    on_bad_image: Literal["error", "skip"] = "error",
) -> tuple[list[ImageDataset], list[str]]:
    """Opens the images of a data card, or of one of its parts.

    Args:
        card: the card, its name or its path.
        data_root: folder with the card's files.
        part: one of PARTS.
        on_bad_image: stop at an unreadable image, or leave it out.

    Returns:
        The parts' images, and sentences about rows that were left out.

    Raises:
        ConfigError: no such part.
        CardError: no such card, or a card that is not valid.
        DataError: images are missing, or the part is empty.
    """
    if part not in PARTS:
        raise ConfigError(f"a card has no part {part!r}. {did_you_mean(part, PARTS)}")
    data = open_data(
        load_card(card) if isinstance(card, str) else card, data_root=data_root, on_bad_image=on_bad_image, check=False
    )
    chosen = [images for name, images in data.parts.items() if part in ("all", name) and len(images)]
    if not chosen:
        raise DataError(f"card {data.card.name} has no images in its part {part!r}")
    return chosen, list(data.skipped)


def _unreadable(path: Path) -> str | None:
    """Why an image cannot be decoded, or None."""
    try:
        decode_image(path, row=str(path))
    except DataError as error:
        return str(error)
    return None


def _unlabelled(store: FileStore, ids: Sequence[str], contents: Sequence[str]) -> ImageDataset:
    rows = np.arange(len(ids), dtype=np.int64)
    return ImageDataset(store, rows, ("image",), tuple(ids), np.zeros_like(rows), tuple(contents))


@torch.inference_mode()
def encode_texts(encoder: ClipBackbone, texts: Sequence[str], *, batch_size: int = 256) -> tuple[Tensor, int]:
    """Encodes Q texts as (Q, D) unit-norm float32 vectors, and says how many were cut at the end of the context.

    Raises:
        DataError: a text is empty.
    """
    if not texts or not all(text.strip() for text in texts):
        raise DataError("a search needs words (or an image file), and this query has none")
    tokens, cut = caption_tokens(encoder, [[text] for text in texts])
    parts = [encoder.encode_text(part) for part in tokens.tokens.split(batch_size)]
    return torch.cat(parts).float().cpu(), cut


@torch.inference_mode()
def encode_picture(
    encoder: ClipBackbone, image: Any, *, window: tuple[float, float] | None = None, frames: str | None = None
) -> Tensor:
    """Encodes an image as a (1, D) unit-norm float32 vector.

    Args:
        encoder: the towers.
        image: a path, a PIL image, bytes, an open file or pixels, see `data.given_images`.
        window: (black, white) values for images of more than 8 bits.
        frames: which of several frames, see `decode_image`.

    Raises:
        DataError: it cannot be read or decoded, or is not one image.
    """
    pixels = encoder.transform(one_image(image).decoded(window, frames))
    return encoder.encode_image(pixels[None]).float().cpu()
