# SPDX-License-Identifier: Apache-2.0
"""An index finds what its model finds, is written whole, and is not read with other weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_artifacts import changed, edit_manifest, leaves, save, write_checkpoint

from adaptclip.artifact import load
from adaptclip.cli import main
from adaptclip.clip import load_backbone
from adaptclip.data.card import load_card
from adaptclip.data.sources import open_data
from adaptclip.errors import AdaptclipError, ConfigError, DataError, StorageError
from adaptclip.features import FeatureCache
from adaptclip.files import digest, write_json, write_tensors
from adaptclip.retrieval import build_index, card_as_images, encode_texts, files_as_images, load_encoder, open_index
from adaptclip.seals import SEAL, describe_files, write_sealed


@pytest.fixture(scope="module")
def digits():
    return open_data(load_card("digits"), check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "vit", "vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, digits) -> Path:
    """A folder with 30 images in two folders, one of them twice."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(30):
        path = root / ("a" if i % 2 else "b") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        digits.test.image(i if i != 29 else 7).save(path)
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def test_images_are_found_by_words_and_by_images(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "index"
    source = ("--backbone", f"local-dir:{checkpoint}", "--cache", tmp_path / "cache")
    assert run("embed", pictures, "--out", out, *source) == 0
    assert "30 images" in capsys.readouterr().out
    backbone = load_backbone(f"local-dir:{checkpoint}")
    paths = sorted(pictures.rglob("*.png"))
    images, _ = files_as_images(paths)
    with torch.no_grad():
        vectors = torch.cat([backbone.encode_image(backbone.transform(images.image(i))[None]) for i in range(30)])
        text = backbone.encode_text(backbone.tokenize(["a seven"]))
    assert run("search", out, "a seven", "--top-k", "5", "--format", "jsonl") == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = (vectors @ text[0]).numpy()
    order = np.argsort(-scores, kind="stable")[:5]
    assert [h["image"] for h in hits] == [str(paths[i]) for i in order]
    np.testing.assert_allclose([h["score"] for h in hits], scores[order], atol=1e-5)
    # An image finds itself and its copy before all others.
    assert run("search", out, pictures / "a" / "07.png", "--top-k", "3", "--format", "csv") == 0
    rows = capsys.readouterr().out.splitlines()
    assert {row.split(",")[0] for row in rows[1:3]} == {str(pictures / "a" / f"{n}.png") for n in ("07", "29")}
    assert all(float(row.split(",")[1]) == pytest.approx(1, abs=1e-5) for row in rows[1:3])
    assert run("search", out, "a seven") == 0
    assert "score" in capsys.readouterr().out


def test_adapted_towers_make_other_vectors(checkpoint, digits, tmp_path, capsys):
    backbone = load_backbone(f"local-dir:{checkpoint}")
    save(tmp_path / "lora", "lora", backbone, digits)
    arguments = ("--part", "validation", "--cache", tmp_path / "cache")
    assert run("embed", "digits", "--model", tmp_path / "lora", "--out", tmp_path / "adapted", *arguments) == 0
    assert run("embed", "digits", "--backbone", f"local-dir:{checkpoint}", "--out", tmp_path / "plain", *arguments) == 0
    adapted, plain = open_index(tmp_path / "adapted"), open_index(tmp_path / "plain")
    assert adapted.names == plain.names == list(digits.validation.ids)
    encoder = load(tmp_path / "lora").adapter.encoder
    expected = FeatureCache(None).get(encoder, digits.validation).values[0]
    torch.testing.assert_close(adapted.vectors, expected, atol=1e-6, rtol=0)
    assert (adapted.vectors - plain.vectors).abs().max() > 1e-3
    # Neither is searched with the other's towers.
    queries, _ = encode_texts(encoder, ["three"])
    assert len(adapted.search(encoder, queries, k=4)[0]) == 4
    with pytest.raises(DataError, match="was made with the weights"):
        plain.search(encoder, queries)
    capsys.readouterr()
    assert run("search", tmp_path / "adapted", "three", "--backbone", f"local-dir:{checkpoint}") == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_it_goes_on_where_it_was_and_leaves_nothing_half_written(checkpoint, digits, tmp_path, monkeypatch):
    backbone, named = load_encoder(None, f"local-dir:{checkpoint}")
    images = digits.validation.select(range(40))
    seen: list[int] = []
    original = backbone.encode_image

    def counted(pixels):
        if sum(seen) >= 24:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr("adaptclip.features.SHARD_ROWS", 8)
    monkeypatch.setattr(backbone, "encode_image", counted)
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "index", backbone, named, [images], cache=cache, batch_size=8)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert sum(seen) == 24
    monkeypatch.setattr(backbone, "encode_image", lambda pixels: seen.append(len(pixels)) or original(pixels))
    assert build_index(tmp_path / "index", backbone, named, [images], cache=cache, batch_size=8) == 40
    assert sum(seen) == len(set(images.contents)) == 40
    with pytest.raises(StorageError, match="exists already"):
        build_index(tmp_path / "index", backbone, named, [images], cache=cache)


