# SPDX-License-Identifier: Apache-2.0
"""Files of a stranger's folder are the folder's own, and a digest sees what changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from made_artifacts import changed, leaves

from adaptclip.errors import StorageError
from adaptclip.files import digest
from adaptclip.seals import (
    SEAL,
    check_bundle,
    check_entries,
    check_file,
    check_run,
    check_seal,
    describe_files,
    own_file,
    seal,
    sha256_of,
    write_sealed,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "own" / "sub").mkdir(parents=True)
    (tmp_path / "own" / "file").write_bytes(b"abc")
    (tmp_path / "own" / "sub" / "deep").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "own"


def test_a_file_of_the_folder_is_found(folder, tmp_path):
    assert own_file(folder, "file") == folder / "file"
    assert own_file(folder, "sub/deep") == folder / "sub" / "deep"
    (folder / "again").symlink_to("sub/deep")
    assert own_file(folder, "again") == folder / "again"
    (tmp_path / "link").symlink_to(folder)  # the folder itself was named by whoever reads it
    assert own_file(tmp_path / "link", "file").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret", "/etc/hostname", "sub/../../secret", "./file", "sub//deep", "a\\b", "a\0b"]
)
def test_a_name_that_leaves_or_is_none_is_refused(folder, name):
    with pytest.raises(StorageError, match="which is not one in this folder"):
        own_file(folder, name)


def link(target: str):
    return lambda path: path.symlink_to(target)


STRANGE = {
    "a file outside": (link("../secret"), "is a link that leaves the folder"),
    "an absolute link": (link("/etc/hostname"), "is a link that leaves the folder"),
    "nothing outside": (link("../nothing"), "is a link that leaves the folder"),
    "a folder outside": (link(".."), "is a link that leaves the folder"),
    "a device that never ends": (link("/dev/zero"), "is a link that leaves the folder"),
    "nothing": (link("nothing"), "there is no such file"),
    "itself": (link("strange"), "cannot read|there is no such file"),
    "the folder itself": (link("."), "is a folder, not a file"),
    "a folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "a pipe that nobody fills": (os.mkfifo, "is a device, pipe or socket, not a file"),
    "a hole of a terabyte": (lambda path: (path.touch(), os.truncate(path, 2**40 + 1)), "bytes, more than"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_of_the_folder_is_refused_by_name_and_not_waited_for(folder, kind):
    make, message = STRANGE[kind]
    make(folder / "strange")
    with pytest.raises(StorageError, match=rf"strange.*{message}|{message}"):
        own_file(folder, "strange")
    if kind not in ("a folder", "the folder itself"):
        with pytest.raises(StorageError, match="strange"):
            check_entries(folder)


def test_a_link_below_a_folder_that_is_a_link_leaves_too(folder, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_bytes(b"key")
    (folder / "inner").symlink_to(tmp_path / "private")
    with pytest.raises(StorageError, match="a link that leaves the folder"):
        own_file(folder, "inner/key")
    with pytest.raises(StorageError, match="inner is a link that leaves the folder"):
        check_entries(folder)


def test_the_cache_of_the_hub_links_to_its_blobs_and_to_nothing_else(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"x")
    (snapshot / "file").symlink_to("../../blobs/abc")
    assert own_file(snapshot, "file").read_bytes() == b"x"
    (tmp_path / "refs").write_bytes(b"x")
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(StorageError, match="leaves the folder"):
        own_file(snapshot, "other")
    # Blobs that are themselves a link are somebody's files, not the cache's.
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "abc").write_bytes(b"key")
    (blobs / "abc").unlink()
    blobs.rmdir()
    blobs.symlink_to(tmp_path / "private")
    with pytest.raises(StorageError, match="leaves the folder"):
        own_file(snapshot, "file")


def test_a_seal_sees_every_change_and_survives_a_file(tmp_path):
    value = {"a": [1, 2.5, None, True, "é\ud800"], "b": {"c": (), "d": float("nan"), "e": {}}, "f": 1e-300}
    sealed = seal(value)
    written = json.loads(json.dumps(sealed))
    assert check_seal(written, "w") is True
    for path, _ in leaves(written):
        with pytest.raises(StorageError, match="w was changed after it was written"):
            check_seal(changed(written, path), "w")
    assert check_seal({key: inner for key, inner in written.items() if key != SEAL}, "w") is False
    assert seal(sealed) == sealed
    assert check_seal(dict(reversed(written.items())), "w") is True


def test_digests_of_files_are_those_that_everybody_computes(folder):
    info = describe_files(folder)
    assert set(info) == {"file", "sub/deep"}
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, "abc"
    assert info["file"] == {"bytes": 3, "sha256": known}
    assert sha256_of(folder / "file", start=(3).to_bytes(8, "big")) == digest(b"abc")
    assert check_file(folder, "file", info["file"]) == folder / "file"
    for content in (b"abd", b"ab", b""):
        (folder / "file").write_bytes(content)
        with pytest.raises(StorageError, match="file is missing or changed"):
            check_file(folder, "file", info["file"])
    for wrong in (None, "ab", {}, {"bytes": "3", "sha256": known}, {"bytes": 3}):
        with pytest.raises(StorageError, match="should tell bytes and sha256 of file"):
            check_file(folder, "file", wrong)


def test_a_bundle_may_have_digests(folder):
    check_bundle(folder)  # those of others have none
    write_sealed(folder / "check.json", {"files": {**describe_files(folder), "README.md": {"bytes": 1, "sha256": ""}}})
    check_bundle(folder)
    (folder / "sub" / "deep").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"sub/deep is missing or changed"):
        check_bundle(folder)


def test_a_run_knows_its_files(folder):
    with pytest.warns(UserWarning, match="keeps no digests of its files.*cannot be checked"):
        check_run(folder, ["file", "none"])
    write_sealed(folder / "report.json", {"files": describe_files(folder, ["file"])})
    check_run(folder, ["file", "none"])
    with pytest.raises(StorageError, match=r"sub/deep is none of the files that this run wrote"):
        check_run(folder, ["sub/deep"])
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({"files": report["files"]}))
    with pytest.raises(StorageError, match="it has no digest of itself"):
        check_run(folder, ["file"])
    (folder / "report.json").write_text(json.dumps({**report, "files": {}}))
    with pytest.raises(StorageError, match="was changed after it was written"):
        check_run(folder, ["file"])
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "file").unlink()
    with pytest.raises(
        StorageError, match=r"file is missing.*Finish the run again \(its recipe with --resume, or with"
    ):
        check_run(folder, ["file"])
