# SPDX-License-Identifier: Apache-2.0
"""One reader for YAML and JSON: what grows, nests or repeats a key is refused in words, and nothing else reads them."""

from __future__ import annotations

import ast
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adaptclip import files as storage
from adaptclip.data.card import parse_card
from adaptclip.errors import CardError, GateError, StorageError
from adaptclip.files import MAX_DEPTH, parse_json, parse_yaml
from adaptclip.gates.loading import load_gates

ROOT = Path(__file__).resolve().parents[2]
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))

YAML = {
    "key twice": ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: the key 'a' is given twice \(first on line 1\)"),
    "key twice below": ("x:\n  - {b: 1, b: 2}\n", r"line 2, column 12: the key 'b' is given twice"),
    "key twice by merging": ("a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n", r"the key 'x' is given twice"),
    "two merges": ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", r"line 4, column 3: the key '<<' is given twice"),
    "two merged": ("a: &a {x: 1}\nc: &c {x: 2}\nb:\n  <<: [*a, *c]\n", r"`<<` takes one mapping"),
    "number and truth": ("1: a\ntrue: b\n", r"the key True is given twice"),
    "a list for a key": ("[a, b]: 1\n", r"a key must be text or a number, got a list"),
    "aliases without end": (ALIASES, r"more than 100,000 values by line 6, counting what its aliases"),
    "an alias of itself": ("a: &a [*a]\n", r"\*a on line 1 holds itself"),
    "an unknown alias": ("a: *b\n", r"undefined alias"),
    "deep lists": ("a: " + "[" * 5000, r"nested too deeply"),
    "deep mappings": ("a: " + "{a: " * 5000, r"nested too deeply"),
    "deep by indentation": ("".join(" " * i + "a:\n" for i in range(MAX_DEPTH + 2)), r"nested too deeply"),
    "a tag that does not fit": ("a: !!timestamp noon\n", r"not valid YAML"),
    "an empty number": ('a: !!int ""\n', r"not valid YAML"),
    "a Python object": ("a: !!python/object:os.system x\n", r"could not determine a constructor"),
    "a number without end": ("a: " + "1" * 6000, r"not valid YAML"),
    "two documents": ("a: 1\n---\na: 2\n", r"another document"),
    "nothing": ("", r"no YAML mapping.*got nothing"),
    "a list": ("- a\n", r"no YAML mapping.*`key: value` lines, got list"),
    "a tab": ("a:\n\t- b\n", r"line 2.*blanks, not tabs"),
    "control characters": ("a: \x00", r"not valid YAML"),
    "not UTF-8": ("a: é\n".encode("latin-1"), r"not UTF-8 text \(byte 0xe9 on line 1\)"),
    "UTF-16": ("a: b\n".encode("utf-16"), r"not UTF-8 text \(UTF-16\)"),
    "too long": ("a" * (storage.MAX_YAML_BYTES + 1), r"too large to be read: 4,194,305 bytes, allowed are 4,194,304"),
    "too many values": ("a: [" + "1," * 100_001 + "]", r"more than 100,000 values"),
}
JSON = {
    "key twice": ('{"a": 1,\n "b": {"c": 1,\n "c": 2}}', r"the key 'c' is given twice, on line 2 and on line 3"),
    "key twice, one escaped": ('{"a\\u0062": 1, "ab": 2}', r"the key 'ab' is given twice"),
    "a key like a brace": (
        '{"x": "\\"k\\": {", "k": 1,\n"k": 2}',
        r"the key 'k' is given twice, on line 1 and on line 2",
    ),
    "NaN": ("[NaN]", r"holds NaN, which is no JSON"),
    "infinity": ("[-Infinity]", r"holds -Infinity"),
    "a number beyond": ("[1e999]", r"holds 1e999"),
    "deep lists": ("[" * 100_000, r"nested too deeply"),
    "deep objects": ('{"a":' * 100_000, r"nested too deeply"),
    "one too deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), r"nested too deeply"),
    "half a character": ('["\\ud800"]', r"not valid JSON.*surrogates"),
    "a number without end": ("[" + "9" * 5000 + "]", r"not valid JSON"),
    "a cut text": ('{"a": ', r"not valid JSON at line 1, column"),
    "nothing": ("", r"not valid JSON at line 1, column 1"),
    "two values": ("{}\n{}", r"not valid JSON at line 2, column 1: Extra data"),
    "NUL bytes": ("{}\0\0", r"not valid JSON"),
    "not UTF-8": (b'{"a": "\xe9"}', r"not UTF-8 text \(byte 0xe9 on line 1\)"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_refused(name):
    text, message = YAML[name]
    started = time.perf_counter()
    with pytest.raises(StorageError, match=message) as refused:
        parse_yaml(text, where="c.yaml")
    assert time.perf_counter() - started < 1
    assert "c.yaml" in str(refused.value)


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_refused(name):
    text, message = JSON[name]
    started = time.perf_counter()
    with pytest.raises(StorageError, match=message) as refused:
        parse_json(text, where="c.json")
    assert time.perf_counter() - started < 1
    assert "c.json" in str(refused.value)


def test_what_is_meant_is_read():
    merged = parse_yaml("\ufeffa: &a {x: 1}\nb:\n  <<: *a\n  y: 2\nc: [*a, *a]\n2: two\n", where="c")
    assert merged == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}], 2: "two"}
    assert parse_json('\ufeff{"a": "\\ud83d\\ude00", "b": [{"a": 1}, {"a": 1}]}', where="c")["a"] == "😀"
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, where="c")
    assert parse_json("[NaN, 1e999]", where="c", nan=True)[1] == float("inf")
    assert parse_json(b"[1.5, 2]", where="c") == [1.5, 2]


