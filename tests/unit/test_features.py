# SPDX-License-Identifier: Apache-2.0
import io
import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_clip import make_tiny_backbone
from torch import nn

from adaptclip import features as features_module
from adaptclip.clip import ClipBackbone
from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.data.transforms import Augment, train_augment
from adaptclip.errors import BackboneError, ConfigError, DataError, StorageError
from adaptclip.features import FeatureCache
from adaptclip.files import digest

SIDE, WIDTH = 8, 6


class FakeBackbone(nn.Module):
    """The part of ClipBackbone that a feature cache uses; it remembers the batches it was given."""

    embed_dim, name, device = WIDTH, "fake", torch.device("cpu")

    def __init__(self, seed=0, fails_after=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3 * SIDE * SIDE, WIDTH, generator=generator)
        self.image_digest = f"weights-{seed}"
        self.transform_spec = {"size": SIDE}
        self.batches: list[int] = []
        self.fails_after = fails_after

    def transform(self, image):
        return self.normalize(image.resize((SIDE, SIDE)))

    def normalize(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5

    def encode_image(self, images):
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        return F.normalize(images.flatten(1) @ self.weight, dim=-1)


class FakePipeline:
    """Like an albumentations pipeline, it holds its random state, so two threads in it would spoil each other."""

    def set_random_seed(self, seed):
        self.seed = seed
        self.thread = threading.get_ident()

    def __call__(self, *, image):
        seed = self.seed
        time.sleep(0.001)
        assert (seed, threading.get_ident()) == (self.seed, self.thread), "two threads at once"
        noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3))
        return {"image": (noise // 2 + image[:1, :1] // 2).astype(np.uint8)}


def _augment(spec="noise"):
    return Augment(SIDE, spec, FakePipeline())


def _dataset(seeds):
    """One image per seed; equal seeds are equal images."""
    images = []
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    ids = tuple(f"row-{i}" for i in range(len(images)))
    return ImageDataset(
        store=MemoryStore(images, ids),
        rows=np.arange(len(images)),
        class_names=("a", "b"),
        ids=ids,
        labels=np.arange(len(images)) % 2,
        contents=tuple(digest(image) for image in images),
    )


def _get(cache, dataset, backbone: Any = None, **options):
    return cache.get(backbone or FakeBackbone(), dataset, batch_size=4, **options)


def _expected(dataset, backbone):
    """Every image on its own, without batches, threads or files."""
    rows = [backbone.encode_image(backbone.transform(dataset.image(i))[None]) for i in range(len(dataset))]
    return torch.cat(rows)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_ROWS", 8)


@pytest.mark.parametrize("cached", [False, True])
def test_features_are_those_of_the_live_backbone(tmp_path, cached):
    dataset, backbone = _dataset(range(11)), FakeBackbone()
    features = _get(FeatureCache(tmp_path if cached else None), dataset, backbone)
    assert backbone.batches == [4, 4, 3]
    assert features.values.shape == (1, 11, WIDTH)
    assert features.values.dtype == torch.float32
    torch.testing.assert_close(features.values[0], _expected(dataset, backbone), atol=1e-6, rtol=0)
    assert features.labels.tolist() == dataset.labels.tolist()
    assert features.ids == dataset.ids
    # They can be used in training, which tensors made in inference mode cannot.
    weight = torch.zeros(WIDTH, requires_grad=True)
    (features.values[0] @ weight).sum().backward()


def test_second_time_nothing_is_encoded(tmp_path):
    dataset = _dataset(range(11))
    first = _get(FeatureCache(tmp_path), dataset)
    backbone = FakeBackbone()
    second = _get(FeatureCache(str(tmp_path)), dataset, backbone)
    assert backbone.batches == []
    assert torch.equal(first.values, second.values)


def test_images_are_shared_by_content_whatever_the_split(tmp_path):
    _get(FeatureCache(tmp_path), _dataset([1, 2, 3]))
    backbone = FakeBackbone()
    features = _get(FeatureCache(tmp_path), _dataset([7, 3, 9, 1]), backbone)
    assert backbone.batches == [2]
    torch.testing.assert_close(features.values[0], _expected(_dataset([7, 3, 9, 1]), backbone))


def test_a_picture_in_several_rows_is_encoded_once(tmp_path):
    backbone = FakeBackbone()
    features = _get(FeatureCache(tmp_path), _dataset([5, 6, 5, 5]), backbone)
    assert backbone.batches == [2]
    assert torch.equal(features.values[0, 0], features.values[0, 3])
    assert not torch.equal(features.values[0, 0], features.values[0, 1])
    assert len(features) == 4


@pytest.mark.parametrize("change", ["weights", "transform", "window"])
def test_another_way_of_looking_is_another_feature(tmp_path, change):
    dataset, cache = _dataset(range(3)), FeatureCache(tmp_path)
    _get(cache, dataset)
    other = FakeBackbone(seed=1 if change == "weights" else 0)
    other.transform_spec = {"size": SIDE, "mean": 0.5} if change == "transform" else {"size": SIDE}
    _get(cache, replace(dataset, window=(0.0, 9.0)) if change == "window" else dataset, other)
    assert other.batches == [3]


def test_views_are_fixed_by_content_and_number(tmp_path):
    whole = _get(FeatureCache(tmp_path), _dataset(range(9)), views=3, augment=_augment(), workers=4)
    assert whole.values.shape == (3, 9, WIDTH)
    assert len({tuple(row.tolist()) for row in whole.values.flatten(0, 1)}) == 27
    # Other company, other order, other batches, one thread, no files: the same views.
    part = _get(FeatureCache(None), _dataset([20, 8, 2]), views=2, augment=_augment(), workers=1)
    torch.testing.assert_close(part.values[:, 1:], whole.values[:2, [8, 2]], atol=1e-6, rtol=0)


def test_real_views_are_the_same_from_one_thread_and_from_many(tiny_backbone):
    augment = train_augment(tiny_backbone.image_size)
    dataset = _dataset(range(24))
    alone = _get(FeatureCache(None), dataset, tiny_backbone, views=2, augment=augment, workers=1)
    many = _get(FeatureCache(None), dataset, tiny_backbone, views=2, augment=augment, workers=8)
    assert torch.equal(alone.values, many.values)
    assert not torch.allclose(alone.values[0], alone.values[1], atol=1e-3)


def test_real_features_are_those_of_the_evaluation_transform(tiny_backbone):
    dataset = _dataset(range(5))
    features = _get(FeatureCache(None), dataset, tiny_backbone)
    with torch.no_grad():
        expected = _expected(dataset, tiny_backbone)
    torch.testing.assert_close(features.values[0], expected, atol=1e-5, rtol=0)


def test_another_text_tower_reads_the_same_features(tmp_path):
    dataset, first, second = _dataset(range(6)), make_tiny_backbone(), make_tiny_backbone()
    state = second.model.state_dict()
    with torch.no_grad():
        state["token_embedding.weight"] += 1
    other = ClipBackbone(second.model, second.tokenizer, name="other text")
    assert other.digest != first.digest
    expected = _get(FeatureCache(tmp_path), dataset, first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipBackbone, "encode_image", lambda *_: pytest.fail("encoded again"))
        kept = _get(FeatureCache(tmp_path), dataset, other)
    assert torch.equal(kept.values, expected.values)
    assert kept.weights == other.image_digest


def test_more_views_keep_the_first_ones(tmp_path):
    dataset = _dataset(range(4))
    two = _get(FeatureCache(tmp_path), dataset, views=2, augment=_augment())
    backbone = FakeBackbone()
    three = _get(FeatureCache(tmp_path), dataset, backbone, views=3, augment=_augment())
    assert backbone.batches == [4]
    assert torch.equal(three.values[:2], two.values)
    _get(FeatureCache(tmp_path), dataset, backbone, views=1, augment=_augment("other"))
    assert backbone.batches == [4, 4]


def test_killed_encoding_goes_on_in_the_same_batches(tmp_path, small_shards):
    dataset = _dataset(range(22))
    undisturbed = FakeBackbone()
    expected = _get(FeatureCache(tmp_path / "a"), dataset, undisturbed)
    cache = FeatureCache(tmp_path / "b")
    killed = FakeBackbone(fails_after=3)
    with pytest.raises(KeyboardInterrupt):
        _get(cache, dataset, killed)
    rest = FakeBackbone()
    features = _get(cache, dataset, rest)
    # The first shard (8 rows, 2 batches) was kept; the batches of the rest are those of the undisturbed run.
    assert rest.batches == undisturbed.batches[2:]
    assert torch.equal(features.values, expected.values)


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "not safetensors"])
def test_damaged_shard_is_encoded_again_with_a_warning(tmp_path, small_shards, damage):
    dataset = _dataset(range(20))
    expected = _get(FeatureCache(tmp_path), dataset)
    shards = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(shards) == 3
    content = bytearray(shards[1].read_bytes())
    content[-3] ^= 1
    spoiled = {"flipped byte": content, "truncated": content[:100], "empty": b"", "not safetensors": b"x" * 500}
    shards[1].write_bytes(spoiled[damage])
    backbone = FakeBackbone()
    with pytest.warns(UserWarning, match=f"{shards[1].name} is damaged .* encoded again"):
        features = _get(FeatureCache(tmp_path), dataset, backbone)
    assert sum(backbone.batches) in (4, 8)
    assert torch.equal(features.values, expected.values)
    assert _get(FeatureCache(tmp_path), dataset, backbone).values.equal(expected.values)


