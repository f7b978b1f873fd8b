# SPDX-License-Identifier: Apache-2.0
"""Seeded damage to one file: what a bad disk, a half-done copy, an editor, a stranger or a mix-up makes of it.

A mutation takes the path of a file in a throw-away copy, a generator, and the path of the same file of another run. It
changes or replaces that one file (or its entry in the folder) and nothing else. `Unfit` says that there is nothing in
this file that it could change.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Mutation = Callable[[Path, random.Random, Path], None]


class Unfit(Exception):  # noqa: N818 - no error of the project
    """The mutation has nothing to change in this file."""


# --- bytes ---


def _flip(path: Path, draw: random.Random, start: float, end: float) -> None:
    content = bytearray(path.read_bytes())
    low, high = int(len(content) * start), max(int(len(content) * end), int(len(content) * start) + 1)
    if not content:
        raise Unfit
    place = draw.randrange(low, min(high, len(content)))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_early(path: Path, draw: random.Random, other: Path) -> None:
    """One bit of the first twentieth: headers."""
    _flip(path, draw, 0, 0.05)


def flip_anywhere(path: Path, draw: random.Random, other: Path) -> None:
    """One bit."""
    _flip(path, draw, 0, 1)


def flip_late(path: Path, draw: random.Random, other: Path) -> None:
    """One bit of the last tenth: footers."""
    _flip(path, draw, 0.9, 1)


def cut(path: Path, draw: random.Random, other: Path) -> None:
    """The end is missing, from the middle of a line on."""
    content = path.read_bytes()
    if len(content) < 4:
        raise Unfit
    end = draw.randrange(len(content) // 4, len(content) - 2)
    while end > 1 and content[end - 1 : end] in (b"\n", b"\r", b"-", b" "):
        end -= 1
    path.write_bytes(content[:end])


def extend(path: Path, draw: random.Random, other: Path) -> None:
    """Bytes of something else stand at the end."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 200)))


def zero_block(path: Path, draw: random.Random, other: Path) -> None:
    """A block of the disk came back as zeros."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(max(1, len(content) - 16))
    length = min(draw.randrange(16, 513), len(content) - start)
    if not any(content[start : start + length]):
        raise Unfit
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def nul_tail(path: Path, draw: random.Random, other: Path) -> None:
    """The file has its length and its end is NUL: the machine lost its power."""
    content = path.read_bytes()
    if len(content) < 4:
        raise Unfit
    keep = draw.randrange(len(content) // 2, len(content))
    path.write_bytes(content[:keep] + bytes(len(content) - keep))


def empty(path: Path, draw: random.Random, other: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path, draw: random.Random, other: Path) -> None:
    path.unlink()


def other_run(path: Path, draw: random.Random, other: Path) -> None:
    """The whole, valid file of another run lies there."""
    if other.read_bytes() == path.read_bytes():
        raise Unfit
    shutil.copyfile(other, path)


# --- the entry in the folder ---


def directory(path: Path, draw: random.Random, other: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_secret(path: Path, draw: random.Random, other: Path) -> None:
    """A link to somebody else's file, which is no file of the project."""
    secret = path.parent.parent / "hostile-secret"
    secret.write_text("root:x:0:0:root:/root:/bin/bash\n")
    path.unlink()
    path.symlink_to(secret)


