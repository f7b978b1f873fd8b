# SPDX-License-Identifier: Apache-2.0
"""Archives, shards and addresses as sources: read where they lie, safe with hostile ones, and what is said of each."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from zoo.making import picture, put

from adaptclip.data import archives, remote
from adaptclip.data.card import parse_card
from adaptclip.data.shards import expanded
from adaptclip.data.sources import open_data, read_rows
from adaptclip.errors import DataError, ResourceError

NAMES = [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("cat", "dog") for i in range(2)]
PNG = {name: picture(number) for number, name in enumerate(NAMES)}


def card(block: str, folder: Path) -> Any:
    return parse_card(f"---\nadaptclip:\n{block}\n---\n", name="c", path=folder / "c.md")


def rows(block: str, folder: Path) -> Any:
    return read_rows(card(block, folder), None)


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w", *more: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for info in more:
            file.addfile(info)
    return buffer.getvalue()


ARCHIVES = {
    "a.zip": zipped(PNG), "stored.zip": zipped(PNG, zipfile.ZIP_STORED), "UPPER.ZIP": zipped(PNG),
    "a.tar": tarred(PNG), "a.tar.gz": tarred(PNG, "w:gz"), "a.tgz": tarred(PNG, "w:gz"),
    "a.tar.bz2": tarred(PNG, "w:bz2"), "a.tar.xz": tarred(PNG, "w:xz"),
    "wrapped.zip": zipped({f"photos/{name}": content for name, content in PNG.items()}),
    "named otherwise.tar": zipped(PNG),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_folder_of_classes_in_an_archive(tmp_path, name):
    (tmp_path / name).write_bytes(ARCHIVES[name])
    data = open_data(card(f"  source: {{kind: image_folder, path: {name}}}", tmp_path))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (4, 4)
    assert {data.train.read(i) for i in range(4)} == {PNG[name] for name in PNG if name.startswith("train")}
    assert data.train.where(0).startswith(str(tmp_path.resolve() / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing is unpacked beside it


def test_a_part_of_an_archive_and_its_change(tmp_path):
    block = "  source: {kind: image_folder, path: a.zip/train}\n  splits: {fractions: {train: 0.5, test: 0.5}}"
    (tmp_path / "a.zip").write_bytes(ARCHIVES["a.zip"])
    first = rows(block, tmp_path)
    assert len(first) == 4
    (tmp_path / "a.zip").write_bytes(zipped({**PNG, "train/cat/9.png": picture(99)}))
    second = rows(block, tmp_path)
    assert len(second) == 5
    assert not set(first.stamps) & set(second.stamps)


def test_a_table_names_files_in_archives(tmp_path):
    (tmp_path / "a.zip").write_bytes(ARCHIVES["a.zip"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.tar").write_bytes(ARCHIVES["a.tar"])
    put(tmp_path, "t.csv", b"image,label,split\na.zip/train/cat/0.png,cat,train\nsub/b.tar/test/dog/1.png,dog,test\n")
    found = rows(
        "  source: {kind: manifest, files: t.csv}\n  splits: {column: split, train: train, test: test}", tmp_path
    )
    assert [found.store.read(i) for i in range(2)] == [PNG["train/cat/0.png"], PNG["test/dog/1.png"]]
    put(tmp_path, "t.csv", b"image,label,split\na.zip/train/cat/nothing.png,cat,train\n")
    found = rows(
        "  source: {kind: manifest, files: t.csv}\n  splits: {column: split, train: train, test: test}", tmp_path
    )
    with pytest.raises(DataError, match="No such file"):
        found.store.read(0)
    for wrong in ("b.tar/../../x.png", "../a.zip/train/cat/0.png"):
        put(tmp_path / "sub", "t.csv", f"image,label\n{wrong},cat\n".encode())
        with pytest.raises(DataError, match=r"leaves|leads out"):
            rows("  source: {kind: manifest, files: sub/t.csv}", tmp_path)


def linked(name: str, to: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, to
    return info


def encrypted() -> bytes:
    content = bytearray(zipped(PNG))
    for sign, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.find(sign)
        content[start + at] |= 1
    return bytes(content)


def zip_link() -> bytes:
    buffer = io.BytesIO(zipped(PNG))
    with zipfile.ZipFile(buffer, "a") as file:
        info = zipfile.ZipInfo("train/cat/link.png")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def other_method() -> bytes:
    buffer = io.BytesIO(zipped(PNG))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("train/cat/x.png", picture(3), zipfile.ZIP_LZMA)
    return buffer.getvalue()


OUT = {"../../evil.png": b"x", "/root.png": b"x", "C:\\x.png": b"x"}
LINKS = (linked("train/cat/l.png", "/etc/passwd"), linked("train/dog/h.png", "../../x"))
LEFT_OUT = {
    "names that lead out.zip": (zipped({**PNG, **OUT}), "3 left out, names that lead out"),
    "names that lead out.tar": (tarred({**PNG, "../evil.png": b"x"}), "1 left out, names that lead out"),
    "links.tar": (tarred(PNG, "w", *LINKS), "2 left out, links and devices"),
    "link.zip": (zip_link(), "1 left out, links and devices"),
    "encrypted.zip": (encrypted(), "1 left out, encrypted"),
    "another method.zip": (other_method(), "1 left out, packed by a method that is not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_said(tmp_path, name):
    content, said = LEFT_OUT[name]
    (tmp_path / name).write_bytes(content)
    found = rows(f"  source: {{kind: image_folder, path: {name}}}", tmp_path)
    assert len(found) == (7 if "encrypted" in name else 8)
    assert any(said in sentence for sentence in found.passed_over)
    assert not (tmp_path.parent / "evil.png").exists()


def damaged_member() -> bytes:
    content = bytearray(zipped(PNG, zipfile.ZIP_STORED))
    at = content.find(PNG["train/cat/0.png"])
    content[at + 100] ^= 255
    return bytes(content)


def lying_size() -> bytes:
    """A member that says it has 10 bytes and unpacks to more."""
    content = bytearray(zipped({**PNG, "train/cat/0.png": bytes(5000)}))
    for sign, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = content.find(sign)
        content[start + at : start + at + 4] = (10).to_bytes(4, "little")
    return bytes(content)


HOSTILE = {
    "cut off.zip": (ARCHIVES["a.zip"][:900], "damaged or cut off"),
    "cut off.tar": (ARCHIVES["a.tar"][:5000], r"damaged or cut off|not those that the archive lists"),
    "cut off.tar.gz": (ARCHIVES["a.tar.gz"][:500], "damaged or cut off"),
    "no archive.zip": (b"<html>not found</html>", "no ZIP or TAR archive"),
    "empty.zip": (b"", "no ZIP or TAR archive"),
    "damaged file.zip": (damaged_member(), "not those that the archive lists"),
    "lying size.zip": (lying_size(), "not those that the archive lists"),
    "bomb.zip": (zipped({**PNG, "train/cat/b.png": bytes(70_000_000)}), r"unpacks from [\d,]+ to 70,000,000 bytes"),
    "bomb.tar.gz": (tarred({**PNG, "x/y.bin": bytes(3_000_000)}, "w:gz"), "unpacks to more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(tmp_path, name, monkeypatch):
    content, message = HOSTILE[name]
    if name == "bomb.tar.gz":
        monkeypatch.setattr(archives, "FREE_RATIO", 0)
        monkeypatch.setattr(archives, "MAX_RATIO", 20)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(card(f"  source: {{kind: image_folder, path: {name}}}", tmp_path))


def shard(start: int, count: int, ending: str = "png") -> bytes:
    files: dict[str, bytes] = {}
    for i in range(start, start + count):
        files[f"{i:04d}.{ending}"] = picture(i)
        files[f"{i:04d}.cls"] = str(i % 2).encode()
        files[f"{i:04d}.txt"] = f"picture {i}".encode()
        files[f"{i:04d}.json"] = json.dumps({"site": "ab"[i % 2], "age": 30 + i, "more": {"x": 1}}).encode()
    return tarred(files)


SHARDS = (
    '  source: {kind: webdataset, files: {train: "s/a-{00..01}.tar", test: "s/b-*.tar"}}\n'
    "  columns: {label: cls, groups: {site: site}}\n  class_names: [even, odd]"
)


def test_webdataset_shards(tmp_path):
    for name, start in (("a-00", 0), ("a-01", 4), ("b-00", 8)):
        put(tmp_path, f"s/{name}.tar", shard(start, 4))
    data = open_data(card(SHARDS, tmp_path))
    assert (len(data.train), len(data.test)) == (8, 4)
    assert list(data.train.labels) == [0, 1] * 4
    assert data.train.groups["site"] == ("a", "b") * 4
    assert [data.train.read(i) for i in range(8)] == [picture(i) for i in range(8)]
    assert set(data.unused_columns) == {"txt", "age", "__key__"}
    captions = SHARDS.replace("label: cls", "captions: txt").replace("\n  class_names: [even, odd]", "")
    assert list(open_data(card(captions, tmp_path)).train.captions or ())[2] == ("picture 2",)


WRONG_SHARDS = {
    "no image": ({"0.cls": b"1"}, "the row '0' has no image; it holds cls"),
    "two images": ({"0.jpg": b"x", "0.png": b"x", "0.cls": b"1"}, r"several images \(jpg, png\): name one by"),
    "no label": ({"0.png": b"x"}, "the row '0' has no column 'cls'"),
    "a label that is no text": ({"0.png": b"x", "0.cls": b"\xff\xfe\xfd"}, r"0\.cls: .*utf-8"),
    "damaged JSON": ({"0.png": b"x", "0.cls": b"1", "0.json": b"{"}, r"0\.json"),
    "a label of megabytes": ({"0.png": b"x", "0.cls": bytes(2**21)}, "should hold a short text"),
}


@pytest.mark.parametrize("kind", WRONG_SHARDS)
def test_wrong_shards(tmp_path, kind):
    files, message = WRONG_SHARDS[kind]
    put(tmp_path, "s/a-00.tar", tarred(files))
    with pytest.raises(DataError, match=message):
        rows('  source: {kind: webdataset, files: "s/a-{00..00}.tar"}\n  columns: {label: cls}', tmp_path)


def test_ranges_of_shards():
    assert expanded("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert expanded("{0..1}-{0..1}") == ["0-0", "0-1", "1-0", "1-1"]
    for wrong in ("{3..1}", "{0..999999999}"):
        with pytest.raises(DataError, match="should rise"):
            expanded(wrong)


@pytest.fixture
def online(monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("ADAPTCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "is_offline", lambda: False)
    monkeypatch.setitem(remote.EXTRAS, "memory", ("fsspec", "remote"))
    remote._about.cache_clear()
    remote._folder_at.cache_clear()
    yield fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()
    remote._about.cache_clear()


TABLE = "  source: {kind: manifest, files: t.csv}\n  splits: {column: split, train: train, test: test}"


def test_a_folder_at_an_address(online, tmp_path):
    for name, content in PNG.items():
        online.pipe(f"/bucket/photos/{name}", content)
    data = open_data(card("  source: {kind: image_folder, path: 'memory://bucket/photos/'}", tmp_path))
    assert (len(data.train), len(data.test)) == (4, 4)
    assert data.train.read(0) in PNG.values()
    assert data.train.where(0).startswith("memory://bucket/photos/train/cat/0.png")
    # Without the bucket, from the copies.
    online.store.clear()
    assert data.train.read(0) in PNG.values()


def test_an_archive_and_shards_at_an_address(online, tmp_path):
    online.pipe("/bucket/a.zip", ARCHIVES["a.zip"])
    assert len(rows("  source: {kind: image_folder, path: 'memory://bucket/a.zip'}", tmp_path)) == 8
    online.pipe("/bucket/s-0.tar", shard(0, 3))
    block = "  source: {kind: webdataset, files: 'memory://bucket/s-{0..0}.tar'}\n  columns: {label: cls}"
    assert len(rows(block, tmp_path)) == 3


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server on this machine that counts what is asked of it."""

    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *args: object) -> None:
        self.asked.append(self.requestline)