def test_shard_that_was_moved_to_another_folder_is_not_taken_for_one_of_its(tmp_path):
    dataset, other = _dataset(range(5)), FakeBackbone(seed=1)
    _get(FeatureCache(tmp_path / "one"), dataset)
    expected = _get(FeatureCache(tmp_path / "two"), dataset, other)
    (foreign,), (own,) = ((tmp_path / name).glob("*/*.safetensors") for name in ("one", "two"))
    own.unlink()
    foreign.rename(own.with_name(foreign.name))  # whole, with the digest of its bytes in its name
    with pytest.warns(UserWarning, match=r"of other weights or another transform\); its images are encoded again"):
        features = _get(FeatureCache(tmp_path / "two"), dataset, other)
    assert torch.equal(features.values, expected.values)


def test_pipe_among_the_shards_is_not_waited_for(tmp_path):
    dataset = _dataset(range(5))
    expected = _get(FeatureCache(tmp_path), dataset)
    (shard,) = tmp_path.glob("*/*.safetensors")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.warns(UserWarning, match="a pipe or device, no file"):
        assert _get(FeatureCache(tmp_path), dataset).values.equal(expected.values)


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, small_shards):
    dataset = _dataset(range(20))
    num_written = []

    def write_bytes(path, content):
        if len(num_written) == 1:
            raise StorageError(f"cannot write {path}: [Errno 28] No space left on device")
        num_written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "write_bytes", write_bytes)
        with pytest.raises(StorageError, match="No space left"):
            _get(FeatureCache(tmp_path), dataset)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    backbone = FakeBackbone()
    _get(FeatureCache(tmp_path), dataset, backbone)
    assert sum(backbone.batches) == 12


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*choose another folder"):
        _get(FeatureCache(tmp_path / "file" / "cache"), _dataset([0]))