def test_a_large_manifest_is_read_fast():
    names = {"class_names": [f"a class name of usual length, number {i}" for i in range(250_000)]}
    text = json.dumps(names)
    assert len(text) > 10 * 2**20
    started = time.perf_counter()
    assert parse_json(text, where="m") == names
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("read", [storage.read_json, storage.read_yaml])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "a pipe or device"), (tmp_path, "a folder"), (Path("a\0b"), "null")):
        with pytest.raises(StorageError, match=message):
            read(path)


def test_the_length_is_known_before_the_file_is_read(tmp_path):
    (tmp_path / "long.json").touch()
    os.truncate(tmp_path / "long.json", 2**40)
    with pytest.raises(StorageError, match="too large to be read"):
        storage.read_json(tmp_path / "long.json")


@pytest.mark.parametrize("metadata", [b'{"a": 1, "a": 2}', b"[", b"[]", b'{"a": NaN}', b"\xff"])
def test_metadata_of_a_table(tmp_path, metadata):
    table = pa.table({"a": [1]}).replace_schema_metadata({b"adaptclip": metadata})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(StorageError, match=r"metadata of .*t\.parquet"):
        storage.read_parquet(tmp_path / "t.parquet")


CARD = "license: mit\nadaptclip:\n  source: {kind: embedded, name: digits}\n"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            CARD + "  options:\n" + "".join(f"    {line}\n" for line in ALIASES.splitlines()),
            "counting what its aliases",
        ),
        ("adaptclip: " + "[" * 2000 + "\n", "nested too deeply"),
        (CARD + "  gates: [{metric: accuracy, at_least: 0.9}]\n  gates: []\n", r"line 6, column 3: the key 'gates'"),
        (
            CARD + "  gates:\n    - {metric: accuracy, at_least: 0.95, at_least: 0.5}\n",
            "the key 'at_least' is given twice",
        ),
        (CARD + "adaptclip: {}\n", "the key 'adaptclip' is given twice"),
    ],
)
def test_cards(head, message):
    started = time.perf_counter()
    with pytest.raises(CardError, match=message):
        parse_card(f"---\n{head}---\n", name="c")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("gates:\n  - metric: accuracy\n    at_least: 0.95\n    at_least: 0.5\n", "at_least"),
        ("gates:\n  - {metric: accuracy, at_least: 0.95}\ngates:\n  - {metric: accuracy, at_least: 0.5}\n", "gates"),
    ],
)
def test_gates(tmp_path, text, key):
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises((StorageError, GateError), match=f"the key '{key}' is given twice"):
        load_gates(tmp_path / "gates.yaml")


def test_nothing_else_parses_yaml_or_json():
    """`json.load`, `json.loads` and all of `yaml` stand in storage.py only."""
    looked_at, found = 0, set()
    for path in sorted([*(ROOT / "adaptclip").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]):
        looked_at += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="json"), attr="load" | "loads" | "JSONDecoder"):
                    found.add(path.name)
                case ast.ImportFrom(module="json", names=names) if {"load", "loads"} & {name.name for name in names}:
                    found.add(path.name)
                case ast.Import(names=names) if any(name.name.split(".")[0] == "yaml" for name in names):
                    found.add(path.name)
                case ast.ImportFrom(module="yaml") | ast.Name(id="ModelCard" | "DatasetCard" | "metadata_load"):
                    found.add(path.name)  # the hub's readers parse a card's head themselves
    assert looked_at >= 160, f"only {looked_at} modules were looked at"
    assert found == {"files.py"}
