# SPDX-License-Identifier: Apache-2.0
"""Tables in which an image may show several classes, as ISIC, ODIR and CheXpert have them, and what is made of each."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from zoo.making import picture, put, run

from adaptclip.data.asking import Given
from adaptclip.data.card import load_card
from adaptclip.data.scaffold import new_card
from adaptclip.data.sources import open_data
from adaptclip.errors import AdaptclipError

NUMBER = 48
PICTURES = [picture(seed) for seed in range(NUMBER)]
SETS = [["cataract"], ["cataract", "glaucoma"], [], ["glaucoma"]]
"""What images 0, 1, 2, 3 show, and again 4, 5, 6, 7 and so on."""


@pytest.fixture(autouse=True, scope="module")
def _one_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def written(root: Path, header: str, row, name: str = "t.csv") -> Path:
    """The images, and a table with `row(number, what it shows)` for each."""
    for i in range(NUMBER):
        put(root, f"{i}.png", PICTURES[i])
    lines = [*([header] if header else []), *(row(i, SETS[i % 4]) for i in range(NUMBER))]
    put(root, name, "\n".join([*lines, ""]).encode())
    return root / name


def shows(root: Path, **flags) -> tuple[str, str, dict[str, list[int]]]:
    """The text of the new card, what was said, and class -> numbers of the images that show it by the opened card."""
    said: list[str] = []
    (root / "card.md").unlink(missing_ok=True)
    source = next(path for path in root.iterdir() if path.stem == "t")
    path = new_card(source, root / "card.md", given=Given(**flags), say=said.append)
    data = open_data(load_card(path))
    found: dict[str, list[int]] = {name: [] for name in data.class_names}
    for part in data.parts.values():
        for c, name in enumerate(data.class_names):
            found[name] += [int(Path(part.where(i)).stem) for i in range(len(part)) if part.shows(c)[i]]
    return path.read_text(encoding="utf-8"), "\n".join(said), {name: sorted(rows) for name, rows in found.items()}


EXPECTED = {name: [i for i in range(NUMBER) if name in SETS[i % 4]] for name in ("cataract", "glaucoma")}

FORMS = {
    "semicolons": ("image,labels", lambda i, names: f"{i}.png,{';'.join(names)}", '{"separator": ";"}'),
    "bars, and words for none": (
        "image,labels", lambda i, names: f"{i}.png,{'|'.join(names) or 'No Finding'}",
        '{"separator": "|", "none": ["No Finding"]}',
    ),
    "commas in quotes": ("image,labels", lambda i, names: f'{i}.png,"{", ".join(names)}"', '{"separator": ","}'),
    "a column for each": (
        "image,cataract,glaucoma",
        lambda i, names: f"{i}.png,{int('cataract' in names)},{int('glaucoma' in names)}.0", "{}",
    ),
    "a column for each and one for none": (
        "image,cataract,glaucoma,No Finding",
        lambda i, names: f"{i}.png,{int('cataract' in names)},{int('glaucoma' in names)},{int(not names)}", "{}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_is_recognised(tmp_path, kind):
    header, row, rule = FORMS[kind]
    written(tmp_path, header, row)
    text, said, found = shows(tmp_path)
    assert f"several_labels: {rule}\n" in text
    assert found == EXPECTED
    assert "2 classes with their images: cataract 24, glaucoma 24" in said
    assert f"images show 1.00 of 2 classes on average, 2 at most; 12 of {NUMBER} show none of them" in said
    assert run(["card", "check", str(tmp_path / "card.md")]) == 0


def test_lists_of_json_and_parquet(tmp_path):
    written(tmp_path / "a", "", lambda i, names: json.dumps({"image": f"{i}.png", "labels": names}), "t.jsonl")
    columns = {"image": [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(PICTURES)]}
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table(columns | {"labels": [SETS[i % 4] for i in range(NUMBER)]}), tmp_path / "b" / "t.parquet")
    text, said, found = shows(tmp_path / "a")
    assert "several_labels: {}\n" in text
    assert "the cells of 'labels' are lists: an image may show several" in said
    assert found == EXPECTED
    new_card(tmp_path / "b" / "t.parquet", tmp_path / "b" / "card.md")
    data = open_data(load_card(tmp_path / "b" / "card.md"))
    assert sum(int(part.shows(0).sum()) for part in data.parts.values()) == 24


def test_one_class_each_in_columns_of_0_and_1(tmp_path):
    kinds = ["MEL", "NV", "BCC"]
    written(
        tmp_path,
        "image,MEL,NV,BCC",
        lambda i, _: ",".join([str(i), *("1.0" if i % 3 == c else "0.0" for c in range(3))]),
    )
    text, said, found = shows(tmp_path)
    assert 'labels: ["MEL", "NV", "BCC"]' in text
    assert "several_labels" not in text
    assert found == {name: [i for i in range(NUMBER) if i % 3 == c] for c, name in enumerate(kinds)}
    assert "the columns MEL, NV, BCC are the classes, one of them for each image" in said


def test_what_uncertain_and_empty_cells_stand_for_is_asked(tmp_path, capsys):
    marks = ["1.0,", "-1.0,1.0", ",", "0.0,1.0"]
    source = written(tmp_path, "Path,Edema,Mass", lambda i, _: f"{i}.png,{marks[i % 4]}")
    out = tmp_path / "card.md"
    assert run(["card", "new", str(source), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert (
        "12 of 96 cells of the columns Edema, Mass are -1, which is uncertain: what does it stand for (--uncertain)"
        in error
    )
    assert "36 of 96 cells of the columns Edema, Mass are empty: what does it stand for (--blank)" in error
    assert error.rstrip().endswith(f"--out {out} --uncertain ignore --blank negative")
    text, _, found = shows(tmp_path, uncertain="ignore", blank="negative")
    assert 'several_labels: {"uncertain": "ignore", "blank": "negative"}' in text
    assert found == {
        "Edema": [i for i in range(NUMBER) if i % 4 == 0],
        "Mass": [i for i in range(NUMBER) if i % 4 in (1, 3)],
    }
    assert shows(tmp_path, uncertain="positive", blank="negative")[2]["Edema"] == [
        i for i in range(NUMBER) if i % 4 < 2
    ]


def test_findings_of_patients_in_a_second_table(tmp_path):
    written(tmp_path, "image,patient", lambda i, _: f"{i}.png,P{i // 2}")
    rows = [f"P{i},{i % 2},{int(i % 3 == 0)}" for i in range(NUMBER // 2)]
    put(tmp_path, "elsewhere/findings.csv", "\n".join(["patient,Edema,Mass", *rows]).encode())
    text, _, found = shows(tmp_path, join=(str(tmp_path / "elsewhere/findings.csv"),))
    assert 'labels: ["Edema", "Mass"]' in text
    assert found == {
        "Edema": [i for i in range(NUMBER) if i // 2 % 2],
        "Mass": [i for i in range(NUMBER) if i // 2 % 3 == 0],
    }


def test_attributes_of_0_and_1_are_no_classes_where_there_is_a_column_of_them(tmp_path):
    written(tmp_path, "image,label,smoker,implant", lambda i, _: f"{i}.png,{'ab'[i % 2]},{i % 3 % 2},{i % 5 % 2}")
    text, said, _ = shows(tmp_path)
    assert 'label: "label"' in text
    assert '#   "smoker": "smoker"' in text
    assert "a 24, b 24" in said


def test_text_that_looks_like_a_list_is_refused(tmp_path):
    written(tmp_path, "image,labels", lambda i, names: f'{i}.png,"{names}"')
    with pytest.raises(AdaptclipError, match="is a list in one cell"):
        shows(tmp_path)