def test_remains_of_killed_runs_are_removed(tmp_path):
    _get(FeatureCache(tmp_path), _dataset([0]))
    (folder,) = tmp_path.iterdir()
    old, new = folder / ".old.tmp", folder / ".new.tmp"
    for path in (old, new):
        path.write_text("")
    long_ago = time.time() - 10 * features_module.STALE_S
    os.utime(old, (long_ago, long_ago))
    _get(FeatureCache(tmp_path), _dataset([1]))
    assert not old.exists()
    assert new.exists()


def test_image_that_cannot_be_decoded_is_named(tmp_path):
    dataset = _dataset(range(3))
    dataset.store.images[1] = b"not an image"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="row-1"):
        _get(FeatureCache(tmp_path), dataset)


def test_features_that_are_not_finite_are_refused(tmp_path):
    dataset, backbone = _dataset(range(3)), FakeBackbone()
    backbone.weight[0, 0] = float("nan")
    with pytest.raises(BackboneError, match="fake gives features that are not finite for 3 of 3 images"):
        _get(FeatureCache(tmp_path), dataset, backbone)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": -1}, "views and workers must be 0 or more"),
        ({"workers": -2}, "got 0, -2, 4"),
        ({"views": 2}, "2 augmented views need an augmentation"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        _get(FeatureCache(None), _dataset([0]), **options)


def test_no_images():
    features = _get(FeatureCache(None), _dataset([]))
    assert features.values.shape == (1, 0, WIDTH)


def test_one_process_of_an_accelerator_works_alone(tmp_path):
    alone = SimpleNamespace(num_processes=1, process_index=0)
    features = _get(FeatureCache(tmp_path), _dataset(range(5)), accelerator=alone)
    assert features.values.shape == (1, 5, WIDTH)
