# SPDX-License-Identifier: Apache-2.0
"""What strangers named reaches a terminal readable, and a spreadsheet as text; line lengths depend on no terminal."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from adaptclip import terminal
from adaptclip.entrypoint import run_and_exit
from adaptclip.errors import DataError, shown
from adaptclip.prediction_files import read_predictions
from adaptclip.terminal import console, encodable, json_line, plain_cell, safe_cell, say

HARMFUL = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "a\rpass": r"a\rpass",
    "a\x00b\x07": r"a\x00b\x07",
    "two\nlines": r"two\nlines",
    "csi\x9b31m": r"csi\x9b31m",
    "gpj.‮exe": r"gpj.\u202eexe",
    "⁦isolated⁩": r"\u2066isolated\u2069",
    "zero​width": r"zero\u200bwidth",
    "tag\U000e0041": r"tag\U000e0041",
    "caf\udce9.png": r"caf\xe9.png",  # a Latin-1 byte in a file name
}
HARMLESS = ["Größe 3 µm", "naïve 犬 🐕", "[red]class[/red]", "100 %", ":smile:", ""]


@pytest.mark.parametrize(("text", "escaped"), HARMFUL.items())
def test_harmful_characters_become_escapes_everywhere(text, escaped, capsys):
    assert shown(text) == escaped
    say(text)
    table = Table("name")
    table.add_row(text)
    console().print(table)
    console().print(Text(f"as Text {text}"))
    console().print(f"a line with {text}")
    logging.getLogger("a").warning("about %s", text)
    out = capsys.readouterr().out
    assert out.startswith(escaped + "\n")
    assert all(shown(line) == line for line in out.split("\n"))
    assert out.count(escaped) >= 3  # of Text, rich itself leaves some characters out
    assert json.loads(json_line({text: text})) == {text: text}
    assert shown(json_line({text: text})) == json_line({text: text})


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_left_alone(text, capsys):
    assert shown(text) == text
    table = Table("name")
    table.add_row(text)
    console().print(table)
    assert text in capsys.readouterr().out
    assert json_line(text) == json.dumps(text, ensure_ascii=False)


def test_errors_and_warnings_of_a_command_are_shown(capsys):
    def fail() -> int:
        sys.stderr.write(warnings.formatwarning("about \x1b[2J", UserWarning, "a.py", 1, "x"))
        logging.getLogger("somewhere").warning("left out %s", "a\nerror: b\x1b[2J")
        raise DataError("cannot read x\x1b[31m.png\nerror: all gates passed\n  - a point\n‮")

    before, formatter = warnings.formatwarning, logging.lastResort and logging.lastResort.formatter
    try:
        with pytest.raises(SystemExit) as stop:
            run_and_exit(fail)
    finally:
        warnings.formatwarning = before
        if logging.lastResort is not None:
            logging.lastResort.setFormatter(formatter)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "\x1b" not in err
    # What is no line of ours cannot look like one.
    assert err.endswith("\nerror: cannot read x\\x1b[31m.png\n  error: all gates passed\n  - a point\n  \\u202e\n")


def test_a_warning_is_one_sentence_without_its_place_in_the_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    terminal.guard_messages()
    said = warnings.formatwarning(UserWarning("2 gates are inconclusive"), UserWarning, "a.py", 7, "warn(x)")  # type: ignore[arg-type]
    assert said == "warning: 2 gates are inconclusive\n"
    assert "a.py:7: FutureWarning: b" in warnings.formatwarning("b", FutureWarning, "a.py", 7)


def test_what_the_system_says_of_a_name_is_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_and_exit(lambda: len((tmp_path / ("x" * 300)).read_bytes()))
    assert stop.value.code == 1
    assert "error: cannot use " in (err := capsys.readouterr().err)
    assert "x: File name too long" in err
    with pytest.raises(BrokenPipeError):  # of no file by name: nothing a user gave
        run_and_exit(lambda: exec("raise BrokenPipeError(32, 'Broken pipe')"))


def test_markup_in_names_is_text(capsys):
    table = Table("class")
    table.add_row("[red]warbler[/red]")
    console().print(table)
    console().print("[bold]x[/bold] :dog:")
    out = capsys.readouterr().out
    assert "[red]warbler[/red]" in out
    assert "[bold]x[/bold] :dog:" in out


@pytest.mark.parametrize(("columns", "width"), [("20", 20), ("80", 80), ("300", 300), ("", 120), ("wide", 120)])
def test_where_no_terminal_is_tables_have_a_width_and_sentences_stay_whole(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    name, title = "".join(chr(97 + i % 26) for i in range(500)), "a title of a table that is longer than its columns"
    made = terminal.table("name", "value", title=title)
    made.add_row(name, "1")
    console().print(Group(made, Text("word " * 200)))
    lines = [line.rstrip() for line in capsys.readouterr().out.split("\n")]
    assert lines[0] == title
    assert ("word " * 200).rstrip() in lines
    cells = [line for line in lines if line.startswith("│")]
    assert {len(line) for line in cells} == {width}
    assert "".join(line.split("│")[1].strip() for line in cells) == name


def test_a_narrow_table_does_not_wrap_its_title(monkeypatch, capsys):
    made = terminal.table("a", title="per cent of images with an interval")
    made.add_row("1")
    console().print(made)
    out = capsys.readouterr().out.splitlines()
    assert out[0].rstrip() == "per cent of images with an interval"
    assert made.title  # printed again, it has its title again


def test_an_encoding_that_lacks_letters_ends_nothing():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    say("Größe 犬", to=stream)
    table = Table("name")
    table.add_row("é")
    console(stream).print(table)
    shown = stream.buffer.getvalue().decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    assert shown.startswith("Gr\\xf6\\xdfe \\u72ac\n")
    assert "\\xe9" in shown
    assert encodable("é", stream) == "\\xe9"


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("＝1", "'＝1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("a=b", "a=b"),
        ("'quoted", "'quoted"),
        ("'=1", "''=1"),
        ("", ""),
        (-0.5, -0.5),
        (None, None),
    ],
)
def test_a_spreadsheet_runs_no_cell(cell, written):
    assert safe_cell(cell) == written
    assert plain_cell(written) == cell


@given(st.text(alphabet="'=+-@\t\ra1.", max_size=6))
def test_cells_come_back_exactly(text):
    assert plain_cell(safe_cell(text)) == text
    assert safe_cell(text)[:1] not in tuple("=@\t\r") or not text


def test_labels_from_our_own_tables_are_those_of_the_classes(tmp_path):
    rows = [["label", "pred", "site"], *(["=x", "=x", "-1"], ["@y", "=x", "+a"])]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([safe_cell(cell) for cell in row] for row in rows)
    found = read_predictions(tmp_path / "p.csv")
    assert found["class_names"] == ("=x", "@y")
    assert found["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("columns", [30, 60, 200])
def test_a_long_name_in_a_table_goes_on_in_the_next_line(columns):
    names = [f"exports/clinic-{'long' * 12}/IMG_2024_{i:05d}.jpg" for i in range(3)]
    made, stream = terminal.table("image", "top 1"), io.StringIO()
    for name in names:
        made.add_row(name, "cat 97.0%")
    Console(file=stream, width=columns).print(made)
    assert "…" not in stream.getvalue()
    first = [line.split("│")[1].strip() for line in stream.getvalue().splitlines() if line.count("│") == 3]
    assert "".join(first) == "".join(names)


def test_no_table_of_the_package_cuts_its_cells():
    """Those of rich do; `table` makes columns that do not, and reports make theirs so."""
    root, looked_at = Path(__file__).resolve().parents[2] / "adaptclip", 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.table":
                assert path.name in ("terminal.py", "render.py"), f"{path} should make its table by terminal.table"
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_column":
                looked_at += 1
                assert "overflow='fold'" in ast.unparse(node), f"{path}:{node.lineno}"
    assert looked_at >= 1
