# SPDX-License-Identifier: Apache-2.0
"""An index: the vectors of images in a folder of their own, with the digest of the weights that made them.

manifest.json          format version, model and digest of its weights, transform, number and width of the vectors, size
                       and digest of the other two files; under a digest of its own (`adaptclip.seals`)
vectors.safetensors    "vectors" (N, D) float32, unit norm; read by memory mapping
names.json             N paths or ids

The files are compared with their digests whenever an index is opened, and nothing is remembered of it: a search reads
all vectors anyway, and a million of width 512 take about two seconds. The nearest vectors are exact, by matrix products
over blocks of rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch
from torch import Tensor

from adaptclip.errors import ConfigError, DataError, StorageError, did_you_mean
from adaptclip.files import digest, read_json, write_json, write_tensors
from adaptclip.outputs import atomic_folder
from adaptclip.seals import check_file, check_seal, describe_files, own_file, write_sealed

if TYPE_CHECKING:
    from adaptclip.clip import ClipBackbone
    from adaptclip.data.dataset import ImageDataset
    from adaptclip.features import FeatureCache

Engine = Literal["exact", "faiss"]

SCORES_BYTES = 64 * 2**20
"""Most bytes of one block's scores."""

MOST_ROWS = 32768
"""Most rows of a block: a block of a memory-mapped index should not be much larger than what the processor caches."""


