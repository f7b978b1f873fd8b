# SPDX-License-Identifier: Apache-2.0
"""What a verdict belongs to: digests of images and gates, frozen test images, the ledger of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from adaptclip.cli.gate import gate
from adaptclip.cli.report import report
from adaptclip.errors import DataError
from adaptclip.gate_rules import GateRule
from adaptclip.gates import check_gates
from adaptclip.gates.verdicts import gates_digest, images_digest, note_judgement
from adaptclip.predictions import Predictions


def predictions(n: int = 400, right: int = 390) -> Predictions:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    pred = np.where(np.arange(n) < right, labels, 1 - labels)
    sure = rng.uniform(0.6, 0.99, n)
    probs = np.where(np.eye(2)[pred] == 1, sure[:, None], 1 - sure[:, None]).astype(np.float32)
    return Predictions(tuple(map(str, range(n))), labels, probs, ("a", "b"), {"site": ("x", "y") * (n // 2)})


RULES = [GateRule(at_least=0.8), GateRule(metric="accuracy", group="site", at_least=0.7)]


@pytest.fixture
def run(tmp_path):
    """A run folder as `finish_run` leaves it, as far as judging reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    made = predictions()
    made.save(folder / "predictions.parquet")
    (folder / "gates.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.8}\n")
    judged = note_judgement(folder, "recipe coop", made, [GateRule(at_least=0.8)])
    (folder / "report.json").write_text(json.dumps({"judged": judged.to_dict()}))
    return folder


def ledger(run):
    return [json.loads(line) for line in (run / "judgements.jsonl").read_text().splitlines()]


def test_the_images_digest_is_of_ids_and_label_names_in_any_order():
    whole = predictions()
    order = np.random.default_rng(1).permutation(len(whole))
    shuffled = replace(
        whole, ids=tuple(whole.ids[i] for i in order), labels=whole.labels[order], probs=whole.probs[order], groups={}
    )
    assert images_digest(shuffled) == images_digest(whole)
    swapped = replace(whole, class_names=("b", "a"), labels=1 - whole.labels, probs=whole.probs[:, ::-1])
    assert images_digest(swapped) == images_digest(whole)  # the same classes, numbered otherwise
    flipped = whole.labels.copy()
    flipped[0] = 1
    renamed = ("other", *whole.ids[1:])
    others = [replace(whole, labels=flipped), replace(whole, ids=renamed), predictions(398)]
    assert len({images_digest(p) for p in [whole, *others]}) == 4


def test_the_gates_digest_is_of_what_decides():
    assert gates_digest(RULES) == gates_digest(RULES[::-1])
    assert gates_digest([GateRule(at_least=0.8, confidence=0.95)]) == gates_digest([GateRule(at_least=0.8)])
    gap = GateRule(group="site", gap_at_most=0.1)
    assert gates_digest([gap]) == gates_digest([gap.model_copy(update={"margin": 0.02}, deep=True)])
    other = [GateRule(at_least=0.8), GateRule(at_least=0.81), GateRule(at_least=0.8, min_n=50)]
    assert len({gates_digest([rule]) for rule in other} | {gates_digest([]), gates_digest(RULES)}) == 5


def test_a_verdict_carries_both_digests():
    made = predictions()
    for verdict in check_gates(made, None, RULES):
        assert (verdict.images, verdict.gates) == (images_digest(made), gates_digest(RULES))
        assert verdict.to_dict()["images"] == verdict.images


def test_a_run_counts_its_judgements_and_the_gates_they_were_by(run, tmp_path, capsys):
    assert gate([run]) == 0
    assert "judged 2 times in this run folder, with the same gates" in capsys.readouterr().out.replace("\n", " ")
    (tmp_path / "easier.yaml").write_text("gates:\n  - {metric: accuracy, at_least: 0.7}\n")
    assert report(run, gates=tmp_path / "easier.yaml", out=tmp_path / "page") == 0
    said = "These test images were judged 3 times in this run folder, with 2 different sets of gates."
    assert said in capsys.readouterr().out.replace("\n", " ")
    assert said in (tmp_path / "page.md").read_text().splitlines()[4]  # beside the verdict
    assert said in (tmp_path / "page.html").read_text()
    kept = json.loads((tmp_path / "page.json").read_text())
    assert (kept["judged"]["times"], kept["judged"]["gate_sets"]) == (3, 2)
    assert kept["judged"]["images"] == images_digest(predictions()) == kept["verdicts"][0]["images"]
    assert kept["judged"]["images"][:12] in (tmp_path / "page.md").read_text()
    assert [entry["command"] for entry in ledger(run)] == ["recipe coop", "gate", "report"]
    assert all(entry["when"].endswith("Z") for entry in ledger(run))


def test_a_report_without_gates_judges_nothing(run, capsys):
    (run / "gates.yaml").unlink()
    assert report(run) == 0
    assert len(ledger(run)) == 1
    assert "judged" not in capsys.readouterr().out


def test_a_damaged_line_of_the_ledger_counts_as_a_judgement(run):
    with (run / "judgements.jsonl").open("a") as file:
        file.write('{"when": "2026-\n\x00\n')
    assert note_judgement(run, "gate", predictions(), [GateRule(at_least=0.8)]).times == 4


def test_a_ledger_that_cannot_be_written_does_not_end_the_judgement(run, tmp_path, caplog):
    (run / "judgements.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (run / "judgements.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert gate([run]) == 0
    assert "is not noted" in caplog.text
    assert len((tmp_path / "elsewhere.jsonl").read_text().splitlines()) == 1


def test_other_rows_than_the_frozen_ones_are_refused_in_a_run_and_another_set_by_path(run, capsys):
    fewer = predictions(300, 300)
    fewer.save(run / "predictions.parquet")
    with pytest.raises(DataError, match=r"holds 300 rows .* not those of the 400 test images .* another set"):
        gate([run])
    with pytest.raises(DataError, match="not those of the 400 test images"):
        report(run)
    assert len(ledger(run)) == 1
    assert gate([run / "predictions.parquet"], gates=run / "gates.yaml") == 0
    assert "Another set: the file holds 300 rows" in capsys.readouterr().out.replace("\n", " ")
    predictions().save(run / "again.parquet")
    gate([run / "again.parquet"], gates=run / "gates.yaml")
    assert "Another set" not in capsys.readouterr().out


def test_a_changed_label_is_another_set(run):
    labels = predictions().labels.copy()
    labels[-1] = 1 - labels[-1]  # one mistake less
    replace(predictions(), labels=labels).save(run / "predictions.parquet")
    with pytest.raises(DataError, match="not those of the 400 test images"):
        gate([run])


def test_junit_says_what_the_verdicts_belong_to(run, tmp_path, capsys):
    assert gate([run], junit=tmp_path / "junit.xml") == 0
    found = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("property")
    assert {p.get("name"): p.get("value") for p in found} == {
        "images": images_digest(predictions()), "gates": gates_digest([GateRule(at_least=0.8)]),
    }  # fmt: skip
    capsys.readouterr()
