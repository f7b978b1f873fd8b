# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import os
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from adaptclip.data.fingerprints import (
    DHASH_RADIUS,
    PHASH_RADIUS,
    Fingerprint,
    cache_root,
    content_digests,
    file_stamp,
    fingerprint_of,
    fingerprints,
    similar_pairs,
)
from adaptclip.errors import DataError
from adaptclip.files import read_parquet, write_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_the_cache_folder_can_be_moved(cache, monkeypatch):
    assert cache_root() == cache
    monkeypatch.delenv("ADAPTCLIP_CACHE")
    assert cache_root().parts[-2:] == (".cache", "adaptclip")


@pytest.mark.parametrize("size", [(96, 72), (900, 640)])
def test_altered_copies_are_found_and_other_pictures_are_not(size):
    originals = [photo(seed, size) for seed in range(8)]
    copies = [
        jpeg(originals[0], 50),
        originals[1].resize((size[0] // 2, size[1] // 2), Image.Resampling.BICUBIC),
        ImageEnhance.Brightness(originals[2]).enhance(1.1),
        originals[3].convert("L").convert("RGB"),
    ]
    found = similar_pairs([fingerprint_of(i) for i in originals], [fingerprint_of(i) for i in copies])
    assert sorted(found) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_flat_pictures_match_nothing():
    flat = [Image.new("RGB", (64, 64), c) for c in ("white", "white", "black", (200, 201, 199))]
    faint = Image.fromarray(np.random.default_rng(0).integers(120, 126, (64, 64), dtype=np.uint8))
    found = [fingerprint_of(image) for image in [*flat, faint, faint]]
    assert all(picture.flat for picture in found)
    assert list(similar_pairs(found)) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.booleans()), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(0, 63), max_size=8), min_size=1, max_size=8),
)
def test_pairs_are_those_of_a_plain_double_loop(words, flips):
    first = [Fingerprint(p, d, flat) for p, d, flat in words]
    second = []
    for i, bits in enumerate(flips):
        p, d, _ = words[i % len(words)]
        for bit in bits:
            p, d = p ^ (1 << bit), d ^ (1 << (bit // 2))
        second.append(Fingerprint(p, d))

    def near(a: Fingerprint, b: Fingerprint) -> bool:
        close = (a.phash ^ b.phash).bit_count() <= PHASH_RADIUS and (a.dhash ^ b.dhash).bit_count() <= DHASH_RADIUS
        return close and not a.flat and not b.flat

    expected = {(i, j) for (i, a), (j, b) in product(enumerate(first), enumerate(second)) if near(a, b)}
    assert set(similar_pairs(first, second)) == expected
    both = first + second
    expected = {(i, j) for (i, a), (j, b) in product(enumerate(both), enumerate(both)) if i < j and near(a, b)}
    assert set(similar_pairs(both)) == expected


def test_nothing_is_read_or_decoded_twice():
    images = [png(photo(0)), png(photo(1)), png(photo(0))]
    calls = []

    def read(row: int) -> bytes:
        calls.append(row)
        return images[row]

    def run():
        contents = content_digests(read, ["a", "b", "c"], store="s")
        return contents, fingerprints(read, contents, where=str, window=None, store="s")

    first = run()
    assert first[0][0] == first[0][2] != first[0][1]
    assert len(calls) == 3 + 2  # the third image is the first
    calls.clear()
    assert run() == first
    assert calls == []


def test_a_changed_stamp_is_read_again():
    content_digests(lambda row: b"old", ["1"], store="s")
    assert content_digests(lambda row: b"new", ["1"], store="s") == content_digests(lambda r: b"old", ["1"], store="x")
    assert content_digests(lambda row: b"new", ["2"], store="s") != content_digests(lambda r: b"old", ["1"], store="x")


def test_a_damaged_cache_is_computed_again(cache, caplog):
    expected = content_digests(lambda row: b"x", ["1"], store="s")
    (path,) = (cache / "fingerprints").iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert content_digests(lambda row: b"x", ["1"], store="s") == expected
    assert "damaged and are computed again" in caplog.text


def test_kept_digests_that_were_changed_are_computed_again(cache, caplog):
    """Whole as a file, and wrong: nothing but a digest of all rows can tell."""
    expected = content_digests(lambda row: b"xy"[row : row + 1], ["1", "2"], store="s")
    (path,) = (cache / "fingerprints").iterdir()
    table, info = read_parquet(path)
    write_parquet(path, table.set_column(1, "value", table["value"].take([1, 0])), info)
    assert content_digests(lambda row: b"xy"[row : row + 1], ["1", "2"], store="s") == expected
    assert "damaged and are computed again" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_only_a_warning(cache, caplog):
    cache.mkdir()
    cache.chmod(0o500)
    assert len(content_digests(lambda row: b"x", ["1"], store="s")) == 1
    assert "not kept for the next run" in caplog.text


def test_a_cache_that_is_no_folder_is_only_a_warning(cache, caplog):
    cache.write_text("a file")
    assert len(content_digests(lambda row: b"x", ["1"], store="s")) == 1
    assert "not kept for the next run" in caplog.text


def test_problems_name_their_own_row_even_when_kept():
    def read(row: int) -> bytes:
        if row == 2:
            raise DataError("cannot read gone.png: No such file")
        return b""

    contents = content_digests(read, ["a", "b", "c"], store="s")
    assert contents[0] == contents[1] != contents[2]
    for _ in range(2):
        found = fingerprints(read, contents, where=lambda row: f"row {row}", window=None, store="s")
        assert found[1].problem.startswith("row 1: the image is empty")
        assert found[2].problem == "row 2: cannot read gone.png: No such file"
        assert not found[0].comparable


def test_an_interrupted_pass_keeps_what_it_has(cache):
    def read(row: int) -> bytes:
        if row == 300:
            raise KeyboardInterrupt
        return str(row).encode()

    stamps = [str(i) for i in range(400)]
    with pytest.raises(KeyboardInterrupt):
        content_digests(read, stamps, store="s")
    calls = []
    content_digests(lambda row: calls.append(row) or b"", stamps, store="s")
    assert min(calls) == 300


def test_a_stamp_follows_the_file(tmp_path):
    path = tmp_path / "a"
    missing = file_stamp(path)
    path.write_bytes(b"1")
    first = file_stamp(path)
    os.utime(path, ns=(1, 1))
    assert len({missing, first, file_stamp(path)}) == 3