def dangling_link(path: Path, draw: random.Random, other: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_to_other(path: Path, draw: random.Random, other: Path) -> None:
    """A link to the valid file of another run."""
    path.unlink()
    path.symlink_to(other)


def link_to_itself(path: Path, draw: random.Random, other: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def fifo(path: Path, draw: random.Random, other: Path) -> None:
    """A named pipe that nobody writes to: who opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def no_permission(path: Path, draw: random.Random, other: Path) -> None:
    path.chmod(0)


# --- text ---


def bom(path: Path, draw: random.Random, other: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def crlf(path: Path, draw: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


def utf16(path: Path, draw: random.Random, other: Path) -> None:
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))


def nul_bytes(path: Path, draw: random.Random, other: Path) -> None:
    """Three NUL bytes between two characters."""
    content = path.read_bytes()
    if len(content) < 4:
        raise Unfit
    place = draw.randrange(1, len(content))
    path.write_bytes(content[:place] + bytes(3) + content[place:])


# --- JSON and YAML: structure ---


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(_yaml_of(path, text))


def _yaml_of(path: Path, text: str) -> str:
    return text.split("---\n")[1] if path.suffix == ".md" else text


def _store(path: Path, value: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    if path.suffix == ".md":
        prose = path.read_text(encoding="utf-8").split("---\n", 2)[2]
        text = f"---\n{text}---\n{prose}"
    path.write_text(text, encoding="utf-8")


def _slots(value: Any, kinds: tuple[type, ...]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value of one of the kinds, in the order of the file."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(inner, kinds) and not (isinstance(inner, bool) and bool not in kinds):
            yield value, key
        yield from _slots(inner, kinds)


def _change(path: Path, draw: random.Random, kinds: tuple[type, ...], change: Callable[[Any], Any]) -> None:
    whole = _load(path)
    found = [(box, key) for box, key in _slots(whole, kinds) if change(box[key]) != box[key]]
    if not found:
        raise Unfit
    box, key = draw.choice(found)
    box[key] = change(box[key])
    _store(path, whole)


def letter(path: Path, draw: random.Random, other: Path) -> None:
    """One letter of one text value."""
    turn = str.maketrans("abcdefghijklmnopqrstuvwxyz0123456789", "bcdefghijklmnopqrstuvwxyza1234567890")
    place = draw.random()

    def change(text: str) -> str:
        i = int(place * len(text))
        return text[:i] + text[i : i + 1].translate(turn) + text[i + 1 :]

    _change(path, draw, (str,), change)


def number(path: Path, draw: random.Random, other: Path) -> None:
    """One number, to another that might stand there."""
    _change(path, draw, (int, float), lambda v: v + 1 if isinstance(v, int) else v * 0.5)


def boolean(path: Path, draw: random.Random, other: Path) -> None:
    _change(path, draw, (bool,), lambda v: not v)


def reorder_list(path: Path, draw: random.Random, other: Path) -> None:
    _change(path, draw, (list,), lambda v: v[::-1])


def empty_list(path: Path, draw: random.Random, other: Path) -> None:
    _change(path, draw, (list,), lambda v: [])


def wrong_type(path: Path, draw: random.Random, other: Path) -> None:
    """A text, number or list stands where another kind of value belongs."""
    strange = draw.choice([["a list"], {"a": "mapping"}, 7.25, None])
    _change(path, draw, (str, int, float, list, dict), lambda v: v if type(v) is type(strange) else strange)


def drop_key(path: Path, draw: random.Random, other: Path) -> None:
    whole = _load(path)
    found = [box for box in (whole, *(b[k] for b, k in _slots(whole, (dict,)))) if isinstance(box, dict) and box]
    if not found:
        raise Unfit
    box = draw.choice(found)
    del box[draw.choice(sorted(box))]
    _store(path, whole)


def unknown_key(path: Path, draw: random.Random, other: Path) -> None:
    """One letter of one key."""
    whole = _load(path)
    found = [box for box in (whole, *(b[k] for b, k in _slots(whole, (dict,)))) if isinstance(box, dict) and box]
    if not found:
        raise Unfit
    box = draw.choice(found)
    old = draw.choice(sorted(box))
    box[old[:-1] + "x"] = box.pop(old)
    _store(path, whole)


def duplicate_key(path: Path, draw: random.Random, other: Path) -> None:
    """A key stands twice in one mapping; the second value is another one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        keys = [m for m in re.finditer(r'\n( *)"([^"\n]+)": ', text) if not text[: m.start()].endswith("[")]
        if not keys:
            raise Unfit
        found = draw.choice(keys)
        path.write_text(f'{text[: found.start()]}\n{found[1]}"{found[2]}": 0,{text[found.start() :]}', encoding="utf-8")
        return
    lines = text.splitlines(keepends=True)
    last = next((i for i, line in enumerate(lines[1:], 1) if line == "---\n"), len(lines))
    found = [i for i, line in enumerate(lines[:last]) if re.match(r" *[a-z_]+: *[^\s{\[|>]", line)]
    flow = [i for i, line in enumerate(lines[:last]) if re.search(r"\{[a-z_]+: [^{}]*\}", line)]
    if not found and not flow:
        raise Unfit
    i = draw.choice(found + flow)
    if i in flow:
        lines[i] = re.sub(r"\{([a-z_]+): ([^{}]*)\}", r"{\1: \2, \1: x}", lines[i], count=1)
    else:
        lines.insert(i, lines[i].partition(":")[0].replace("- ", "  ") + ": x\n" if "- " not in lines[i] else lines[i])
    if "- " in lines[i] and i not in flow:
        lines[i + 1] = lines[i + 1].replace("- ", "  ", 1)
    path.write_text("".join(lines), encoding="utf-8")


def not_an_object(path: Path, draw: random.Random, other: Path) -> None:
    _store(path, draw.choice([[], {}, 7, "text", None, [[1, 2]]]))


def _insert(path: Path, text: str, draw: random.Random) -> None:
    """Puts a raw text in the place of one value."""
    mark = "hostile-mark"
    _change(path, draw, (str, int, float, list, dict), lambda v: mark)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(f'"{mark}"', text).replace(mark, text), encoding="utf-8")


def deep(path: Path, draw: random.Random, other: Path) -> None:
    _insert(path, "[" * 50_000 + "]" * 50_000, draw)


def huge_number(path: Path, draw: random.Random, other: Path) -> None:
    """A number that no float holds, or that takes minutes to convert."""
    _insert(path, draw.choice(["1" + "0" * 400, "9" * 200_000, "1.0e+999", "-1" + "0" * 30]), draw)


def not_a_number(path: Path, draw: random.Random, other: Path) -> None:
    _insert(path, draw.choice(["NaN", "Infinity"] if path.suffix == ".json" else [".nan", ".inf"]), draw)


def alias_bomb(path: Path, draw: random.Random, other: Path) -> None:
    """A few lines of YAML that unfold to a billion entries."""
    text = path.read_text(encoding="utf-8")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    bomb = "\n".join(lines) + "\n"
    head = "---\n" if path.suffix == ".md" else ""
    path.write_text(head + bomb + text.removeprefix(head), encoding="utf-8")


# --- tables ---


def deep_line(path: Path, draw: random.Random, other: Path) -> None:
    """One line of JSON lines is nested without end."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[draw.randrange(len(lines))] = '{"image": ' + "[" * 50_000 + "]" * 50_000 + "}\n"
    path.write_text("".join(lines), encoding="utf-8")


def _cells(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]


def _write_cells(path: Path, rows: list[list[str]]) -> None:
    path.write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")


def column_twice(path: Path, draw: random.Random, other: Path) -> None:
    """Two columns of one name: which one counts?"""
    rows = _cells(path)
    i = draw.randrange(len(rows[0]))
    moved = [rows[0][i], *(row[i] for row in rows[1:][::-1])]
    _write_cells(path, [[*row, cell] for row, cell in zip(rows, moved, strict=True)])


def columns_moved(path: Path, draw: random.Random, other: Path) -> None:
    """The same table with its columns in another order."""
    rows = _cells(path)
    order = draw.sample(range(len(rows[0])), len(rows[0]))
    _write_cells(path, [[row[i] for i in order] for row in rows])


def index_column(path: Path, draw: random.Random, other: Path) -> None:
    """The unnamed first column of pandas."""
    rows = _cells(path)
    _write_cells(path, [["" if i == 0 else str(i - 1), *row] for i, row in enumerate(rows)])


def cell_missing(path: Path, draw: random.Random, other: Path) -> None:
    """One row has a cell less."""
    rows = _cells(path)
    rows[draw.randrange(1, len(rows))].pop()
    _write_cells(path, rows)


def cell_more(path: Path, draw: random.Random, other: Path) -> None:
    rows = _cells(path)
    rows[draw.randrange(1, len(rows))].append("more")
    _write_cells(path, rows)


def header_missing(path: Path, draw: random.Random, other: Path) -> None:
    _write_cells(path, _cells(path)[1:])


def open_quote(path: Path, draw: random.Random, other: Path) -> None:
    """A quote that is never closed swallows the rest."""
    rows = _cells(path)
    row = rows[draw.randrange(1, len(rows) - 1)]
    row[0] = '"' + row[0]
    _write_cells(path, rows)


def latin1(path: Path, draw: random.Random, other: Path) -> None:
    """Bytes that are no UTF-8."""
    rows = _cells(path)
    content = ",".join(rows[1]).replace("e", "é").encode("latin-1")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], content + b"\n", *lines[2:]]))


BYTES: tuple[Mutation, ...] = (flip_early, flip_anywhere, flip_late, cut, extend, zero_block, nul_tail, empty, missing)
ENTRY: tuple[Mutation, ...] = (directory, link_to_secret, dangling_link, link_to_itself, fifo, no_permission)
VALUES: tuple[Mutation, ...] = (letter, letter, letter, number, number, reorder_list, reorder_list, empty_list)
STRUCTURE: tuple[Mutation, ...] = (
    wrong_type, drop_key, unknown_key, duplicate_key, not_an_object, deep, huge_number, not_a_number,
)  # fmt: skip
TEXT: tuple[Mutation, ...] = (bom, crlf, utf16, nul_bytes)
