# SPDX-License-Identifier: Apache-2.0
"""The specimens end to end: the planted gap is found, its absence too, and words are probed, with the starter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from recipe_files import ROOT, load_recipe

import adaptclip as ac
from adaptclip.cli.probe import probe
from adaptclip.cli.report import report as report_command
from adaptclip.errors import ArtifactError, CardError, DataError
from adaptclip.predictions import Predictions
from adaptclip.seals import write_sealed

recipe = load_recipe("linear_probe")
EFFECT, SPECIES_PER_GENUS = 0.4, 5
KINDS = {"faults": ["a blank page", "a faded drawing"], "praise": ["a beautiful shell"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("specimens")


def run(folder: Path, effect: float, name: str) -> Path:
    """A run on half as many specimens as the card has, with another planted effect and words to probe with."""
    text = (ROOT / "data_cards" / "specimens.md").read_text(encoding="utf-8")
    options = f"options: {{site_effect: {effect}, seed: 0, per_species: 40}}"
    assert "options: {site_effect: 0.4, seed: 0, per_species: 80}" in text
    text = text.replace("options: {site_effect: 0.4, seed: 0, per_species: 80}", options)
    card = folder / f"{name}.md"
    card.write_text(text.replace("  gates:\n", f"  probes: {json.dumps(KINDS)}\n  gates:\n", 1), encoding="utf-8")
    AcceleratorState._reset_state(reset_partial_state=True)
    cfg = recipe.Config(card=str(card), C=1.0, shots=16, gates="report", cache=folder / "cache", out=folder / name)
    assert recipe.main(cfg) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return cfg.out


@pytest.fixture(scope="module")
def planted(folder) -> Path:
    return run(folder, EFFECT, "planted")


def rows_of(out: Path, attribute: str) -> dict:
    table = json.loads((out / "report.json").read_text())["groups"][attribute]
    return {row["group"]: row for row in table["rows"]} | {"gap": table["gap"]}


def test_the_planted_gap_is_recovered_within_its_interval(planted):
    site = rows_of(planted, "site")
    # By construction 40 % of the field station's images tell no more than the genus: one of five species by luck.
    museum = site["museum"]["accuracy"]["model"]["value"]
    expected = -EFFECT * (museum - 1 / SPECIES_PER_GENUS)
    found = site["field station"]["against_rest"]
    assert found["low"] < expected < found["high"]
    assert expected < -0.2
    assert found["high"] < 0
    assert found["differs"]
    assert site["gap"]["p_value"] < 0.001
    assert site["gap"]["worst_group"] == "field station"
    # And from the images: those without marks are at chance within the genus, the others as good as the museum's.
    marks = rows_of(planted, "marks")
    erased = marks["erased"]["accuracy"]["model"]
    assert erased["low"] < 1 / SPECIES_PER_GENUS < erased["high"]
    p = Predictions.load(planted / "predictions.parquet")
    right, where, erased_at = (np.array(x) for x in (p.pred == p.labels, p.groups["site"], p.groups["marks"]))
    by_hand = right[where == "field station"].mean() - right[where == "museum"].mean()
    assert found["difference"] == pytest.approx(by_hand)
    assert (erased_at[where == "field station"] == "erased").mean() == pytest.approx(EFFECT)
    verdicts = {v["title"]: v for v in json.loads((planted / "report.json").read_text())["verdicts"]}
    assert verdicts["accuracy of every site ≥ 0.75"]["group"] == "field station"
    assert verdicts["accuracy of every site ≥ 0.75"]["verdict"] != "pass"
    page = (planted / "report.html").read_text()
    assert "Accuracy differs by site more than chance explains" in page
    assert "lowest for field station" in page


def test_without_a_planted_effect_none_is_found(folder):
    site = rows_of(run(folder, 0.0, "none"), "site")
    found = site["field station"]["against_rest"]
    assert found["low"] < 0 < found["high"]
    assert not found["differs"]
    assert site["gap"]["p_value"] > 0.05


def test_words_are_probed_before_and_after(planted, folder, capsys):
    card = str(folder / "planted.md")
    options: dict[str, Any] = {"card": card, "cache": folder / "cache", "out": planted / "probe.json", "top_k": 50}
    with pytest.raises(ArtifactError, match="failed 1 of 4 gates"):
        probe(planted, **options)
    assert probe(planted, **options, allow_failed_gates=True) == 0
    assert "images given an extra word instead of a class" in capsys.readouterr().out
    found = json.loads((planted / "probe.json").read_text())
    assert (found["num_images"], found["kinds"], found["card"]) == (400, KINDS, "planted")
    # Zero-shot rates by hand, with open_clip alone on the images themselves.
    model = ac.load(planted, allow_failed_gates=True)
    data = ac.open_data(ac.load_card(card), check=False)
    words = [word for of_kind in KINDS.values() for word in of_kind]
    backbone = model.backbone
    with torch.no_grad():
        text = []
        for name in (*data.prompt_names, *words):
            tokens = backbone.tokenizer([t.format(name) for t in data.card.templates])
            each = torch.nn.functional.normalize(backbone.model.encode_text(tokens), dim=-1)
            text.append(torch.nn.functional.normalize(each.mean(dim=0), dim=-1))
        features = ac.FeatureCache(folder / "cache").get(backbone, data.test).values[0]
        answers = (features @ torch.stack(text).T).argmax(dim=1).numpy()
    fault = (answers >= 25) & (answers < 27)
    overall = {row["kind"]: row for row in found["association"]["overall"]}
    assert overall["faults"]["zero_shot"]["value"] == pytest.approx(fault.mean())
    assert overall["praise"]["zero_shot"]["value"] == pytest.approx((answers == 27).mean())
    assert overall["faults"]["change"]["value"] == pytest.approx(
        overall["faults"]["model"]["value"] - overall["faults"]["zero_shot"]["value"]
    )
    site = np.array(data.test.groups["site"])
    rows = {row["group"]: row for row in found["association"]["groups"]["site"]["faults"]["rows"]}
    for name, row in rows.items():
        assert row["zero_shot"]["value"] == pytest.approx(fault[site == name].mean())
    assert len(rows) == 2
    for rankings in found["retrieval"].values():
        assert all(row["p_value"] <= row["p_holm"] <= 1 for row in rankings)
        assert all(row["k"] == 50 for row in rankings)


def test_the_report_of_the_run_shows_the_probe_of_its_own_model(planted, folder, tmp_path, capsys):
    if not (planted / "probe.json").is_file():
        options: dict[str, Any] = {
            "card": str(folder / "planted.md"),
            "cache": folder / "cache",
            "out": planted / "probe.json",
        }
        probe(planted, **options, allow_failed_gates=True)
    assert report_command(planted, out=tmp_path / "r") == 0
    for suffix in (".md", ".html"):
        text = (tmp_path / "r").with_suffix(suffix).read_text()
        assert "Text probe" in text
        assert "a faded drawing" in text
    other = json.loads((planted / "probe.json").read_text()) | {"model": "of another"}
    kept = (planted / "probe.json").read_bytes()
    write_sealed(planted / "probe.json", other)
    report_command(planted, out=tmp_path / "again.md")
    (planted / "probe.json").write_bytes(kept)
    text = (tmp_path / "again.md").read_text()
    assert "## Text probe" not in text
    assert "is of another model or version and is left out" in text
    capsys.readouterr()


def test_wrong_words_are_named(planted, folder, tmp_path):
    card, words = folder / "planted.md", tmp_path / "words.yaml"
    options: dict[str, Any] = {"card": str(card), "cache": folder / "cache", "words": words, "allow_failed_gates": True}
    for text, message in (
        ("faults: scratch\n", "'faults' should be a list of words"),
        ("faults: []\n", "'faults' should be a list of words"),
        ("faults: [1]\n", "'faults' should be a list of words"),
        ("{}\n", "at least one word"),
        ("faults: [a, a]\n", "asked for once, and is no class; got 'a' again"),
        ("faults: [Carabellus cinctus]\n", "got 'Carabellus cinctus' again"),
    ):
        words.write_text(text)
        with pytest.raises(DataError, match=message):
            probe(planted, **options)
    words.write_text("faults: [a blank page]\n")
    with pytest.raises(DataError, match="knows other classes than the card digits"):
        probe(planted, **{**options, "card": "digits"})
    bare = tmp_path / "bare.md"
    bare.write_text(card.read_text().replace(f"  probes: {json.dumps(KINDS)}\n", ""))
    with pytest.raises(CardError, match="names no words to probe with"):
        probe(planted, **{**options, "card": str(bare), "words": None})
