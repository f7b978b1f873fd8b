# SPDX-License-Identifier: Apache-2.0
"""Batches of images: the same images and the same crops as the cache of features, in any order of asking."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adaptclip.data.card import load_card
from adaptclip.data.dataset import ImageDataset, MemoryStore
from adaptclip.data.fingerprints import content_digest
from adaptclip.data.sources import open_data
from adaptclip.data.transforms import train_augment
from adaptclip.errors import ConfigError, DataError
from adaptclip.features import FeatureCache
from adaptclip.methods import LoRA
from adaptclip.training.pixels import PixelLoader
from adaptclip.training.steps import FeatureLoader, train_steps
from adaptclip.training.support import Support
from adaptclip.training.tracking import make_accelerator
from adaptclip.types import Batch

ROWS = 10


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    """Ten images, two of each of the digits 0 to 4."""
    train = open_data(load_card("digits"), check=False).train
    return train.select([row for label in range(5) for row in np.flatnonzero(train.labels == label)[:2]])


@pytest.fixture(scope="module")
def crop(tiny_backbone):
    return train_augment(tiny_backbone.image_size)


@pytest.fixture
def loader(images, tiny_backbone, crop):
    def make(processes=1, rank=0, accumulate=1, dataset=images, **settings) -> PixelLoader:
        accelerator = fake(processes, rank, accumulate)
        settings = {"batch_size": 4, "seed": 0, **settings}
        return PixelLoader(dataset, tiny_backbone, augment=crop, accelerator=accelerator, **settings)

    return make


def fake(processes=1, rank=0, accumulate=1) -> Any:
    """What a loader asks of the accelerator of one of several processes."""
    return SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=processes, gradient_accumulation_steps=accumulate
    )


def pixels_of(batch: Batch) -> torch.Tensor:
    assert batch.images is not None
    return batch.images


@pytest.mark.parametrize("views", [0, 2])
def test_crops_are_those_of_the_feature_cache(loader, images, tiny_backbone, crop, views):
    epochs = 3
    features = FeatureCache(None).get(tiny_backbone, images, views=epochs, augment=crop)
    pixels = loader(views=views)
    assert pixels.steps_per_epoch == 2
    seen = set()
    for micro_step in range(epochs * 2):
        epoch = micro_step // 2
        batch = pixels.batch(micro_step)
        assert pixels_of(batch).shape == (4, 3, 32, 32)
        got = tiny_backbone.encode_image(pixels_of(batch))
        view = epoch % views if views else epoch
        torch.testing.assert_close(got, features.values[view, batch.index], atol=2e-6, rtol=0)
        assert torch.equal(batch.labels, torch.as_tensor(images.labels)[batch.index])
        seen.add((view, *batch.index.tolist()))
    assert len(seen) == 6  # the order is a fresh one in every epoch, whatever the view
    # The views differ by far more than the tolerance, or the comparison would say nothing.
    assert (features.values[0] - features.values[1]).abs().amax(dim=1).min() > 1e-4


def test_views_come_again_and_fresh_crops_do_not(loader):
    def crops_of_image_0(views):
        pixels = loader(batch_size=ROWS, views=views)
        batches = [pixels.batch(epoch) for epoch in range(4)]
        return [pixels_of(batch)[batch.index == 0] for batch in batches]

    repeated, fresh = crops_of_image_0(2), crops_of_image_0(0)
    assert torch.equal(repeated[0], repeated[2])
    assert torch.equal(repeated[1], repeated[3])
    assert torch.equal(repeated[1], fresh[1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(fresh, 2))


@pytest.mark.parametrize(("processes", "accumulate", "batch_size"), [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_the_order_and_its_division_are_the_feature_loaders(
    loader, images, tiny_backbone, processes, accumulate, batch_size
):
    features = FeatureCache(None).get(tiny_backbone, images)
    whole = FeatureLoader(features, batch_size=4, seed=3, accelerator=fake())
    for step in range(3):
        parts = []
        for rank in range(processes):
            accelerator = fake(processes, rank, accumulate)
            alike = FeatureLoader(features, batch_size=batch_size, seed=3, accelerator=accelerator)
            pixels = loader(processes, rank, accumulate, batch_size=batch_size, seed=3)
            assert pixels.steps_per_epoch == whole.steps_per_epoch == 2
            for micro_step in range(step * accumulate, (step + 1) * accumulate):
                batch = pixels.batch(micro_step)
                assert torch.equal(batch.index, alike.batch(micro_step).index)
                parts.append(batch)
        together = {
            int(i): picture for batch in parts for i, picture in zip(batch.index, pixels_of(batch), strict=True)
        }
        expected = loader(seed=3).batch(step)
        assert sorted(together) == sorted(expected.index.tolist())
        for row, picture in zip(expected.index.tolist(), pixels_of(expected), strict=True):
            assert torch.equal(together[row], picture)


def test_any_step_can_be_asked_for_in_any_order(loader):
    straight = loader()
    expected = [straight.batch(m) for m in range(6)]
    jumping = loader(workers=3)  # threads do not change what is drawn
    for micro_step in (4, 5, 0, 3, 3, 1, 2, 5):
        batch = jumping.batch(micro_step)
        assert torch.equal(pixels_of(batch), pixels_of(expected[micro_step]))
        assert torch.equal(batch.index, expected[micro_step].index)


def test_a_resumed_loop_yields_the_rest(loader):
    accelerator = make_accelerator(cpu=True)
    everything = list(train_steps(loader(), 5, accelerator))
    rest = list(train_steps(loader(), 5, accelerator, start=3))
    assert [step for step, _ in rest] == [4, 5]
    for (_, resumed), (_, undisturbed) in zip(rest, everything[3:], strict=True):
        assert torch.equal(pixels_of(resumed), pixels_of(undisturbed))


def test_drawing_crops_leaves_the_global_generators_alone(loader):
    """Dropout draws from them: were they touched by a thread, a run could not be repeated."""
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    pixels = loader()
    for micro_step in range(3):
        pixels.batch(micro_step)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr]


def with_a_damaged_row(images: ImageDataset, row: int) -> ImageDataset:
    data = [images.read(i) for i in range(len(images))]
    data[row] = data[row][:40]
    names = [f"{i}.png" for i in range(len(images))]
    contents = tuple(content_digest(image) for image in data)
    return replace(images, store=MemoryStore(data, names), rows=np.arange(len(data)), contents=contents)


def test_an_unreadable_image_is_named_when_its_step_comes(loader, images):
    order = [row for m in range(2) for row in loader().batch(m).index.tolist()]
    pixels = loader(dataset=with_a_damaged_row(images, order[6]))
    # It is read ahead while step 0 is used, and must not stop that one.
    assert pixels.batch(0).index.tolist() == order[:4]
    with pytest.raises(DataError, match=rf"image {order[6]}\.png"):
        pixels.batch(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": -1}, "views and workers must be 0 or more, got -1 and 0"),
        ({"workers": -2}, "views and workers must be 0 or more, got 0 and -2"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"processes": 4, "accumulate": 3}, "10 training images cannot be divided among 4 processes × 3"),
    ],
)
def test_bad_numbers(loader, settings, message):
    with pytest.raises(ConfigError, match=message):
        loader(**settings)


@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_the_adapter_decides_what_is_loaded(images, tiny_backbone, crop, tmp_path, towers):
    adapter = LoRA(tiny_backbone, images.class_names, towers=towers)
    support = Support(
        tiny_backbone, images, images.select([]), source=FeatureCache(tmp_path), seed=2, accelerator=fake()
    )
    chosen = support.loader_for(adapter, batch_size=4, views=3)
    assert chosen.steps_per_epoch == 2
    assert bool(list(tmp_path.rglob("*.safetensors"))) == (towers == "text")
    if towers == "text":
        assert isinstance(chosen, FeatureLoader)
        features = FeatureCache(None).get(tiny_backbone, images, views=3, augment=crop).values
        for epoch in range(4):  # the fourth epoch shows the first crops again
            batch = chosen.batch(2 * epoch)
            assert batch.images is None
            assert batch.features is not None
            assert torch.equal(batch.features, features[epoch % 3, batch.index])
    else:
        assert isinstance(chosen, PixelLoader)
        first, fourth = (chosen.batch(2 * epoch) for epoch in (0, 3))
        alone = PixelLoader(images, tiny_backbone, augment=crop, batch_size=4, seed=2, accelerator=fake())
        assert torch.equal(pixels_of(fourth), pixels_of(alone.batch(6)))
        shown = {int(i) for i in first.index} & {int(i) for i in fourth.index}
        assert shown
        for row in shown:  # never the same crop twice
            assert not torch.equal(pixels_of(first)[first.index == row], pixels_of(fourth)[fourth.index == row])
