# SPDX-License-Identifier: Apache-2.0
"""The names of images' files go from the source to predictions, reports and indexes, whatever the source is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_clip import make_tiny_backbone

from adaptclip.data.card import load_card
from adaptclip.data.dataset import DomainData
from adaptclip.data.sources import open_data
from adaptclip.features import FeatureCache
from adaptclip.methods import ZeroShotClassifier
from adaptclip.methods.predicting import predict
from adaptclip.predictions import Predictions
from adaptclip.reports.fine_grained import example_names, fine_grained_report
from adaptclip.retrieval import build_index, open_index

NAMES = {"train": [f"{name}/é {i}.png" for name in ("cat", "dog") for i in range(3)],
         "test": [f"{name}/t{i}.png" for name in ("cat", "dog") for i in range(4)]}  # fmt: skip
SPLITS = "  splits: {train: train, test: test}\n"
BLOCKS = {
    "folder": "  source: {kind: image_folder, path: images}\n" + SPLITS,
    "table": "  source: {kind: manifest, files: table.csv}\n  splits: {column: split, train: train, test: test}\n"
    "  columns: {image: path, cluster: patient id}\n",
    "parquet": "  source: {kind: parquet, files: {train: train.parquet, test: test.parquet}}\n" + SPLITS,
    "parquet without names": "  source: {kind: parquet, files: {train: train-.parquet, test: test-.parquet}}\n"
    + SPLITS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    draws, lines = np.random.default_rng(0), ["path,label,split,patient id"]
    for part, names in NAMES.items():
        contents = []
        for i, name in enumerate(names):
            path = folder / "images" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
            contents.append(path.read_bytes())
            lines.append(f"images/{part}/{name},{name[:3]},{part},{part}{i // 2}")
        labels = [name[:3] for name in names]
        for ending, paths in (("", names), ("-", [None] * len(names))):
            cells = pa.array(
                [{"bytes": b, "path": p} for b, p in zip(contents, paths, strict=True)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            )
            pq.write_table(pa.table({"image": cells, "label": labels}), folder / f"{part}{ending}.parquet")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind, block in BLOCKS.items():
        (folder / f"{kind}.md").write_text(f"---\nadaptclip:\n{block}---\n", encoding="utf-8")
    return folder


def opened(folder: Path, kind: str) -> DomainData:
    return open_data(load_card(folder / f"{kind}.md"))


@pytest.mark.parametrize(
    ("kind", "before"), [("folder", "test/"), ("table", "images/test/"), ("parquet", "")], ids=lambda value: str(value)
)
def test_files_are_named_from_the_source_to_what_is_written(folder, tmp_path, kind, before):
    data = opened(folder, kind)
    wanted = [before + name for name in NAMES["test"]]
    assert sorted(data.test.names) == sorted(wanted)
    assert data.train.select([1]).names == (data.train.names[1],)
    tower = make_tiny_backbone()
    features = FeatureCache(None).get(tower, data.test)
    found = predict(ZeroShotClassifier(tower, data.class_names), features, data.test)
    found.save(tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").column("file").to_pylist() == list(data.test.names)
    again = Predictions.load(tmp_path / "p.parquet")
    assert (again.files, again.groups, again.ids) == (found.files, {}, data.test.ids)
    assert again.cluster_name == ("patient id" if kind == "table" else "")
    shown = example_names(fine_grained_report(again, draws=100))
    assert shown
    assert set(shown.values()) <= set(wanted)
    build_index(
        tmp_path / "index", tower, {"backbone": "tiny", "digest": tower.digest}, [data.test], cache=FeatureCache(None)
    )
    assert open_index(tmp_path / "index").names == list(data.test.names)


def test_the_digest_of_the_data_does_not_hang_on_names(folder):
    """The same images in a folder and in Parquet are the same data; a run can be compared with one on either."""
    first, second = opened(folder, "parquet"), opened(folder, "parquet without names")
    assert first.digest == second.digest
    assert first.test.ids == second.test.ids
    assert second.test.files is None
    assert second.test.names == second.test.ids


def test_a_file_of_predictions_may_name_the_files(tmp_path):
    rows = [f"{i},site {i % 2}/scan {i}.png,cat,0.7,0.3" for i in range(6)]
    (tmp_path / "p.csv").write_text("id,file,label,prob_cat,prob_dog\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = Predictions.load(tmp_path / "p.csv")
    assert found.files == tuple(f"site {i % 2}/scan {i}.png" for i in range(6)) == found.names
    assert found.groups == {}