def test_addresses_of_the_web(online, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    (tmp_path / "www").mkdir()
    for i in range(2):
        (tmp_path / "www" / f"{i}.png").write_bytes(picture(i))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    put(tmp_path, "t.csv", f"image,label,split\n{base}/0.png?key=SECRET,cat,train\n{base}/1.png,dog,test\n".encode())
    try:
        found = rows(TABLE, tmp_path)
        assert [found.store.read(i) for i in range(2)] == [picture(0), picture(1)]
        assert found.store.where(0) == f"{base}/0.png"  # without what may be a key
        asked = len(Quiet.asked)
        assert [found.store.read(i) for i in range(2)] == [picture(0), picture(1)]
        assert len(Quiet.asked) == asked  # from the copies
        # Another file by now: another stamp, and fetched again.
        (tmp_path / "www" / "0.png").write_bytes(picture(7))
        remote._about.cache_clear()
        again = rows(TABLE, tmp_path)
        assert again.stamps[0] != found.stamps[0]
        assert again.stamps[1] == found.stamps[1]
        assert again.store.read(0) == picture(7)
        monkeypatch.setattr(remote, "MAX_BYTES", 100)
        (tmp_path / "www" / "1.png").write_bytes(picture(8))
        remote._about.cache_clear()
        with pytest.raises(DataError, match=r"1\.png has .* bytes, more than 100"):
            rows(TABLE, tmp_path).store.read(1)
        put(tmp_path, "t.csv", f"image,label,split\n{base}/none.png,cat,train\n".encode())
        with pytest.raises(DataError, match=r"nothing at .*none\.png"):
            rows(TABLE, tmp_path).store.read(0)
        with pytest.raises(DataError, match="does not list its files"):
            rows(f"  source: {{kind: image_folder, path: '{base}/photos/'}}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    remote._about.cache_clear()
    # The server is gone: what has no copy cannot be had now; offline, the copies do.
    put(tmp_path, "t.csv", f"image,label,split\n{base}/0.png?key=SECRET,cat,train\n".encode())
    with pytest.raises(ResourceError, match=r"0\.png cannot be reached now") as caught:
        rows(TABLE, tmp_path)
    assert "SECRET" not in str(caught.value)
    monkeypatch.setattr(remote, "is_offline", lambda: True)
    assert rows(TABLE, tmp_path).store.read(0) == picture(7)
    put(tmp_path, "t.csv", f"image,label,split\n{base}/9.png,cat,train\n".encode())
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE=1 forbids"):
        rows(TABLE, tmp_path)


def test_a_damaged_copy_is_fetched_again(online, tmp_path):
    online.pipe("/bucket/a.png", picture(1))
    copy = remote.local_copy("memory://bucket/a.png")
    copy.write_bytes(b"half")
    assert remote.local_copy("memory://bucket/a.png").read_bytes() == picture(1)


ADDRESSES = {
    "file:///etc/passwd": "addresses of file:// are not read",
    "ftp://host/a.png": "addresses of ftp:// are not read",
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_other_addresses_are_refused(tmp_path, url):
    put(tmp_path, "t.csv", f"image,label,split\n{url},cat,train\n".encode())
    with pytest.raises(DataError, match=r"t\.csv, line 2: the column 'image': " + ADDRESSES[url]):
        rows(TABLE, tmp_path)


def test_without_fsspec_the_command_is_said(online, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ResourceError, match=r"an address of s3:// needs s3fs.*`pip install 'adaptclip\[s3\]'`"):
        remote.local_copy("s3://bucket/a.png")
