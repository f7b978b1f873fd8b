# SPDX-License-Identifier: Apache-2.0
"""What version 0.1 wrote is read with a notice, and gives the answers that it gave then.

The folder `early` was written by the sources of version 0.1: an artifact and an index of the tiny checkpoint, whose
heads are of an unusual width, and the answers of that version to four images and a query.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import adaptclip as ac
from adaptclip.errors import ArtifactError, DataError
from adaptclip.retrieval import encode_texts, load_encoder, open_index

EARLY = Path(__file__).parent / "early"
EXPECTED = json.loads((EARLY / "expected.json").read_text())


@pytest.fixture(scope="module")
def digits():
    return ac.open_data(ac.load_card("digits"), check=False)


def test_an_early_artifact_answers_as_it_did(tiny, digits):
    with pytest.warns(UserWarning, match="is of an early version: its manifest has no digest of itself"):
        model = ac.load(EARLY / "artifact", backbone=tiny, allow_failed_gates=True)
    found = model.predict([digits.test.image(i) for i in range(4)])
    info = [[p.probabilities[name] for name in model.class_names] for p in found]
    assert len(info) == len(EXPECTED["probabilities"]) == 4
    for own, expected in zip(info, EXPECTED["probabilities"], strict=True):
        assert own == pytest.approx(expected, abs=1e-5)


def test_an_early_index_finds_what_it_found(tiny):
    with pytest.warns(UserWarning, match="is of an early version"):
        index = open_index(EARLY / "index")
    encoder, _ = load_encoder(None, tiny, None)
    vector, _ = encode_texts(encoder, ["the digit three"])
    hits = index.search(encoder, vector, k=6)[0]
    assert [hit.name for hit in hits] == [name for name, _ in EXPECTED["hits"]]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in EXPECTED["hits"]], abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*early version")
def test_other_weights_are_refused_all_the_same(tiny, tmp_path):
    with pytest.raises(ArtifactError, match="was trained on other weights"):
        ac.load(EARLY / "artifact", backbone="starter", allow_failed_gates=True)
    encoder, _ = load_encoder(None, "starter", None)
    with pytest.raises(DataError, match="was made with the weights"):
        open_index(EARLY / "index").check_encoder(encoder)


def test_the_early_digest_is_no_way_round_for_newer_folders(tiny, tmp_path):
    """One that says nothing of heads and pooling counts only where no better one was made."""
    backbone = ac.load_backbone(tiny)
    info = json.loads((EARLY / "artifact" / "manifest.json").read_text())["backbone"]["digest"]
    assert info != backbone.digest
    assert backbone.made(info, early=True)
    assert not backbone.made(info, early=False)
    assert backbone.made(backbone.digest, early=False)


def test_an_early_artifact_has_no_prompts_of_another(tiny, tmp_path):
    shutil.copytree(EARLY / "artifact", tmp_path / "changed")
    file = tmp_path / "changed" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["prompt_names"][0] = "naught"
    file.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="early version"), pytest.raises(ArtifactError, match="changed afterwards"):
        ac.load(tmp_path / "changed", backbone=tiny, allow_failed_gates=True)
