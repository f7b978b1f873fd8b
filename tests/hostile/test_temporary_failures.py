# SPDX-License-Identifier: Apache-2.0
"""What fails today and may work tomorrow is never kept as a property of an image, a shard or a job."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import pytest
import torch
from zoo.making import run, tree

import adaptclip as ac
from adaptclip.bench.jobs import Job, JobStore
from adaptclip.bench.runner import Progress, run_jobs
from adaptclip.errors import StorageError

LAYOUT = {f"{part}/{name}": 3 for part in ("train", "test") for name in ("cat", "dog")}

FAILURES: dict[str, BaseException] = {
    "not allowed": PermissionError(errno.EACCES, "Permission denied"),
    "a network file system's hiccup": OSError(errno.ESTALE, "Stale file handle"),
    "a disk's": OSError(errno.EIO, "Input/output error"),
    "too many open files": OSError(errno.EMFILE, "Too many open files"),
    "no memory": MemoryError(),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tiny_backbone):
    """All that these tests import late: a user without rights may not read where Python lies."""
    run(["card", "check", str(tree(tmp_path_factory.mktemp("first") / "photos", LAYOUT))])
    digits = ac.open_data(ac.load_card("digits"), check=False).validation.select(range(2))
    ac.FeatureCache(tmp_path_factory.mktemp("cache")).get(tiny_backbone, digits)
    return digits


def check(folder: Path, capsys) -> tuple[int, str]:
    code = run(["card", "check", str(folder)])
    info = capsys.readouterr()
    return code, info.out + info.err


def test_a_file_that_may_be_read_again_is_read_again(imported, as_somebody, monkeypatch, capsys):
    """Really without permission: as another user where the tests run as root."""
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(as_somebody / "cache"))
    photos = tree(as_somebody / "photos", LAYOUT)
    image = photos / "train" / "cat" / "1.png"
    image.chmod(0o000)
    with pytest.raises(PermissionError):
        image.read_bytes()
    for _ in range(2):
        code, said = check(photos, capsys)
        assert code == 1
        assert "Permission denied" in said
        assert "1.png" in said
    image.chmod(0o644)
    code, said = check(photos, capsys)
    assert (code, "no problem found" in said) == (0, True), said


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_that_leaves_the_file_as_it_is_is_forgotten(tmp_path, monkeypatch, capsys, failure):
    """Size and times of the file stay the same, so that nothing but the failure could have been kept."""
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))
    photos = tree(tmp_path / "photos", LAYOUT)
    image, read, failed = photos / "test" / "dog" / "2.png", Path.read_bytes, []

    def read_or_fail(self: Path) -> bytes:
        if self.name == image.name and self.parent.name == "dog" and self.parent.parent.name == "test":
            failed.append(self)
            raise FAILURES[failure]
        return read(self)

    before = image.stat()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_or_fail)
        for _ in range(2):
            code, said = check(photos, capsys)
            assert code == 1, said
            assert "2.png" in said
            assert "Traceback" not in said
        assert len(failed) >= 2, "it was tried each time"
    after = image.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (
        before.st_mtime_ns, before.st_ctime_ns, before.st_size,
    )  # fmt: skip
    code, said = check(photos, capsys)
    assert (code, "no problem found" in said) == (0, True), said


def test_features_that_cannot_be_read_for_now_are_kept(imported, as_somebody, tiny_backbone):
    digits = imported
    cache = ac.FeatureCache(as_somebody / "cache")
    expected = cache.get(tiny_backbone, digits).values
    (shard,) = (as_somebody / "cache").glob("*/*.safetensors")
    content = shard.read_bytes()
    shard.chmod(0o000)
    shard.parent.chmod(0o555)  # and no better one can be put in its place
    with (
        pytest.warns(UserWarning, match=r"cannot be read .*Permission denied.*encoded again"),
        pytest.raises(StorageError, match="Permission denied"),
    ):
        cache.get(tiny_backbone, digits)
    shard.parent.chmod(0o755)
    with pytest.warns(UserWarning, match=r"cannot be read .*Permission denied.*encoded again"):
        assert torch.equal(cache.get(tiny_backbone, digits.select(range(1))).values, expected[:, :1])
    assert shard.exists()
    shard.chmod(0o644)
    assert shard.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.get(tiny_backbone, digits).values, expected)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_job_that_failed_is_tried_again_in_the_next_launch(tmp_path, failure):
    job, tried = Job("card", "gda", {}, 1, 1, "key"), []

    def work(of: Job) -> dict:
        tried.append(of.key)
        if len(tried) == 1:
            error = FAILURES[failure]
            assert isinstance(error, Exception)
            raise error
        return {"job": {"card": "card", "method": "gda", "shots": 1, "seed": 1}, "judged": {}, "total_s": 1.0}

    for launch, settled in (("one", None), ("one", None), ("two", {})):
        board = JobStore(tmp_path, launch)
        run_jobs([job], work, board, Progress([job], board, metric="accuracy", processes=1, show=False), wait=True)
        assert (board.result("key") is None) == (settled is None)
    assert tried == ["key", "key"]
    assert not (tmp_path / "key.failed.json").exists()