def test_an_index_is_mapped_and_not_held(tmp_path, checkpoint):
    rows, width = 60_000, 512  # 123 MB
    write_tensors(tmp_path / "i" / "vectors.safetensors", {"vectors": torch.ones(rows, width)})
    write_json(tmp_path / "i" / "names.json", [str(i) for i in range(rows)])
    manifest = {"format_version": 2, "model": {"digest": "x"}, "transform": {}, "count": rows, "width": width}
    files = describe_files(tmp_path / "i", ["vectors.safetensors", "names.json"])
    write_sealed(tmp_path / "i" / "manifest.json", manifest | {"files": files})

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    index = open_index(tmp_path / "i")
    assert resident() - before < 40e6
    assert float(index.vectors[::1000].sum()) == 60 * width


def unseal(folder: Path, **changes: object) -> dict[str, object]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: value for key, value in {**manifest, **changes}.items() if key != SEAL}


def make_early(folder: Path, **changes: object) -> None:
    """Rewrites an index as the first format had it: a digest of the names alone."""
    names = json.loads((folder / "names.json").read_text())
    early = unseal(folder, format_version=1, names_digest=digest(names), **changes)
    write_json(folder / "manifest.json", {key: value for key, value in early.items() if key != "files"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is not an index"),
        (lambda f: (f / "manifest.json").write_text("[]"), "something else's"),
        (lambda f: edit_manifest(f, format_version=9), "has format 9"),
        (lambda f: edit_manifest(f, format_version="9"), "lacks format_version"),
        (lambda f: edit_manifest(f, width=3), "expected float32"),
        (lambda f: edit_manifest(f, model={}), "lacks the digest of its model"),
        (lambda f: edit_manifest(f, window=[1]), "window in manifest.json should be two numbers"),
        (lambda f: edit_manifest(f, files={}), "should tell bytes and sha256 of vectors.safetensors"),
        (lambda f: write_json(f / "manifest.json", unseal(f)), "has no digest of itself"),
        (lambda f: write_json(f / "manifest.json", unseal(f, format_version=1)), "lacks names_digest"),
        (lambda f: (f / "names.json").write_text('["a"]'), "names.json is missing or changed"),
        (lambda f: (f / "names.json").unlink(), "names.json is missing or changed"),
        (lambda f: (f / "vectors.safetensors").unlink(), "vectors.safetensors is missing or changed"),
        (lambda f: ((f / "names.json").unlink(), os.mkfifo(f / "names.json")), "a device, pipe or socket"),
        (lambda f: ((f / "names.json").unlink(), (f / "names.json").symlink_to("/etc/hostname")), "leaves the folder"),
        (lambda f: os.truncate(f / "vectors.safetensors", 2**40), "is missing or changed: it has 1,099"),
        (lambda f: (f / "vectors.safetensors").write_bytes(b"\x80\x04cos\nsystem\n"), "is damaged"),
    ],
)
def test_a_damaged_index_is_said(checkpoint, digits, tmp_path, change, message):
    backbone, named = load_encoder(None, f"local-dir:{checkpoint}")
    build_index(tmp_path / "i", backbone, named, [digits.test.select(range(12))], cache=FeatureCache(None))
    assert len(open_index(tmp_path / "i")) == 12
    change(tmp_path / "i")
    with pytest.raises(DataError, match=message):
        open_index(tmp_path / "i")


@pytest.fixture(scope="module")
def small(tmp_path_factory, checkpoint, digits) -> Path:
    folder = tmp_path_factory.mktemp("small") / "i"
    backbone, named = load_encoder(None, f"local-dir:{checkpoint}")
    build_index(folder, backbone, named, [digits.test.select(range(12))], cache=FeatureCache(None))
    return folder


