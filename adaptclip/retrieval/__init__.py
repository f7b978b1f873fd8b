# SPDX-License-Identifier: Apache-2.0
"""Search over images by text or image, exact, with a pretrained or an adapted CLIP."""

from adaptclip.retrieval.encoding import (
    card_as_images,
    encode_picture,
    encode_texts,
    files_as_images,
    load_encoder,
    load_named,
)
from adaptclip.retrieval.index import Engine, Hit, Index, build_index, nearest, open_index

__all__ = [
    "Engine",
    "Hit",
    "Index",
    "build_index",
    "card_as_images",
    "encode_picture",
    "encode_texts",
    "files_as_images",
    "load_encoder",
    "load_named",
    "nearest",
    "open_index",
]
