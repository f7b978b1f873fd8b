# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from adaptclip.errors import DataError, StorageError
from adaptclip.predictions import Predictions
from adaptclip.reports.full import build_report


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_scikit_learn_classifier_gets_the_whole_report(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 4)), np.array(["ant", "bee", "wasp"])[rng.integers(0, 3, 300)]
    x[:, 0] += 2 * (y == "bee")
    model = LogisticRegression().fit(x, y)
    probs = model.predict_proba(x)
    lines = ["id,label," + ",".join(f"prob_{name}" for name in model.classes_) + ",site,level:kind"]
    for i in range(300):
        numbers = ",".join(f"{p:.8f}" for p in probs[i])
        lines.append(f"r{i},{y[i]},{numbers},{['north', 'south', ''][i % 3]},{'ant' if y[i] == 'ant' else 'winged'}")
    found = Predictions.load(write(tmp_path / "p.csv", "\n".join(lines) + "\n"))
    assert found.class_names == ("ant", "bee", "wasp")
    assert set(found.groups["site"]) == {"north", "south", "unknown"}
    assert found.levels == {"kind": ("ant", "winged", "winged")}
    report = build_report(found)
    assert report["overall"]["accuracy"]["model"]["value"] == model.score(x, y)
    assert all(report["overall"][m]["model"]["value"] is not None for m in ("ece", "brier", "macro_auc"))
    assert [row["n"] for row in report["groups"]["site"]["rows"]] == [100, 100, 100]


def test_predicted_classes_alone_give_accuracy_and_say_what_is_missing(tmp_path):
    found = Predictions.load(write(tmp_path / "p.csv", "label,pred,site\n" + "b,b,x\na,b,x\nc,c,y\n" * 20))
    overall = build_report(found)["overall"]
    assert overall["accuracy"]["model"]["value"] == pytest.approx(2 / 3)
    for metric in ("ece", "brier", "macro_auc"):
        assert overall[metric]["model"]["value"] is None
        assert "probabilities" in overall[metric]["model"]["note"]
    assert "predicted classes only" in build_report(found)["notes_on_input"][0]


def test_a_ranking_keeps_its_order_and_survives_a_file(tmp_path):
    names = [f"k{i}" for i in range(9)]
    head = ",".join(f"top_{k},top_{k}_prob" for k in range(1, 6))
    rows = ["k8,k8,0.5,k3,0.2,k1,0.1,k0,0.1,k2,0.05", "k2,k8,0.5,k3,0.2,k1,0.1,k0,0.1,k2,0.05"]
    found = Predictions.load(write(tmp_path / "p.csv", f"label,{head}\n" + "\n".join(rows)), classes=names)
    assert (found.ranked, found.confident) == (5, True)
    assert found.probs.max(axis=1).tolist() == pytest.approx([0.5, 0.5])
    found.save(tmp_path / "p.parquet")
    again = Predictions.load(tmp_path / "p.parquet")
    assert (again.ranked, again.notes) == (5, found.notes)
    overall = build_report(again)["overall"]
    assert overall["top5_accuracy"]["model"]["value"] == 1
    assert overall["brier"]["model"]["value"] is None