def nearest(queries: Tensor, vectors: Tensor, k: int, *, engine: Engine = "exact") -> tuple[Tensor, Tensor]:
    """Returns the k rows of `vectors` with the largest dot product with each query, largest first.

    With "exact", equal scores are ordered by row, so the answer depends on nothing but its arguments. "faiss" is as
    exact, without an order of ties, and uses all cores (faiss.knn; the package is optional).

    Args:
        queries: (Q, D) float32.
        vectors: (N, D) float32; may be memory-mapped, since it is only read, block by block.
        k: number of answers, 1 or more; at most N are given.
        engine: who multiplies.

    Returns:
        Scores (Q, K) float32 and rows (Q, K) int64, K the smaller of k and N.

    Raises:
        DataError: shapes do not fit, or there is nothing to search.
        ConfigError: k below 1, an unknown engine, or faiss is not installed.
    """
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1] or not len(vectors):
        raise DataError(
            f"queries should be (Q, D) and vectors (N, D) with N above 0, got {tuple(queries.shape)} and "
            f"{tuple(vectors.shape)}"
        )
    if k < 1:
        raise ConfigError(f"the number of answers must be 1 or more, got {k}")
    k = min(k, len(vectors))
    if engine == "faiss":
        return _faiss(queries, vectors, k)
    if engine != "exact":
        raise ConfigError(f"unknown engine {engine!r}. {did_you_mean(str(engine), ('exact', 'faiss'))}")
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    size = max(1, min(MOST_ROWS, SCORES_BYTES // (4 * max(1, len(queries)))))
    for start in range(0, len(vectors), size):
        found, where = _best(queries @ vectors[start : start + size].T, k)
        scores, rows = torch.cat([scores, found], dim=1), torch.cat([rows, where + start], dim=1)
        # Earlier blocks stand first, and a stable sort leaves equal scores in that order.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, rows = scores[:, :k], rows.gather(1, order)[:, :k]
    return scores, rows


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k best columns of each row, the earlier of equal ones first."""
    k = min(k, scores.shape[1])
    found, where = scores.topk(k, dim=1)
    # topk takes any of those that tie for the last place, and orders ties as it likes.
    where, back = where.sort(dim=1)
    found, order = found.gather(1, back).sort(dim=1, descending=True, stable=True)
    where = where.gather(1, order)
    for row in ((scores >= found[:, -1:]).sum(dim=1) > k).nonzero().flatten().tolist():
        found[row], where[row] = (part[:k] for part in scores[row].sort(descending=True, stable=True))
    return found, where


def _faiss(queries: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("faiss is not installed: python -m pip install faiss-cpu, or leave --engine out") from error
    scores, rows = faiss.knn(queries.numpy(), vectors.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(rows)


FORMAT_VERSION = 2
"""Raised when an older adaptclip could no longer read what a newer one writes. 1, still read: a digest of the names."""

MOST_NAMES_BYTES = 2**32
"""Largest JSON of an index; ten million names of 400 letters."""

SEALED_SINCE = 2
"""Format from which on an index without digests is refused."""

_MANIFEST, _VECTORS, _NAMES = "manifest.json", "vectors.safetensors", "names.json"


@dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        name: path or id of the image.
        score: cosine similarity with the query, -1 to 1.
    """

    name: str
    score: float


@dataclass(frozen=True, eq=False)
class Index:
    """Vectors that can be searched.

    Attributes:
        names: N paths, names of files or ids.
        vectors: (N, D) float32, unit norm.
        manifest: what the index says of itself.
    """

    names: list[str]
    vectors: Tensor
    manifest: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def search(
        self, encoder: ClipBackbone, queries: Tensor, *, k: int = 10, engine: Engine = "exact"
    ) -> list[list[Hit]]:
        """Returns the k images nearest to each of (Q, D) queries, the nearest first.

        Args:
            encoder: what made the queries.
            queries: unit-norm vectors of texts or images.
            k: answers per query.
            engine: see `nearest`.

        Raises:
            DataError: the queries come from other weights than the index.
            ConfigError: see `nearest`.
        """
        self.check_encoder(encoder)
        scores, rows = nearest(queries, self.vectors, k, engine=engine)
        return [
            [Hit(self.names[row], score) for score, row in zip(own, where, strict=True)]
            for own, where in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def check_encoder(self, encoder: ClipBackbone) -> None:
        """Raises DataError unless the encoder has the weights and the transform that made the vectors."""
        made = self.manifest["model"]["digest"]
        if not encoder.made(made, early=self.manifest["format_version"] < SEALED_SINCE):
            raise DataError(
                f"this index was made with the weights {made[:12]}…, {encoder.name} here has {encoder.digest[:12]}…: "
                "their vectors cannot be compared. Search with the model it was made with, or make the index again "
                "(adaptclip embed)."
            )
        if encoder.transform_spec != self.manifest["transform"]:
            raise DataError(
                f"this index was made with the transform {self.manifest['transform']}, {encoder.name} has "
                f"{encoder.transform_spec}; make the index again (adaptclip embed)"
            )


def build_index(
    folder: Path,
    encoder: ClipBackbone,
    model: Mapping[str, Any],
    parts: Sequence[ImageDataset],
    *,
    cache: FeatureCache,
    batch_size: int = 64,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> int:
    """Encodes images and writes them as an index, whole or not at all; the number of images is returned.

    What a killed run has encoded is in the cache, and the next one goes on from there.

    Args:
        folder: the new index.
        encoder: the towers.
        model: what `load_encoder` says of them.
        parts: images, in the order of the index.
        cache: remembers what is encoded.
        batch_size: images encoded at once.
        overwrite: replace an earlier index.
        inputs: files and folders that are read, which the index must keep clear of.

    Raises:
        StorageError: the folder exists already, may not be replaced (see `adaptclip.outputs`), or cannot be written.
        DataError: an image cannot be decoded.
    """
    with atomic_folder(folder, "index", overwrite=overwrite, inputs=inputs) as new:
        vectors = torch.cat([cache.get(encoder, part, batch_size=batch_size).values[0] for part in parts])
        names = [name for part in parts for name in part.names]
        write_tensors(new / _VECTORS, {"vectors": vectors})
        write_json(new / _NAMES, names)
        write_sealed(
            new / _MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "model": dict(model),
                "transform": encoder.transform_spec,
                "window": parts[0].window,
                "frames": parts[0].frames,
                "count": len(names),
                "width": vectors.shape[1],
                "files": describe_files(new, [_VECTORS, _NAMES]),
            },
        )
    return len(names)


def open_index(folder: Path) -> Index:
    """Opens an index, having compared its files with their digests; the vectors are memory-mapped.

    Raises:
        DataError: the folder is not an index, is damaged, or of a newer format.
    """
    if not os.path.lexists(folder / _MANIFEST):
        raise DataError(
            f"{folder} is not an index: it has no {_MANIFEST}. Make one: adaptclip embed IMAGES --out INDEX"
        )
    try:
        manifest = read_json(own_file(folder, _MANIFEST))
        _check_manifest(folder, manifest)
        names = read_json(own_file(folder, _NAMES), max_bytes=MOST_NAMES_BYTES)
        with safetensors.safe_open(own_file(folder, _VECTORS), "pt") as file:
            vectors = file.get_tensor("vectors")
    except (StorageError, OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{folder} is damaged: {error}. Make it again (adaptclip embed).") from error
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not fits or vectors.dtype != torch.float32 or tuple(vectors.shape) != (len(names), manifest["width"]):
        raise DataError(
            f"{folder} is damaged: {_VECTORS} has {vectors.dtype} {tuple(vectors.shape)} and {_NAMES} "
            f"{len(names) if fits else 'no list of'} names; expected float32 ({manifest['count']}, {manifest['width']})"
        )
    if manifest["format_version"] < SEALED_SINCE and digest(names) != manifest["names_digest"]:
        raise DataError(f"{folder} is damaged: {_NAMES} was changed. Make it again (adaptclip embed).")
    return Index(names, vectors, manifest)


def _check_manifest(folder: Path, manifest: Any) -> None:
    """Raises DataError unless the manifest has what is read from it, in a known format."""
    needed = {"format_version": int, "model": dict, "transform": dict, "count": int, "width": int}
    if not isinstance(manifest, dict) or not {"format_version", "count", "width"} <= set(manifest):
        raise DataError(f"{folder} is not an index: its {_MANIFEST} is something else's")
    early = isinstance(manifest["format_version"], int) and manifest["format_version"] < SEALED_SINCE
    needed |= {"names_digest": str} if early else {"files": dict}
    wrong = [key for key, kind in needed.items() if not isinstance(manifest.get(key), kind)]
    if wrong or not isinstance(manifest["model"].get("digest"), str):
        raise DataError(f"{folder} is damaged: {_MANIFEST} lacks {', '.join(wrong) or 'the digest of its model'}")
    if manifest["format_version"] > FORMAT_VERSION:
        raise DataError(f"{folder} has format {manifest['format_version']}, read are those up to {FORMAT_VERSION}")
    window = manifest.get("window")
    if window is not None and not (
        isinstance(window, list) and [type(w) in (int, float) for w in window] == [True] * 2
    ):
        raise DataError(f"{folder} is damaged: window in {_MANIFEST} should be two numbers or null, got {window!r:.80}")
    if check_seal(manifest, str(folder / _MANIFEST)):
        files = manifest["files"] if not early else {}
        for name in (_VECTORS, _NAMES):
            check_file(folder, name, files.get(name))
    elif early:
        warnings.warn(
            f"{folder} is of an early version: its {_MANIFEST} has no digests of itself and of the vectors, so whether "
            "they are as they were written cannot be checked. Make it again (adaptclip embed) to have them.",
            stacklevel=3,
        )
    else:
        raise DataError(f"{folder} is damaged: {_MANIFEST} has no digest of itself, which its format has")