def test_whatever_changes_in_an_index_is_seen(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "i")
    manifest = json.loads((folder / "manifest.json").read_text())
    places = [path for path, _ in leaves(manifest)]
    assert len(places) > 15
    for path in places:
        write_json(folder / "manifest.json", changed(manifest, path))
        with pytest.raises(DataError):
            open_index(folder)
    whole = {path.name: path.read_bytes() for path in small.iterdir()}
    draw, seen = np.random.default_rng(0), 0
    for name, content in whole.items():
        for place in draw.integers(0, len(content), 30):
            damaged = bytearray(content)
            damaged[place] ^= int(draw.integers(1, 256))
            (folder / name).write_bytes(damaged)
            try:
                found = open_index(folder)
            except DataError:
                seen += 1
            else:  # white space between two values of the manifest
                assert (name, found.manifest) == ("manifest.json", manifest)
        (folder / name).write_bytes(content)
    assert seen >= 80
    assert len(open_index(folder)) == 12


def test_an_early_index_is_read_with_what_cannot_be_checked(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "i")
    make_early(folder)
    with pytest.warns(UserWarning, match="early version.*of the vectors, so whether.*cannot be checked"):
        assert torch.equal(open_index(folder).vectors, open_index(small).vectors)
    (folder / "names.json").write_text(json.dumps(["x"] * 12))
    with pytest.warns(UserWarning, match="early"), pytest.raises(DataError, match=r"names\.json was changed"):
        open_index(folder)


def test_bad_requests(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "good.png").write_bytes((pictures / "a" / "01.png").read_bytes())
    (tmp_path / "mixed" / "bad.png").write_bytes(b"not an image")
    source = ("--backbone", f"local-dir:{checkpoint}", "--cache", tmp_path / "cache", "--out", tmp_path / "i")
    assert run("embed", tmp_path / "mixed", *source) == 1
    assert "bad.png" in capsys.readouterr().err
    assert run("embed", tmp_path / "mixed", *source, "--on-bad-image", "skip") == 0
    assert "skipped" in (printed := capsys.readouterr().out)
    assert "1 images" in printed
    assert run("embed", tmp_path / "mixed", *source) == 1
    assert "exists already" in capsys.readouterr().err
    assert run("search", tmp_path / "i", "nowhere.jpg") == 1
    assert "no image nowhere.jpg" in capsys.readouterr().err
    assert run("search", tmp_path / "i", "a photo " * 40, "--format", "csv") == 0
    assert "it was cut" in capsys.readouterr().err
    assert run("search", tmp_path / "i", " ") == 1
    assert "needs words" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not both"):
        load_encoder("runs/x", "starter")
    with pytest.raises(ConfigError, match='Did you mean "test"'):
        card_as_images("digits", part="tset")
    with pytest.raises(AdaptclipError, match="no data card"):
        card_as_images("digitz")


@pytest.mark.shared_data
def test_recall_over_real_captions_is_that_of_a_plain_ranking(shared_data, tmp_path):
    parts, _ = card_as_images("flickr8k", data_root=shared_data("flickr8k"), part="test")
    images = parts[0].select(range(80))
    assert images.captions is not None
    encoder, named = load_encoder()
    build_index(tmp_path / "index", encoder, named, [images], cache=FeatureCache(None))
    index = open_index(tmp_path / "index")
    texts = [(text, name) for own, name in zip(images.captions, images.names, strict=True) for text in own]
    vectors, _ = encode_texts(encoder, [text for text, _ in texts])
    found = index.search(encoder, vectors, k=10)
    with torch.no_grad():
        pixels = torch.stack([encoder.transform(images.image(i)) for i in range(len(images))])
        plain = torch.cat([encoder.model.encode_image(p) for p in pixels.split(16)])
        tokens = encoder.tokenizer([text for text, _ in texts], context_length=encoder.context_length)
        words = encoder.model.encode_text(tokens)
    scores = torch.nn.functional.cosine_similarity(words[:, None], plain[None], dim=-1).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")
    assert len(texts) == 400
    recalls = []
    for k in (1, 5, 10):
        own = sum(name in [hit.name for hit in row[:k]] for row, (_, name) in zip(found, texts, strict=True))
        plainly = sum(name in [images.names[i] for i in row[:k]] for row, (_, name) in zip(order, texts, strict=True))
        assert own == plainly
        recalls.append(own)
    assert 0 < recalls[0] < recalls[1] < recalls[2] < 400