def test_numbers_count_through_the_classes_and_names_win(tmp_path):
    path = write(tmp_path / "p.csv", "label,pred\n0,1\n2,2\n")
    assert Predictions.load(path, classes=["a", "b", "c"]).labels.tolist() == [0, 2]
    assert Predictions.load(path, classes=["2", "1", "0"]).labels.tolist() == [2, 0]
    own = Predictions(("a", "b"), np.array([0, 1]), np.eye(2, dtype=np.float32), ("1", "0"))
    own.save(tmp_path / "own.parquet")
    assert Predictions.load(tmp_path / "own.parquet").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lable,pred\n1,a,a\n", r"no column 'label'. Did you mean \"lable\""),
        ("id,label\n1,a\n", "says nothing about what the model answered"),
        (
            "id,label,prob_a,prob_b\nx,a,0.7,0.3\ny,a,0.9,0.3\n",
            r"1 row whose numbers are not probabilities.*'y' has 0.3 to 0.9 with the sum 1.2; logits need a softmax",
        ),
        ("label,prob_a,prob_b\na,5.5,-2\n", r"'0' has -2 to 5.5 with the sum 3.5"),
        (
            "label,prob_a,prob_b\na,70,30\nb,40,60\n",
            "2 rows whose numbers are not probabilities.*divide per cent by 100",
        ),
        ("label,prob_a,prob_b\na,0.7,0.3\na,nan,0.3\n", "1 empty cells or NaN; the first in row 2"),
        ("label,prob_a,prob_b\na,inf,0.3\n", "not finite"),
        ("label,prob_a,prob_b\na,0.5,0.5\na,,0.3\n", "'prob_a' should hold numbers, and has 1 empty cells.*row 2"),
        ("label,prob_a,prob_b\na,0.5,0.5\na,high,0.3\n", "'prob_a' should hold numbers, and has 'high' in row 2"),
        ("label,prob_a,prob_b\n", "columns and no rows"),
        ("", "Empty CSV file. It should be UTF-8 text"),
        ("label,prob_a\nx\n", "Expected 2 columns, got 1"),
        ("label,prob_ant,prob_bee\nbea,0.7,0.3\n", r"unknown class 'bea'.*Did you mean \"bee\""),
        ("label,prob_a,prob_b,pred\na,0.7,0.3,b\n", "1 of 1 rows `pred` is not the most probable"),
        ("id,label,pred\n1,a,a\n1,a,b\n", "1 repeated id, for example '1'"),
        ("id,label,pred\n,a,a\n1,a,b\n", "'id' has"),
        ("label,pred\n,a\nb,b\n", "'label' has empty cells"),
        ("label,pred\n0.5,1\n", "fractions"),
        ("label,pred,label\na,a,a\n", "two columns named 'label'"),
        ("label,pred,level:k\na,a,x\na,b,y\n", "several values for the class 'a'"),
        ("label,top_1,top_2\na,b,b\n", "twice"),
    ],
)
def test_malformed_files_say_what_is_wrong(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        Predictions.load(write(tmp_path / "p.csv", text))


def test_files_that_are_no_tables_are_refused(tmp_path):
    (tmp_path / "latin.csv").write_bytes("label,prob_a,prob_\u00e9\na,0.5,0.5\n".encode("latin-1"))
    (tmp_path / "cell.csv").write_bytes("label,pred\n\u00e9,a\n".encode("latin-1"))
    (tmp_path / "p.json").write_text("{}")
    (tmp_path / "p.parquet").write_bytes(b"nonsense" * 9)
    os.mkfifo(tmp_path / "pipe.csv")
    for name, message in (
        ("latin.csv", "latin.csv is not UTF-8 text .byte 0xe9.*Windows-1252.*CSV UTF-8"),
        ("cell.csv", "cell.csv is not UTF-8 text .byte 0xe9.*Windows-1252.*CSV UTF-8"),
        ("p.json", "allowed: .parquet, .csv, .tsv"),
        ("p.parquet", "cannot read"),
        ("none.csv", "there is no file"),
        ("pipe.csv", "a pipe or device, no file"),
    ):
        with pytest.raises((DataError, StorageError), match=message):
            Predictions.load(tmp_path / name)


PLAIN = "id,label,prob_ant,prob_bee,group:age\n007,ant,0.75,0.25,30.5\n7,bee,0.5,0.5,41\n8,bee,1,0,7.5\n"
GERMAN = PLAIN.replace(",", ";").replace(".", ",")

WRITTEN_AS: dict[str, bytes] = {
    "UTF-8 with a mark": PLAIN.encode("utf-8-sig"),
    "UTF-16": PLAIN.encode("utf-16"),
    "German Excel, CSV UTF-8": GERMAN.replace("\n", "\r\n").encode("utf-8-sig"),
    "German Excel, Unicode text": GERMAN.replace(";", "\t").replace("\n", "\r\n").encode("utf-16"),
    "Excel's line about the separator": b"sep=;\r\n" + GERMAN.replace("\n", "\r\n").encode(),
    "semicolons and points": PLAIN.replace(",", ";").encode(),
    "commas in quotes": b'id,label,prob_ant,prob_bee,group:age\n007,ant,"0,75","0,25","30,5"\n'
    b'7,bee,"0,5","0,5",41\n8,bee,1,0,"7,5"\n',
    "bars": PLAIN.replace(",", "|").encode(),
    "all in quotes": GERMAN.replace(";", '";"').replace("\n", '"\n"').removesuffix('"').join(['"', ""]).encode(),
    "blank lines first": b"\n\n" + PLAIN.encode(),
}
"""How a file is written -> the same predictions."""


@pytest.mark.parametrize("kind", WRITTEN_AS)
def test_every_way_of_writing_the_same_predictions(tmp_path, kind):
    (tmp_path / "p.csv").write_bytes(WRITTEN_AS[kind])
    found = Predictions.load(tmp_path / "p.csv")
    assert (found.ids, found.class_names, found.labels.tolist()) == (("007", "7", "8"), ("ant", "bee"), [0, 1, 1])
    assert found.probs.tolist() == [[0.75, 0.25], [0.5, 0.5], [1, 0]]
    assert found.groups["age"] in (("30.5", "41", "7.5"), ("30,5", "41", "7,5"))


def test_german_excel_in_windows_1252_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "p.csv").write_bytes(GERMAN.replace("ant", "Käfer").encode("cp1252"))
    with pytest.raises(
        DataError, match=r"p.csv is not UTF-8 text \(byte 0xe4, .*Save it as UTF-8: in Excel as `CSV UTF-8`"
    ):
        Predictions.load(tmp_path / "p.csv")
    (tmp_path / "mixed.csv").write_text("label;prob_a;prob_b\na;0,5;0.5\n")
    with pytest.raises(DataError, match=r"'prob_a' should hold numbers, and has '0,5' in row 1"):
        Predictions.load(tmp_path / "mixed.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,pred\n0,0\n1,01\n", r"the classes '01' = '1' are one number spelt in several ways; write each in one"),
        ("label,pred\n0,0\n00,1\n1,1\n", "the classes '0' = '00' are one number"),
        ("label,pred\n1,1\n1.0,0\n", r"the classes '1' = '1\.0' are one number"),
        ("label,top_1,top_2\n1,1,2\n2,02,1\n", "the classes '02' = '2' are one number"),
        ("label,prob_1,prob_2\n01,0.7,0.3\n2,0.7,0.3\n", "the classes '01' = '1' are one number"),
        ("label,pred\na,a\na ,b\nb,b\n", "the classes 'a' = 'a ' differ only in blanks around them"),
        ("label,prob_a,prob_b\na,0.7,0.3\nb ,0.7,0.3\n", "the classes 'b' = 'b ' differ only in blanks around them"),
        ("label,pred\n\u00e9,b\ne\u0301,b\n", r"the classes 'e.u0301' = '.xe9' differ only in .* the Unicode form"),
    ],
)
def test_a_class_in_two_spellings_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        Predictions.load(write(tmp_path / "p.csv", text))


