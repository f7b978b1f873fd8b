# SPDX-License-Identifier: Apache-2.0
"""Files are whole or absent; digests cannot run into each other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptclip import files as storage
from adaptclip import outputs
from adaptclip.errors import StorageError


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_digests_of_different_pieces_differ(a, b):
    assert (storage.digest(a) == storage.digest(b)) == (a == b)


def test_a_digest_is_of_pieces_not_of_their_sum():
    assert storage.digest("ab", "c") != storage.digest("a", "bc")
    assert storage.digest(["ab", "c"]) == storage.digest("ab", "c")
    assert len(storage.digest(b"x")) == 64


WRITERS = {
    "bytes": lambda path: storage.write_bytes(path, b"new" * 1000),
    "json": lambda path: storage.write_json(path, {"new": list(range(100))}),
    "yaml": lambda path: storage.write_yaml(path, {"new": 1}),
    "tensors": lambda path: storage.write_tensors(path, {"new": torch.ones(100)}),
    "parquet": lambda path: storage.write_parquet(path, pa.table({"new": [1, 2]}), {}),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("fails_at", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, kind, fails_at):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if fails_at == "fsync" else (Path, "replace", full)))
    with pytest.raises(StorageError, match="No space left on device"):
        WRITERS[kind](path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_cannot_be_made_is_named(tmp_path, kind):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(StorageError, match="a_file"):
        WRITERS[kind](tmp_path / "a_file" / "below")


def test_json_has_no_nan_and_reads_back(tmp_path):
    value = {"a": float("nan"), "b": np.float32(0.5), "c": np.arange(3), "d": Path("x"), "e": torch.tensor(2)}
    storage.write_json(tmp_path / "v.json", value)
    assert storage.read_json(tmp_path / "v.json") == {"a": None, "b": 0.5, "c": [0, 1, 2], "d": "x", "e": 2}


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (storage.read_json, b"{"),
        (storage.read_yaml, b"a: ["),
        (storage.read_tensors, b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
        (storage.read_parquet, b"PAR1 and then nothing"),
    ],
)
def test_a_damaged_or_missing_file_is_named(tmp_path, read, content):
    path = tmp_path / "damaged"
    for prepare in (lambda: None, lambda: path.write_bytes(content)):
        prepare()
        with pytest.raises(StorageError, match="damaged"):
            read(path)


INDEX = '{"format_version": 1, "names_digest": "0", "transform": {}, "count": 0}'


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"

    def fill(*, fail: bool, overwrite: bool = False) -> None:
        with outputs.atomic_folder(target, "index", overwrite=overwrite) as folder:
            (folder / "manifest.json").write_text(INDEX)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(fail=True)
    assert list(tmp_path.iterdir()) == []
    fill(fail=False)
    (target / "names.json").write_text("2")
    with pytest.raises(StorageError, match="exists already"):
        fill(fail=False)
    with pytest.raises(KeyboardInterrupt):
        fill(fail=True, overwrite=True)
    assert sorted(p.name for p in target.iterdir()) == ["manifest.json", "names.json"]
    fill(fail=False, overwrite=True)
    assert [p.name for p in target.iterdir()] == ["manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
