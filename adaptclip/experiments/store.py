"""Features for many jobs on many processes: every picture is encoded once, by whichever process comes first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from adaptclip.backbone import ClipBackbone
from adaptclip.data.dataset import ImageDataset
from adaptclip.data.transforms import Augment
from adaptclip.features import SHARD_ROWS, FeatureCache
from adaptclip.storage import digest
from adaptclip.types import Features

MAX_CHUNKS = 32
"""Most parts that a pool of pictures is encoded in; each part is read by looking through all shards."""

MEMORY_BYTES = 2 * 2**30
"""What is kept in memory between jobs; beyond it, the pool that was read first is dropped."""


class FeatureStore:
    """The feature cache as jobs see it.

    Jobs of different shots and seeds ask for overlapping images. What is encoded is the whole pool that any job of the
    grid may ask for, in parts that do not depend on who asks first; so the batches, and with them the last bits of
    every feature, are the same however many processes there are and whichever job comes first. A part is encoded under
    a lock, and a process that finds it taken goes on to the next.
    """

    def __init__(self, cache: FeatureCache, backbone: ClipBackbone, locks: Path) -> None:
        """Reads and fills `cache` with features of `backbone`; `locks` is a folder that all processes share."""
        self._cache, self.backbone, self._locks = cache, backbone, locks
        self._pools: dict[tuple[str, str], Tensor] = {}

    def get(
        self, images: ImageDataset, pool: ImageDataset, *, views: int = 0, augment: Augment | None = None
    ) -> Features:
        """Returns the features (V, N, D) of images that are part of a pool; V is 1 for the evaluation transform.

        Raises:
            KeyError: an image is not in the pool.
            DataError, BackboneError, StorageError, ConfigError: see `FeatureCache.get`.
        """
        key = (pool.digest, augment.spec if views and augment else "")
        values = self._pools.get(key)
        if values is None or len(values) < max(views, 1):
            self._pools.pop(key, None)
            values = self._pools[key] = self._read(pool, views, augment)
            self._drop_oldest()
        row_of = {content: row for row, content in enumerate(pool.contents)}
        rows = [row_of[content] for content in images.contents]
        return Features(
            values=values[: max(views, 1), rows],
            labels=torch.as_tensor(images.labels, dtype=torch.int64),
            ids=tuple(images.ids),
            weights=self.backbone.image_digest,
        )

    def _read(self, pool: ImageDataset, views: int, augment: Augment | None) -> Tensor:
        size = SHARD_ROWS * max(1, -(-len(pool) // (SHARD_ROWS * MAX_CHUNKS)))
        chunks = [pool.select(range(i, min(i + size, len(pool)))) for i in range(0, len(pool), size)]
        parts: dict[int, Tensor] = {}
        self._locks.mkdir(parents=True, exist_ok=True)
        for patience_s in (0, -1):  # first what nobody else is busy with, then whatever is left
            for number, chunk in enumerate(chunks):
                if number in parts:
                    continue
                name = digest(pool.digest, augment.spec if augment else "", str(number))[:24]
                try:
                    with FileLock(self._locks / f"{name}.lock", timeout=patience_s):
                        features = self._cache.get(self.backbone, chunk, views=views, augment=augment)
                except Timeout:
                    continue
                parts[number] = features.values
        width = self.backbone.embed_dim
        empty = torch.empty(max(views, 1), 0, width)
        return torch.cat([empty, *(parts[number] for number in sorted(parts))], dim=1)

    def _drop_oldest(self) -> None:
        while len(self._pools) > 1 and sum(v.nbytes for v in self._pools.values()) > MEMORY_BYTES:
            del self._pools[next(iter(self._pools))]


class PooledFeatures:
    """The store as the source of one case's support set: each part is read from the pool that it belongs to."""

    def __init__(self, store: FeatureStore, pool_of: Sequence[tuple[ImageDataset, ImageDataset]]) -> None:
        """`pool_of` has (part, its pool) for the parts of a case."""
        self._store, self._pool_of = store, tuple(pool_of)

    def get(
        self, backbone: Any, dataset: ImageDataset, *, views: int = 0, augment: Augment | None = None, **_: Any
    ) -> Features:
        """Returns features of one of the parts; see `FeatureStore.get`."""
        pool = next(pool for part, pool in self._pool_of if part is dataset)
        return self._store.get(dataset, pool, views=views, augment=augment)