def test_numbers_of_one_spelling_are_what_they_say(tmp_path):
    padded = write(tmp_path / "padded.csv", "label,prob_01,prob_02\n01,0.7,0.3\n02,0.7,0.3\n")
    assert Predictions.load(padded).labels.tolist() == [0, 1]  # and no ids that count from 0
    assert Predictions.load(write(tmp_path / "p.csv", "label,pred\n01,02\n02,02\n")).class_names == ("01", "02")
    floats = write(tmp_path / "floats.csv", "label,pred\n0.0,1\n1.0,1\n")
    assert Predictions.load(floats).labels.tolist() == [0, 1]


def test_columns_of_many_values_are_not_groups(tmp_path):
    text = "label,pred,scan,group:camera\n" + "".join(f"a,a,{i}.png,{i}\n" for i in range(30))
    found = Predictions.load(write(tmp_path / "p.csv", text), classes=["a", "b"])
    assert list(found.groups) == ["camera"]
    assert "'scan' has 30 values" in found.notes[0]


@pytest.mark.parametrize("column", ["patient", "PatientID", "patient_id", "Subject", "case no", "lesion"])
def test_a_column_of_patients_is_no_group_by_itself(tmp_path, column):
    lines = "".join(f"a,{'ab'[i % 2]},U{i // 2},C{i // 4}\n" for i in range(60))
    bare = write(tmp_path / "p.csv", f"label,pred,{column},ward\n{lines}")
    with pytest.raises(DataError, match=rf"'{column}' .* rename it `cluster` if .* `group:{column}` if it really"):
        Predictions.load(bare)
    for name, groups in (("cluster", ["ward"]), (f"group:{column}", [column, "ward"])):
        found = Predictions.load(write(tmp_path / "q.csv", f"label,pred,{name},ward\n{lines}"))
        assert list(found.groups) == groups
        assert (found.clusters is None) == (name != "cluster")
    # Clusters that hold its rows together make it harmless; such as cut it apart do not.
    wider = Predictions.load(write(tmp_path / "w.csv", f"label,pred,{column},cluster\n{lines}"))
    assert not wider.groups
    assert f"'{column}' is not taken for a group" in wider.notes[0]
    apart = "".join(f"a,{'ab'[i % 2]},U{i // 2},C{i}\n" for i in range(60))
    with pytest.raises(DataError, match=r"several clusters .*`cluster` seems too narrow"):
        Predictions.load(write(tmp_path / "n.csv", f"label,pred,{column},cluster\n{apart}"))


