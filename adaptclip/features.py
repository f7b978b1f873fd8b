# SPDX-License-Identifier: Apache-2.0
"""Image features of a frozen tower: computed once per image and view, kept on disk, shared by every run.

On disk a cache is one folder per way of looking at an image (image weights, transform, window, view), and in it shards:
safetensors files of a few hundred rows that name the images they hold by the digest of their encoded bytes. Which data
set, split, seed or number of shots asked for an image does not matter, so all of them share its features.

    <root>/<digest of the key>/key.json                         the key in words
    <root>/<digest of the key>/<digest of the file>.safetensors  "values" (rows, D) float32 and the images' digests
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptclip.data.dataset import FeatureRows, ImageDataset
from adaptclip.data.read_image import DECODING
from adaptclip.data.transforms import Augment, train_augment
from adaptclip.errors import BackboneError, ConfigError, StorageError
from adaptclip.feature_clip import FeatureClip
from adaptclip.files import check_is_file, digest, parse_json, write_bytes, write_json
from adaptclip.progress import Bar, progress_bar
from adaptclip.seeding import derive_seed
from adaptclip.types import Features

if TYPE_CHECKING:
    from accelerate import Accelerator

    from adaptclip.clip import ClipBackbone
    from adaptclip.data.card_block import Augmentation

SHARD_ROWS = 256
"""Most images per shard (a whole number of batches, at least one): what a kill can cost in encoding."""

STALE_S = 24 * 3600.0
"""Age in seconds from which a temporary file in the cache is taken for the remains of a killed run."""


class FeatureCache:
    """Encodes images once and remembers them.

    A run that was killed and started again encodes the rest in the same batches as one that was not disturbed: the
    missing images are cut into blocks of whole batches, and a block is encoded and written as a whole. With several
    processes, blocks and not single images are divided among them, so the batches stay the same too.
    """

    def __init__(self, root: Path | str | None) -> None:
        """Remembers under `root`; None keeps nothing on disk. Raises StorageError when it is a file."""
        self.root = Path(root) if root is not None else None
        if self.root is not None and self.root.exists() and not self.root.is_dir():
            raise StorageError(f"the feature cache {self.root} is a file; give a folder (--cache)")

    def get(
        self,
        backbone: ClipBackbone | FeatureClip,
        dataset: ImageDataset,
        *,
        views: int = 0,
        augment: Augment | None = None,
        batch_size: int = 64,
        workers: int = 0,
        accelerator: Accelerator | None = None,
    ) -> Features:
        """Returns the features of all images, computing those that are not in the cache. Every process calls it.

        Args:
            backbone: the frozen CLIP.
            dataset: N images.
            views: 0 for the backbone's evaluation transform; V > 0 for V augmented views of each image. View v of an
                image is fixed by v and the image's bytes, whoever computes it.
            augment: makes an augmented view; needed when `views` > 0.
            batch_size: images encoded at once.
            workers: threads that decode and transform; 0 chooses up to 4.
            accelerator: divides the work among its processes; None works alone.

        Returns:
            Features with values (1, N, D), or (V, N, D) for V views; float32 on the CPU, the same on every process.
            Of a card that holds features, those: for V views the crops it has, at most V, or without any the one view.

        Raises:
            ConfigError: a number out of range, views without `augment`, or features of a card with another model.
            DataError: an image cannot be decoded.
            BackboneError: a feature is not finite.
            StorageError: the cache cannot be written.

        Warns:
            UserWarning: a shard is damaged; its images are encoded again.
        """
        if views < 0 or workers < 0 or batch_size < 1:
            got = f"got {views}, {workers}, {batch_size}"
            raise ConfigError(f"views and workers must be 0 or more and batch_size 1 or more; {got}")
        if not dataset.has_pixels or isinstance(backbone, FeatureClip):
            return _stored(backbone, dataset, views)
        if views > 0 and augment is None:
            raise ConfigError(f"{views} augmented views need an augmentation (`augment`)")
        first_row: dict[str, int] = {}
        for row, content in enumerate(dataset.contents):
            first_row.setdefault(content, row)  # an image that stands in several rows is encoded once
        place = {content: i for i, content in enumerate(first_row)}
        values = torch.empty(max(views, 1), len(place), backbone.embed_dim)
        jobs = []
        for number, out in enumerate(values):
            view = _View(number, augment) if views and augment else None
            load, key = _loader(backbone, dataset, first_row, view), _key(backbone, dataset, view)
            folder = self.root / digest(json.dumps(key, sort_keys=True))[:32] if self.root else None
            missing = _read_shards(folder, place, out) if folder else place
            jobs.append(_Job(folder, key, load, place, missing, out))
        _encode_missing(jobs, backbone, batch_size=batch_size, workers=workers, accelerator=accelerator)
        rows = [place[content] for content in dataset.contents]
        return Features.of(
            values if len(rows) == len(place) else values[:, rows], dataset, weights=backbone.image_digest
        )


def training_crop(clip: ClipBackbone | FeatureClip, augmentation: Augmentation, *, min_scale: float = 0.0) -> Any:
    """Returns a card's crop at a model's size (`train_augment`), or None where there are features and no pixels.

    Args:
        clip: gives the size.
        augmentation: of the card.
        min_scale: smallest crop as a share of the image's area that a method asks for; a larger limit of the card wins.
    """
    if not clip.image_size:
        return None
    low, high = augmentation.scale
    return train_augment(
        clip.image_size, scale=(max(low, min_scale), high), horizontal_flip=augmentation.horizontal_flip
    )


def _stored(clip: ClipBackbone | FeatureClip, dataset: ImageDataset, views: int) -> Features:
    """Features that were computed elsewhere, as the card holds them."""
    store = dataset.store
    if not isinstance(store, FeatureRows):
        raise ConfigError("there are only text features and no image tower, and the card holds images; load a model")
    if not isinstance(clip, FeatureClip):
        raise ConfigError(
            f"the card holds features that another model made, so {clip.name} can do nothing with them; leave "
            "--backbone out"
        )
    values = torch.from_numpy(store.values[:, dataset.rows])
    crops = values[1 : 1 + views] if views and len(values) > 1 else values[:1]
    return Features.of(crops, dataset)


@dataclass(frozen=True)
class _View:
    """One numbered augmented view."""

    number: int
    augment: Augment


@dataclass(frozen=True)
class _Job:
    """One view of all images.

    Attributes:
        folder: where its shards lie, or None.
        key: what makes this view different from others, JSON-able.
        load: content digest -> (3, H, W) pixels.
        place: content digest -> row of `values`.
        missing: the part of `place` that this process did not find in the cache.
        values: (U, D) features of the U different images, filled in place.
    """

    folder: Path | None
    key: dict[str, Any]
    load: Callable[[str], Tensor]
    place: dict[str, int]
    missing: dict[str, int]
    values: Tensor


def _key(backbone: ClipBackbone, dataset: ImageDataset, view: _View | None) -> dict[str, Any]:
    """Returns all that the features of an image depend on besides its bytes, JSON-able."""
    key: dict[str, Any] = {
        "weights": backbone.image_digest, "transform": backbone.transform_spec, "window": dataset.window,
        "decoding": DECODING,
    }  # fmt: skip
    key |= {"frames": dataset.frames} if dataset.frames else {}
    return key if view is None else key | {"view": view.number, "augment": view.augment.spec}


def _loader(
    backbone: ClipBackbone, dataset: ImageDataset, row_of: dict[str, int], view: _View | None
) -> Callable[[str], Tensor]:
    """Returns a function that gives the pixels (3, H, W) of an image; it may be called from several threads."""
    if view is None:
        return lambda content: backbone.transform(dataset.image(row_of[content]))
    # albumentations keeps its random state in the pipeline object, so only one thread may seed and use it at a time.
    lock = threading.Lock()

    def load(content: str) -> Tensor:
        image = dataset.image(row_of[content])
        seed = derive_seed(0, content, view.number)
        with lock:
            changed = view.augment(image, seed)
        return backbone.normalize(changed)

    return load


def _encode_missing(
    jobs: Sequence[_Job], backbone: ClipBackbone, *, batch_size: int, workers: int, accelerator: Accelerator | None
) -> None:
    """Fills the missing rows of every job; the processes share the work, and each ends with all of it."""
    from accelerate.utils import broadcast_object_list

    for folder in {job.folder for job in jobs if job.folder is not None and job.missing}:
        _remove_stale(folder)
    todo = [list(job.missing) for job in jobs]
    rank, processes = 0, 1
    if accelerator is not None and accelerator.num_processes > 1:
        rank, processes = accelerator.process_index, accelerator.num_processes
        # Another program may be filling the same cache, so one process decides for all what is left to do.
        todo = broadcast_object_list([todo])[0]
    size = batch_size * max(1, SHARD_ROWS // batch_size)
    shares = [[c[i : i + size] for i in range(0, len(c), size)][rank::processes] for c in todo]
    total = sum(len(block) for share in shares for block in share)
    with (
        ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool,
        progress_bar(total=total, desc="encoding images", unit="image", show=total > 0 and rank == 0) as bar,
    ):
        for job, share in zip(jobs, shares, strict=True):
            for block in share:
                values = _encode(backbone, _prefetched(pool, job.load, block, batch_size), bar)
                _refuse_not_finite(values, block, backbone)
                job.values[[job.place[content] for content in block]] = values
                if job.folder is not None:
                    _write_shard(job.folder, job.key, block, values)
    if accelerator is not None and processes > 1:
        accelerator.wait_for_everyone()
        for job, share in zip(jobs, shares, strict=True):
            _take_from_others(job, [content for block in share for content in block])


def _encode(backbone: ClipBackbone, batches: Iterator[Tensor], bar: Bar) -> Tensor:
    """Returns the features (rows, D) of batches (B, 3, H, W), float32 on the CPU."""
    encoded = []
    for images in batches:
        with torch.inference_mode():
            encoded.append(backbone.encode_image(images.to(backbone.device)).float().cpu())
        bar.update(len(images))
    return torch.cat(encoded)  # outside of inference mode, so that the result is a normal tensor


def _prefetched(
    pool: ThreadPoolExecutor, load: Callable[[str], Tensor], contents: Sequence[str], batch_size: int
) -> Iterator[Tensor]:
    """Yields batches (B, 3, H, W) in order; while one is used, the next is decoded."""
    ahead: list[Future[Tensor]] = []
    for start in range(0, len(contents) + batch_size, batch_size):
        current, ahead = ahead, [pool.submit(load, content) for content in contents[start : start + batch_size]]
        if current:
            yield torch.stack([future.result() for future in current])


def _refuse_not_finite(values: Tensor, contents: Sequence[str], backbone: ClipBackbone) -> None:
    bad = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise BackboneError(
            f"{backbone.name} gives features that are not finite for {len(bad)} of {len(values)} images (the first has "
            f"the SHA-256 {contents[bad[0]]}); if the backbone runs in half precision, use fp32 or bf16"
        )


def _take_from_others(job: _Job, mine: Sequence[str]) -> None:
    """Fills the rows that other processes encoded: from the cache, or without one from the processes themselves."""
    from accelerate.utils import gather_object

    if job.folder is None:
        parts = gather_object([(list(mine), job.values[[job.place[content] for content in mine]])])
        for contents, values in parts:
            job.values[[job.place[content] for content in contents]] = values
        return
    done = set(mine)
    left = _read_shards(job.folder, {c: row for c, row in job.missing.items() if c not in done}, job.values)
    if left:
        raise StorageError(
            f"{len(left)} images are missing in {job.folder} although another process encoded them: is the cache on "
            "a file system that all processes share?"
        )


def _write_shard(folder: Path, key: dict[str, Any], contents: Sequence[str], values: Tensor) -> None:
    """Writes one shard under the digest of its bytes: one rename makes it exist, and every later damage is seen."""
    import safetensors.torch

    if not (folder / "key.json").exists():
        write_json(folder / "key.json", key)
    # With the key's digest in it, a shard that is moved to another folder is not taken for one of that folder's.
    # One entry: safetensors writes several in an order that varies, and a shard is named by its bytes.
    info = {"shard": json.dumps({"contents": list(contents), "key": folder.name})}
    shard = safetensors.torch.save({"values": values.contiguous()}, info)
    write_bytes(folder / f"{digest(shard)[:32]}.safetensors", shard)


def _read_shards(folder: Path, wanted: dict[str, int], out: Tensor) -> dict[str, int]:
    """Fills rows of `out` from the shards of a folder.

    Args:
        folder: of one view; it need not exist.
        wanted: content digest -> row of `out`.
        out: (U, D).

    Returns:
        The part of `wanted` that was not found, in its own order.
    """
    left = dict(wanted)
    for path in sorted(folder.glob("*.safetensors")):
        contents, values = _read_shard(path, left)
        if contents:
            out[[left.pop(content) for content in contents]] = values
    return left


def _read_shard(path: Path, wanted: Collection[str]) -> tuple[list[str], Tensor]:
    """Returns which of the wanted images a shard holds, and their features; none when it is damaged."""
    import safetensors.torch

    try:
        if os.path.lexists(path):
            check_is_file(path)
        with path.open("rb") as file:  # what cannot be read now is no damage, and may be read the next time
            file.read(1)
    except FileNotFoundError:
        return [], torch.empty(0)  # another program found it damaged
    except OSError as error:
        warnings.warn(
            f"the feature cache file {path} cannot be read ({error}); its images are encoded again", stacklevel=4
        )
        return [], torch.empty(0)
    except StorageError as error:
        _drop(path, error)
        return [], torch.empty(0)
    try:
        with safetensors.safe_open(path, "pt") as shard:
            info = parse_json((shard.metadata() or {})["shard"], where=f"the contents of {path}")
            if info["key"] != path.parent.name:
                raise ValueError("it holds features of other weights or another transform")
            contents: list[str] = info["contents"]
            rows = [i for i, content in enumerate(contents) if content in wanted]
            if rows:  # the file is memory-mapped: without wanted rows no feature is read
                _check_digest(path)
                return [contents[i] for i in rows], shard.get_tensor("values")[rows]
    except FileNotFoundError:
        pass  # another program found it damaged
    except (OSError, ValueError, KeyError, TypeError, StorageError, safetensors.SafetensorError) as error:
        _drop(path, error)
    return [], torch.empty(0)


def _drop(path: Path, error: Exception) -> None:
    """Removes a shard that is damaged, and says so."""
    warnings.warn(f"the feature cache file {path} is damaged ({error}); its images are encoded again", stacklevel=5)
    with contextlib.suppress(OSError):
        path.unlink()


def _check_digest(path: Path) -> None:
    if digest(path.read_bytes())[:32] != path.stem:
        raise ValueError("its bytes do not match the digest in its name")


def _remove_stale(folder: Path) -> None:
    """Removes what runs that were killed while they wrote a shard left behind."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
