# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import albumentations
import numpy as np
import pytest
from PIL import Image

from adaptclip.data.transforms import build_strictly, train_augment
from adaptclip.errors import ConfigError


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    # Columns are told apart by red, rows by green, so that a view shows where it was taken and whether it is mirrored.
    grid = np.zeros((90, 120, 3), dtype=np.uint8)
    grid[..., 0] = np.linspace(0, 255, 120, dtype=np.uint8)[None]
    grid[..., 1] = np.linspace(0, 255, 90, dtype=np.uint8)[:, None]
    return Image.fromarray(grid)


def test_a_view_is_uint8_of_the_asked_size(photo):
    view = train_augment(32)(photo, 0)
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8


def test_the_seed_alone_decides_the_view(photo):
    augment, again = train_augment(32), train_augment(32)
    for seed in (0, 1, 2**63 - 1):
        expected = augment(photo, seed)
        augment(photo, seed + 1 if seed < 2**62 else 5)  # what was drawn before must not matter
        assert (augment(photo, seed) == expected).all()
        assert (again(photo, seed) == expected).all()
        assert (pickle.loads(pickle.dumps(augment))(photo, seed) == expected).all()


def test_many_seeds_give_many_views(photo):
    augment = train_augment(16)
    assert len({augment(photo, seed).tobytes() for seed in range(64)}) == 64


def test_copies_in_other_threads_draw_the_same_views(photo):
    def views(_: int) -> bytes:
        augment = train_augment(16)
        return b"".join(augment(photo, seed).tobytes() for seed in range(8))

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(views, range(2)))) == 1


def test_global_generators_do_not_matter(photo):
    augment = train_augment(16)
    np.random.seed(0)
    first = augment(photo, 3)
    np.random.seed(1)
    assert (augment(photo, 3) == first).all()


def _is_mirrored(view: np.ndarray) -> bool:
    return bool(view[:, 0, 0].mean() > view[:, -1, 0].mean())


def test_half_of_the_views_are_mirrored_unless_it_is_forbidden(photo):
    flips = [_is_mirrored(train_augment(16)(photo, seed)) for seed in range(200)]
    assert 70 < sum(flips) < 130
    plain = train_augment(16, horizontal_flip=False)
    assert not any(_is_mirrored(plain(photo, seed)) for seed in range(200))


def test_the_crop_covers_the_asked_share_of_the_area(photo):
    augment = train_augment(64, scale=(0.25, 0.36), horizontal_flip=False)
    shares = []
    for seed in range(100):
        view = augment(photo, seed).astype(float)
        width = (view[:, -1, 0].mean() - view[:, 0, 0].mean()) / 255
        height = (view[-1, :, 1].mean() - view[0, :, 1].mean()) / 255
        shares.append(width * height)
    assert min(shares) > 0.2
    assert max(shares) < 0.4
    assert 0.27 < np.mean(shares) < 0.33


def test_the_whole_image_stays_itself(photo):
    square = photo.resize((64, 64))
    view = train_augment(64, scale=(1.0, 1.0), horizontal_flip=False)
    # The aspect ratio varies, so that only a fall-back of the crop shows the whole; the mean colour must hold anyway.
    means = np.mean([view(square, seed).mean(axis=(0, 1)) for seed in range(20)], axis=0)
    assert means == pytest.approx(np.asarray(square).mean(axis=(0, 1)), abs=12)


def test_shrinking_averages_instead_of_picking_pixels():
    noise = np.random.default_rng(0).integers(0, 2, (512, 512, 1), dtype=np.uint8).repeat(3, axis=2) * 255
    view = train_augment(32, scale=(0.9, 1.0))(Image.fromarray(noise), 0)
    assert np.abs(view.astype(float) - 127.5).max() < 60


def test_the_spec_tells_pipelines_apart():
    specs = {
        train_augment(32).spec,
        train_augment(48).spec,
        train_augment(32, scale=(0.5, 1.0)).spec,
        train_augment(32, horizontal_flip=False).spec,
    }
    assert len(specs) == 4
    assert train_augment(32).spec == train_augment(32).spec


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 1.5), (0.8, 0.2)])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ConfigError, match="scale is two shares of the area"):
        train_augment(32, scale=scale)


def test_wrong_sizes_seeds_and_modes_are_refused(photo):
    with pytest.raises(ConfigError, match="at least 1 pixel, got 0"):
        train_augment(0)
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        train_augment(8)(photo, -1)
    with pytest.raises(ConfigError, match="RGB image, got mode L"):
        train_augment(8)(photo.convert("L"), 0)


def test_an_unknown_argument_of_albumentations_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a user's program may do: the error must come all the same
        with pytest.raises(ConfigError, match=r"RandomResizedCrop.*'hieght' are not valid"):
            build_strictly(albumentations.RandomResizedCrop, size=(8, 8), hieght=8)
        with pytest.raises(ConfigError, match="RandomResizedCrop"):
            build_strictly(albumentations.RandomResizedCrop, size=8)