@pytest.mark.parametrize("column", ["patient_sex", "site", "camera", "scene", "eye", "hospital"])
def test_columns_about_patients_and_places_are_groups(tmp_path, column):
    lines = "".join(f"a,{'ab'[i % 2]},V{i % 8}\n" for i in range(60))
    assert list(Predictions.load(write(tmp_path / "p.csv", f"label,pred,{column}\n{lines}")).groups) == [column]


def test_pages_and_names_of_a_saved_file_are_checked(tmp_path):
    """One bit of a file by itself: whatever is read is what was written, or it is refused in words."""
    draw = np.random.default_rng(0)
    probs = draw.dirichlet(np.ones(3), 200).astype(np.float32)
    saved = Predictions(tuple(map(str, range(200))), np.arange(200) % 3, probs, ("ant", "bee", "wasp"))
    saved.save(tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    pages = whole[: -int.from_bytes(whole[-8:-4], "little") - 8]  # what comes before the footer
    assert len(pages) > 1000
    refused = 0
    for place in draw.integers(4, len(pages), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        (tmp_path / "p.parquet").write_bytes(damaged)
        try:
            found = Predictions.load(tmp_path / "p.parquet")
        except (StorageError, DataError):
            refused += 1
        else:  # fields of a page's header that nothing reads
            assert np.array_equal(found.probs, saved.probs)
            assert (found.ids, found.labels.tolist()) == (saved.ids, saved.labels.tolist())
    assert refused > 100
    (tmp_path / "p.parquet").write_bytes(whole.replace(b'"bee"', b'"bef"'))
    with pytest.raises(StorageError, match="what it says of its columns was changed"):
        Predictions.load(tmp_path / "p.parquet")


SEVERAL = "id,positive_crack,positive_rust,sigmoid_rust,sigmoid_crack,site\n"


def test_images_that_may_show_several_classes_need_no_label_and_no_shares(tmp_path):
    rows = "a,1,0,0.2,0.9,x\nb,,1,0.6,0.3,x\nc,0,-1,0,0,y\nd,0,0,0.1,0.2,y\n"
    found = Predictions.load(write(tmp_path / "p.csv", SEVERAL + rows))
    assert found.several
    assert found.class_names == ("crack", "rust")
    assert found.positive is not None
    assert found.known is not None
    assert found.sigmoid is not None
    assert found.positive.tolist() == [[True, False], [False, True], [False, False], [False, False]]
    assert found.known.tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert found.sigmoid[0].tolist() == pytest.approx([0.9, 0.2])
    assert found.probs[:3].tolist() == [pytest.approx([9 / 11, 2 / 11]), pytest.approx([1 / 3, 2 / 3]), [0.5, 0.5]]
    assert found.labels.tolist() == [0, 1, 0, 0]
    assert (found.groups, found.thresholds) == ({"site": ("x", "x", "y", "y")}, None)
    found.save(tmp_path / "p.parquet")
    again = Predictions.load(tmp_path / "p.parquet")
    for name in ("positive", "known", "sigmoid", "probs", "labels"):
        assert np.array_equal(getattr(again, name), getattr(found, name))


def test_yes_and_no_may_be_words_and_thresholds_stand_in_columns(tmp_path):
    head = "positive_crack;positive_rust;sigmoid_crack;sigmoid_rust;threshold_crack;threshold_rust;label\n"
    rows = "yes;True;0,9;0,2;0,3;0,5;what\nno;False;0,1;0,2;0,3;0,5;ever\n;True;0,5;0,7;0,3;0,5;\n"
    found = Predictions.load(write(tmp_path / "p.csv", head + rows))
    assert found.positive is not None
    assert found.known is not None
    assert found.thresholds is not None
    assert found.positive.tolist() == [[True, True], [False, False], [False, True]]
    assert found.known.tolist() == [[True, True], [True, True], [False, True]]
    assert found.thresholds.tolist() == pytest.approx([0.3, 0.5])
    assert not found.groups


def test_what_nobody_knows_of_a_whole_class_is_no_error(tmp_path):
    found = Predictions.load(write(tmp_path / "p.csv", SEVERAL + "a,,0,0.2,0.9,x\nb,,1,0.6,0.3,x\n"))
    assert found.known is not None
    assert not found.known[:, 0].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SEVERAL + "a,2,0,0.2,0.9,x\n", "column 'positive_crack' says whether an image shows a class.*got 2 in row 1"),
        (SEVERAL + "a,maybe,0,0.2,0.9,x\n", "got 'maybe' in row 1"),
        (SEVERAL + "a,1,0,0.2,1.9,x\n", "numbers from 0 to 1"),
        ("positive_crack,positive_rust,prob_crack,prob_rust\n1,0,0.5,0.5\n", "rename prob_crack … to sigmoid_crack"),
        ("positive_crack,positive_rust,label\n1,0,crack\n", "needs the probability of each by itself beside it"),
        ("positive_crack,positive_rust,sigmoid_crack,sigmoid_rost\n1,0,0.5,0.5\n", "2 sigmoid_… columns do not fit"),
        (SEVERAL.strip() + ",level:kind\na,1,0,0.2,0.9,x,deep\n", "level:kind' is a value of the one class"),
        (
            "positive_a,positive_b,sigmoid_a,sigmoid_b,threshold_a,threshold_b\n1,0,0.5,0.5,0.5,0.5\n1,0,0.5,0.5,0.4,0.5\n",
            "threshold_a holds several numbers",
        ),
    ],
)
def test_what_says_neither_yes_nor_no_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        Predictions.load(write(tmp_path / "p.csv", text))


def test_what_is_not_known_belongs_to_sets_of_classes():
    fields: dict[str, Any] = {
        "ids": ("a",),
        "labels": np.array([0]),
        "probs": np.array([[0.5, 0.5]]),
        "class_names": ("x", "y"),
    }
    own: dict[str, Any] = {"sigmoid": np.array([[0.5, 0.5]]), "positive": np.array([[True, False]])}
    with pytest.raises(DataError, match="belongs to sets of classes"):
        Predictions(**fields, known=np.array([[True, True]]))
    with pytest.raises(DataError, match="shows no class of which that is not known"):
        Predictions(**fields, **own, known=np.array([[False, True]]))
    with pytest.raises(DataError, match="should be"):
        Predictions(**fields, **own, known=np.array([[1, 1]]))
    assert not Predictions(**fields).several
    assert Predictions(**fields, **own).shown_counts.tolist() == [1, 0]
